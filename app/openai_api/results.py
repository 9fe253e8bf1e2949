"""A finished job's metrics as OpenAI's results.csv, with what this service adds."""

import csv
import io

from app.openai_api.repository import Metrics

COLUMNS = {
    "train_loss": ("train", "loss"),
    "train_accuracy": ("train", "accuracy"),
    "valid_loss": ("held_out", "loss"),
    "valid_mean_token_accuracy": ("held_out", "accuracy"),
    "learning_rate": ("train", "learning_rate"),
    "sigma": ("train", "sigma"),
    "grad_norm": ("train", "grad_norm"),
}
"""Column: series and name of its metric. Those of OpenAI first, in OpenAI's order."""


def results_csv(metrics: Metrics) -> bytes:
    """A row for each step that has a number; a number that is not known is left empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", *COLUMNS])
    for step in sorted({step for _, step in metrics}):
        cells = [metrics.get((series, step), {}).get(name) for series, name in COLUMNS.values()]
        writer.writerow([step, *("" if cell is None else cell for cell in cells)])
    return text.getvalue().encode()
