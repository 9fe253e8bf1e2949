"""Every row is read or named with its place, whatever its shape."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.worker.training.conftest import ROWS, chat
from tests.worker.training.data.kept import read
from worker.training.config import Data, DataFile
from worker.training.data.conversations import Conversation
from worker.training.errors import ConfigInvalid, DatasetInvalid

Write = Callable[..., DataFile]

FIVE = ROWS[:5]
GOOD = json.dumps(chat("Hello", "Hi")).encode()


def problem(
    write: Write, content: bytes | list[Any], filename: str = "rows.jsonl", **data: Any
) -> str:
    with pytest.raises(DatasetInvalid) as caught:
        read(write(content, filename), Data(**data))
    return caught.value.message


BAD_LINES: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"{oops}", "not JSON: Expecting property name"),
    "no object": (b"[1]", "expected an object, found a list of 1"),
    "NaN": (b'{"messages": NaN}', "NaN is not JSON"),
    "no UTF-8": (b'{"messages": "\xff"}', "not UTF-8: byte 0xff at column 15"),
    "too deep": (b"[" * 100_000, "nested too deeply"),
    "too long": (b'"' + b"x" * (1 << 20) + b'"', "longer than 1,048,576 bytes"),
}


def calls(tool_calls: Any) -> dict[str, Any]:
    answer = {"role": "assistant", "content": "", "tool_calls": tool_calls}
    return {"messages": [{"role": "user", "content": "x"}, answer]}


def answered(**more: Any) -> dict[str, Any]:
    question, answer = chat("Q", "A")["messages"]
    return {"messages": [question, {**answer, **more}]}


def nested(depth: int) -> dict[str, Any]:
    return {"a": nested(depth - 1)} if depth else {}


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
    "half a character": (
        chat("Hello", "ha\ud83d"),
        "messages[1].content: expected valid Unicode text, found the lone surrogate U+D83D at "
        "character 3",
    ),
    "a NUL": (
        chat("\0", "Hi"),
        "messages[0].content: expected valid Unicode text, found the character U+0000",
    ),
    "half a character in an argument": (
        calls([{"function": {"name": "f", "arguments": {"x": ["\udc00"]}}}]),
        "messages[1].tool_calls[0].function.arguments.x[0]: expected valid Unicode text",
    ),
    "half a character in a field's name": (
        calls([{"\ud83d": 1}]),
        "messages[1].tool_calls[0]: expected valid Unicode text",
    ),
    "half a character in a tool": (
        {**chat("Hello", "Hi"), "tools": [{"name": "\ud83d"}]},
        "tools[0].name: expected valid Unicode text",
    ),
    "tool calls that are none": (
        calls(5),
        "messages[1].tool_calls: expected a list of objects, found the number 5",
    ),
    "a tool call that is none": (
        calls(["f()"]),
        "messages[1].tool_calls: expected a list of objects, found a list of 1",
    ),
    "deep arguments": (
        calls([nested(80)]),
        "messages[1].tool_calls[0].a.a.a",
    ),
    "a tool that is none": (
        {**chat("Hello", "Hi"), "tools": ["f"]},
        "tools: expected a list of objects, found a list of 1",
    ),
    "a name that is none": (
        {"messages": [{"role": "user", "content": "x", "name": 5}]},
        "messages[0].name: expected a string, found the number 5",
    ),
    "a weight between": (
        answered(weight=0.5),
        "messages[1].weight: expected 0 (context) or 1 (learnt), found the number 0.5",
    ),
    "a weight that is no number": (
        answered(weight=True),
        "messages[1].weight: expected 0 (context) or 1 (learnt), found true",
    ),
    "no weight at all": (
        answered(weight=0),
        "messages: expected an assistant turn to learn from, found weight 0 on each",
    ),
    "reasoning that is no text": (
        answered(reasoning_content=["x"]),
        "messages[1].reasoning_content: expected a string, found a list of 1",
    ),
    "a user who reasons": (
        {"messages": [{"role": "user", "content": "x", "reasoning_content": "y"}]},
        "messages[0]: expected only the fields content, name, role, tool_call_id, tool_calls, "
        "found reasoning_content",
    ),
    "arguments that are no JSON": (
        calls([{"function": {"name": "f", "arguments": "x = 1"}}]),
        "messages[1].tool_calls[0].function.arguments: expected the JSON of an object, found the "
        "string 'x = 1'",
    ),
    "arguments without names": (
        calls([{"function": {"name": "f", "arguments": "[1]"}}]),
        "messages[1].tool_calls[0].function.arguments: expected the JSON of an object, found a "
        "list of 1",
    ),
    "half a character in arguments of text": (
        calls([{"function": {"name": "f", "arguments": '{"x": "\\ud83d"}'}}]),
        "messages[1].tool_calls[0].function.arguments.x: expected valid Unicode text",
    ),
    "an infinite argument": (
        calls([{"function": {"name": "f", "arguments": '{"x": 1e999}'}}]),
        "messages[1].tool_calls[0].function.arguments.x: expected a number that JSON has, found "
        "the number inf",
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
        assert "1 of 3 rows of file:rows.jsonl cannot be used: line 3: " in message
        assert words in message

    def test_a_bad_row_is_named_by_field(self, data_file: Write) -> None:
        rows = [row for row, _ in BAD_ROWS.values()]
        found = read(data_file([*FIVE, *rows]), Data(max_bad_rows=len(rows)))
        assert len(found.bad_rows) == len(rows)
        for number, (bad, (_, words)) in enumerate(
            zip(found.bad_rows, BAD_ROWS.values(), strict=True), 6
        ):
            assert str(bad).startswith(f"line {number}: {words}")

    def test_some_may_be_allowed_and_are_kept_for_the_report(self, data_file: Write) -> None:
        rows = [*FIVE, {"messages": []}]
        found = read(data_file(rows), Data(max_bad_rows=1))
        assert len(found.conversations) == 5
        assert [bad.place for bad in found.bad_rows] == ["line 6"]
        assert "2 of 7" in problem(data_file, [*rows, {"messages": 1}], max_bad_rows=1)

    def test_all_are_counted_and_the_first_thousand_kept(self, data_file: Write) -> None:
        rows = [*FIVE, *[{"messages": []}] * 1500, *FIVE]
        found = read(data_file(rows), Data(max_bad_rows=1500))
        assert (found.rows, found.bad, len(found.bad_rows)) == (1510, 1500, 1000)
        assert found.bad_rows[-1].place == "line 1005"
        assert "1500 of 1510 rows" in problem(data_file, rows, max_bad_rows=1499)

    def test_reading_ends_where_far_too_many_are_bad(self, data_file: Write) -> None:
        message = problem(data_file, [*FIVE, *[{"messages": []}] * 2000], max_bad_rows=9)
        assert message.startswith("At least 1,010 rows of file:rows.jsonl cannot be used: line 6: ")
        assert message.endswith("; and 1,005 more.")

    def test_only_the_first_are_shown(self, data_file: Write) -> None:
        message = problem(data_file, [*FIVE, *[{"messages": []}] * 9])
        assert message.count("line ") == 5
        assert "and 4 more" in message

    @pytest.mark.parametrize(
        "row",
        [
            {"\ud83d\0\x1b[31m": "x"},
            {"messages": "\ud83d\0\x1b[31m" * 99},
            {"messages": {"\ud83d\0\x1b[31m" * 99: 1}},
            {"messages": [{"role": "\ud83d\0"}]},
            {"messages": [{"role": "user", "content": "x", "\ud83d\0": 1}]},
            {**chat("Hello", "Hi"), "tools": [{"\0" * 99: "\0"}]},
            {"conversations": [{"from": "\ud83d\0", "value": "x"}]},
            {f"column {n}": 1 for n in range(999)},
        ],
    )
    def test_what_is_said_of_a_row_is_short_and_printable(
        self, data_file: Write, row: dict[str, Any]
    ) -> None:
        message = problem(data_file, [row])
        assert message.isprintable()
        assert len(message) < 600

    def test_a_completion_of_messages_holds_an_answer(self, data_file: Write) -> None:
        row = {
            "prompt": chat("Q", "A")["messages"],
            "completion": [{"role": "user", "content": "x"}],
        }
        message = problem(data_file, [row])
        assert "completion: expected an assistant turn to learn from, found user" in message

    def test_a_csv_row_is_named_by_the_line_on_which_it_begins(self, data_file: Write) -> None:
        content = b'instruction,output\na,b\n\n\n"two\nlines",x\nc,\n'
        assert "line 7: output" in problem(data_file, content, "rows.csv")

    def test_a_csv_line_that_is_not_utf_8_is_named(self, data_file: Write) -> None:
        content = b"instruction,output\na,b\nc,\xe9\n"
        assert "at line 3" in problem(data_file, content, "rows.csv")

    def test_a_csv_field_may_be_as_long_as_a_line_of_jsonl(self, data_file: Write) -> None:
        content = b"instruction,output\n" + b"a" * 500_000 + b",b\n"
        assert read(data_file(content, "rows.csv"), Data()).rows == 1

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

    def test_a_mapped_column_wins_over_one_of_the_expected_name(self, data_file: Write) -> None:
        rows = [{"question": "Q", "prompt": 7, "completion": "A"}]
        found = read(data_file(rows), Data(mapping={"prompt": "question"}))
        assert found.conversations == [Conversation(chat("Q", "A")["messages"])]

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({}, "renames to promt, which no format reads"),
            ({"format": "chat"}, "renames to promt, which the format chat does not read"),
        ],
    )
    def test_a_mapping_to_a_name_that_nothing_reads_is_refused(
        self, data_file: Write, options: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(ConfigInvalid, match=words) as caught:
            read(data_file(FIVE), Data(mapping={"promt": "question"}, **options))
        assert "messages" in str(caught.value.hint)

    def test_a_mapping_from_a_column_that_no_row_has_is_refused(self, data_file: Write) -> None:
        rows = [{"question": "Q", "completion": "A"}]
        with pytest.raises(ConfigInvalid, match="names qestion, which no row of") as caught:
            read(data_file(rows), Data(mapping={"prompt": "qestion"}))
        assert caught.value.hint == "Its rows have completion, question."

    def test_a_row_without_a_mapped_column_is_bad(self, data_file: Write) -> None:
        rows = [{"question": "Q", "completion": "A"}, {"completion": "A"}]
        message = problem(data_file, rows, mapping={"prompt": "question"})
        assert "line 2: prompt: expected the column question (data.mapping), found only" in message

    def test_answers_in_a_prompt_of_messages_are_context(self, data_file: Write) -> None:
        row = {
            "prompt": [*chat("1", "2")["messages"], {"role": "user", "content": "Q"}],
            "completion": [{"role": "assistant", "content": "A"}],
        }
        (conversation,) = read(data_file([row]), Data()).conversations
        assert conversation.context == {1}

    def test_unknown_columns_are_listed(self, data_file: Write) -> None:
        message = problem(data_file, [{"text": "x", "id": 1}])
        assert "line 1: columns: expected one of: messages;" in message
        assert "found text, id" in message

    def test_rows_of_another_format_than_the_first_are_bad(self, data_file: Write) -> None:
        message = problem(data_file, [chat("Q", "A"), {"prompt": "Q", "completion": "A"}])
        assert (
            "line 2: messages: expected a column of chat, found only prompt, completion" in message
        )
