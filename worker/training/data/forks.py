"""What a template makes of the first messages of a conversation, of all prefixes in one rendering.

A template that goes through the messages in order, and looks at none before it is there, renders
the first of them as it does when more follow: the same text up to where its loop would end, and
then what stands after the loop. So that part is rendered at the end of a turn as well, set apart in
the text by two marks, as if the conversation ended there:

    before   {% for m in messages %}…{% endfor %}after
    forking  {% for m in messages %}…{% for add_generation_prompt in due() %}<after>{% endfor %}
             {% endfor %}after

That holds for templates that change nothing after the loop that a later turn could see (``fork``
looks at the syntax tree), and for conversations during which the template has asked for nothing
that depends on what follows: not for the number of messages, nor the last one, nor the next one
(``Turns`` notices). Else there is no answer.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from jinja2 import Environment, Template, nodes

OPEN, CLOSE = "\ufdd1", "\ufdd2"  # noncharacters, of which no row holds any
FORK = re.compile(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}")
TURNS, DUE, PROMPT = "flatlora_turns", "flatlora_due", "add_generation_prompt"

# What could carry something from one fork to the next, or into the loop.
STATEFUL = ("cycler", "joiner")
LAZY = {"batch", "groupby", "items", "map", "reject", "rejectattr", "select", "selectattr", "slice"}
FOREIGN = (nodes.Block, nodes.Extends, nodes.FromImport, nodes.Import, nodes.Include)
UNFIT = (nodes.NSRef, nodes.Macro, nodes.CallBlock, nodes.Break, nodes.Continue)


class LooksAhead(Exception):
    """What the template wants to know depends on what follows."""


def fork(environment: Environment, source: str) -> Template | None:
    """The template that renders all prefixes; None for one of which it cannot be told beforehand.

    Args:
        environment: What it is compiled with.
        source: Its text.
    """
    whole = environment.parse(source)
    loops = [i for i, node in enumerate(whole.body) if isinstance(node, nodes.For)]
    if not loops:
        return None
    loop: Any = whole.body[loops[-1]]
    # parsed anew, as a compiler may write into a tree
    after = environment.parse(source).body[loops[-1] + 1 :]
    before = whole.body[: loops[-1] + 1]
    if loop.recursive or loop.else_ or loop.test or not _may_be_forked(whole, before, after):
        return None
    loop.iter = _call(TURNS, loop.iter)
    loop.body.append(
        nodes.For(
            nodes.Name(PROMPT, "store"),
            _call(DUE),
            [_text(OPEN), *after, _text(CLOSE)],
            [],
            None,
            False,
        )
    )
    whole.set_lineno(1)
    whole.set_environment(environment)
    return environment.from_string(whole)


def _may_be_forked(
    whole: nodes.Template, before: Sequence[nodes.Node], after: Sequence[nodes.Node]
) -> bool:
    """Whether what stands after the loop means the same inside it, and leaves no trace there."""
    loop = before[-1]
    kept = [*whole.find_all(nodes.Assign), *whole.find_all(nodes.AssignBlock)]
    inside = _names(loop, "store") | {macro.name for macro in loop.find_all(nodes.Macro)}
    return not (
        any(name.name in STATEFUL for name in whole.find_all(nodes.Name))
        or next(whole.find_all(FOREIGN), None)
        or any(map(_reaches_out, whole.find_all(nodes.Macro)))
        or any(filter_.name in LAZY for node in kept for filter_ in node.find_all(nodes.Filter))
        or any(_reads_prompt(node) for node in before)
        or any(next(_all(node, UNFIT), None) for node in after)
        or any(_names(node, "load") & (inside | {"loop"}) for node in after)
    )


def _reaches_out(macro: nodes.Macro) -> bool:
    """Whether it writes into a namespace that is not its own."""
    own = _names(macro, "store")
    return any(reference.name not in own for reference in macro.find_all(nodes.NSRef))


def _reads_prompt(node: nodes.Node) -> bool:
    """Whether it depends on the prompt that is asked for, and not just on whether one may be."""
    if isinstance(node, nodes.Test) and node.name == "defined":
        return False
    if isinstance(node, nodes.Name):
        return node.name == PROMPT and node.ctx == "load"
    return any(map(_reads_prompt, node.iter_child_nodes()))


def _all(node: nodes.Node, kinds: Any) -> Iterator[nodes.Node]:
    if isinstance(node, kinds):
        yield node
    yield from node.find_all(kinds)


def _names(node: nodes.Node, what: str) -> set[str]:
    return {name.name for name in node.find_all(nodes.Name) if name.ctx == what}


def _call(name: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.Name(name, "load"), list(arguments), [], None, None)


def _text(text: str) -> nodes.Output:
    return nodes.Output([nodes.TemplateData(text)])


class Turns:
    """One rendering of a forking template.

    Args:
        messages: Of the whole conversation.
        wanted: The prefixes that are asked for, by their numbers of messages: without the prompt of
            a next answer (False), with it (True), or both.
    """

    def __init__(self, messages: Sequence[Any], wanted: Mapping[int, Sequence[bool]]) -> None:
        self.messages = messages
        self._wanted = wanted
        self._forks: list[tuple[int, bool]] = []
        self._is_lost = False
        self._begun = self._done = self._length = 0  # turns of the loop, and where it is
        self.seen = min(wanted)
        """Messages that are there in every prefix whose end has not come yet."""
        self.end: int | None = None
        """Where the conversation ends, while the template may know that."""

    def render(
        self, template: Template, variables: Mapping[str, Any]
    ) -> tuple[str, dict[tuple[int, bool], tuple[int, str]]] | None:
        """The whole conversation, and of each prefix how far it goes with it and what follows then.

        Args:
            template: A forking one.
            variables: What else it may see.

        Returns:
            None if the template has asked for what depends on later messages.
        """
        ours = {"messages": _Messages(self, 0), TURNS: self._loop, DUE: self._due, PROMPT: False}
        try:
            text = template.render({**variables, **ours})
        except Exception:  # ours, or of a template to which this is no list
            return None
        parts = FORK.split(text)
        if self._is_lost or self.end is None or len(parts) != 2 * len(self._forks) + 1:
            return None
        found = {}
        length = 0
        for key, before, rest in zip(self._forks, parts[::2], parts[1::2], strict=False):
            length += len(before)
            found[key] = length, rest
        return "".join(parts[::2]), found

    def lose(self) -> NoReturn:
        """Note that there is no answer, whatever the template makes of the exception."""
        self._is_lost = True
        raise LooksAhead

    @property
    def known(self) -> int:
        """Messages that the template may look at."""
        return self.seen if self.end is None else self.end

    def begin(self, index: int) -> None:
        """The loop asks for a message, or finds that there is none.

        It may do so only when it is done with the one before: else it looks whether one follows.
        """
        if self._begun != self._done:
            self.lose()
        if index == len(self.messages):
            self.end = index
            raise StopIteration
        self._begun += 1
        self._length = index + 1
        self.seen = max(self.seen, self._length)

    def _loop(self, value: Any) -> "_Loop":
        if not isinstance(value, _Messages) or self._begun or self.end is not None:
            self.lose()
        return _Loop(self, value._offset)

    def _due(self) -> Iterator[bool]:
        """The forks at the end of a turn."""
        self._done += 1
        for prompt in self._wanted.get(self._length, ()):
            self.end = self._length
            self._forks.append((self._length, prompt))
            yield prompt
        self.end = None


class _Loop:
    """What the loop goes through."""

    def __init__(self, turns: Turns, offset: int) -> None:
        self._turns = turns
        self._next = offset

    def __iter__(self) -> "_Loop":
        return self

    def __next__(self) -> Any:
        self._turns.begin(self._next)
        self._next += 1
        return self._turns.messages[self._next - 1]

    def __len__(self) -> int:
        return self._turns.lose()


class _Messages:
    """The messages, to a template: as many as it may know of.

    While it may know where they end, they are a list like any other.
    """

    def __init__(self, turns: Turns, offset: int) -> None:
        self._turns = turns
        self._offset = offset

    def _list(self) -> list[Any]:
        if self._turns.end is None:
            self._turns.lose()
        return list(self._turns.messages[self._offset : self._turns.end])

    def __getitem__(self, index: Any) -> Any:
        turns, end = self._turns, self._turns.end
        match index:
            case slice(start=int() | None, stop=None, step=None) if end is None:
                start = self._offset + (index.start or 0)
                if self._offset <= start <= turns.seen:
                    return _Messages(turns, start)
            case int() if 0 <= index < turns.known - self._offset:
                return turns.messages[self._offset + index]
            case int() if end is not None and self._offset - end <= index < 0:
                return turns.messages[end + index]
        return self._list()[index]

    def __bool__(self) -> bool:
        return self._offset < self._turns.known or bool(self._list())

    def __len__(self) -> int:
        return len(self._list())

    def __iter__(self) -> Iterator[Any]:
        return iter(self._list())

    def __contains__(self, item: object) -> bool:
        return item in self._list()

    def __eq__(self, other: object) -> bool:
        return self._list() == other

    __hash__ = None  # type: ignore[assignment] # as a list's

    def __str__(self) -> str:
        return str(self._list())

    __repr__ = __str__
