"""Runs of a job in processes of their own, killed at random moments."""

import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from worker.inputs import write_job
from worker.training.config import TrainingJob

ROOT = Path(__file__).resolve().parents[3]


def describe(job: TrainingJob, folder: Path) -> None:
    """Write the job into its folder, as the worker does."""
    folder.mkdir(parents=True)
    settings = asdict(job)
    groups = ("lora", "data", "training", "evaluation", "resources")
    spec = {
        "rank": job.lora.rank,
        "sigma": job.sigma,
        "seed": job.seed,
        "dry_run": False,
        **{name: settings[name] for name in groups},
    }
    write_job(folder, job.job_id, spec, job.base_model, job.dataset, job.validation)


def start(folder: Path, pause: float) -> "subprocess.Popen[str]":
    """A process that goes on with the job, and pauses after each step."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.worker.training.killed_run", str(folder), str(pause)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        text=True,
    )


def kill_at_random(folder: Path, chance: random.Random, times: int) -> None:
    """Let the job run a few steps and kill it, again and again."""
    for _ in range(times):
        with start(folder, 0.02) as process:
            assert process.stdout
            for _ in range(chance.randrange(1, 4)):
                process.stdout.readline()
            try:
                process.wait(chance.random() * 0.1)
            except subprocess.TimeoutExpired:
                process.kill()


def finish(folder: Path) -> int:
    """Let the job run to its end, in a process of its own; its exit code."""
    with start(folder, 0) as process:
        process.communicate()
        return process.returncode
