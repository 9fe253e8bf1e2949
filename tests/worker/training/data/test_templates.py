"""In the templates of all families the answers are found exactly, with their end of turn."""

from dataclasses import replace
from typing import Any

import pytest
from tokenizers import AddedToken

from tests.worker.training.conftest import chat
from tests.worker.training.data.families import FAMILIES, TODAY
from worker.training.data.conversations import Conversation
from worker.training.data.messages import Message
from worker.training.data.rendering import LossOn, Renderer, RowRefused

TWO_TURNS = [*chat("Hi", "Hello!\n\nYou?")["messages"], *chat("Bye", "Ciao")["messages"]]
SYSTEM = {"role": "system", "content": "Be brief."}

TOOLS = [{"type": "function", "function": {"name": "f", "description": "Does it."}}]
CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
}
STEPS = [TWO_TURNS[0], CALL, {"role": "tool", "content": "42"}, TWO_TURNS[1]]


def learnt(
    family: str, talk: Conversation | list[Message], loss_on: LossOn = "assistant"
) -> list[str]:
    renderer = FAMILIES[family].renderer(loss_on)
    example = renderer.render(talk if isinstance(talk, Conversation) else Conversation(talk))
    assert renderer.learns_to_stop(example)
    return [piece["text"] for piece in renderer.segments(example) if piece["in_loss"]]


@pytest.mark.parametrize("name", FAMILIES)
class TestFamilies:
    def test_each_answer_and_its_end_of_turn_is_learnt_and_no_more(self, name: str) -> None:
        family = FAMILIES[name]
        first, second = (f"{family.lead}{text}{family.end}" for text in ("Hello!\n\nYou?", "Ciao"))
        assert learnt(name, TWO_TURNS) == [first, family.think + second]
        assert learnt(name, TWO_TURNS[:2]) == [family.think + first]
        assert learnt(name, TWO_TURNS, "last_assistant") == [family.think + second]

    def test_any_of_them_may_be_context(self, name: str) -> None:
        talk, answers = Conversation(TWO_TURNS), learnt(name, TWO_TURNS)
        assert learnt(name, replace(talk, context=frozenset({1}))) == answers[1:]
        assert learnt(name, replace(talk, context=frozenset({3}))) == answers[:1]

    def test_a_system_turn_is_context_or_refused(self, name: str) -> None:
        messages = [SYSTEM, *TWO_TURNS]
        if not FAMILIES[name].system:
            with pytest.raises(RowRefused, match="System role not supported"):
                learnt(name, messages)
            return
        assert learnt(name, messages) == learnt(name, TWO_TURNS)
        renderer = FAMILIES[name].renderer()
        pieces = renderer.segments(renderer.render(Conversation(messages)))
        assert not pieces[0]["in_loss"]
        assert "Be brief." in pieces[0]["text"]

    def test_the_first_token_of_an_answer_is_where_the_prompt_ends(self, name: str) -> None:
        renderer = FAMILIES[name].renderer()
        before = renderer.segments(renderer.render(Conversation(TWO_TURNS[:2])))[0]["text"]
        assert before == renderer._apply(Conversation(TWO_TURNS[:1]), prompt=True)

    def test_a_row_is_shown_as_the_template_renders_it(self, name: str) -> None:
        renderer = FAMILIES[name].renderer()
        shown = renderer.segments(renderer.render(Conversation(TWO_TURNS)))
        assert "".join(piece["text"] for piece in shown) == renderer._apply(Conversation(TWO_TURNS))

    def test_special_tokens_in_the_data_stay_text(self, name: str) -> None:
        family, renderer = FAMILIES[name], FAMILIES[name].renderer()
        spelt = "".join([family.bos, family.eos, family.end, "<|im_start|>", *family.special])
        plain = renderer.render(Conversation(chat("Q", "A")["messages"]))
        example = renderer.render(Conversation(chat(f"Q{spelt}", f"A{spelt}")["messages"]))
        special = list(renderer._special)
        assert [i for i in example.ids if i in special] == [i for i in plain.ids if i in special]
        pieces = renderer.segments(example)
        expected = f"{family.lead}{family.think}A{spelt}{family.end}"
        assert [piece["text"] for piece in pieces if piece["in_loss"]] == [expected]

    def test_calls_of_tools_are_learnt_and_their_results_are_not(self, name: str) -> None:
        family = FAMILIES[name]
        talk = Conversation(STEPS, TOOLS)
        if family.call is None:
            with pytest.raises(RowRefused, match="has tool_calls, which the chat template does"):
                learnt(name, talk)
            return
        answer = f"{family.lead}{family.think}Hello!\n\nYou?{family.end}"
        assert learnt(name, talk) == [family.call + family.end, answer]
        renderer = family.renderer()
        shown = renderer.segments(renderer.render(talk))
        assert "Does it." in shown[0]["text"]
        assert "42" in shown[2]["text"]


