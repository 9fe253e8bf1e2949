"""Of a long conversation all beginnings are rendered at once, and are what they are one by one."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worker.training.conftest import UNMARKED, chat, make_tokenizer
from tests.worker.training.data.families import CHATML, FAMILIES
from worker.training.data.conversations import Conversation
from worker.training.data.forks import Turns, fork
from worker.training.data.messages import Message
from worker.training.data.prefixes import Prefix, Prefixes
from worker.training.data.rendering import Renderer, RowRefused
from worker.training.errors import Stopped

LOOK_AHEAD = {"qwen 3", "mistral with tools"}  # for the last question

CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
}
TOOLS = [{"type": "function", "function": {"name": "f"}}]

words = st.sampled_from(["Hi", " a\n", "<|im_end|>", "no\n\n", "é", "assistant"])
turns = st.one_of(
    st.builds(lambda q, a: chat(q, a)["messages"], words, words),
    st.builds(
        lambda q, a: [
            {"role": "user", "content": q},
            CALL,
            {"role": "tool", "content": "42"},
            {"role": "assistant", "content": a},
        ],
        words,
        words,
    ),
)


def talk_of(count: int) -> Conversation:
    return Conversation([m for n in range(count) for m in chat(f"Q{n}", f"A{n}")["messages"]])


def learnt(renderer: Renderer, talk: Conversation) -> Any:
    try:
        example = renderer.render(talk)
    except RowRefused as refusal:
        return str(refusal)
    return example.ids.tolist(), example.in_loss.tolist()


def one_by_one(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> Renderer:
    """The same, but that each beginning is rendered by transformers."""

    def of(self: Prefixes, _talk: Any, _text: Any, _turns: Any, render: Any, **_: Any) -> Any:
        return lambda upto, prompt: Prefix(0, render(upto, prompt))

    monkeypatch.setattr(Prefixes, "of", of)
    return renderer


@pytest.mark.parametrize("name", FAMILIES)
class TestFamilies:
    @settings(max_examples=25, deadline=None)
    @given(st.lists(turns, min_size=4, max_size=6), st.booleans())
    def test_the_answers_are_those_of_rendering_turn_by_turn(
        self, name: str, drawn: list[list[Message]], has_tools: bool
    ) -> None:
        messages = [message for turn in drawn for message in turn]
        talk = Conversation(messages, TOOLS if has_tools else None)
        found = learnt(FAMILIES[name].renderer(), talk)
        with pytest.MonkeyPatch.context() as monkeypatch:
            assert found == learnt(one_by_one(FAMILIES[name].renderer(), monkeypatch), talk)

    def test_how_often_a_template_is_rendered_does_not_grow_with_the_turns(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        renderer = FAMILIES[name].renderer()
        count = counted(renderer, monkeypatch)
        few, many = count(talk_of(6)), count(talk_of(60))
        assert (few == many) == (name not in LOOK_AHEAD)


def counted(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> Callable[[Conversation], int]:
    """How many renderings a conversation takes."""
    renderings = [0]

    def count(method: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            renderings[0] += 1
            return method(*arguments, **named)

        return call

    for owner, method in ((Renderer, "_run"), (Prefixes, "_render"), (Turns, "render")):
        monkeypatch.setattr(owner, method, count(getattr(owner, method)))

    def taken_by(talk: Conversation) -> int:
        renderings[0] = 0
        renderer.render(talk)
        return renderings[0]

    return taken_by


LOOP = "{% for m in messages %}"
TURN = "<{{ m['role'] }}>{{ m['content'] }}"
END = "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"

# With which a beginning is rendered as it is among more.
IN_ORDER = {
    "plain": LOOP + TURN + END,
    "the first": LOOP + "{% if loop.first %}!{% endif %}{{ loop.index0 }}" + TURN + END,
    "the one before": LOOP + "{{ messages[loop.index0 - 1].role if loop.index0 }}" + TURN + END,
    "first of all": "{{ messages[0]['content'] }}" + LOOP + TURN + END,
    "without the first": "{% set messages = messages[1:] %}" + LOOP + TURN + END,
    "a count": "{% set ns = namespace(n=0) %}" + LOOP + "{% set ns.n = ns.n + 1 %}" + TURN
    + "{% endfor %}{{ ns.n }}{% if add_generation_prompt %}>{% endif %}",
    "the end, at the end": LOOP + TURN + END
    + "{{ messages | length }}{{ messages[-1].content }}{{ messages[-2:] }}{{ messages[99] }}",
    "a default prompt": "{% if not add_generation_prompt is defined %}"
    "{% set add_generation_prompt = true %}{% endif %}" + LOOP + TURN + END,
    "a macro": "{% macro show(m) %}{% set ns = namespace(t='') %}{% set ns.t = m.content %}"
    "{{ ns.t }}{% endmacro %}" + LOOP + "{{ show(m) }}" + END,
    "a loop at the end": LOOP + TURN + "{% endfor %}{% set x = 'x' %}{{ x }}"
    "{% if add_generation_prompt %}{{ messages | map(attribute='role') | join }}{% endif %}",
}  # fmt: skip
# With which it may not be.
OTHERWISE = {
    "the last": LOOP + "{% if loop.last %}!{% endif %}" + TURN + END,
    "the next": LOOP + "{{ loop.nextitem.role }}" + TURN + END,
    "the next by its number": LOOP + "{{ messages[loop.index0 + 1].role }}" + TURN + END,
    "the length of the loop": LOOP + "{{ loop.length }}" + TURN + END,
    "the number from behind": LOOP + "{{ loop.revindex }}" + TURN + END,
    "the length": "{{ messages | length }}" + LOOP + TURN + END,
    "the length in the loop": LOOP + "{{ messages | length }}" + TURN + END,
    "the last at once": "{{ messages[-1].role }}" + LOOP + TURN + END,
    "from behind": "{% for m in messages[::-1] %}{{ m.role }}{% endfor %}" + LOOP + TURN + END,
    "all but the last": "{% for m in messages[:-1] %}" + TURN + END,
    "a part": "{% set some = messages[2:] %}{{ some[0].content }}" + LOOP + TURN + END,
    "twice": LOOP + "{{ m.role }}{% endfor %}" + LOOP + TURN + END,
    "inside": LOOP + "{% for o in messages %}{{ o.role }}{% endfor %}" + TURN + END,
    "as text": "{{ messages }}" + LOOP + TURN + END,
    "as JSON": "{{ messages | tojson }}" + LOOP + TURN + END,
    "whether there is any": LOOP + "{% if messages == [] %}{% else %}" + TURN + "{% endif %}" + END,
    "whether it is a list": "{{ messages is sequence }}" + LOOP + TURN + END,
    "whether it is in it": LOOP + "{{ {'role': 'x'} in messages }}" + TURN + END,
    "how many are chosen": "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    + LOOP + TURN + END,
    "chosen in time": "{% set users = messages | selectattr('role', 'equalto', 'user') %}"
    + LOOP + TURN + "{% endfor %}{{ users | list | length }}",
    "some of them": "{% for m in messages if m.role == 'user' %}" + TURN + END,
    "some are passed over": LOOP + "{% if loop.first %}{% continue %}{% endif %}" + TURN + END,
    "not all": LOOP + "{% if loop.index0 == 3 %}{% break %}{% endif %}" + TURN + END,
    "none": LOOP + TURN + "{% else %}none{% endfor %}",
    "the prompt in the loop": LOOP + TURN + "{{ add_generation_prompt }}" + END,
    "the prompt before it": "{{ add_generation_prompt }}" + LOOP + TURN + END,
    "a count at the end": "{% set ns = namespace(n=0) %}" + LOOP + "{{ ns.n }}" + TURN
    + "{% endfor %}{% set ns.n = 7 %}{{ ns.n }}",
    "a count in a macro": "{% set ns = namespace(n=0) %}{% macro up() %}"
    "{% set ns.n = ns.n + 1 %}{{ ns.n }}{% endmacro %}" + LOOP + TURN + "{% endfor %}{{ up() }}",
    "a cycle": "{% set c = cycler('a', 'b') %}" + LOOP + TURN + "{% endfor %}{{ c.next() }}",
    "a comma": "{% set c = joiner(',') %}" + LOOP + TURN + "{% endfor %}{{ c() }}{{ c() }}",
    "a generator": "{% set g = 'abc' | map('upper') %}" + LOOP + TURN
    + "{% endfor %}{% for x in g %}{{ x }}{% endfor %}",
    "a name of the loop": "{% set x = 1 %}" + LOOP + "{% set x = 2 %}" + TURN
    + "{% endfor %}{{ x }}",
    "the message after the loop": LOOP + TURN + "{% endfor %}{{ m }}",
    "the loop after the loop": LOOP + TURN + "{% endfor %}{{ loop }}",
    "not one loop": "{{ messages[0].content }}",
    "a loop of something else": "{% for x in [1, 2] %}{{ x }}{% endfor %}",
    "a refusal": LOOP + TURN + "{% endfor %}"
    "{% if messages | length == 3 %}{{ raise_exception('three') }}{% endif %}",
}  # fmt: skip


def found_at_once(template: str, talk: Conversation) -> dict[tuple[int, bool], str] | None:
    """Every beginning, without the comparisons by which ``Prefixes`` makes sure."""
    prefixes = Prefixes(template, {})
    forking = fork(prefixes._plain.environment, template)
    wanted = {n: [False, True] for n in range(2, len(talk.messages) + 1)}
    rendered = forking and Turns(talk.messages, wanted).render(forking, {})
    if not rendered:
        return None
    text, found = rendered
    assert text == prefixes._render(talk, len(talk.messages), prompt=False)
    return {key: text[:shared] + rest for key, (shared, rest) in found.items()}


@pytest.mark.parametrize("name", IN_ORDER)
def test_a_template_that_reads_in_order_is_rendered_once(name: str) -> None:
    talk, template = talk_of(4), IN_ORDER[name]
    found = found_at_once(template, talk)
    assert found
    prefixes = Prefixes(template, {})
    expected = {
        (n, prompt): prefixes._render(talk, n, prompt=prompt)
        for n in range(2, 9)
        for prompt in (False, True)
    }
    assert found == expected


@pytest.mark.parametrize("name", OTHERWISE)
def test_one_that_does_not_is_found_out(name: str) -> None:
    found = found_at_once(OTHERWISE[name], talk_of(4))
    wanted = {(n, prompt) for n in range(2, 9) for prompt in (False, True)}
    assert found is None or found.keys() != wanted


def test_a_rendering_that_is_not_transformers_own_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    renderer = Renderer(make_tokenizer(UNMARKED), "assistant")
    expected = learnt(renderer, talk_of(9))
    right = Turns.render

    def wrong(self: Turns, *arguments: Any) -> Any:
        text, found = right(self, *arguments)  # type: ignore[misc]
        return text, {key: (shared, rest + "x") for key, (shared, rest) in found.items()}

    monkeypatch.setattr(Turns, "render", wrong)
    assert learnt(renderer, talk_of(9)) == expected


def test_a_wish_ends_it_within_a_row() -> None:
    calls = [0]

    def proceed() -> None:
        calls[0] += 1
        if calls[0] == 7:
            raise Stopped("cancel")

    renderer = Renderer(FAMILIES["qwen 3"].tokenizer(), "assistant", proceed=proceed)
    with pytest.raises(Stopped):
        renderer.render(talk_of(50))
    assert calls == [7]


def test_thousands_of_turns_are_found_each() -> None:
    talk = talk_of(2000)
    renderer = Renderer(make_tokenizer(CHATML), "assistant")
    pieces = renderer.segments(renderer.render(talk))
    answers = [piece["text"] for piece in pieces if piece["in_loss"]]
    assert answers == [f"A{n}<|im_end|>" for n in range(2000)]
