"""What crosses the pipe can be kept by every database and read by every client."""

import json
import math
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.pipe import Message, PipeReporter, read_messages

anything: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def sent(report: Any) -> Message:
    """A report after its way through a real pipe."""
    reading, writing = os.pipe()
    reporter = PipeReporter(writing)
    reporter.preflight({"report": report})
    reporter._pipe.close()
    (message,) = read_messages(reading)
    found: Message = message["report"]["report"]
    return found


@given(anything)
def test_whatever_a_row_holds_the_message_is_plain(value: Any) -> None:
    text = json.dumps(sent(value), ensure_ascii=False, allow_nan=False)
    assert "\\u0000" not in text
    text.encode()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a\ud800b", "a\\ud800b"),
        ("a\0b", "a\\0b"),
        (math.nan, None),
        ([math.inf, 1.5], [None, 1.5]),
        ({"\udfff": "Zürich 🙂"}, {"\\udfff": "Zürich 🙂"}),
    ],
)
def test_what_cannot_be_kept_is_written_out(value: Any, expected: Any) -> None:
    assert sent(value) == expected


def test_half_a_line_of_a_trainer_that_was_killed_is_not_read() -> None:
    reading, writing = os.pipe()
    os.write(writing, b'{"kind": "phase", "name": "training"}\n{"kind": "st')
    os.close(writing)
    assert list(read_messages(reading)) == [{"kind": "phase", "name": "training"}]