class TestReasoning:
    """Qwen 3 shows the reasoning since the last question, and leaves out what was before."""

    @staticmethod
    def reasoned(text: str, answer: str) -> list[Message]:
        return [{"role": "assistant", "content": answer, "reasoning_content": text}]

    @pytest.mark.parametrize("is_inside", [False, True])
    def test_that_of_earlier_answers_is_left_out_and_that_of_the_last_is_learnt(
        self, is_inside: bool
    ) -> None:
        first, second = (
            [{"role": "assistant", "content": f"<think>\n{text}\n</think>\n\n{answer}"}]
            if is_inside
            else self.reasoned(text, answer)
            for text, answer in (("Hm </b>", "Hello!"), ("Well", "Ciao"))
        )
        messages = [TWO_TURNS[0], *first, TWO_TURNS[2], *second]
        assert learnt("qwen 3", messages) == [
            "Hello!<|im_end|>",
            "<think>\nWell\n</think>\n\nCiao<|im_end|>",
        ]

    def test_that_between_calls_of_tools_is_learnt(self) -> None:
        call = {**CALL, "reasoning_content": "Let me see."}
        messages = [STEPS[0], call, STEPS[2], *self.reasoned("So.", "42")]
        first, second = learnt("qwen 3", Conversation(messages, TOOLS))
        assert first.startswith("<think>\nLet me see.\n</think>\n\n<tool_call>")
        assert second == "<think>\nSo.\n</think>\n\n42<|im_end|>"

    def test_a_template_that_does_not_read_it_refuses_it(self) -> None:
        messages = [TWO_TURNS[0], *self.reasoned("Hm", "Hello!")]
        with pytest.raises(RowRefused, match="reasoning_content, which the chat template does not"):
            learnt("qwen 2.5", messages)


def test_llama_is_told_the_date_of_the_job() -> None:
    renderer = FAMILIES["llama 3.1"].renderer()
    example = renderer.render(Conversation(TWO_TURNS))
    assert f"Today Date: {TODAY:%d %b %Y}\n" in renderer.segments(example)[0]["text"]


@pytest.mark.parametrize("name", ["mistral", "gemma 3"])
def test_two_user_turns_in_a_row_are_refused(name: str) -> None:
    with pytest.raises(
        RowRefused, match="user, user, assistant: Conversation roles must alternate"
    ):
        learnt(name, [TWO_TURNS[0], *TWO_TURNS[:2]])


def test_several_calls_at_once_are_refused_by_llama() -> None:
    calls: Any = CALL["tool_calls"]
    messages = [STEPS[0], {**CALL, "tool_calls": calls * 2}, *STEPS[2:]]
    with pytest.raises(RowRefused, match="only supports single tool-calls at once"):
        learnt("llama 3.1", Conversation(messages, TOOLS))


def test_tools_that_move_with_the_last_question_are_refused_in_long_conversations() -> None:
    with pytest.raises(RowRefused, match="otherwise once later turns follow"):
        learnt("mistral with tools", Conversation([*STEPS, *TWO_TURNS[2:]], TOOLS))


def test_a_special_token_that_takes_in_blanks_does_not_reach_into_the_answer() -> None:
    family = FAMILIES["phi 3"]
    tokenizer = replace(family, special=()).tokenizer()
    tokenizer.add_tokens([AddedToken(t, special=True, rstrip=True) for t in family.special])
    renderer = Renderer(tokenizer, "assistant")
    pieces = renderer.segments(renderer.render(Conversation(chat("Hi", "\n\nHello")["messages"])))
    assert [piece["text"] for piece in pieces if piece["in_loss"]] == ["Hello<|end|>"]
