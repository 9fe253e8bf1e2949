"""From a conversation to token ids and a mask of what the loss is taken on.

The mask comes from the template's ``{% generation %}`` marks where it has them; where it has not,
each assistant turn is what a rendering with that turn adds to the rendering up to it. A template
for which earlier turns change when later ones are added has no such turns, and is refused.

Text in the data that spells a special token stays text: such a spelling is cut in two before the
template sees it, and the rendering is tokenised in pieces that end at the cut.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from jaxtyping import Bool, Int32
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from worker.training.conversations import Conversation, Message
from worker.training.errors import ConfigInvalid

LossOn = Literal["assistant", "last_assistant", "all"]
Span = tuple[int, int]

GENERATION_MARK = re.compile(r"{%-?\s*generation\s*-?%}")
CUT = "\ue0f1"  # a private-use character: no template writes it, and no row may hold it


@dataclass(frozen=True)
class Example:
    """One row as the model sees it."""

    ids: Int32[np.ndarray, " length"]
    in_loss: Bool[np.ndarray, " length"]

    @property
    def targets(self) -> int:
        """Tokens that the loss is taken on. The first token of a row is never predicted."""
        return int(self.in_loss[1:].sum())

    def cut(self, max_length: int) -> "Example":
        """The first ``max_length`` tokens."""
        return Example(self.ids[:max_length], self.in_loss[:max_length])


class Renderer:
    """Renders conversations with one tokenizer's chat template.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        loss_on: ``"assistant"`` turns, the ``"last_assistant"`` turn, or ``"all"`` tokens.

    Raises:
        ConfigInvalid: If the tokenizer has no chat template, or cannot tell where tokens begin.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> None:
        if not isinstance(tokenizer.chat_template, str):
            raise ConfigInvalid(
                "The base model's tokenizer has no chat template.",
                "Use an instruction-tuned base model, or put a chat_template.jinja in its folder.",
            )
        if not tokenizer.is_fast:
            raise ConfigInvalid("The base model has no fast tokenizer (tokenizer.json).", None)
        self._tokenizer = tokenizer
        self._template: str = tokenizer.chat_template
        self._has_marks = GENERATION_MARK.search(self._template) is not None
        self._loss_on = loss_on
        added = tokenizer.added_tokens_decoder
        self._special_ids = {index for index, token in added.items() if token.special}
        spellings = sorted((str(token) for token in added.values()), key=len, reverse=True)
        self._spelling = re.compile("|".join(map(re.escape, spellings)) or r"(?!)")

    def render(self, conversation: Conversation) -> Example:
        """Token ids and loss mask of a whole conversation.

        Raises:
            ConfigInvalid: If the template cannot say where the assistant's turns are.
        """
        messages = [self._cut_spellings(message) for message in conversation.messages]
        safe = Conversation(messages, conversation.tools)
        text, spans = self._text_and_spans(safe)
        ids, starts = self._tokenise(text)
        in_loss = self._mask(ids, starts, text, spans)
        return Example(np.array(ids, dtype=np.int32), in_loss)

    def segments(self, example: Example) -> list[dict[str, Any]]:
        """An example as text, in pieces that are in the loss or not, for a person to look at."""
        pieces: list[dict[str, Any]] = []
        changes = np.flatnonzero(np.diff(example.in_loss)) + 1
        for ids, in_loss in zip(
            np.split(example.ids, changes), np.split(example.in_loss, changes), strict=True
        ):
            text = self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)
            pieces.append({"text": text, "in_loss": bool(in_loss[0])})
        return pieces

    def _cut_spellings(self, message: Message) -> Message:
        content = message["content"].replace(CUT, "")
        cut = self._spelling.sub(lambda found: found[0][:1] + CUT + found[0][1:], content)
        return {**message, "content": cut}

    def _text_and_spans(self, conversation: Conversation) -> tuple[str, list[Span]]:
        messages = conversation.messages
        if self._loss_on == "all":
            text = self._apply(conversation, messages)
            return text, [(0, len(text))]
        if self._has_marks:
            text, spans = self._apply_marked(conversation)
        else:
            text, spans = self._compare_prefixes(conversation)
        if not spans:
            raise ConfigInvalid(
                "The chat template renders no assistant turn.", "Check its {% generation %} marks."
            )
        return text, spans[-1:] if self._loss_on == "last_assistant" else spans

    def _apply(
        self, conversation: Conversation, messages: list[Message], *, prompt: bool = False
    ) -> str:
        return self._render(conversation, messages, add_generation_prompt=prompt)[0]

    def _apply_marked(self, conversation: Conversation) -> tuple[str, list[Span]]:
        return self._render(conversation, conversation.messages, return_assistant_tokens_mask=True)

    def _render(
        self, conversation: Conversation, messages: list[Message], **options: Any
    ) -> tuple[str, list[Span]]:
        import jinja2

        try:
            arguments: dict[str, Any] = {**self._tokenizer.special_tokens_map, **options}
            # typed as str upstream, but it returns texts and spans
            rendered: Any = render_jinja_template(
                conversations=[messages],
                tools=conversation.tools,
                chat_template=self._template,
                **arguments,
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ConfigInvalid(
                f"The chat template refuses a conversation of {roles}: {error}.",
                "Reorder or drop the turns that this base model's template does not allow.",
            ) from error
        texts, spans = rendered
        return texts[0], [cast(Span, tuple(span)) for span in spans[0]] if spans else []

    def _compare_prefixes(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """Each assistant turn is what its rendering adds to the prompt before it."""
        messages = conversation.messages
        text = self._apply(conversation, messages)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._apply(conversation, messages[:index], prompt=True)
            upto = self._apply(conversation, messages[: index + 1])
            if not (upto.startswith(before) and text.startswith(upto)):
                raise ConfigInvalid(
                    "The chat template has no {% generation %} marks, and it renders a turn "
                    "otherwise once later turns follow, so the assistant's tokens cannot be found.",
                    "Add {% generation %} marks to the template, or train on single turns.",
                )
            spans.append((len(before), len(upto)))
        return text, spans

    def _tokenise(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids, and where in the text (cuts included) each token begins."""
        ids: list[int] = []
        starts: list[int] = []
        offset = 0
        for piece in text.split(CUT):
            encoded = self._tokenizer(
                piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            ids += encoded["input_ids"]
            starts += [offset + start for start, _ in encoded["offset_mapping"]]
            offset += len(piece) + len(CUT)
        return ids, starts

    def _mask(
        self, ids: list[int], starts: list[int], text: str, spans: list[Span]
    ) -> Bool[np.ndarray, " length"]:
        in_loss = np.zeros(len(ids), dtype=bool)
        position = np.array(starts)
        for start, end in spans:
            inside = np.flatnonzero((position >= start) & (position < end))
            if inside.size:
                stop = self._end_of_turn(ids, starts, text, inside, end)
                in_loss[inside[0] : stop] = True
        return in_loss

    def _end_of_turn(
        self, ids: list[int], starts: list[int], text: str, inside: np.ndarray, end: int
    ) -> int:
        """One past the last token of a turn that is learnt: its end-of-turn token.

        Templates differ in whether their marks leave that token out, or take in the line break
        that follows it.
        """
        last = int(inside[-1])
        special = [index for index in inside.tolist() if ids[index] in self._special_ids]
        if special:
            following = special[-1] + 1
            if following > last or not text[starts[following] : end].strip():
                return int(following)
        if last + 1 < len(ids) and ids[last + 1] in self._special_ids:
            return last + 2
        return last + 1
