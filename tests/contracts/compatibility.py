"""What of one OpenAPI document breaks a client that was written for an earlier one.

One question is asked of every schema: is all that is *given* among what is *taken*? Of a request
the old client gives and the new service takes, of an answer the other way round. Two things are
more lenient with answers, as clients are told to read them so: fields and values of an enum that
are new there are passed over.

No library: those of Python that compare documents are young, or read OpenAPI 3.0 alone.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Json = dict[str, Any]
Way = Literal["request", "answer"]
METHODS = {"get", "put", "post", "delete", "patch", "head", "options"}
KINDS: dict[type, str] = {
    bool: "boolean", str: "string", int: "integer", float: "number", type(None): "null",
    dict: "object", list: "array",
}  # fmt: skip
LEAST = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
MOST = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")


def breaking_changes(released: Json, present: Json) -> list[str]:
    """A sentence for each; none where every client of the released document still works."""
    found: list[str] = []
    kept: list[Json] = []
    routes = {_anonymous(path): item for path, item in present["paths"].items()}
    for path, item in released["paths"].items():
        for method in METHODS & set(item):
            name = f"{method.upper()} {path}"
            operation = routes.get(_anonymous(path), {}).get(method)
            if operation is None:
                found.append(f"{name} is gone.")
                continue
            kept.append(item[method])
            old, new = Document(released, item[method]), Document(present, operation)
            found += [f"{name}: {change}" for change in _of_operation(old, new)]
    gone = set().union(*map(_codes, kept)) - set().union(*map(_codes, _operations(present)))
    return sorted([*found, *(f"No error has the code {code} any more." for code in gone)])


def _operations(document: Json) -> list[Json]:
    items = document["paths"].values()
    return [operation for item in items for name, operation in item.items() if name in METHODS]


@dataclass(frozen=True)
class Document:
    """A node of a document, with the whole, in which its references lead."""

    whole: Json
    node: Any

    def at(self, *names: str) -> "Document | None":
        node = self
        for name in names:
            if name not in node.node:
                return None
            node = Document(self.whole, node.node[name]).resolved()
        return node

    def items(self) -> Iterator[tuple[str, "Document"]]:
        for name, node in (self.node or {}).items():
            yield name, Document(self.whole, node).resolved()

    def resolved(self) -> "Document":
        node = self.node
        while isinstance(node, dict) and isinstance(node.get("$ref"), str):
            target: Any = self.whole
            for part in node["$ref"].removeprefix("#/").split("/"):
                target = target[part]
            node = target
        return Document(self.whole, node)

    def alternatives(self) -> list["Document"]:
        """The schema as schemas of one kind each."""
        assert not {"allOf", "not", "if"} & set(self.node), "not read here"
        for union in ("anyOf", "oneOf"):
            if union in self.node:
                parts = [Document(self.whole, part).resolved() for part in self.node[union]]
                return [one for part in parts for one in part.alternatives()]
        kinds = self.node.get("type")
        if isinstance(kinds, list):
            return [Document(self.whole, {**self.node, "type": kind}) for kind in kinds]
        return [self]

    @property
    def kind(self) -> str | None:
        """None is any."""
        if (values := self.values) is not None:
            return KINDS[type(values[0])]
        found: str | None = self.node.get("type")
        return found

    @property
    def values(self) -> list[Any] | None:
        """All that there are, where the schema lists them."""
        if "const" in self.node:
            return [self.node["const"]]
        found: list[Any] | None = self.node.get("enum")
        return found


def _anonymous(path: str) -> str:
    """The path without the names of its parts: those are not on the wire."""
    return "/".join("{}" if part.startswith("{") else part for part in path.split("/"))


def _of_operation(old: Document, new: Document) -> Iterator[str]:
    yield from _of_parameters(old, new)
    yield from _of_bodies(old, new)
    yield from _of_answers(old, new)


def _of_parameters(old: Document, new: Document) -> Iterator[str]:
    before, now = _parameters(old), _parameters(new)
    for name, parameter in before.items():
        if name not in now:
            yield f"the parameter {name} is gone."
            continue
        given, taken = parameter.at("schema"), now[name].at("schema")
        if given and taken:
            yield from Comparison("request").fits(given, taken, f"the parameter {name}")
    for name, parameter in now.items():
        is_old = name in before and before[name].node.get("required")
        if parameter.node.get("required") and not is_old:
            yield f"the parameter {name} is required now."


def _parameters(operation: Document) -> Mapping[str, Document]:
    nodes = [Document(operation.whole, node).resolved() for node in _list(operation)]
    return {node.node["name"]: node for node in nodes if node.node["in"] != "path"}


def _list(operation: Document) -> list[Json]:
    found: list[Json] = operation.node.get("parameters", [])
    return found


def _of_bodies(old: Document, new: Document) -> Iterator[str]:
    before, now = old.at("requestBody"), new.at("requestBody")
    if now and now.node.get("required") and not (before and before.node.get("required")):
        yield "a body is required now."
    if before:
        yield from _of_contents(before, now, "request", "the body")


def _of_answers(old: Document, new: Document) -> Iterator[str]:
    before = dict(Document(old.whole, old.node["responses"]).items())
    now = dict(Document(new.whole, new.node["responses"]).items())
    for status in {**before, **now}:
        ours = before.get(status) or _other(before, status)
        theirs = now.get(status) or _other(now, status)
        if theirs is None:
            if status.startswith("2"):
                yield f"it is not answered with {status} any more."
        elif ours:
            yield from _of_contents(ours, theirs, "answer", f"the answer {status}")
            if status in before and status in now:
                yield from _of_headers(ours, theirs, f"the answer {status}")


def _other(answers: Mapping[str, Document], status: str) -> Document | None:
    """What an error is by ``default``, where its status has no entry."""
    return answers.get("default") if status.startswith(("4", "5")) else None


def _of_headers(old: Document, new: Document, what: str) -> Iterator[str]:
    before, now = ({k.lower(): v for k, v in _headers(one)} for one in (old, new))
    for name, header in before.items():
        where = f"{what}, header {name}"
        if name not in now:
            yield f"{where} is gone."
            continue
        if header.node.get("required") and not now[name].node.get("required"):
            yield f"{where} may be missing now."
        ours, theirs = header.at("schema"), now[name].at("schema")
        if ours and theirs:
            yield from Comparison("answer").fits(theirs, ours, where)


def _headers(answer: Document) -> Iterator[tuple[str, Document]]:
    yield from Document(answer.whole, answer.node.get("headers")).items()


def _codes(operation: Json) -> set[str]:
    """Of the errors that it lists."""
    answers = operation["responses"].values()
    return {code for answer in answers for code in answer.get("x-codes", [])}


def _of_contents(old: Document, new: Document | None, way: Way, what: str) -> Iterator[str]:
    for media_type, before in Document(old.whole, old.node.get("content")).items():
        now = new.at("content", media_type) if new else None
        if now is None:
            yield f"{what} is not {media_type} any more."
            continue
        schemas = before.at("schema"), now.at("schema")
        given, taken = schemas if way == "request" else schemas[::-1]
        if given and taken:
            yield from Comparison(way).fits(given, taken, what)


@dataclass
class Comparison:
    """Of two schemas, and all that is in them."""

    way: Way
    begun: set[tuple[int, int]] = field(default_factory=set)
    """Schemas may hold themselves."""

    def fits(self, given: Document, taken: Document, where: str) -> Iterator[str]:
        """Why not all that is given is taken."""
        for one in given.alternatives():
            others = [other for other in taken.alternatives() if _is_within(one.kind, other.kind)]
            if others:
                yield from self._nearest(one, others, where)
            elif self.way == "request":
                yield f"{where} may not be {one.kind or 'anything'} any more."
            else:
                yield f"{where} may be {one.kind or 'anything'} now."

    def _nearest(self, one: Document, others: list[Document], where: str) -> list[str]:
        """The least that is wrong with it, among what it may be meant as.

        Values of an enum are spread over alternatives at times: what one lacks another may have.
        """
        if one.values is not None and all(other.values is not None for other in others):
            known = [value for other in others for value in other.values or []]
            others = [Document(one.whole, {"enum": known})]
        tries = [Comparison(self.way, {*self.begun}).one(one, other, where) for other in others]
        return min(map(list, tries), key=len)

    def one(self, given: Document, taken: Document, where: str) -> Iterator[str]:
        if self.way == "request":
            yield from _values(given, taken, where)
            yield from _bounds(given, taken, where)
        yield from self._properties(given, taken, where)
        for part in ("items", "additionalProperties"):
            ours, theirs = given.node.get(part), taken.node.get(part)
            if isinstance(ours, dict) and isinstance(theirs, dict):
                inner = [Document(one.whole, one.node[part]).resolved() for one in (given, taken)]
                yield from self.fits(inner[0], inner[1], f"{where}/*")

    def _properties(self, given: Document, taken: Document, where: str) -> Iterator[str]:
        pair = id(given.node.get("properties")), id(taken.node.get("properties"))
        if pair in self.begun:
            return
        if given.node.get("properties"):
            self.begun.add(pair)
        ours, theirs = _fields(given), _fields(taken)
        always, asked = (set(one.node.get("required", [])) for one in (given, taken))
        for name in sorted(ours.keys() & theirs):
            yield from self.fits(ours[name], theirs[name], f"{where}/{name}")
        if self.way == "request":
            for name in sorted(asked - always):
                yield f"{where}/{name} is required now."
            for name in sorted(ours.keys() - theirs if theirs else []):
                yield f"{where}/{name} is not taken any more."
            if _is_open(given) and not _is_open(taken):
                yield f"{where} takes no other fields any more."
        else:
            for name in sorted(theirs.keys() - ours):
                yield f"{where}/{name} is gone."
            for name in sorted((asked - always) & ours.keys()):
                yield f"{where}/{name} may be missing now."


def _fields(schema: Document) -> dict[str, Document]:
    properties = schema.at("properties")
    return dict(properties.items()) if properties else {}


def _is_open(schema: Document) -> bool:
    return schema.node.get("additionalProperties", True) is not False


def _is_within(given: str | None, taken: str | None) -> bool:
    return taken in {None, given} or (given, taken) == ("integer", "number")


def _values(given: Document, taken: Document, where: str) -> Iterator[str]:
    if taken.values is None:
        return
    if given.values is None:
        yield f"{where} may be only one of {taken.values} now."
        return
    for value in given.values:
        if value not in taken.values:
            yield f"{where} may not be {value!r} any more."


def _bounds(given: Document, taken: Document, where: str) -> Iterator[str]:
    for name in (*LEAST, *MOST):
        ours, theirs = given.node.get(name), taken.node.get(name)
        if theirs is None:
            continue
        is_narrower = ours is None or (theirs > ours if name in LEAST else theirs < ours)
        if is_narrower and not _is_implied(given, name, theirs):
            yield f"{where}: {name} is {theirs} now, and was {ours}."
    if (pattern := taken.node.get("pattern")) and pattern != given.node.get("pattern"):
        yield f"{where} has to match {pattern} now."


def _is_implied(given: Document, name: str, bound: float) -> bool:
    """Whether the values that are listed keep to a bound anyway."""
    lengths = [len(v) if isinstance(v, str) else v for v in given.values or []]
    kept = [v >= bound if name in LEAST else v <= bound for v in lengths]
    return bool(kept) and all(kept)
