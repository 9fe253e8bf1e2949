"""Templates of the shapes that models come with, without marks: the answers are found exactly."""

import pytest
from tokenizers import AddedToken

from tests.worker.training.conftest import chat, make_tokenizer
from worker.training.data.conversations import Conversation, Message
from worker.training.data.rendering import Renderer, RowRefused

# Written here after the shape of each family: what opens a turn, what ends it, what is refused.
LLAMA_3 = (
    "{% for m in messages %}"
    "{% set turn = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.first %}{% set turn = bos_token + turn %}{% endif %}{{ turn }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
QWEN = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}"
    "{% for m in turns %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' }}"
    "{% if loop.first and system is defined %}{{ system + '\n\n' }}{% endif %}"
    "{{ m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# Template, its special tokens, bos, eos, and what ends a turn.
FAMILIES: dict[str, tuple[str, list[str], str, str, str]] = {
    "llama 3": (
        LLAMA_3,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|eot_id|>",
    ),
    "qwen": (QWEN, [], "<|endoftext|>", "<|im_end|>", "<|im_end|>"),
    "mistral": (MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>", "</s>"),
    "gemma": (
        GEMMA,
        ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
        "<bos>",
        "<eos>",
        "<end_of_turn>",
    ),
    "phi": (
        PHI,
        ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        "<|endoftext|>",
        "<|endoftext|>",
        "<|end|>",
    ),
}
TWO_TURNS = [*chat("Hi", "Hello!\n\nYou?")["messages"], *chat("Bye", "Ciao")["messages"]]
SYSTEM = {"role": "system", "content": "Be brief."}


def renderer_of(family: str) -> Renderer:
    template, special, bos, eos, _ = FAMILIES[family]
    tokenizer = make_tokenizer(template)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.bos_token, tokenizer.eos_token = bos, eos
    return Renderer(tokenizer, "assistant")


def learnt(family: str, messages: list[Message], learnt_from: int = 0) -> list[str]:
    renderer = renderer_of(family)
    example = renderer.render(Conversation(messages, learnt_from=learnt_from))
    assert renderer.learns_to_stop(example)
    return [piece["text"] for piece in renderer.segments(example) if piece["in_loss"]]


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def test_each_answer_and_its_end_of_turn_is_learnt_and_no_more(self, family: str) -> None:
        end = FAMILIES[family][-1]
        space = " " if family == "mistral" else ""
        first, second = f"{space}Hello!\n\nYou?{end}", f"{space}Ciao{end}"
        assert learnt(family, TWO_TURNS) == [first, second]
        assert learnt(family, TWO_TURNS[:2]) == [first]
        assert learnt(family, TWO_TURNS, learnt_from=2) == [second]

    def test_a_system_turn_is_context_or_refused(self, family: str) -> None:
        messages = [SYSTEM, *TWO_TURNS]
        if family == "gemma":
            with pytest.raises(RowRefused, match="System role not supported"):
                learnt(family, messages)
        else:
            assert learnt(family, messages) == learnt(family, TWO_TURNS)

    def test_the_first_token_of_an_answer_is_where_the_prompt_ends(self, family: str) -> None:
        renderer = renderer_of(family)
        example = renderer.render(Conversation(TWO_TURNS[:2]))
        before = renderer.segments(example)[0]["text"]
        tokenizer = renderer._tokenizer
        assert before == tokenizer.apply_chat_template(
            TWO_TURNS[:1], tokenize=False, add_generation_prompt=True
        )


def test_two_user_turns_in_a_row_are_refused_by_mistral() -> None:
    with pytest.raises(
        RowRefused, match="user, user, assistant: Conversation roles must alternate"
    ):
        learnt("mistral", [TWO_TURNS[0], *TWO_TURNS[:2]])


def test_a_special_token_that_takes_in_blanks_does_not_reach_into_the_answer() -> None:
    tokenizer = make_tokenizer(PHI)
    tokenizer.add_tokens([AddedToken(t, special=True, rstrip=True) for t in FAMILIES["phi"][1]])
    renderer = Renderer(tokenizer, "assistant")
    pieces = renderer.segments(renderer.render(Conversation(chat("Hi", "\n\nHello")["messages"])))
    assert [piece["text"] for piece in pieces if piece["in_loss"]] == ["Hello<|end|>"]
