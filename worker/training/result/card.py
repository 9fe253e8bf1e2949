"""The model card of a finished adapter: what a person wants to know before using it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from worker.training.result.curves import Curves, summary
from worker.training.result.facts import Facts, about_rows, code, plain, settings
from worker.training.result.manifest import versions
from worker.training.result.usage import usage

EVALUATIONS_SHOWN = 20
FLAT = (
    "[Flat-LoRA](https://arxiv.org/abs/2409.14396): LoRA under small random perturbations of the "
    "full merged weights, so that it lies in a flat region of the loss. The noise is gone after "
    "training: this is a plain LoRA adapter, and nothing of the method is needed to use it."
)
LICENCE = (
    "The terms of the base model and of the rows that it was trained on hold for this adapter too. "
    "Neither is known to the program that wrote this card, so it names no licence: add `license` "
    "to the card's header before you publish it."
)
CITATION = """\
```bibtex
@inproceedings{li2025flatlora,
  title     = {Flat-LoRA: Low-Rank Adaptation over a Flat Loss Landscape},
  author    = {Li, Tao and He, Zhengbao and Li, Yujun and Wang, Yasheng and Shang, Lifeng and
               Huang, Xiaolin},
  booktitle = {International Conference on Machine Learning},
  year      = {2025},
  url       = {https://arxiv.org/abs/2409.14396}
}
```"""


def write_card(path: Path, facts: Facts, curves: Curves, picture: str) -> None:
    """Write the card.

    Args:
        path: Where.
        facts: What was trained on what, and how it went.
        curves: Said in words, where the picture is not shown.
        picture: File name of the picture, beside the card.
    """
    job, result = facts.job, facts.result
    sections = [
        f"---\n{_header(facts)}---",
        f"# LoRA adapter for {plain(job.base_model.reference)}",
        _introduction(facts),
        f"![{summary(curves)}]({picture})",
        *_evaluation(facts),
        *usage(job, result["precision"], facts.quantization, is_chat=facts.is_chat),
        "## Data",
        _table(about_rows(facts)),
        "## Training",
        FLAT if job.sigma else "Plain LoRA: σ is 0.",
        _table(settings(facts)),
        f"Made with {', '.join(f'{name} {number}' for name, number in versions().items())}. "
        "`training_manifest.json` has all inputs and settings, and the SHA-256 of each file.",
        "## Limits",
        "\n".join(f"- {limit}" for limit in _limits(facts)),
        "## Licence",
        LICENCE,
    ]
    if job.sigma:
        sections += ["## Citation", CITATION]
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _header(facts: Facts) -> str:
    """The YAML that a model hub reads. A base model that is a folder is none that it knows."""
    job, held_out = facts.job, facts.result["held_out"]
    is_folder = job.base_model.name.startswith("file:")
    after = held_out["after"]
    rows = job.validation or job.dataset
    results = [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=_kind_of_rows(facts),
            dataset_name=f"held-out rows of {rows.uri}",
            metric_type=type_,
            metric_name=name,
            metric_value=round(value, 6),
        )
        for type_, name, value in (
            ("loss", "held-out loss", after["loss"]),
            ("perplexity", "held-out perplexity", _perplexity(after["loss"])),
            ("accuracy", "held-out token accuracy", after["accuracy"]),
        )
        if math.isfinite(value)
    ]
    card = ModelCardData(
        base_model=None if is_folder else job.base_model.name,
        base_model_relation=None if is_folder else "adapter",
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", *_tags(facts)],
        model_name=f"{job.base_model.reference.rstrip('/').rpartition('/')[2]}-lora",
        eval_results=results,
    )
    return card.to_yaml() + "\n"


def _tags(facts: Facts) -> Iterator[str]:
    if facts.is_chat:  # plain text is no supervision
        yield "sft"
    if facts.job.sigma:
        yield "flat-lora"


def _kind_of_rows(facts: Facts) -> str:
    """The held-out rows' type as ``datasets`` names its loaders."""
    report = facts.report.get("validation", facts.report)
    file: str = report["format"]["file"]
    return {"jsonl": "json", "tsv": "csv"}.get(file, file)


def _introduction(facts: Facts) -> str:
    job, held_out = facts.job, facts.result["held_out"]
    before, after = held_out["before"], held_out["after"]
    method = f"Flat-LoRA (σ {job.sigma:g})" if job.sigma else "plain LoRA"
    return (
        f"A rank-{job.lora.rank} adapter, trained with {method} on "
        f"{code(job.dataset.uri)}. On {held_out['rows']:,} held-out rows the loss went from "
        f"{before['loss']:.4f} to **{after['loss']:.4f}**, the perplexity from "
        f"{_perplexity(before['loss']):.4g} to **{_perplexity(after['loss']):.4g}**."
    )


def _evaluation(facts: Facts) -> Iterator[str]:
    held_out, job = facts.result["held_out"], facts.job
    before, after = held_out["before"], held_out["after"]
    source = code(job.validation.uri) if job.validation else "the same file, not trained on"
    yield "## Evaluation"
    yield (
        f"{held_out['rows']:,} rows of {source}; {held_out['tokens']:,} "
        f"tokens in the loss, computed in {held_out['dtype']}, without noise."
    )
    yield (
        "| | base model | with the adapter |\n|---|---:|---:|\n"
        f"| loss | {before['loss']:.4f} | {after['loss']:.4f} |\n"
        f"| perplexity | {_perplexity(before['loss']):.4g} | {_perplexity(after['loss']):.4g} |\n"
        f"| token accuracy | {before['accuracy']:.1%} | {after['accuracy']:.1%} |"
    )
    if facts.result["kept"] == "best":
        yield f"The adapter is that of step {facts.kept_step}, where the held-out loss was lowest."
    yield _history(facts.state.held_out)


def _history(points: Sequence[Mapping[str, float]]) -> str:
    every = math.ceil(len(points) / EVALUATIONS_SHOWN)
    shown = [*points[:-1:every], points[-1]]
    rows = [f"| {p['step']:g} | {p['loss']:.4f} | {p['accuracy']:.1%} |" for p in shown]
    title = f"{len(shown)} of {len(points)} evaluations"
    return (
        f"<details><summary>{title}</summary>\n\n"
        "| step | loss | token accuracy |\n|---:|---:|---:|\n" + "\n".join(rows) + "\n\n</details>"
    )


def _limits(facts: Facts) -> Iterator[str]:
    likeness = "are like the rows it was trained on"
    if facts.job.validation:
        likeness = "come from a file that the author of the job has chosen"
    yield (
        f"The held-out rows {likeness}: their loss says nothing about "
        "other tasks, or about what the adapter has made worse."
    )
    yield (
        "It was not examined for safety, bias or truth. What the base model does wrong, and what "
        "stands in the rows, it may do too."
    )
    yield f"It saw no more than {facts.longest:,} tokens at once."
    if quantization := facts.job.training.quantization:
        yield (
            f"The base was held in {quantization.removesuffix('bit')} bits while it was trained. "
            "On a base in another type its answers differ a little."
        )
    for warning in facts.report["warnings"]:
        yield plain(warning)


def _table(rows: Iterator[tuple[str, str]]) -> str:
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows]
    return "| | |\n|---|---|\n" + "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
