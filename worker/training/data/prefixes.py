"""What a chat template makes of the first messages of a conversation, for many such beginnings.

To render each by itself takes time that grows with the square of the number of turns. Where a
template allows it all are rendered at once (``forks``); where it does not, they are at least not
copied and checked anew each time, as transformers would.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import _compile_jinja_template

from worker.training.data.conversations import Conversation
from worker.training.data.forks import Turns, fork

FEW_TURNS = 3  # for which it is not worth it


@dataclass(frozen=True)
class Prefix:
    """A rendering of the first messages.

    Attributes:
        shared: Letters from its beginning that are those of the rendering of all messages.
        rest: What follows in it.
    """

    shared: int
    rest: str


Key = tuple[int, bool]
"""So many messages, with the prompt of a next answer or without."""

Render = Callable[[int, bool], str]
Find = Callable[[int, bool], Prefix]


class Prefixes:
    """Renders beginnings of conversations with one template.

    Args:
        template: Its text.
        variables: What it may see besides messages and tools.
    """

    def __init__(self, template: str, variables: Mapping[str, Any]) -> None:
        # what transformers renders with itself: its filters and functions, and its sandbox
        self._plain: jinja2.Template = _compile_jinja_template(template)
        self._forking = fork(self._plain.environment, template)
        self._variables = {**variables, "documents": None}

    def of(
        self,
        conversation: Conversation,
        text: str,
        turns: Sequence[int],
        render: Render,
        *,
        with_both: bool = False,
    ) -> Find:
        """How to find the renderings that tell where some turns are.

        What is found is what ``render`` gives: as far as it was not proved it was compared.

        Args:
            conversation: Whose.
            text: The rendering of all of it.
            turns: Indices of messages, of which is wanted what is rendered before each, with the
                prompt of an answer, and what is rendered up to it.
            render: Gives the rendering of the first messages as transformers does it.
            with_both: Whether what is rendered up to a turn is wanted with a prompt too.
        """
        if any("reasoning_content" in message for message in conversation.messages):
            return lambda upto, prompt: Prefix(0, render(upto, prompt))  # it gives it more names
        keys = [_keys_of(turn, with_both=with_both) for turn in turns]
        if len(turns) > FEW_TURNS and (found := self._forked(conversation, text, keys)):
            checked = {*keys[0], *keys[-1]}
            if all(_whole(found[key], text) == render(*key) for key in checked):
                return lambda upto, prompt: found[upto, prompt]
        if self._render(conversation, len(conversation.messages), prompt=False) != text:
            return lambda upto, prompt: Prefix(0, render(upto, prompt))
        return lambda upto, prompt: Prefix(0, self._render(conversation, upto, prompt=prompt))

    def _forked(
        self, conversation: Conversation, text: str, keys: Sequence[Sequence[Key]]
    ) -> dict[Key, Prefix] | None:
        """All of them from one rendering, if the template allows that."""
        if self._forking is None:
            return None
        wanted: dict[int, set[bool]] = {}
        for upto, prompt in (key for keys_of_turn in keys for key in keys_of_turn):
            wanted.setdefault(upto, set()).add(prompt)
        prompts = {upto: sorted(found) for upto, found in wanted.items()}
        variables = {**self._variables, "tools": conversation.tools}
        rendered = Turns(conversation.messages, prompts).render(self._forking, variables)
        if rendered is None:
            return None
        whole, found = rendered
        if whole != text or len(found) != sum(map(len, prompts.values())):
            return None
        return {key: Prefix(shared, rest) for key, (shared, rest) in found.items()}

    def _render(self, conversation: Conversation, upto: int, *, prompt: bool) -> str:
        return self._plain.render(
            **self._variables,
            messages=conversation.messages[:upto],
            tools=conversation.tools,
            add_generation_prompt=prompt,
        )


def _keys_of(turn: int, *, with_both: bool) -> list[Key]:
    return [(turn, True), (turn + 1, False), *([(turn + 1, True)] if with_both else [])]


def _whole(prefix: Prefix, text: str) -> str:
    return text[: prefix.shared] + prefix.rest
