"""What a card says of the rows and the settings, as names and values."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from worker.training.config import DataFile, TrainingJob
from worker.training.state import State

Line = tuple[str, str]

LOSS_ON = {
    "assistant": "the assistant's turns, with the token that ends each",
    "last_assistant": "the last turn of the assistant, with the token that ends it",
    "all": "all tokens",
}
HELD = {"4bit": "in 4 bits (bitsandbytes)", "8bit": "in 8 bits (bitsandbytes)"}


@dataclass(frozen=True)
class Facts:
    """What a card is written from.

    Attributes:
        job: The job.
        result: What it reports of itself.
        state: As the run left it.
        report: The preflight report.
        quantization: Arguments of the ``BitsAndBytesConfig`` that the base was loaded with.
    """

    job: TrainingJob
    result: Mapping[str, Any]
    state: State
    report: Mapping[str, Any]
    quantization: Mapping[str, Any] | None = None

    @property
    def kept_step(self) -> int:
        """The optimizer step whose adapter this is."""
        return int(self.result["kept_step"])

    @property
    def max_length(self) -> int:
        """Tokens that rows were cut at."""
        return int(self.report["length"]["limit"])

    @property
    def is_chat(self) -> bool:
        """Whether rows were rendered with a chat template."""
        return bool(self.report["format"]["name"] != "text")


def about_rows(facts: Facts) -> Iterator[Line]:
    """Which rows it was trained on, and what became of them."""
    job = facts.job
    yield "file", _source(job.dataset)
    yield from _counts(facts.report)
    if job.validation:
        yield "held-out file", _source(job.validation)
    yield "loss on", LOSS_ON[job.data.loss_on]


def _source(file: DataFile) -> str:
    commit = f", commit `{file.revision}`" if file.revision else ""
    return f"{code(file.uri)}{commit}, SHA-256 `{file.sha256}`"


def _counts(report: Mapping[str, Any]) -> Iterator[Line]:
    rows, tokens, length = report["rows"], report["tokens"], report["length"]
    format_ = report["format"]
    parts = filter(None, (format_["file"], format_["compression"]))
    bad, empty = rows["bad"], rows["dropped_without_targets"]
    yield "format", f"{format_['name']} in {' '.join(parts)}"
    yield "rows read", f"{rows['read']:,}"
    yield "rows trained on", f"{rows['used']:,}"
    yield "rows held out", f"{rows['held_out']:,}"
    yield "rows dropped", f"{bad + empty:,} ({bad:,} bad, {empty:,} with nothing to learn)"
    yield "rows cut", f"{rows['truncated']:,} at {length['limit']:,} tokens"
    yield "tokens", f"{tokens['all']:,}, of them {tokens['in_loss']:,} in the loss"
    yield "length", f"median {length['p50']:,}, p99 {length['p99']:,}, longest {length['max']:,}"


def settings(facts: Facts) -> Iterator[Line]:
    """Every setting that the adapter depends on."""
    yield from _of_the_adapter(facts)
    yield from _of_the_run(facts)
    yield from _of_the_optimizer(facts)
    yield from _of_the_machine(facts)


def _of_the_adapter(facts: Facts) -> Iterator[Line]:
    job, result, lora = facts.job, facts.result, facts.job.lora
    divisor = "√rank" if lora.rslora else "rank"
    scaling = lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)
    layers = lora.target_modules
    share = result["trainable_parameters"] / result["parameters"]
    yield "base model", code(job.base_model.name)
    yield "revision", code(job.base_model.revision or "–")
    yield "rank, alpha", f"{lora.rank}, {lora.alpha:g}; scaled by alpha / {divisor} = {scaling:.4g}"
    yield "target modules", layers if isinstance(layers, str) else code(", ".join(layers))
    yield "dropout", f"{lora.dropout:g}"
    yield "trained weights", f"{result['trainable_parameters']:,} ({share:.2%} of the base's)"
    if job.sigma:
        yield "σ", f"{job.sigma:g}, rising from 0 as ½ (1 − cos(π t / T))"
        yield "perturbed layers", f"{result['perturbed_layers']:,}"


def _of_the_run(facts: Facts) -> Iterator[Line]:
    job, result, training = facts.job, facts.result, facts.job.training
    planned = facts.report["steps"]
    of = f" of {planned:,}, then stopped early" if result["stopped_early"] else ""
    patience, is_best = job.evaluation.patience, facts.result["kept"] == "best"
    tokens = training.batch_tokens
    yield "optimizer steps", f"{result['steps']:,}{of}"
    yield "epochs", f"{result['epochs']:g}"
    yield "batch", f"{tokens:,} tokens" if tokens else f"{training.batch_size:,} rows"
    yield "tokens seen", f"{result['train_tokens']:,}"
    if patience:
        yield "early stopping", f"after {patience} evaluations without a lower loss"
    yield "adapter of", f"step {facts.kept_step:,}, the {'best' if is_best else 'last'} one"


def _of_the_optimizer(facts: Facts) -> Iterator[Line]:
    training = facts.job.training
    ratio, warmup = training.loraplus_lr_ratio, training.warmup_ratio
    plus = f"; of B {ratio:g} times that (LoRA+)" if ratio != 1 else ""
    yield "optimizer", f"AdamW, weight decay {training.weight_decay:g}"
    yield "learning rate", f"{training.learning_rate:g}{plus}"
    yield "schedule", f"{training.schedule}, after a warm-up of {100 * warmup:g} % of the steps"
    yield "gradients", f"clipped at norm {training.max_grad_norm:g}"


def _of_the_machine(facts: Facts) -> Iterator[Line]:
    job, plan, precision = facts.job, facts.result["plan"], facts.result["precision"]
    yield "longest row", f"{facts.max_length:,} tokens"
    yield "micro-batch", f"{plan['micro_batch_size']:,}{' packed' if plan['packing'] else ''} rows"
    yield "packing", "yes" if plan["packing"] else "no"
    yield "activation checkpointing", "yes" if plan["activation_checkpointing"] else "no"
    yield "base held", HELD.get(job.training.quantization or "", f"in {precision}")
    yield "computed in", f"{precision}; adapter and optimizer in float32"
    if job.resources.gpus > 1:
        yield "GPUs", str(job.resources.gpus)
    yield "seed", str(job.seed)


def plain(text: str) -> str:
    """Text from elsewhere, in which nothing is Markdown or HTML."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|" else c for c in " ".join(text.split()))


def code(text: str) -> str:
    """Text from elsewhere, as code."""
    return f"`` {text} ``" if "`" in text else f"`{' '.join(text.split())}`"
