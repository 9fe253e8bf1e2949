"""The loss is taken on the assistant's tokens with their end of turn, and on nothing else."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.worker.training.conftest import MARKED, UNMARKED, chat, make_tokenizer
from worker.training.data.conversations import Conversation, to_conversation
from worker.training.data.messages import RowProblem
from worker.training.data.rendering import CUT, LossOn, Renderer, RowRefused
from worker.training.errors import ConfigInvalid

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

    @pytest.mark.parametrize("template", [MARKED, UNMARKED])
    def test_answers_that_are_context_are_not_in_it(self, template: str) -> None:
        assert learnt(template, replace(TALK, context=frozenset({2}))) == ["Ciao<|im_end|>"]

    def test_marks_of_context_are_counted_however_many_a_turn_has(self) -> None:
        twice = MARKED.replace(
            "{{ m['content'] }}<|im_end|>{% endgeneration %}",
            "{{ m['content'] }}{% endgeneration %}|{% generation %}<|im_end|>{% endgeneration %}",
        )
        assert learnt(twice, replace(TALK, context=frozenset({2}))) == ["Ciao", "<|im_end|>"]

    @pytest.mark.parametrize("template", [MARKED, UNMARKED])
    def test_any_answer_may_be_context(self, template: str) -> None:
        first = replace(TALK, context=frozenset({4}))
        assert learnt(template, first) == ["Hello!<|im_end|>"]
        assert learnt(template, first, "last_assistant") == ["Hello!<|im_end|>"]

    def test_marks_that_some_answers_lack_cannot_be_counted(self) -> None:
        last = "{% if m['role'] == 'assistant' and loop.last %}"
        template = MARKED.replace("{% if m['role'] == 'assistant' %}", last)
        assert learnt(template) == ["Ciao<|im_end|>"]
        with pytest.raises(RowRefused, match="marks some of its answers only"):
            learnt(template, replace(TALK, context=frozenset({2})))

    @pytest.mark.parametrize("name", ["tool_calls", "reasoning_content"])
    @pytest.mark.parametrize("template", [MARKED, UNMARKED])
    def test_what_the_template_would_pass_over_is_refused(self, template: str, name: str) -> None:
        question, answer = chat("Hi", "Hello")["messages"]
        talk = Conversation([question, {**answer, name: [{"function": {}}]}])
        with pytest.raises(RowRefused, match=f"has {name}, which the chat template does not read"):
            learnt(template, talk)

    @pytest.mark.parametrize("loss_on", ["assistant", "last_assistant"])
    def test_a_token_that_begins_before_the_answer_is_in_it(self, loss_on: LossOn) -> None:
        template = (
            "{% for m in messages %}{% if m['role'] == 'assistant' %}ASSISTANT: "
            "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
            "{% else %}USER: {{ m['content'] }} {% endif %}{% endfor %}"
        )
        tokenizer = make_tokenizer(template)
        backend = tokenizer.backend_tokenizer
        trained = Tokenizer(models.BPE())
        trained.pre_tokenizer, trained.decoder = backend.pre_tokenizer, backend.decoder
        trained.train_from_iterator(
            ["USER: Hi ASSISTANT: Hello"] * 9,
            trainers.BpeTrainer(special_tokens=["<|im_end|>"], show_progress=False),
        )
        trained.post_processor = processors.ByteLevel(trim_offsets=False)
        tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=trained,
            eos_token="<|im_end|>",  # noqa: S106 - not a password
        )
        tokenizer.chat_template = template
        renderer = Renderer(tokenizer, loss_on)
        example = renderer.render(Conversation(chat("Hi", "Hello")["messages"]))
        pieces = renderer.segments(example)
        assert [piece["text"] for piece in pieces] == ["USER: Hi ASSISTANT:", " Hello<|im_end|>"]
        assert len(example.ids[example.in_loss]) == 2

    def test_a_template_that_rewrites_earlier_turns_is_refused(self) -> None:
        template = UNMARKED.replace(
            "{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'] | upper }}"
        )
        with pytest.raises(RowRefused, match="renders a turn otherwise once later turns follow"):
            learnt(template)

    def test_what_is_shown_of_it_moves_no_cursor(self) -> None:
        talk = Conversation(chat("\x1b[2J\tHi\n", "Hello")["messages"])
        renderer = Renderer(make_tokenizer(), "assistant")
        text = renderer.segments(renderer.render(talk))[0]["text"]
        assert "\ufffd[2J\tHi\n" in text

    def test_a_tokenizer_without_a_template_is_refused(self) -> None:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = None
        with pytest.raises(ConfigInvalid, match="no chat template"):
            Renderer(tokenizer, "assistant").render(TALK)

    def test_what_the_template_refuses_is_told_to_the_jobs_author(self) -> None:
        template = "{{ raise_exception('no system turns here') }}"
        with pytest.raises(RowRefused, match="no system turns here"):
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

    @pytest.mark.parametrize("template", [MARKED, UNMARKED])
    def test_it_stays_text_wherever_it_is_spelt(self, template: str) -> None:
        spelt = {"<|pad|>": ["<|im_end|>", {"x": "<|pad|>"}], "plain": 5}
        call = {"type": "function", "function": {"name": "<|pad|>", "arguments": spelt}}
        talk = Conversation(
            [
                {"role": "user", "content": "Hi", "name": "<|im_end|>"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
            ],
            tools=[{"name": "<|pad|>", "description": "ends with <|im_end|>"}],
        )
        turn = "{{ m.name }}{{ m.tool_calls | tojson if m.tool_calls }}{{ m['content'] }}"
        head = "{% if tools %}{{ tools | tojson }}{% endif %}"
        tokenizer = make_tokenizer(head + template.replace("{{ m['content'] }}", turn))
        example = Renderer(tokenizer, "assistant").render(talk)
        ids = example.ids.tolist()
        assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
        assert tokenizer.convert_tokens_to_ids("<|pad|>") not in ids
        expected = tokenizer.apply_chat_template(talk.messages, tools=talk.tools, tokenize=False)
        assert tokenizer.decode(ids) == expected

    @pytest.mark.parametrize("shown", ["m['content'] | length", "[m['content']]"])
    def test_a_template_that_would_not_leave_it_as_text_is_refused(self, shown: str) -> None:
        template = MARKED.replace("<|im_start|>", "<|im_start|>{{ " + shown + " }}", 1)
        assert learnt(template)
        talk = Conversation(chat("What is <|pad|>?", "Padding")["messages"])
        with pytest.raises(RowRefused, match="spells a special token"):
            learnt(template, talk)

    def test_an_added_token_that_is_not_special_keeps_its_id(self) -> None:
        tokenizer = make_tokenizer()
        tokenizer.add_tokens([AddedToken("<think>", special=False)])
        tokenizer.add_tokens([AddedToken("\n\n", special=False, normalized=False)])
        talk = Conversation(chat("Hi", "<think>\n\nHello<|im_end|>")["messages"])
        ids = Renderer(tokenizer, "assistant").render(talk).ids.tolist()
        for token, count in (("<think>", 1), ("\n\n", 1), ("<|im_end|>", 2)):
            assert ids.count(tokenizer.convert_tokens_to_ids(token)) == count, token

    def test_a_cut_is_nothing_that_a_row_can_hold(self) -> None:
        with pytest.raises(RowProblem, match="valid Unicode text, found the character U"):
            to_conversation(chat("Hi", f"a{CUT}b"), "chat", {})


class TestClock:
    DATED = (
        "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y, %-d, 100%%d %') }}{% endif %}"
    )

    @pytest.mark.parametrize("template", [MARKED, UNMARKED])
    def test_a_template_is_told_the_moment_that_was_given(self, template: str) -> None:
        moment = datetime(2024, 7, 4, 23, 59, tzinfo=UTC)
        tokenizer = make_tokenizer(self.DATED + template)
        renderer = Renderer(tokenizer, "assistant", today=moment)
        segments = renderer.segments(renderer.render(TALK))
        assert segments[0]["text"].startswith("04 Jul 2024, 4, 100%d %<|im_start|>system")
        assert segments[1]["text"] == "Hello!<|im_end|>"

    @pytest.mark.parametrize("directive", "aAbBcdHIjmMpSUwWxXyYzZ")
    def test_each_directive_is_that_of_python(self, directive: str) -> None:
        moment = datetime(2024, 7, 4, 3, 5, 9, tzinfo=UTC)
        tokenizer = make_tokenizer(f"\n[{{{{ strftime_now('%{directive}') }}}}]" + MARKED)
        renderer = Renderer(tokenizer, "all", today=moment)
        (segment,) = renderer.segments(renderer.render(TALK))
        assert segment["text"].startswith(f"\n[{moment.strftime('%' + directive)}]<|im_start|>")

    def test_without_a_moment_it_is_the_present(self) -> None:
        tokenizer = make_tokenizer("{{ strftime_now('%Y') }}" + MARKED)
        renderer = Renderer(tokenizer, "all")
        (segment,) = renderer.segments(renderer.render(TALK))
        assert int(segment["text"][:4]) >= 2024


class TestText:
    """Plain text: every token of it is learnt, and that it ends."""

    TEXT = Conversation([], text="Once <|im_end|> upon\n")

    @pytest.mark.parametrize("loss_on", ["assistant", "last_assistant", "all"])
    def test_it_needs_no_template_and_is_learnt_to_its_end(self, loss_on: LossOn) -> None:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = None
        renderer = Renderer(tokenizer, loss_on)
        example = renderer.render(self.TEXT)
        assert example.in_loss.all()
        assert renderer.learns_to_stop(example)
        assert example.ids[-1] == tokenizer.eos_token_id
        assert example.ids.tolist().count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(example.ids) == f"{self.TEXT.text}<|im_end|>"

    def test_it_begins_with_bos_where_the_tokenizer_writes_one(self) -> None:
        tokenizer = make_tokenizer()
        bos = tokenizer.bos_token_id
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A <|im_end|>",
            special_tokens=[("<|endoftext|>", bos), ("<|im_end|>", tokenizer.eos_token_id)],
        )
        ids = Renderer(tokenizer, "all").render(Conversation([], text="Once")).ids
        assert ids.tolist() == tokenizer("Once")["input_ids"]
        assert ids[0] == bos
