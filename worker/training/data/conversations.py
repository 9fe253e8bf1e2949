"""From a row in one of four shapes to a conversation.

chat               {"messages": [{"role", "content"}, …], "tools"?: […]}
sharegpt           {"conversations": [{"from", "value"}, …], "system"?, "tools"?}
alpaca             {"instruction", "input"?, "output", "system"?}
prompt_completion  {"prompt", "completion"}: two strings, or two lists of messages
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from worker.training.data.words import describe, shown

RowFormat = Literal["chat", "sharegpt", "alpaca", "prompt_completion"]
Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
MESSAGE_FIELDS = {"role", "content", "name", "tool_calls", "tool_call_id"}

MAX_DEPTH = 64

# What no tokenizer or database keeps: NUL, surrogates, and noncharacters, of which rendering uses
# one for itself.
NO_TEXT = re.compile("[\0\ud800-\udfff\ufdd0-\ufdef]")

# What tells a format, most telling first, and what each may hold besides.
SIGNS: dict[RowFormat, tuple[str, ...]] = {
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}
OPTIONAL: dict[RowFormat, tuple[str, ...]] = {
    "chat": ("tools",),
    "sharegpt": ("system", "tools"),
    "prompt_completion": ("tools",),
    "alpaca": ("input", "system"),
}


class RowProblem(Exception):
    """A row that is no conversation: which field, what was expected, what was found."""

    def __init__(self, field: str, expected: str, found: Any) -> None:
        text = shown(found) if isinstance(found, Found) else describe(found)
        super().__init__(f"{shown(field, 120)}: expected {expected}, found {text}")


class Found(str):
    """A finding in words of its own."""


@dataclass(frozen=True)
class Conversation:
    """Messages in the form that chat templates read.

    Attributes:
        messages: In order, each with role and content.
        tools: Descriptions of the tools that the assistant may call.
        learnt_from: The first message that may be learnt, if answers before it are context.
    """

    messages: list[Message]
    tools: list[Any] | None = None
    learnt_from: int = 0

    def canonical(self) -> str:
        """Equal for equal conversations, whatever file or format they came from."""
        return json.dumps([self.messages, self.tools], sort_keys=True, ensure_ascii=False)


def recognise_format(values: Mapping[str, Any], mapping: Mapping[str, str]) -> RowFormat:
    """The format of a row, by its columns.

    Raises:
        RowProblem: If its columns belong to no format.
    """
    columns = _renamed(values, mapping)
    for name, signs in SIGNS.items():
        if all(sign in columns for sign in signs):
            return name
    expected = "; ".join(" and ".join(signs) for signs in SIGNS.values())
    raise RowProblem("columns", f"one of: {expected}", Found(", ".join(values) or "none"))


def to_conversation(
    values: Mapping[str, Any], row_format: RowFormat, mapping: Mapping[str, str]
) -> Conversation:
    """Read a row as a conversation.

    Args:
        values: The row.
        row_format: How to read it.
        mapping: Columns to rename: the name that the format expects → the name in the file.

    Raises:
        RowProblem: If the row does not have that shape.
    """
    columns = _renamed(values, mapping)
    for sign in SIGNS[row_format]:
        if sign not in columns:
            theirs = shown(mapping.get(sign, ""), 40)
            wanted = (
                f"the column {theirs} (data.mapping)" if theirs else f"a column of {row_format}"
            )
            raise RowProblem(sign, wanted, Found(f"only {', '.join(values)}"))
    conversation = READERS[row_format](columns)
    _check_turns(conversation)
    return conversation


def known_columns(row_format: RowFormat | None) -> set[str]:
    """Names that a format reads; of all formats if it is not known yet."""
    formats = [row_format] if row_format else list(SIGNS)
    return {name for format_ in formats for name in (*SIGNS[format_], *OPTIONAL[format_])}


def _renamed(values: Mapping[str, Any], mapping: Mapping[str, str]) -> dict[str, Any]:
    """A column that is mapped wins over one that has the expected name by chance."""
    taken = {*mapping, *mapping.values()}
    kept = {name: value for name, value in values.items() if name not in taken}
    mapped = {ours: values[theirs] for ours, theirs in mapping.items() if theirs in values}
    return kept | mapped


def _read_chat(row: Mapping[str, Any]) -> Conversation:
    return Conversation(_messages(row["messages"], "messages"), _tools(row.get("tools")))


def _read_sharegpt(row: Mapping[str, Any]) -> Conversation:
    turns = _list(row["conversations"], "conversations")
    messages = []
    for index, turn in enumerate(turns):
        place = f"conversations[{index}]"
        if not isinstance(turn, dict):
            raise RowProblem(place, "an object with from and value", turn)
        role = SHAREGPT_ROLES.get(str(turn.get("from")).lower())
        if role is None:
            known = ", ".join(SHAREGPT_ROLES)
            raise RowProblem(f"{place}.from", f"one of {known}", turn.get("from"))
        messages.append({"role": role, "content": _text(turn.get("value"), f"{place}.value")})
    return Conversation(_with_system(row, messages), _tools(row.get("tools")))


def _read_alpaca(row: Mapping[str, Any]) -> Conversation:
    question = _text(row["instruction"], "instruction")
    context = row.get("input")
    if context not in (None, ""):
        question = f"{question}\n\n{_text(context, 'input')}"
    answer = _text(row["output"], "output")
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(_with_system(row, turns))


def _read_prompt_completion(row: Mapping[str, Any]) -> Conversation:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        context = _messages(prompt, "prompt")
        turns = context + _messages(completion, "completion")
        has_answers = any(message["role"] == "assistant" for message in context)
        learnt_from = len(context) if has_answers else 0
        return Conversation(turns, _tools(row.get("tools")), learnt_from)
    return Conversation(
        [
            {"role": "user", "content": _text(prompt, "prompt")},
            {"role": "assistant", "content": _text(completion, "completion")},
        ]
    )


READERS: dict[RowFormat, Callable[[Mapping[str, Any]], Conversation]] = {
    "chat": _read_chat,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "prompt_completion": _read_prompt_completion,
}


def _messages(value: Any, field: str) -> list[Message]:
    return [_message(item, f"{field}[{index}]") for index, item in enumerate(_list(value, field))]


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise RowProblem(place, "an object with role and content", value)
    role = value.get("role")
    if role not in ROLES:
        raise RowProblem(f"{place}.role", f"one of {', '.join(ROLES)}", role)
    # Parquet writes every field of a struct, with null where the row had none.
    fields = {name: item for name, item in value.items() if item is not None}
    if unknown := fields.keys() - MESSAGE_FIELDS:
        known = ", ".join(sorted(MESSAGE_FIELDS))
        raise RowProblem(place, f"only the fields {known}", Found(", ".join(sorted(unknown))))
    for name in ("name", "tool_call_id"):
        if name in fields:
            _string(fields[name], f"{place}.{name}")
    if "tool_calls" in fields:
        _objects(fields["tool_calls"], f"{place}.tool_calls")
    if role == "assistant" and fields.get("tool_calls"):
        return {**fields, "content": _content(fields.get("content", ""), place, may_be_empty=True)}
    return {**fields, "content": _content(fields.get("content"), place)}


def _content(value: Any, place: str, *, may_be_empty: bool = False) -> str:
    """A string, or the list of text parts that some clients write."""
    if isinstance(value, list) and value:
        value = "".join(_part(part, f"{place}.content[{i}]") for i, part in enumerate(value))
    if may_be_empty and value == "":
        return ""
    return _text(value, f"{place}.content")


def _part(part: Any, place: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise RowProblem(place, 'a text part {"type": "text", "text": …}', part)


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RowProblem(field, "a non-empty string", value)
    return _string(value, field)


def _string(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise RowProblem(field, "a string", value)
    if bad := NO_TEXT.search(value):
        found = f"U+{ord(bad[0]):04X} at character {bad.start() + 1}"
        kind = "the lone surrogate" if "\ud800" <= bad[0] <= "\udfff" else "the character"
        raise RowProblem(field, "valid Unicode text", Found(f"{kind} {found}"))
    return value


def _check_json(value: Any, place: str, depth: int = 0) -> None:
    """Templates see these values as they are, so all that is in them is checked."""
    if depth > MAX_DEPTH:
        raise RowProblem(place, f"values nested at most {MAX_DEPTH} deep", Found("deeper ones"))
    match value:
        case str():
            _string(value, place)
        case list():
            for index, item in enumerate(value):
                _check_json(item, f"{place}[{index}]", depth + 1)
        case dict():
            for name, item in value.items():
                inside = f"{place}.{shown(_string(name, place), 40)}"
                _check_json(item, inside, depth + 1)
        case None | bool() | int() | float():
            pass
        case _:
            raise RowProblem(place, "a JSON value", value)


def _objects(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowProblem(field, "a list of objects", value)
    _check_json(value, field)
    return value


def _list(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise RowProblem(field, "a list of messages", value)
    return value


def _tools(value: Any) -> list[Any] | None:
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowProblem("tools", "a list of objects", value) from None
    return None if value in (None, "", []) else _objects(value, "tools")


def _with_system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    system = row.get("system")
    if system in (None, ""):
        return messages
    return [{"role": "system", "content": _text(system, "system")}, *messages]


def _check_turns(conversation: Conversation) -> None:
    roles = [message["role"] for message in conversation.messages]
    if "assistant" not in (learnt := roles[conversation.learnt_from :]):
        field = "completion" if conversation.learnt_from else "messages"
        raise RowProblem(field, "an assistant turn to learn from", Found(", ".join(learnt)))
    if "system" in roles[1:]:
        index = roles.index("system", 1)
        raise RowProblem(f"messages[{index}].role", "system only at the start", "system")
    first = roles[1] if roles[0] == "system" and len(roles) > 1 else roles[0]
    if first != "user":
        raise RowProblem("messages", "a user turn before the first answer", Found(", ".join(roles)))
