"""From a conversation to token ids and a mask of what the loss is taken on.

The mask comes from the template's ``{% generation %}`` marks where it has them; where it has not,
each assistant turn is what a rendering with that turn adds to the rendering up to it. A row in
which earlier turns change when later ones are added has no such turns, and is refused; but a
template may leave out an earlier turn's reasoning, as those of reasoning models do.

Plain text needs no template: all of it is learnt, with eos as its end.

Text in the data that spells a special token stays text: such a spelling is cut in two before the
template sees it, and the rendering is tokenised in pieces that end at the cut.
"""

import re
import string
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal, TypeVar, cast

import jinja2
import numpy as np
from jaxtyping import Bool, Int32, Int64
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from worker.training.data.conversations import Conversation
from worker.training.data.examples import Example
from worker.training.data.prefixes import Find, Prefix, Prefixes
from worker.training.data.words import shown
from worker.training.errors import ConfigInvalid, Stopped

LossOn = Literal["assistant", "last_assistant", "all"]
Span = tuple[int, int]
Json = TypeVar("Json")

MARKS = {"return_assistant_tokens_mask": True}
GENERATION_MARK = re.compile(r"{%-?\s*generation\s*-?%}")
CONTROL = re.compile(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
CUT = "\ufdd0"  # a noncharacter: no template writes it, and rows that hold one are bad

# transformers passes no functions to a template, so a macro stands in for its own strftime_now.
# The line break is what a template loses after a block.
CLOCK = (
    "{% macro strftime_now(format) %}{% set found = namespace(text=format) %}"
    "{% for directive, value in frozen_clock.items() %}"
    "{% set found.text = found.text | replace(directive, value) %}"
    "{% endfor %}{{ found.text }}{% endmacro %}\n"
)


REASONING = re.compile(r"\A\s*<(\w+)>.*</\1>\n*", re.DOTALL)


class RowRefused(Exception):
    """The chat template or the tokenizer does not take this row.

    Args:
        problem: Why.
        hint: What to change, if it is so for every row.
    """

    def __init__(self, problem: str, hint: str) -> None:
        super().__init__(problem)
        self.hint = hint


@dataclass(frozen=True)
class Tokens:
    """A text's tokens, where in it (cuts included) each begins and ends, and which are special."""

    ids: Int32[np.ndarray, " length"]
    starts: Int64[np.ndarray, " length"]
    ends: Int64[np.ndarray, " length"]
    special: Bool[np.ndarray, " length"]


class Renderer:
    """Renders conversations with one tokenizer's chat template.

    Args:
        tokenizer: A fast tokenizer; with a chat template, unless all rows are plain text.
        loss_on: ``"assistant"`` turns, the ``"last_assistant"`` turn that is learnt, or ``"all"``
            tokens. Of plain text it is always all.
        today: What a template that asks for the date is told; by default the present moment.
        proceed: Called at every turn: a conversation may have thousands. May end it.

    Raises:
        ConfigInvalid: If the tokenizer cannot tell where tokens begin.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        loss_on: LossOn,
        *,
        today: datetime | None = None,
        proceed: Callable[[], None] = lambda: None,
    ) -> None:
        if not tokenizer.is_fast:
            raise ConfigInvalid("The base model has no fast tokenizer (tokenizer.json).", None)
        self._tokenizer = tokenizer
        template = tokenizer.chat_template
        self._template: str = template if isinstance(template, str) else ""
        self._variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        if "strftime_now" in self._template:
            self._template = CLOCK + self._template
            self._variables["frozen_clock"] = _clock(today or datetime.now().astimezone())
        self._has_marks = GENERATION_MARK.search(self._template) is not None
        self._loss_on = loss_on
        self._proceed = proceed
        self._prefixes: Prefixes | None = None  # compiled where a row needs them
        special = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._special = {*special, tokenizer.eos_token_id} - {None}
        self._eos = str(tokenizer.eos_token or "")
        spellings = sorted(special.values(), key=len, reverse=True)
        self._spelling = re.compile("|".join(map(re.escape, spellings)) or r"(?!)")

    def render(self, conversation: Conversation) -> Example:
        """Token ids and loss mask of a whole conversation.

        Raises:
            RowRefused: If the template or the tokenizer does not take it, or it cannot be told
                where the assistant's turns are.
            ConfigInvalid: If it needs a chat template, and there is none.
        """
        if conversation.text is not None:
            return self._render_text(conversation.text)
        if not self._template:
            raise ConfigInvalid(
                "The base model's tokenizer has no chat template.",
                "Use an instruction-tuned base model, put a chat_template.jinja in its folder, or "
                "train on plain text (data.format: text).",
            )
        try:
            return self._render(conversation)
        except (RowRefused, Stopped, MemoryError):
            raise
        except Exception as error:  # templates are programs of others: they may raise anything
            kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            roles = ", ".join(message["role"] for message in conversation.messages)
            raise RowRefused(
                f"the chat template refuses a conversation of {shown(roles, 80)}: "
                f"{kind}{shown(str(error))}",
                "Reorder or drop the turns that this base model's template does not allow.",
            ) from error

    def segments(self, example: Example) -> list[dict[str, Any]]:
        """An example as text, in pieces that are in the loss or not, for a person to look at."""
        pieces: list[dict[str, Any]] = []
        changes = np.flatnonzero(np.diff(example.in_loss)) + 1
        for ids, in_loss in zip(
            np.split(example.ids, changes), np.split(example.in_loss, changes), strict=True
        ):
            text = CONTROL.sub("\ufffd", self._decode(ids.tolist()))
            pieces.append({"text": text, "in_loss": bool(in_loss[0])})
        return pieces

    def learns_to_stop(self, example: Example) -> bool:
        """Whether what is learnt of a whole example ends with an end-of-turn token."""
        for index in example.ids[example.in_loss][::-1].tolist():
            if index in self._special:
                return True
            if self._decode([index]).strip():
                return False
        return False

    def _decode(self, ids: list[int]) -> str:
        return cast(str, self._tokenizer.decode(ids, skip_special_tokens=False))

    def _render_text(self, text: str) -> Example:
        tokens = self._tokenise(self._cut_spellings(text))
        begin: list[int] = self._tokenizer("")["input_ids"]
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        before = begin[:1] if begin and begin[0] == bos else []
        after = [] if eos is None else [eos]
        ids = np.array([*before, *tokens.ids.tolist(), *after], np.int32)
        return Example(ids, np.ones(len(ids), dtype=bool))

    def _render(self, conversation: Conversation) -> Example:
        self._check_reads(conversation)
        messages = [
            {**self._cut_spellings(message), "role": message["role"]}
            for message in conversation.messages
        ]
        tools = self._cut_spellings(conversation.tools)
        safe = replace(conversation, messages=messages, tools=tools)
        text, spans = self._text_and_spans(safe)
        if safe != conversation and text.replace(CUT, "") != self._apply(conversation):
            raise RowRefused(
                "it spells a special token, which the chat template would not leave as it is",
                "Spell special tokens otherwise in the data.",
            )
        tokens = self._tokenise(text)
        return Example(tokens.ids, _mask(tokens, text, spans))

    def _check_reads(self, conversation: Conversation) -> None:
        """That nothing which is to be learnt is passed over by the template."""
        for name in ("tool_calls", "reasoning_content"):
            if name not in self._template and any(m.get(name) for m in conversation.messages):
                raise RowRefused(
                    f"it has {name}, which the chat template does not read",
                    "Write it into content, in the base model's own words.",
                )
        if conversation.tools and "tools" not in self._template:
            raise RowRefused(
                "it has tools, which the chat template does not read",
                "Leave tools out, or use a base model that knows tools.",
            )

    def _cut_spellings(self, value: Json) -> Json:
        """The same value, with every special token that is spelt in it cut in two."""
        found: Any = value
        match value:
            case str():
                found = self._spelling.sub(lambda spelt: spelt[0][:1] + CUT + spelt[0][1:], value)
            case list():
                found = [self._cut_spellings(item) for item in value]
            case dict():
                found = {
                    self._cut_spellings(name): self._cut_spellings(item)
                    for name, item in value.items()
                }
        return cast(Json, found)

    def _text_and_spans(self, conversation: Conversation) -> tuple[str, list[Span]]:
        if self._loss_on == "all":
            text = self._apply(conversation)
            return text, [(0, len(text))]
        if self._has_marks:
            text, spans = self._apply_marked(conversation)
        else:
            text, spans = self._compare_prefixes(conversation)
        if not spans:
            raise RowRefused(
                "the chat template renders no assistant turn", "Check its {% generation %} marks."
            )
        return text, spans[-1:] if self._loss_on == "last_assistant" else spans

    def _apply(
        self, conversation: Conversation, upto: int | None = None, *, prompt: bool = False
    ) -> str:
        return self._run(conversation, upto, add_generation_prompt=prompt)[0]

    def _apply_marked(self, conversation: Conversation) -> tuple[str, list[Span]]:
        text, spans = self._run(conversation, None, **MARKS)
        if not conversation.context:
            return text, spans
        learnt = []
        for index, message in enumerate(conversation.messages):
            if message["role"] == "assistant" and index not in conversation.context:
                # A turn may hold any number of marks, so those before it are counted.
                before, upto = (self._marks(conversation, i) for i in (index, index + 1))
                learnt += spans[before:upto]
        answers = sum(message["role"] == "assistant" for message in conversation.messages)
        if len(spans) < answers:
            raise RowRefused(
                "the chat template marks some of its answers only, and some are not to be learnt",
                "Mark every assistant turn in the template, or train on single turns.",
            )
        return text, learnt

    def _marks(self, conversation: Conversation, upto: int) -> int:
        """How many spans the template marks in the first messages."""
        return len(self._run(conversation, upto, **MARKS)[1])

    def _run(
        self, conversation: Conversation, upto: int | None, **options: Any
    ) -> tuple[str, list[Span]]:
        """The first messages as text, and the spans that the template marks in it."""
        # typed as str upstream, but it returns texts and spans
        rendered: Any = render_jinja_template(
            conversations=[conversation.messages[:upto]],
            tools=conversation.tools,
            chat_template=self._template,
            **self._variables,
            **options,
        )
        texts, spans = rendered
        return texts[0], [cast(Span, tuple(span)) for span in spans[0]] if spans else []

    def _compare_prefixes(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """Each assistant turn is what its rendering adds to the prompt before it."""
        text = self._apply(conversation)
        turns = [
            index
            for index, message in enumerate(conversation.messages)
            if message["role"] == "assistant" and index not in conversation.context
        ]
        self._prefixes = self._prefixes or Prefixes(self._template, self._variables)
        prefix = self._prefixes.of(
            conversation,
            text,
            turns,
            lambda upto, prompt: self._apply(conversation, upto, prompt=prompt),
            with_both=bool(self._eos),
        )
        return text, [self._find_turn(prefix, index, text) for index in turns]

    def _find_turn(self, prefix: Find, index: int, text: str) -> Span:
        self._proceed()
        before = prefix(index, True)
        upto = self._without_eos(prefix, index + 1, text)
        start = before.shared + len(before.rest)
        if text.startswith(before.rest, before.shared):
            turn = None
            if start <= upto.shared:
                turn = text[start : upto.shared] + upto.rest
            elif upto.rest.startswith(text[upto.shared : start]):
                turn = upto.rest[start - upto.shared :]
            if turn is not None and text.startswith(turn, start):
                return start, start + len(turn)
            answer = REASONING.sub("", turn or "", count=1)
            if answer and text.startswith(answer, start):
                return start, start + len(answer)
        raise RowRefused(
            "the chat template has no {% generation %} marks, and it renders a turn "
            "otherwise once later turns follow, so the assistant's tokens cannot be found",
            "Add {% generation %} marks to the template, or train on single turns.",
        )

    def _without_eos(self, prefix: Find, upto: int, text: str) -> Prefix:
        """The rendering without the eos that ends the conversation and not its last turn (Phi).

        A next turn takes it off. Where it is the turn's only end, it is still found as the token
        that follows.
        """
        found = prefix(upto, False)
        size = len(self._eos)
        end = text[max(0, found.shared - size) : found.shared] + found.rest
        if not (size and end.endswith(self._eos)):
            return found
        if prefix(upto, True).rest.startswith(found.rest):  # as far as they share they are equal
            return found
        kept = len(found.rest) - size
        return Prefix(found.shared + min(0, kept), found.rest[: max(0, kept)])

    def _tokenise(self, text: str) -> Tokens:
        ids: list[int] = []
        offsets = []
        start = 0
        for piece in text.split(CUT):
            encoded = self._tokenizer(
                piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            ids += encoded["input_ids"]
            offsets.append(np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2) + start)
            start += len(piece) + len(CUT)
        starts, ends = np.concatenate(offsets).T
        special = np.isin(ids, list(self._special))
        return Tokens(np.array(ids, np.int32), starts, ends, special)


def _mask(tokens: Tokens, text: str, spans: list[Span]) -> Bool[np.ndarray, " length"]:
    in_loss = np.zeros(len(tokens.ids), dtype=bool)
    is_ordered = bool((np.diff(tokens.starts) >= 0).all() and (np.diff(tokens.ends) >= 0).all())
    for start, end in spans:
        near = _near(tokens, start, end) if is_ordered else slice(None)
        starts, ends, special = tokens.starts[near], tokens.ends[near], tokens.special[near]
        # An answer's first token may begin before it (" Hello" after "ASSISTANT: "); a special
        # token that takes in the blanks after it may reach into it.
        begins = (starts >= start) | ((ends > start) & ~special)
        inside = np.flatnonzero(begins & (starts < end)) + (near.start or 0)
        if inside.size:
            in_loss[inside[0] : _end_of_turn(tokens, text, inside, end)] = True
    return in_loss


def _near(tokens: Tokens, start: int, end: int) -> slice:
    """All tokens that begin or end within a span, found without a look at the others."""
    first = min(np.searchsorted(tokens.starts, start), np.searchsorted(tokens.ends, start, "right"))
    return slice(int(first), int(np.searchsorted(tokens.starts, end)))


def _end_of_turn(tokens: Tokens, text: str, inside: Int64[np.ndarray, " turn"], end: int) -> int:
    """One past the last token of a turn that is learnt: its end-of-turn token.

    Templates differ in whether their marks leave that token out, or take in the line break that
    follows it.
    """
    last = int(inside[-1])
    if (special := inside[tokens.special[inside]]).size:
        following = int(special[-1]) + 1
        if following > last or not text[tokens.starts[following] : end].strip():
            return following
    if last + 1 < len(tokens.ids) and tokens.special[last + 1]:
        return last + 2
    return last + 1


def _clock(today: datetime) -> dict[str, str]:
    """What each directive of ``strftime`` stands for; ``%%`` is taken out first, and put back."""
    letters = [flag + letter for flag in ("", "-") for letter in string.ascii_letters]
    directives = {f"%{letter}": today.strftime(f"%{letter}") for letter in letters}
    return {"%%": "\0", **directives, "\0": "%"}
