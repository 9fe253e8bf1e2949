"""What a message may hold besides its role and content, and rows that are no messages."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.worker.training.conftest import chat, make_tokenizer
from tests.worker.training.data.kept import read
from tests.worker.training.data.test_rows import answered, calls, problem
from worker.training.config import Data, DataFile
from worker.training.data.conversations import Conversation
from worker.training.data.rendering import Renderer
from worker.training.errors import ConfigInvalid

Write = Callable[..., DataFile]


class TestMessages:
    def test_an_answer_of_weight_0_is_context(self, data_file: Write) -> None:
        question, answer = chat("Q", "A")["messages"]
        row = {
            "messages": [question, {**answer, "weight": 0}, question, {**answer, "weight": 1.0}],
            "parallel_tool_calls": False,
        }
        (found,) = read(data_file([row]), Data()).conversations
        assert found == Conversation([question, answer] * 2, context=frozenset({1}))

    def test_a_weight_does_not_make_a_row_another_one(self, data_file: Write) -> None:
        rows = [answered(), answered(weight=1)]
        one, other = read(data_file(rows), Data()).conversations
        assert one.canonical() == other.canonical()

    def test_weights_of_a_completion_count_from_its_begin(self, data_file: Write) -> None:
        question, answer = chat("Q", "A")["messages"]
        turns = [{**answer, "weight": 0}, question, answer]
        row = {"prompt": [question, answer, question], "completion": turns}
        (found,) = read(data_file([row]), Data()).conversations
        assert found.context == {1, 3}

    def test_the_developer_is_the_system(self, data_file: Write) -> None:
        row = {"messages": [{"role": "developer", "content": "x"}, *chat("Q", "A")["messages"]]}
        (found,) = read(data_file([row]), Data()).conversations
        assert found.messages[0] == {"role": "system", "content": "x"}

    def test_reasoning_stays_beside_the_answer(self, data_file: Write) -> None:
        (found,) = read(data_file([answered(reasoning_content="Hm.")]), Data()).conversations
        assert found.messages[1]["reasoning_content"] == "Hm."

    @pytest.mark.parametrize("arguments", ['{"x": {"y": 1}}', {"x": {"y": 1}}])
    def test_arguments_of_a_call_are_values(self, data_file: Write, arguments: Any) -> None:
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
        (found,) = read(data_file([calls([call])]), Data()).conversations
        function = found.messages[1]["tool_calls"][0]["function"]
        assert function == {"name": "f", "arguments": {"x": {"y": 1}}}

    def test_a_function_call_of_sharegpt_is_a_tool_call(self, data_file: Write) -> None:
        value = '{"name": "f", "arguments": {"x": 1}}'
        turns = [
            {"from": "human", "value": "Q"},
            {"from": "function_call", "value": value},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "A"},
        ]
        (found,) = read(data_file([{"conversations": turns}]), Data()).conversations
        assert [message["role"] for message in found.messages] == [
            "user",
            "assistant",
            "tool",
            "assistant",
        ]
        assert found.messages[1]["content"] == ""
        function = {"name": "f", "arguments": {"x": 1}}
        assert found.messages[1]["tool_calls"] == [{"type": "function", "function": function}]

    @pytest.mark.parametrize(
        ("value", "words"),
        [
            ("f()", "conversations[1].value: expected the JSON of an object with name and arg"),
            ('{"name": 1}', "conversations[1].value[0].name: expected a string, found the number"),
        ],
    )
    def test_a_function_call_of_sharegpt_that_is_none_is_named(
        self, data_file: Write, value: str, words: str
    ) -> None:
        turns = [{"from": "human", "value": "Q"}, {"from": "function_call", "value": value}]
        assert words in problem(data_file, [{"conversations": turns}])


class TestText:
    def test_it_is_read_where_it_is_asked_for(self, data_file: Write) -> None:
        found = read(data_file([{"text": "Once.", "id": 1}]), Data(format="text"))
        assert found.format == "text"
        assert found.conversations == [Conversation([], text="Once.")]

    def test_it_is_not_recognised(self, data_file: Write) -> None:
        message = problem(data_file, [{"text": "Once."}])
        assert "or text, where data.format asks for it, found text" in message

    def test_its_column_may_have_another_name(self, data_file: Write) -> None:
        options = Data(format="text", mapping={"text": "body"})
        (found,) = read(data_file([{"body": "Once."}]), options).conversations
        assert found.text == "Once."

    def test_a_name_that_only_text_has_is_not_renamed_unasked(self, data_file: Write) -> None:
        with pytest.raises(ConfigInvalid, match="renames to text, which no format reads"):
            read(data_file([{"body": "Once."}]), Data(mapping={"text": "body"}))

    @pytest.mark.parametrize("text", ["", " ", None, ["x"], "a\0"])
    def test_what_is_no_text_is_named(self, data_file: Write, text: Any) -> None:
        assert "line 1: text: expected " in problem(data_file, [{"text": text}], format="text")


def test_a_weight_of_a_sharegpt_answer_counts(data_file: Write) -> None:
    turns = [
        {"from": "human", "value": "Hello"},
        {"from": "gpt", "value": "BAD", "weight": 0},
        {"from": "human", "value": "Again"},
        {"from": "gpt", "value": "good", "weight": 1},
    ]
    row = {"system": "Be kind.", "conversations": turns}
    renderer = Renderer(make_tokenizer(), "assistant")
    (example,) = read(data_file([row]), Data(), renderer).examples
    learnt = [part["text"] for part in renderer.segments(example) if part["in_loss"]]
    assert learnt == ["good<|im_end|>"]


def test_tools_that_the_template_does_not_read_are_refused(data_file: Write) -> None:
    row = chat("Hello", "Hi") | {"tools": [{"type": "function", "function": {"name": "weather"}}]}
    with pytest.raises(ConfigInvalid, match="it has tools, which the chat template does not read"):
        read(data_file([row]), Data(), Renderer(make_tokenizer(), "assistant"))


def test_a_tool_may_have_nothing_to_say(data_file: Write) -> None:
    call = {"type": "function", "function": {"name": "touch", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Touch it"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": "Done"},
    ]
    assert len(read(data_file([{"messages": messages}]), Data()).conversations) == 1
