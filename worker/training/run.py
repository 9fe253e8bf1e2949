"""One job from its fetched inputs to its finished adapter, in this process."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from worker.training.build import build, look_ahead
from worker.training.checkpoints import Checkpoint, Checkpoints
from worker.training.config import DataFile, TrainingJob
from worker.training.data.dataset import Prepared, fingerprint, prepare
from worker.training.data.examples import lengths_of, targets_of
from worker.training.data.rendering import Renderer
from worker.training.data.tally import Tally
from worker.training.errors import Stopped
from worker.training.evaluation import best_of
from worker.training.fit import fit, give_way, out_of_memory
from worker.training.loop import train
from worker.training.model.base import (
    choose_device,
    hash_folder,
    load_tokenizer,
    max_positions,
    set_mode,
)
from worker.training.model.kernels import repeatable
from worker.training.order import RowOrder
from worker.training.place import Place
from worker.training.plan import Plan, read_plan, write_plan
from worker.training.ranks import Ranks
from worker.training.reporter import Control, Reporter
from worker.training.result.adapter import save_adapter
from worker.training.result.verify import write_probe
from worker.training.state import Run, State, copy_of_adapter


def run(job: TrainingJob, folder: Path, reporter: Reporter, control: Control) -> dict[str, Any]:
    """Train a job and leave ``folder/adapter``, going on from ``folder/checkpoints`` if it can.

    Args:
        job: What to do; its files are local.
        folder: The job's own. Nothing outside it is written.
        reporter: Hears how it goes.
        control: Is asked at every row and every step boundary whether to stop.

    Returns:
        What the job reports of itself, plain JSON. The same for a run that was interrupted.

    Raises:
        JobError: Whatever the job's author has to know.
        Stopped: If ``control`` wished so.
    """
    reporter.phase("validating")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(job.base_model)
    prepared = _read(job, tokenizer, folder, Tally(reporter, control))
    place = Place.of(job)
    proposed, outlook = look_ahead(job, prepared, place)
    reporter.preflight(prepared.report | outlook)
    if job.dry_run:
        return {"dry_run": True}
    reporter.phase("loading")
    inputs = describe_inputs(job, prepared, place)
    identity = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    checkpoints = Checkpoints(folder / "checkpoints", identity, reporter)
    with repeatable():
        checkpoint = checkpoints.newest()
        known = plan_of_attempt(folder, identity, checkpoint)
        plan, is_settled = _agreed(known or proposed, place.ranks, is_settled=known is not None)
        this_run = build(job, prepared, place, plan, is_settled=is_settled)
        if not (is_settled or place.divided):
            this_run = fit(this_run, reporter)
        state = _go_on(this_run, checkpoint, reporter)
        keep_plan(folder, identity, this_run, state)
        reporter.phase("training")
        this_run, state = _train(this_run, state, checkpoints, reporter, control, folder)
        put_adapter(this_run, state.best_adapter)
        result = _result(this_run, state, place)
        if place.ranks.is_first:
            report = prepared.report
            model = this_run.model
            save_adapter(folder / "adapter", model, tokenizer, job, inputs, result, state, report)
        set_mode(this_run.model, training=False)
        write_probe(folder, this_run.model, prepared.held_out, ranks=place.ranks)
    return result


def _read(
    job: TrainingJob, tokenizer: PreTrainedTokenizerBase, folder: Path, tally: Tally
) -> Prepared:
    """The job's rows. Ranks read them each for itself, and where one stops all do."""
    renderer = Renderer(tokenizer, job.data.loss_on, today=job.clock, proceed=tally.proceed)
    positions = max_positions(job.base_model)
    prepared, wish = None, None
    try:
        prepared = prepare(job, renderer, positions, folder=folder, tally=tally)
    except Stopped as stopped:
        wish = stopped.wish
    if wish := Ranks(choose_device()).strongest(wish):
        raise Stopped(wish)
    assert prepared
    return prepared


def _agreed(plan: Plan | None, ranks: Ranks, *, is_settled: bool) -> tuple[Plan | None, bool]:
    """The first rank's plan for all: each has found its own by its own card's memory."""
    told = ranks.first_tells(json.dumps([plan.to_json() if plan else None, is_settled]))
    values, settled = json.loads(told)
    return Plan(**values) if values else None, settled


def keep_plan(folder: Path, identity: str, this_run: Run, state: State) -> None:
    """Write down by which plan the steps from here on are computed."""
    if this_run.ranks.is_first:
        write_plan(folder, identity, this_run.plan, state.step)


