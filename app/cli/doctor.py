"""``flatlora doctor``"""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from app.cli.output import FAILED, OK, out, print_json
from app.logs import configure_logs
from app.settings import get_settings

if TYPE_CHECKING:
    from app.doctor.finding import Finding

SIGNS = {"ok": "[green]ok  [/]", "warn": "[yellow]warn[/]", "fail": "[red]fail[/]"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")] = False,
) -> None:
    """Check all that the service stands on, and say what mends it. Exit code 1: something fails."""
    from app.doctor.examination import examine  # it looks at everything, so it imports much

    settings = get_settings()
    configure_logs(settings)  # knows the secrets that must not be shown
    findings = []
    for finding in examine(settings):
        findings.append(finding.as_json())
        if not as_json:
            show(finding)
    levels = [finding["level"] for finding in findings]
    is_well = "fail" not in levels
    if as_json:
        print_json({"ok": is_well, "checks": findings})
    else:
        fails, warns = levels.count("fail"), levels.count("warn")
        out.print(f"{len(levels)} checked: {fails} fail, {warns} warn", highlight=False)
    raise typer.Exit(OK if is_well else FAILED)


def show(finding: "Finding") -> None:
    said = {name: escape(text) for name, text in finding.as_json().items()}
    out.print(f"{SIGNS[said['level']]} [bold]{said['name']}[/]: {said['found']}", highlight=False)
    if said["level"] != "ok":
        out.print(f"     [dim]expected[/] {said['expected']}", highlight=False)
        out.print(f"     [dim]mend[/]     {said['mend']}", highlight=False)
