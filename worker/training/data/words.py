"""What stands in a row, in words for a message: short, and every letter of it printable."""

from typing import Any


def shown(text: str, limit: int = 200) -> str:
    """Text from data or a library, as a part of a message.

    What no terminal or database takes (control characters, lone surrogates) is escaped.
    """
    escaped = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: limit + 1])
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"


def describe(value: Any) -> str:
    """A JSON value in a few words, for an error."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"the number {shown(str(value), 40)}"
        case str():
            return "an empty string" if not value else f"the string {value[:40]!r}"
        case list():
            return "an empty list" if not value else f"a list of {len(value)}"
        case dict():
            names = ", ".join(sorted(map(str, value))[:6])
            return f"an object with {shown(names) or 'no fields'}"
    return type(value).__name__
