"""Arguments and options that many commands share."""

from pathlib import Path
from typing import Annotated

import typer

JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job, job_…")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]
Labels = Annotated[list[str] | None, typer.Option("--label", help="KEY=VALUE; may be repeated.")]
PageSize = Annotated[int, typer.Option("--limit", min=1, max=100)]
After = Annotated[str | None, typer.Option("--after", help="Cursor of the next page.")]
IdempotencyKey = Annotated[
    str | None,
    typer.Option(
        "--idempotency-key",
        help="Given again with the same fields it gives the same job. Default: a new one.",
    ),
]
AsTar = Annotated[bool, typer.Option("--tar", help="As one tar instead.")]
Target = Annotated[
    Path | None,
    typer.Option("--to", help="Folder for the adapter, or file. Default: ./JOB, or ./JOB.tar"),
]
