"""A real receiver of webhooks on the loopback, which answers as it is told to."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from standardwebhooks import Webhook

from tests.faults.procs import reserve_port


@dataclass(frozen=True)
class Message:
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def type(self) -> str:
        return str(self.told["type"])

    @property
    def told(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found

    def verify(self, secret: str) -> dict[str, Any]:
        """Raises ``WebhookVerificationError``."""
        found: dict[str, Any] = Webhook(secret).verify(self.body, self.headers)
        return found


Answer = tuple[int, bytes, dict[str, str]]


@dataclass
class Receiver:
    port: int
    host: str = "127.0.0.1"
    messages: list[Message] = field(default_factory=list)
    answer: Callable[[Message], Answer] = lambda _: (204, b"", {})

    def url(self, path: str = "/hook") -> str:
        return f"http://{self.host}:{self.port}{path}"

    def answers(self, status: int, body: bytes = b"", **headers: str) -> None:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        self.answer = lambda _: (status, body, given)

    @property
    def types(self) -> list[str]:
        return [message.type for message in self.messages]

    @property
    def ids(self) -> list[str]:
        return [message.id for message in self.messages]


@contextmanager
def receiving(host: str = "127.0.0.1") -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            message = Message(self.path, headers, body)
            receiver.messages.append(message)
            status, text, more = receiver.answer(message)
            self.send_response(status)
            for name, value in more.items():
                self.send_header(name, value)
            if status != 204:
                self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False  # some are left waiting
        request_queue_size = 128

        def handle_error(self, *_: Any) -> None:
            """Clients go away as they like."""

    with reserve_port() as reserved:  # on 127.0.0.1 too, as a site's
        server = Server((host, reserved.getsockname()[1]), Handler)
        receiver = Receiver(server.server_port, host)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield receiver
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
