"""The stock client of OpenAI on the app under test, and what a job of it looks like."""

import json

from openai import OpenAI
from openai.types import FileObject

from tests.app.service import Service

ROWS = b'{"messages": [{"role": "user", "content": "Hello"}]}\n'


def client_of(service: Service, *, api_key: str = "none", max_retries: int = 0) -> OpenAI:
    """In this process; the client's own retries are switched off where none is asked for."""
    return OpenAI(
        base_url="http://localhost/v1",
        http_client=service.http,
        api_key=api_key,
        max_retries=max_retries,
    )


def upload(client: OpenAI, name: str = "rows.jsonl", rows: bytes = ROWS) -> FileObject:
    return client.files.create(file=(name, rows), purpose="fine-tune")


def row(text: str) -> bytes:
    return json.dumps({"prompt": text, "completion": text}).encode() + b"\n"
