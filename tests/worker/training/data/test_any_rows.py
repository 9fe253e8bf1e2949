"""Whatever JSON a row holds, it is read or named; nothing else happens."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worker.training.conftest import MARKED, UNMARKED, make_tokenizer
from tests.worker.training.data.kept import read
from worker.training.config import Data, DataFile
from worker.training.data.conversations import RowFormat, known_columns
from worker.training.data.messages import ROLES
from worker.training.data.rendering import Renderer
from worker.training.errors import JobError

FORMATS = ("auto", *get_args(RowFormat))
NAMES = [*known_columns(None), "role", "content", "name", "tool_calls", "from", "value", "type"]

texts = st.one_of(
    st.text(st.characters(exclude_categories=[]), max_size=8),
    st.sampled_from([*ROLES, "human", "gpt", "text", "<|im_end|>", "\0", "\ud83d", ""]),
)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(NAMES) | texts, inner, max_size=4)
    ),
    max_leaves=12,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(ROLES) | values, "content": texts | values},
        optional={"tool_calls": values, "name": values, "tool_call_id": values},
    ),
    max_size=4,
)
turns = st.lists(
    st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]) | values, "value": values}),
    max_size=4,
)
said = st.sampled_from(["Hi", "<|im_end|>", " \u00e9\U0001f600"])
calls = st.lists(st.dictionaries(st.sampled_from(NAMES) | texts, values, max_size=2), max_size=2)
answered = st.builds(
    lambda question, answer, more, tools: {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer, **more},
        ],
        "tools": tools,
    },
    said,
    said,
    st.fixed_dictionaries({}, optional={"tool_calls": calls, "name": texts}),
    st.none() | calls | values,
)
rows = (
    answered
    | values
    | st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(NAMES, values),
            "messages": messages | values,
            "conversations": turns | values,
            "prompt": messages | texts,
            "completion": messages | texts,
        },
    )
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows") / "rows.jsonl"


@pytest.fixture(scope="module", params=[MARKED, UNMARKED])
def renderer(request: pytest.FixtureRequest) -> Renderer:
    shown = "{{ m.tool_calls | tojson if m.tool_calls }}{{ m.name | trim }}{{ m['content'] }}"
    template = request.param.replace("{{ m['content'] }}", shown)
    return Renderer(make_tokenizer(template), "assistant")


@settings(max_examples=15, deadline=None)
@given(data=st.lists(rows, min_size=1, max_size=12), format_=st.sampled_from(FORMATS))
def test_any_row_is_used_or_named(
    path: Path, renderer: Renderer, data: list[Any], format_: Any
) -> None:
    path.write_text("\n".join(map(json.dumps, data)))
    file = DataFile("file:rows.jsonl", path, path.name, "")
    said = used_or_named(file, Data(format=format_, max_bad_rows=10**9), renderer, len(data))
    assert all(text.isprintable() and len(text) < 3000 for text in said)


def used_or_named(file: DataFile, options: Data, renderer: Renderer, rows: int) -> list[str]:
    """What is said of the rows."""
    try:
        found = read(file, options, renderer)
    except JobError as error:
        return [error.message, str(error.hint)]
    assert found.rows == rows
    assert len(found.examples) == len(found.conversations)
    assert all(row.canonical().encode() for row in found.conversations)
    return list(map(str, found.bad_rows))
