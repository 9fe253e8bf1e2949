"""The messages of a row, checked field by field: what is no message is named with its place."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from worker.training.data.words import describe, shown

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
MESSAGE_FIELDS = {"role", "content", "name", "tool_calls", "tool_call_id"}
ASSISTANT_FIELDS = {"reasoning_content", "weight"}

MAX_DEPTH = 64

# What no tokenizer or database keeps: NUL, surrogates, and noncharacters, of which rendering uses
# one for itself.
NO_TEXT = re.compile("[\0\ud800-\udfff\ufdd0-\ufdef]")


class RowProblem(Exception):
    """A row that is no conversation: which field, what was expected, what was found."""

    def __init__(self, field: str, expected: str, found: Any) -> None:
        text = shown(found) if isinstance(found, Found) else describe(found)
        super().__init__(f"{shown(field, 120)}: expected {expected}, found {text}")


class Found(str):
    """A finding in words of its own."""


def read_messages(value: Any, field: str) -> tuple[list[Message], frozenset[int]]:
    """The messages, and which of them have weight 0."""
    messages, context = [], []
    for index, item in enumerate(as_list(value, field)):
        message = _message(item, f"{field}[{index}]")
        if message.pop("weight", 1) == 0:
            context.append(index)
        messages.append(message)
    return messages, frozenset(context)


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise RowProblem(place, "an object with role and content", value)
    role = "system" if value.get("role") == "developer" else value.get("role")
    if role not in ROLES:
        raise RowProblem(f"{place}.role", f"one of {', '.join(ROLES)}", role)
    # Parquet writes every field of a struct, with null where the row had none.
    fields = {name: item for name, item in value.items() if item is not None} | {"role": role}
    may_have = MESSAGE_FIELDS | ASSISTANT_FIELDS if role == "assistant" else MESSAGE_FIELDS
    if unknown := fields.keys() - may_have:
        known = ", ".join(sorted(may_have))
        raise RowProblem(place, f"only the fields {known}", Found(", ".join(sorted(unknown))))
    for name in ("name", "tool_call_id", "reasoning_content"):
        if name in fields:
            _string(fields[name], f"{place}.{name}")
    weight_of(fields, place)
    if "tool_calls" in fields:
        fields["tool_calls"] = as_tool_calls(fields["tool_calls"], f"{place}.tool_calls")
    if role == "assistant" and fields.get("tool_calls"):
        return {**fields, "content": _content(fields.get("content", ""), place, may_be_empty=True)}
    may_be_empty = role == "tool"  # a command without output
    return {**fields, "content": _content(fields.get("content"), place, may_be_empty=may_be_empty)}


def weight_of(turn: Mapping[str, Any], place: str) -> int:
    """Whether an answer is learnt: 1, also where nothing is said, or 0.

    Raises:
        RowProblem: If it is anything else.
    """
    value = turn.get("weight")
    if value is None:
        return 1
    # Parquet knows no integer that may be missing: 1.0 is 1.
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in (0, 1):
        raise RowProblem(f"{place}.weight", "0 (context) or 1 (learnt)", value)
    return int(value)


def as_tool_calls(value: Any, place: str) -> list[Any]:
    """Calls with their arguments as values: what templates read, and servers give them.

    OpenAI's format has the arguments' JSON in a string.
    """
    calls = []
    for index, call in enumerate(as_objects(value, place)):
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            inside = f"{place}[{index}].function.arguments"
            arguments = parsed(function["arguments"] or "{}", inside, "the JSON of an object")
            if not isinstance(arguments, dict):
                raise RowProblem(inside, "the JSON of an object", arguments)
            _check_json(arguments, inside)
            calls.append({**call, "function": {**function, "arguments": arguments}})
        else:
            calls.append(call)
    return calls


def parsed(text: str, place: str, expected: str) -> Any:
    """The value whose JSON stands in a string."""
    try:
        return json.loads(text)
    except RecursionError:
        raise RowProblem(place, expected, Found("values nested too deeply")) from None
    except ValueError:
        raise RowProblem(place, expected, text) from None


def _content(value: Any, place: str, *, may_be_empty: bool = False) -> str:
    """A string, or the list of text parts that some clients write."""
    if isinstance(value, list) and value:
        value = "".join(_part(part, f"{place}.content[{i}]") for i, part in enumerate(value))
    if may_be_empty and value == "":
        return ""
    return as_text(value, f"{place}.content")


def _part(part: Any, place: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise RowProblem(place, 'a text part {"type": "text", "text": …}', part)


def as_text(value: Any, field: str) -> str:
    """A string that is not blank, every character of which a tokenizer can read."""
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
        case float() if not math.isfinite(value):
            raise RowProblem(place, "a number that JSON has", value)
        case None | bool() | int() | float():
            pass
        case _:
            raise RowProblem(place, "a JSON value", value)


def as_objects(value: Any, field: str) -> list[Any]:
    """A list of JSON objects, each checked to its leaves."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowProblem(field, "a list of objects", value)
    _check_json(value, field)
    return value


def as_list(value: Any, field: str) -> list[Any]:
    """A list that is not empty."""
    if not isinstance(value, list) or not value:
        raise RowProblem(field, "a list of messages", value)
    return value


def as_tools(value: Any) -> list[Any] | None:
    """Descriptions of tools: a list of objects, or the JSON of one; None if there are none."""
    if isinstance(value, str) and value:
        value = parsed(value, "tools", "a list of objects")
    return None if value in (None, "", []) else as_objects(value, "tools")
