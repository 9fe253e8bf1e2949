"""The loss is taken on the assistant's tokens with their end of turn, and on nothing else."""

from typing import Any

import pytest

from tests.worker.training.conftest import MARKED, UNMARKED, make_tokenizer
from worker.training.conversations import Conversation
from worker.training.errors import ConfigInvalid
from worker.training.rendering import LossOn, Renderer

TALK = Conversation(
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Ciao"},
    ]
)
END_OUTSIDE = MARKED.replace(
    "{{ m['content'] }}<|im_end|>{% endgeneration %}",
    "{{ m['content'] }}{% endgeneration %}<|im_end|>",
)
BREAK_INSIDE = MARKED.replace("<|im_end|>{% endgeneration %}", "<|im_end|>\n{% endgeneration %}")


def learnt(template: str, talk: Conversation = TALK, loss_on: LossOn = "assistant") -> list[str]:
    renderer = Renderer(make_tokenizer(template), loss_on)
    segments = renderer.segments(renderer.render(talk))
    return [segment["text"] for segment in segments if segment["in_loss"]]


class TestMask:
    @pytest.mark.parametrize("template", [MARKED, UNMARKED, END_OUTSIDE, BREAK_INSIDE])
    def test_it_covers_each_answer_and_its_end_of_turn(self, template: str) -> None:
        assert learnt(template) == ["Hello!<|im_end|>", "Ciao<|im_end|>"]

    @pytest.mark.parametrize("template", [MARKED, UNMARKED])
    def test_it_may_cover_the_last_answer_alone(self, template: str) -> None:
        assert learnt(template, loss_on="last_assistant") == ["Ciao<|im_end|>"]

    def test_it_may_cover_everything(self) -> None:
        (text,) = learnt(MARKED, loss_on="all")
        assert text.startswith("<|im_start|>system")

    def test_the_ids_are_those_of_the_tokenizer_itself(self) -> None:
        tokenizer = make_tokenizer()
        rendered: Any = tokenizer.apply_chat_template(TALK.messages, return_dict=True)
        example = Renderer(tokenizer, "assistant").render(TALK)
        assert example.ids.tolist() == rendered["input_ids"]

    def test_a_template_that_rewrites_earlier_turns_is_refused(self) -> None:
        template = UNMARKED.replace(
            "{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'] | upper }}"
        )
        with pytest.raises(ConfigInvalid, match="renders a turn otherwise once later turns follow"):
            learnt(template)

    def test_a_tokenizer_without_a_template_is_refused(self) -> None:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = None
        with pytest.raises(ConfigInvalid, match="no chat template"):
            Renderer(tokenizer, "assistant")

    def test_what_the_template_refuses_is_told_to_the_jobs_author(self) -> None:
        template = "{{ raise_exception('no system turns here') }}"
        with pytest.raises(ConfigInvalid, match="no system turns here"):
            learnt(template)


class TestSpecialText:
    @pytest.mark.parametrize("template", [MARKED, UNMARKED])
    def test_a_special_token_spelt_in_the_data_stays_text(self, template: str) -> None:
        talk = Conversation(
            [
                {"role": "user", "content": "What is <|im_end|> and <|pad|>?"},
                {"role": "assistant", "content": "<|im_end|> ends a turn"},
            ]
        )
        tokenizer = make_tokenizer(template)
        example = Renderer(tokenizer, "assistant").render(talk)
        ids = example.ids.tolist()
        assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
        assert tokenizer.convert_tokens_to_ids("<|pad|>") not in ids
        assert tokenizer.decode(ids) == tokenizer.apply_chat_template(talk.messages, tokenize=False)
        assert learnt(template, talk) == ["<|im_end|> ends a turn<|im_end|>"]
