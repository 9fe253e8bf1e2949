"""Every row is read or named with its place, whatever the file."""

import gzip
import io
import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.worker.training.conftest import ROWS, chat
from worker.training.config import Data, DataFile
from worker.training.conversations import Conversation
from worker.training.dataset import read
from worker.training.errors import DatasetInvalid

Write = Callable[..., DataFile]

FIVE = ROWS[:5]
GOOD = json.dumps(chat("Hello", "Hi")).encode()

FILES: dict[str, Callable[[], bytes]] = {
    "rows.jsonl": lambda: b"\n".join(json.dumps(row).encode() for row in FIVE),
    "rows.json": lambda: json.dumps(FIVE).encode(),
    "rows.parquet": lambda: parquet(FIVE),
}
COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
}


def parquet(rows: list[Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def problem(
    write: Write, content: bytes | list[Any], filename: str = "rows.jsonl", **data: Any
) -> str:
    with pytest.raises(DatasetInvalid) as caught:
        read(write(content, filename), Data(**data))
    return caught.value.message


class TestFiles:
    @pytest.mark.parametrize("suffix", COMPRESSED)
    @pytest.mark.parametrize("filename", FILES)
    def test_each_type_and_compression_gives_the_same_conversations(
        self, data_file: Write, filename: str, suffix: str
    ) -> None:
        content = COMPRESSED[suffix](FILES[filename]())
        found = read(data_file(content, filename + suffix), Data())
        assert found.conversations == [Conversation(row["messages"]) for row in FIVE]
        assert found.source.type == filename.removeprefix("rows.")

    @pytest.mark.parametrize("suffix", COMPRESSED)
    def test_csv_holds_prompts_and_completions(self, data_file: Write, suffix: str) -> None:
        content = b'\xef\xbb\xbfprompt,completion\n"two\nlines","says ""hi"""\nplain,answer\n'
        found = read(data_file(COMPRESSED[suffix](content), "rows.csv" + suffix), Data())
        assert found.format == "prompt_completion"
        assert found.conversations[0].messages[0]["content"] == "two\nlines"
        assert found.conversations[0].messages[1]["content"] == 'says "hi"'

    def test_lines_that_are_named_as_an_array_are_recognised(self, data_file: Write) -> None:
        assert read(data_file(FILES["rows.jsonl"](), "rows.json"), Data()).source.type == "jsonl"

    def test_a_name_without_a_type_is_recognised_by_its_content(self, data_file: Write) -> None:
        assert read(data_file(FILES["rows.parquet"](), "upload"), Data()).source.type == "parquet"

    @pytest.mark.parametrize(
        ("content", "filename", "words"),
        [
            (b"", "rows.jsonl", "is empty"),
            (b" \n \n", "rows.jsonl", "is empty"),
            (b"hello", "rows", "none of JSONL, a JSON array, CSV and Parquet"),
            (b"[1,", "rows.json", "not a JSON array"),
            (b"PAR1 and nothing more", "rows.parquet", "Parquet file cannot be read"),
            (b"PAR1", "rows.jsonl", "named as jsonl and begins like parquet"),
            (b"no gzip", "rows.jsonl.gz", "is not gzip"),
            (gzip.compress(GOOD * 9000)[:-40], "rows.jsonl.gz", "cannot be decompressed"),
            (b'prompt,completion\n"open', "rows.csv", "cannot be read after line 1"),
        ],
    )
    def test_a_file_that_cannot_be_read_says_why(
        self, data_file: Write, content: bytes, filename: str, words: str
    ) -> None:
        assert words in problem(data_file, content, filename)


BAD_LINES: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"{oops}", "not JSON: Expecting property name"),
    "no object": (b"[1]", "expected an object, found a list of 1"),
    "NaN": (b'{"messages": NaN}', "NaN is not JSON"),
    "no UTF-8": (b'{"messages": "\xff"}', "not UTF-8: byte 0xff at column 15"),
    "too deep": (b"[" * 100_000, "nested too deeply"),
    "too long": (b'"' + b"x" * (1 << 20) + b'"', "longer than 1,048,576 bytes"),
}

