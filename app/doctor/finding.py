"""What a check has found."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum

from app.logs import blot
from app.settings import Settings


class Level(StrEnum):
    OK = "ok"
    WARN = "warn"
    """The service works, but worse than it could, or not for long."""
    FAIL = "fail"
    """Something that the service needs does not work."""


@dataclass(frozen=True)
class Finding:
    """``mend`` says what to do, where something is to be done."""

    name: str
    level: Level
    found: str
    expected: str = ""
    mend: str = ""

    def as_json(self) -> dict[str, str]:
        """Without the secrets that a URL or an error may hold."""
        return asdict(self) | {"found": blot(self.found)}


def ok(name: str, found: str, expected: str = "") -> Finding:
    return Finding(name, Level.OK, found, expected)


def warn(name: str, found: str, expected: str, mend: str) -> Finding:
    return Finding(name, Level.WARN, found, expected, mend)


def fail(name: str, found: str, expected: str, mend: str) -> Finding:
    return Finding(name, Level.FAIL, found, expected, mend)


@dataclass(frozen=True)
class Check:
    """Findings are taken as they come, so that what hangs late hides nothing that came before."""

    name: str
    run: Callable[[Settings], Iterator[Finding]]
    expected: str
    mend: str
    """What to do where the check itself ends in an error, or does not end."""
    seconds: float = 6
    """Its drivers give up after 5, and then say more than that nothing came."""


def told(error: BaseException) -> str:
    """The first line of an error that says something; drivers add pages to it."""
    text = str(getattr(error, "orig", None) or error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
