"""The curves of a run as one picture: losses above, learning rate and σ below.

Drawn by ``svg.py`` and not by matplotlib: that brings ten packages to every worker, keeps a font
cache outside the job's folder, and writes one set of colours, where a model hub shows its pages
light or dark.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flatlora import sigma_at
from worker.training.config import TrainingJob
from worker.training.evaluation import best_of
from worker.training.optimizer import learning_rate_at
from worker.training.result.svg import Panel, Point, dot, line, number, text
from worker.training.state import State

WIDTH, HEIGHT, LEFT, RIGHT = 720, 520, 64, 24
SCHEDULE_POINTS = 200
LETTER = 6.6  # about the width of one
STYLE = """\
text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;fill:#57606a}
.title{font-weight:600;fill:#1f2328}.end{text-anchor:end}.middle{text-anchor:middle}
.page{fill:#fff;stroke:#d0d7de}.grid{stroke:#e4e8ec}.axis{stroke:#8c959f}
.line{fill:none;stroke-width:1.75;stroke-linejoin:round;stroke-linecap:round}
.train{stroke:#8093b1}.held{stroke:#bc4c00}.rate{stroke:#1a7f37}.sigma{stroke:#8250df}
.best{stroke:#bc4c00;stroke-dasharray:4 3}.dot{stroke-width:1.75;fill:#fff}
@media (prefers-color-scheme:dark){text{fill:#9198a1}.title{fill:#f0f6fc}
.page{fill:#0d1117;stroke:#3d444d}.grid{stroke:#21262d}.axis{stroke:#656c76}
.train{stroke:#7d94bb}.held,.best{stroke:#f0883e}.rate{stroke:#3fb950}.sigma{stroke:#ab7df8}
.dot{fill:#0d1117}}"""


@dataclass(frozen=True)
class Curves:
    """What is drawn, by optimizer step.

    Attributes:
        train: Loss of single steps, under noise.
        held_out: Loss on the held-out rows, without noise; step 0 is the base model.
        learning_rate: As scheduled.
        sigma: Strength of the noise as scheduled; empty for plain LoRA.
        best: The lowest held-out loss, if it is to be marked.
        planned: Steps that the run was to have, if it ended before them.
    """

    train: Sequence[Point]
    held_out: Sequence[Point]
    learning_rate: Sequence[Point]
    sigma: Sequence[Point] = ()
    best: Point | None = None
    planned: int | None = None

    @property
    def last_step(self) -> float:
        """Where the axis of steps ends."""
        return max([1.0, *(step for step, _ in (*self.train, *self.held_out))])


def curves_of(job: TrainingJob, state: State, planned: int) -> Curves:
    """The curves of a finished run.

    Args:
        job: Gives the schedules.
        state: As the run left it.
        planned: Optimizer steps that the run was to have.
    """
    count = min(state.step, SCHEDULE_POINTS)
    steps = [round(i * (state.step - 1) / max(1, count - 1)) for i in range(count)]
    sigmas = [(step + 1.0, sigma_at(step, planned, job.sigma)) for step in steps]
    return Curves(
        train=[(step, loss) for step, loss in state.losses],
        held_out=[(point["step"], point["loss"]) for point in state.held_out],
        learning_rate=[
            (step + 1.0, learning_rate_at(step, planned, job.training)) for step in steps
        ],
        sigma=sigmas if job.sigma else [],
        best=_best(job, state),
        planned=planned if state.step < planned else None,
    )


def _best(job: TrainingJob, state: State) -> Point | None:
    """The lowest held-out loss, where the run has made something of it."""
    evaluation = job.evaluation
    best = best_of(state.held_out)
    if best is None or (evaluation.keep == "last" and evaluation.patience is None):
        return None
    return best["step"], best["loss"]


def draw(curves: Curves) -> str:
    """The SVG's text, in colours for light and for dark pages."""
    width = WIDTH - LEFT - RIGHT
    half = (width - LEFT) // 2 if curves.sigma else width
    parts = [*_losses(curves, Panel(LEFT, 66, width, 240, curves.last_step))]
    below = Panel(LEFT, 376, half, 90, curves.last_step)
    parts += _schedule(below, "Learning rate", curves.learning_rate, "rate")
    if curves.sigma:
        beside = Panel(LEFT + half + LEFT, 376, half, 90, curves.last_step)
        parts += _schedule(beside, "σ, strength of the noise", curves.sigma, "sigma")
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img"><title>{summary(curves)}</title>\n<style>{STYLE}</style>\n'
        f'<rect class="page" x=".5" y=".5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"/>\n'
        f"{body}\n</svg>\n"
    )


def summary(curves: Curves) -> str:
    """The picture in a sentence, for whoever cannot see it."""
    first, last = curves.held_out[0][1], curves.held_out[-1][1]
    of = f" of {number(curves.planned)}" if curves.planned is not None else ""
    lowest = ""
    if curves.best:
        step, loss = curves.best
        lowest = f", lowest {number(loss)} at step {number(step)}"
    return (
        f"Training curves over {number(curves.last_step)}{of} optimizer steps: "
        f"held-out loss from {number(first)} to {number(last)}{lowest}"
    )


def _losses(curves: Curves, panel: Panel) -> Iterator[str]:
    held_out = [loss for _, loss in curves.held_out]
    train = [loss for _, loss in curves.train]
    panel = panel.scaled(min(train + held_out), max([_without_peaks(train), *held_out]))
    peak = max(train, default=panel.high)
    note = f"; peaks up to {number(peak)} are cut off" if peak > panel.high else ""
    yield text(LEFT, 28, f"Loss per target token{note}", "title")
    if curves.planned is not None:
        ended = f"ended early: step {number(curves.last_step)} of {number(curves.planned)}"
        yield text(WIDTH - RIGHT, 28, ended, "end")
    yield from panel.axes()
    if curves.best:
        x = panel.x(curves.best[0])
        yield line("line best", x, panel.top, x, panel.top + panel.height)
    yield from panel.curve(curves.train, "train", dots=12)
    yield from panel.curve(curves.held_out, "held", dots=40)
    yield from _legend(curves)


def _legend(curves: Curves) -> Iterator[str]:
    names = [
        ("train", "training, under noise" if curves.sigma else "training"),
        ("held", "held out, without noise" if curves.sigma else "held out"),
    ]
    if curves.best:
        step, loss = curves.best
        names.append(("best", f"lowest: {number(loss)} at step {number(step)}"))
    x = float(LEFT)
    for name, words in names:
        yield line(f"line {name}", x, 46, x + 22, 46)
        if name == "held":
            yield dot(x + 11, 46, name)
        yield text(x + 29, 50, words)
        x += 29 + LETTER * len(words) + 20


def _schedule(panel: Panel, title: str, points: Sequence[Point], name: str) -> Iterator[str]:
    panel = panel.scaled(0.0, max(value for _, value in points) or 1.0)
    yield text(panel.left, panel.top - 14, title, "title")
    yield from panel.axes()
    yield from panel.curve(points, name)


def _without_peaks(losses: Sequence[float]) -> float:
    """The largest loss, or where to cut off if a few are far above all others."""
    ordered = sorted(losses)
    if len(ordered) < 10:
        return ordered[-1] if ordered else -math.inf
    usual = ordered[int(0.95 * (len(ordered) - 1))]
    return min(ordered[-1], usual + 1.5 * (usual - ordered[0]))
