"""What the command line prints, and with which code it ends.

0 done · 1 the job failed, or the service refused · 2 wrong usage · 3 the job was cancelled ·
4 the service cannot be reached
"""

import json
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import typer
from rich.console import Console

OK, FAILED, USAGE, CANCELLED, UNREACHABLE = range(5)

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


def print_json(value: Any) -> None:
    """Plain JSON for other programs: no colours, no wrapping."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def fail(message: str, hint: str | None = None, *, code: int = FAILED) -> NoReturn:
    err.print(f"[bold red]error[/]: {_plain(message)}", highlight=False)
    if hint:
        err.print(f"[dim]hint[/]: {_plain(hint)}", highlight=False)
    raise typer.Exit(code)


def fail_with_problem(problem: Mapping[str, Any]) -> NoReturn:
    """Show an RFC 9457 problem: its sentence, each fault, the hint."""
    lines = [str(problem.get("detail") or problem.get("title") or "the request failed")]
    lines += [
        f"  {fault.get('pointer', '')}: {fault.get('detail', '')}"
        for fault in problem.get("errors", [])
    ]
    fail("\n".join(lines), problem.get("hint"))


def _plain(text: str) -> str:
    """A job's name is data: brackets in it are not markup."""
    return text.replace("[", "\\[")