BAD_ROWS: dict[str, tuple[Any, str]] = {
    "no messages": ({"messages": []}, "messages: expected a list of messages, found an empty list"),
    "no list": ({"messages": "hi"}, "messages: expected a list of messages, found the string 'hi'"),
    "a missing column": ({"text": "x"}, "messages: expected a column of chat, found only text"),
    "no object inside": ({"messages": ["hi"]}, "messages[0]: expected an object with role"),
    "an unknown role": (
        {"messages": [{"role": "bot", "content": "x"}]},
        "messages[0].role: expected one of system, user, assistant, tool, found the string 'bot'",
    ),
    "no content": (
        chat("Hello", None),  # type: ignore[arg-type]
        "messages[1].content: expected a non-empty string, found null",
    ),
    "an empty answer": (
        chat("Hello", ""),
        "messages[1].content: expected a non-empty string, found an empty string",
    ),
    "no answer": (
        {"messages": [{"role": "user", "content": "x"}]},
        "messages: expected an assistant turn to learn from, found user",
    ),
    "an unknown field": (
        {"messages": [{"role": "user", "content": "x", "weight": 0}]},
        "messages[0]: expected only the fields content, name, role, tool_call_id, tool_calls, "
        "found weight",
    ),
    "a late system turn": (
        {"messages": [*chat("a", "b")["messages"], {"role": "system", "content": "x"}]},
        "messages[2].role: expected system only at the start",
    ),
    "an answer first": (
        {"messages": [{"role": "assistant", "content": "x"}]},
        "messages: expected a user turn before the first answer, found assistant",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0]: expected a text part",
    ),
}


class TestBadRows:
    @pytest.mark.parametrize("name", BAD_LINES)
    def test_a_bad_line_is_named(self, data_file: Write, name: str) -> None:
        line, words = BAD_LINES[name]
        message = problem(data_file, GOOD + b"\n\n" + line + b"\n" + GOOD)
        assert "1 of 3 rows cannot be used: line 3: " in message
        assert words in message

    @pytest.mark.parametrize("name", BAD_ROWS)
    def test_a_bad_row_is_named_by_field(self, data_file: Write, name: str) -> None:
        row, words = BAD_ROWS[name]
        message = problem(data_file, [*FIVE, row, *FIVE])
        assert f"line 6: {words}" in message

    def test_some_may_be_allowed_and_are_kept_for_the_report(self, data_file: Write) -> None:
        rows = [*FIVE, {"messages": []}]
        found = read(data_file(rows), Data(max_bad_rows=1))
        assert len(found.conversations) == 5
        assert [bad.place for bad in found.bad_rows] == ["line 6"]
        assert "2 of 7" in problem(data_file, [*rows, {"messages": 1}], max_bad_rows=1)

    def test_only_the_first_are_shown(self, data_file: Write) -> None:
        message = problem(data_file, [*FIVE, *[{"messages": []}] * 9])
        assert message.count("line ") == 5
        assert "and 4 more" in message

    def test_a_csv_line_of_the_wrong_width_is_named(self, data_file: Write) -> None:
        content = b'prompt,completion\n"a\nb",c\nd\n'
        assert "line 4: expected 2 fields" in problem(data_file, content, "rows.csv")


class TestFormats:
    @pytest.mark.parametrize(
        ("row", "name"),
        [
            (
                {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
                "sharegpt",
            ),
            ({"instruction": "Q", "input": "", "output": "A"}, "alpaca"),
            ({"prompt": "Q", "completion": "A"}, "prompt_completion"),
            (
                {
                    "prompt": [{"role": "user", "content": "Q"}],
                    "completion": [{"role": "assistant", "content": "A"}],
                },
                "prompt_completion",
            ),
            (chat("Q", "A"), "chat"),
        ],
    )
    def test_each_is_recognised_and_means_the_same(
        self, data_file: Write, row: dict[str, Any], name: str
    ) -> None:
        found = read(data_file([row]), Data())
        assert found.format == name
        assert found.conversations == [Conversation(chat("Q", "A")["messages"])]

    def test_alpaca_puts_the_input_under_the_instruction(self, data_file: Write) -> None:
        found = read(data_file([{"instruction": "Sum", "input": "1 2", "output": "3"}]), Data())
        assert found.conversations[0].messages[0]["content"] == "Sum\n\n1 2"

    def test_columns_may_have_other_names(self, data_file: Write) -> None:
        mapping = {"prompt": "question", "completion": "answer"}
        rows = [{"question": "Q", "answer": "A", "id": 3}]
        assert read(data_file(rows), Data(mapping=mapping)).format == "prompt_completion"

    def test_unknown_columns_are_listed(self, data_file: Write) -> None:
        message = problem(data_file, [{"text": "x", "id": 1}])
        assert "line 1: columns: expected one of: messages;" in message
        assert "found text, id" in message

    def test_rows_of_another_format_than_the_first_are_bad(self, data_file: Write) -> None:
        message = problem(data_file, [chat("Q", "A"), {"prompt": "Q", "completion": "A"}])
        assert (
            "line 2: messages: expected a column of chat, found only prompt, completion" in message
        )