def plan_of_attempt(folder: Path, identity: str, checkpoint: Checkpoint | None) -> Plan | None:
    """The plan by which an earlier attempt has computed, or was going to, after this checkpoint."""
    written = read_plan(folder, identity)
    step = checkpoint.step if checkpoint else 0
    if written and written.from_step >= step:
        return written.plan
    return checkpoint.plan if checkpoint else None


def _go_on(this_run: Run, checkpoint: Checkpoint | None, reporter: Reporter) -> State:
    if checkpoint is None:
        return State()
    state = checkpoint.load(this_run)
    reporter.event("job.resumed", f"Resumed after step {state.step}.", step=state.step)
    return state


def _train(
    this_run: Run,
    state: State,
    checkpoints: Checkpoints,
    reporter: Reporter,
    control: Control,
    folder: Path,
) -> tuple[Run, State]:
    """Train to the end. Where memory runs out, go on from the newest checkpoint by a lighter plan.

    That is written down, so an attempt that is killed after it computes the same steps by it.
    """
    beginning = copy_of_adapter(this_run)
    while True:
        try:
            train(this_run, state, checkpoints, reporter, control)
        except torch.OutOfMemoryError as error:
            if this_run.ranks.size > 1:  # the others wait in another place
                raise out_of_memory(this_run) from error
            why = str(error)
        else:
            return this_run, state
        this_run = give_way(this_run, reporter, why)
        if (checkpoint := checkpoints.newest()) is None:
            put_adapter(this_run, beginning)
            this_run.optimizer.state.clear()
        state = _go_on(this_run, checkpoint, reporter)
        keep_plan(folder, checkpoints.identity, this_run, state)


def put_adapter(this_run: Run, weights: Mapping[str, Tensor]) -> None:
    """Give the adapter other weights."""
    adapter = this_run.adapter
    with torch.no_grad():
        for name, weight in weights.items():
            adapter[name].copy_(weight)


def describe_inputs(job: TrainingJob, prepared: Prepared, place: Place) -> dict[str, Any]:
    """All that determines the adapter, by content: settings, and hashes of what went in."""
    ranks = place.ranks
    # the others need not read the base once more
    files = json.dumps(hash_folder(job.base_model.path) if ranks.is_first else {})
    settings = asdict(job)
    for group in ("job_id", "base_model", "dataset", "validation", "dry_run", "clock"):
        del settings[group]
    return {
        "base_model": {
            "name": job.base_model.name,
            "revision": job.base_model.revision,
            "files": json.loads(ranks.first_tells(files)),
        },
        "dataset": _source(job.dataset),
        "validation": job.validation and _source(job.validation),
        "tokens_sha256": fingerprint(prepared),
        "settings": settings,
        "precision": place.precision,
        "strategy": place.strategy,
    }


def _source(file: DataFile) -> dict[str, str]:
    pinned = {"revision": file.revision} if file.revision else {}
    return {"uri": file.uri, "sha256": file.sha256, **pinned}


def _result(this_run: Run, state: State, place: Place) -> dict[str, Any]:
    job, first, last = this_run.job, state.held_out[0], state.held_out[-1]
    best = best_of(state.held_out)
    kept = best if job.evaluation.keep == "best" and best else last
    trainable, parameters = this_run.model.get_nb_trainable_parameters()  # as 4 bits are packed
    order = RowOrder(lengths_of(this_run.train), job.training, job.seed)
    return {
        "base_model_revision": job.base_model.revision,
        "held_out": {
            "rows": len(this_run.held_out),
            "tokens": int(targets_of(this_run.held_out).sum()),
            "dtype": place.precision,
            "before": {name: first[name] for name in ("loss", "accuracy")},
            "after": {name: kept[name] for name in ("loss", "accuracy")},
        },
        "steps": state.step,
        "stopped_early": state.step < this_run.total_steps,
        "kept": job.evaluation.keep,
        "kept_step": int(kept["step"]),
        "epochs": round(order.epochs(state.step), 4),
        "train_tokens": state.tokens,
        "sigma": job.sigma,
        "perturbed_layers": len(this_run.flat.targets) if job.sigma else 0,
        "trainable_parameters": trainable,
        "parameters": parameters - trainable,
        "precision": place.precision,
        "gpus": place.ranks.size,
        "strategy": place.strategy,
        "plan": this_run.plan.to_json(),
    }
