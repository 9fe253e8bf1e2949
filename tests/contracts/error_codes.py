"""The codes that the program has, those that docs/errors.md explains, and the tests that a name
leads to."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "errors.md"
REASON = "Reason "
POSITIONS = {"UriError": 0, "_refused": 2}
"""Functions that take a code without its name, and where."""
BY_SENTENCE = "a failed job's message, or an attempt of a delivery, tells it in a sentence"
NEVER_ANSWERED = {
    "conflict": "a class above others",
    "too_many_requests": "a class above others",
    "redirect_not_allowed": BY_SENTENCE,
    "host_not_found": BY_SENTENCE,
    "connection_failed": BY_SENTENCE,
    "tls_failed": BY_SENTENCE,
    "timed_out": BY_SENTENCE,
    "answer_refused": BY_SENTENCE,
    "answer_too_large": BY_SENTENCE,
}
BY_TABLE = {"invalid_api_key"}
"""Written in app/openai_api/shape.py as what another code is called."""


def codes_in_code() -> set[str]:
    """Every code that the program can answer with."""
    trees = (ast.parse(path.read_text()) for path in (ROOT / "app").rglob("*.py"))
    found = {code for tree in trees for node in ast.walk(tree) for code in _codes(node)}
    assert found >= NEVER_ANSWERED.keys(), "these codes are no more"
    return (found - NEVER_ANSWERED.keys()) | BY_TABLE


def _codes(node: ast.AST) -> Iterator[str]:
    """``code = "…"`` of a class, ``code="…"`` and ``{"code": "…"}``, and calls by position."""
    given: list[ast.expr | None] = []
    match node:
        case ast.ClassDef():
            for line in node.body:
                match line:
                    case ast.Assign(targets=[ast.Name(id="code")], value=value):
                        given.append(value)
                    case ast.AnnAssign(target=ast.Name(id="code"), value=value):
                        given.append(value)
        case ast.Call(func=ast.Name(id=name), args=args):
            given += [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            if name in POSITIONS and len(args) > POSITIONS[name]:
                given.append(args[POSITIONS[name]])
        case ast.Dict(keys=keys, values=values):
            pairs = zip(keys, values, strict=True)
            given += [v for k, v in pairs if isinstance(k, ast.Constant) and k.value == "code"]
    for value in given:
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value.value


@dataclass(frozen=True)
class Section:
    """Of docs/errors.md."""

    statuses: frozenset[int]
    says: str
    """What stands there in bold: the statuses, or whose a failure is."""
    cause: str
    cure: str


def sections() -> dict[str, Section]:
    """By their headings."""
    found: dict[str, Section] = {}
    for heading, body in re.findall(r"^### (.+)\n((?:(?!#).*\n?)*)", PAGE.read_text(), re.M):
        text = " ".join(body.split())
        parts = re.fullmatch(r"\*\*(.+?)\.\*\* (.+?[.)]) \*Do:\* (.+\.)", text)
        assert parts, f"{heading}: expected **status.** cause *Do:* cure; found {text!r}"
        assert heading not in found, f"{heading} is there twice"
        statuses = frozenset(map(int, re.findall(r"\d{3}", parts[1])))
        found[heading] = Section(statuses, *parts.groups())
    return found


def source_of(test: str) -> str:
    """The text of a test that is named as pytest names it, with its decorators."""
    path, *names = test.split("::")
    node: ast.AST = ast.parse((ROOT / path).read_text())
    for name in names:
        inner = [n for n in ast.iter_child_nodes(node) if getattr(n, "name", None) == name]
        assert inner, f"there is no {test}"
        node = inner[0]
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef), test
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return "\n".join((ROOT / path).read_text().splitlines()[first - 1 : node.end_lineno])
