"""What the command line prints, and with which code it ends.

0 done · 1 the job failed, or the service refused · 2 wrong usage · 3 the job was cancelled ·
4 the service cannot be reached · 130 Ctrl-C
"""

import json
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

OK, FAILED, USAGE, CANCELLED, UNREACHABLE = range(5)
INTERRUPTED = 130  # as shells say it: 128 and the number of SIGINT

PIPED_WIDTH = 400  # of tables: for other programs a line is a row

out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else PIPED_WIDTH)
err = Console(stderr=True, soft_wrap=True)


def print_json(value: Any) -> None:
    """Plain JSON for other programs: no colours, no wrapping."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def print_json_line(value: Any) -> None:
    """One of many that come one after the other: a line, which leaves at once."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_error(message: str, hint: str | None = None) -> None:
    """A name of the user's is data: brackets in it are not markup."""
    err.print(f"[bold red]error[/]: {escape(message)}", highlight=False)
    if hint:
        err.print(f"[dim]hint[/]: {escape(hint)}", highlight=False)


def fail(message: str, hint: str | None = None, *, code: int = FAILED) -> NoReturn:
    print_error(message, hint)
    raise typer.Exit(code)


def fail_with_problem(problem: Mapping[str, Any], *, as_json: bool, code: int = FAILED) -> NoReturn:
    """Show an RFC 9457 problem: its sentence, each fault, the hint; as JSON the whole of it too."""
    if as_json:
        print_json({"error": problem})
    lines = [str(problem.get("detail") or problem.get("title") or "the request failed")]
    lines += [
        f"  {fault.get('pointer', '')}: {fault.get('detail', '')}"
        for fault in problem.get("errors", [])
    ]
    fail("\n".join(lines), problem.get("hint"), code=code)
