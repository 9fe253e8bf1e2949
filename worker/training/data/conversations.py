"""From a row in one of five shapes to a conversation.

chat               {"messages": [{"role", "content"}, …], "tools"?: […]}
sharegpt           {"conversations": [{"from", "value"}, …], "system"?, "tools"?}
alpaca             {"instruction", "input"?, "output", "system"?}
prompt_completion  {"prompt", "completion"}: two strings, or two lists of messages
text               {"text"}: no conversation; only where it is asked for

A message is OpenAI's: an assistant's may hold ``tool_calls``, ``reasoning_content``, and
``weight`` 0 if it is context that is not learnt. The role ``developer`` is read as ``system``.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from worker.training.data.messages import (
    Found,
    Message,
    RowProblem,
    as_list,
    as_objects,
    as_text,
    as_tool_calls,
    as_tools,
    parsed,
    read_messages,
    weight_of,
)
from worker.training.data.words import shown

RowFormat = Literal["chat", "sharegpt", "alpaca", "prompt_completion", "text"]

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
# What tells a format, most telling first, and what each may hold besides.
SIGNS: dict[RowFormat, tuple[str, ...]] = {
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
RECOGNISED: tuple[RowFormat, ...] = ("chat", "sharegpt", "prompt_completion", "alpaca")
OPTIONAL: dict[RowFormat, tuple[str, ...]] = {
    "chat": ("tools",),
    "sharegpt": ("system", "tools"),
    "prompt_completion": ("tools",),
    "alpaca": ("input", "system"),
    "text": (),
}


@dataclass(frozen=True)
class Conversation:
    """Messages in the form that chat templates read.

    Attributes:
        messages: In order, each with role and content.
        tools: Descriptions of the tools that the assistant may call.
        context: Which of the assistant's messages are read and not learnt.
        text: Plain text in place of messages, all of which is learnt.
    """

    messages: list[Message]
    tools: list[Any] | None = None
    context: frozenset[int] = frozenset()
    text: str | None = None

    def canonical(self) -> str:
        """Equal for equal conversations, whatever file or format they came from."""
        held = self.text if self.text is not None else [self.messages, self.tools]
        return json.dumps(held, sort_keys=True, ensure_ascii=False)


def recognise_format(values: Mapping[str, Any], mapping: Mapping[str, str]) -> RowFormat:
    """The format of a row, by its columns.

    Raises:
        RowProblem: If its columns belong to no format.
    """
    columns = _renamed(values, mapping)
    for name in RECOGNISED:
        if all(sign in columns for sign in SIGNS[name]):
            return name
    expected = "; ".join(" and ".join(SIGNS[name]) for name in RECOGNISED)
    if "text" in columns:
        expected += "; or text, where data.format asks for it"
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
    """Names that a format reads; of all that can be recognised if it is not known yet."""
    formats = [row_format] if row_format else RECOGNISED
    return {name for format_ in formats for name in (*SIGNS[format_], *OPTIONAL[format_])}


def _renamed(values: Mapping[str, Any], mapping: Mapping[str, str]) -> dict[str, Any]:
    """A column that is mapped wins over one that has the expected name by chance."""
    taken = {*mapping, *mapping.values()}
    kept = {name: value for name, value in values.items() if name not in taken}
    mapped = {ours: values[theirs] for ours, theirs in mapping.items() if theirs in values}
    return kept | mapped


def _read_chat(row: Mapping[str, Any]) -> Conversation:
    messages, context = read_messages(row["messages"], "messages")
    return Conversation(messages, as_tools(row.get("tools")), context)


def _read_sharegpt(row: Mapping[str, Any]) -> Conversation:
    turns = as_list(row["conversations"], "conversations")
    messages = []
    context = []
    for index, turn in enumerate(turns):
        place = f"conversations[{index}]"
        if not isinstance(turn, dict):
            raise RowProblem(place, "an object with from and value", turn)
        role = SHAREGPT_ROLES.get(str(turn.get("from")).lower())
        if role is None:
            known = ", ".join(SHAREGPT_ROLES)
            raise RowProblem(f"{place}.from", f"one of {known}", turn.get("from"))
        if role == "assistant" and weight_of(turn, place) == 0:
            context.append(index)
        value = as_text(turn.get("value"), f"{place}.value")
        if str(turn["from"]).lower() == "function_call":
            calls = _function_calls(value, f"{place}.value")
            messages.append({"role": role, "content": "", "tool_calls": calls})
        else:
            messages.append({"role": role, "content": value})
    whole = _with_system(row, messages)
    later = len(whole) - len(messages)
    learnt_not = frozenset(index + later for index in context)
    return Conversation(whole, as_tools(row.get("tools")), learnt_not)


def _function_calls(text: str, place: str) -> list[Any]:
    """Calls as LLaMA-Factory writes them: the JSON of ``{"name", "arguments"}``, or a list."""
    value = parsed(text, place, "the JSON of an object with name and arguments, or of a list")
    calls = as_objects(value if isinstance(value, list) else [value], place)
    for index, call in enumerate(calls):
        if not isinstance(call.get("name"), str):
            raise RowProblem(f"{place}[{index}].name", "a string", call.get("name"))
    functions = [{"name": call["name"], "arguments": call.get("arguments", {})} for call in calls]
    return as_tool_calls([{"type": "function", "function": f} for f in functions], place)


def _read_alpaca(row: Mapping[str, Any]) -> Conversation:
    question = as_text(row["instruction"], "instruction")
    context = row.get("input")
    if context not in (None, ""):
        question = f"{question}\n\n{as_text(context, 'input')}"
    answer = as_text(row["output"], "output")
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(_with_system(row, turns))


def _read_prompt_completion(row: Mapping[str, Any]) -> Conversation:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        before, _ = read_messages(prompt, "prompt")
        answer, unlearnt = read_messages(completion, "completion")
        if not any(message["role"] == "assistant" for message in answer):
            roles = ", ".join(message["role"] for message in answer)
            raise RowProblem("completion", "an assistant turn to learn from", Found(roles))
        context = {i for i, message in enumerate(before) if message["role"] == "assistant"}
        context |= {len(before) + index for index in unlearnt}
        return Conversation(before + answer, as_tools(row.get("tools")), frozenset(context))
    return Conversation(
        [
            {"role": "user", "content": as_text(prompt, "prompt")},
            {"role": "assistant", "content": as_text(completion, "completion")},
        ]
    )


def _read_text(row: Mapping[str, Any]) -> Conversation:
    return Conversation([], text=as_text(row["text"], "text"))


READERS: dict[RowFormat, Callable[[Mapping[str, Any]], Conversation]] = {
    "chat": _read_chat,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "prompt_completion": _read_prompt_completion,
    "text": _read_text,
}


def _with_system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    system = row.get("system")
    if system in (None, ""):
        return messages
    return [{"role": "system", "content": as_text(system, "system")}, *messages]


def _check_turns(conversation: Conversation) -> None:
    if conversation.text is not None:
        return
    roles = [message["role"] for message in conversation.messages]
    answers = {index for index, role in enumerate(roles) if role == "assistant"}
    if answers <= conversation.context:
        found = "weight 0 on each" if answers else ", ".join(roles)
        raise RowProblem("messages", "an assistant turn to learn from", Found(found))
    if "system" in roles[1:]:
        index = roles.index("system", 1)
        raise RowProblem(f"messages[{index}].role", "system only at the start", "system")
    first = roles[1] if roles[0] == "system" and len(roles) > 1 else roles[0]
    if first != "user":
        raise RowProblem("messages", "a user turn before the first answer", Found(", ".join(roles)))
