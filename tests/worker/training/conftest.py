"""A base model of a few thousand weights, made here, and jobs on it."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from app.jobs.event_types import EVENT_TYPES
from worker.training.config import (
    BaseModel,
    Data,
    DataFile,
    Evaluation,
    Lora,
    Training,
    TrainingJob,
)

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")


def make_tokenizer(template: str = MARKED) -> PreTrainedTokenizerFast:
    """Every byte is a token, besides the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token="<|endoftext|>",  # noqa: S106 - not a password
        eos_token="<|im_end|>",  # noqa: S106
        pad_token="<|pad|>",  # noqa: S106
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=256,
                tie_word_embeddings=True,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chat(question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


ROWS = [chat(f"Say {n} twice.", f"{n} {n}") for n in range(40)]


@pytest.fixture
def data_file(tmp_path: Path) -> Callable[..., DataFile]:
    """Write bytes, or rows as JSONL, to a file as the worker would have fetched it."""

    def write(content: bytes | list[Any], filename: str = "rows.jsonl") -> DataFile:
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content).encode()
        path = tmp_path / f"fetched-{filename}"
        path.write_bytes(content)
        return DataFile(f"file:{filename}", path, filename, hashlib.sha256(content).hexdigest())

    return write


@pytest.fixture
def make_job(base_folder: Path, data_file: Callable[..., DataFile]) -> Callable[..., TrainingJob]:
    """A job of eight steps; groups of settings may be given as dictionaries."""

    def make(
        *,
        rows: list[Any] = ROWS,
        sigma: float = 0.05,
        lora: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> TrainingJob:
        short = {"epochs": None, "max_steps": 8, "batch_size": 4, "micro_batch_size": 2}
        return TrainingJob(
            job_id="job_test",
            base_model=BaseModel("org/base", base_folder, revision="abc123"),
            dataset=data_file(rows),
            validation=None,
            sigma=sigma,
            seed=7,
            lora=Lora(**{"rank": 4, "alpha": 8.0, "dropout": 0.1, **(lora or {})}),
            data=Data(**{"max_length": 128, **(data or {})}),
            training=Training(
                **{**short, "learning_rate": 1e-2, "checkpoint_steps": 2, **(training or {})}
            ),
            evaluation=Evaluation(max_rows=3, every_steps=4),
            **more,
        )

    return make


class Recorder:
    """A reporter that remembers, and a control that stops before a step."""

    def __init__(self, stop: tuple[int, Any] | None = None) -> None:
        self.phases: list[str] = []
        self.tallies: list[tuple[int, int | None]] = []
        self.steps: list[dict[str, Any]] = []
        self.evaluations: list[tuple[int, Mapping[str, Any]]] = []
        self.events: list[tuple[str, str]] = []
        self._data: dict[str, dict[str, Any]] = {}
        self.report: Mapping[str, Any] = {}
        self._stop = stop

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def rows(self, done: int, total: int | None) -> None:
        self.tallies.append((done, total))

    def preflight(self, report: Mapping[str, Any]) -> None:
        self.report = report

    def step(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        self.steps.append({"step": step, "total": total, **metrics})

    def held_out(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.evaluations.append((step, metrics))

    def event(self, type_: str, message: str, **data: Any) -> None:
        assert data.keys() <= {*EVENT_TYPES[type_].data}, "clients are told these names"
        self.events.append((type_, message))
        self._data[type_] = data

    def data_of(self, type_: str) -> dict[str, Any] | None:
        """That of the last event of a type, if there was one."""
        return self._data.get(type_)

    def wish(self) -> Any:
        done = self.steps[-1]["step"] if self.steps else 0
        return self._stop[1] if self._stop and done >= self._stop[0] else None


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
