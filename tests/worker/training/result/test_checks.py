"""A folder that some server would refuse does not leave the trainer."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.worker.training.result.finished import finish, reseal
from worker.training.config import TrainingJob
from worker.training.errors import PublishFailed
from worker.training.result.checks import CONFIG, WEIGHTS, check_folder
from worker.training.result.manifest import MANIFEST

Make = Callable[..., TrainingJob]
Tensors = dict[str, Tensor]

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
ALL = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def refusal(job: TrainingJob, adapter: Path) -> str:
    with pytest.raises(PublishFailed) as caught:
        check_folder(job, adapter)
    assert caught.value.reason == "publish_failed"
    return caught.value.message


class TestWhole:
    def test_what_a_run_leaves_is_accepted(self, job: TrainingJob, adapter: Path) -> None:
        check_folder(job, adapter)

    @pytest.mark.parametrize(
        "settings",
        [
            {"rank": 1},
            {"rank": 20, "alpha": 7.5},
            {"rslora": True},
            {"target_modules": ["v_proj", "q_proj"]},
        ],
    )
    def test_so_is_that_of_other_settings(
        self, make_job: Make, tmp_path: Path, settings: dict[str, Any]
    ) -> None:
        job = make_job(lora=settings)
        check_folder(job, finish(job, tmp_path))

    def test_so_is_a_base_of_transposed_layers(self, make_job: Make, tmp_path: Path) -> None:
        """GPT-2's: PEFT notes in the config that their weights are in × out."""
        from transformers import GPT2Config, GPT2LMHeadModel

        job = make_job()
        base = tmp_path / "gpt2"
        config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=260, n_positions=128)
        GPT2LMHeadModel(config).save_pretrained(base)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (base / name).write_bytes((job.base_model.path / name).read_bytes())
        job = replace(job, base_model=replace(job.base_model, path=base))
        with pytest.warns(UserWarning, match="fan_in_fan_out"):
            adapter = finish(job, tmp_path)
        check_folder(job, adapter)

    def test_a_whole_alpha_is_written_as_a_whole_number(self, adapter: Path) -> None:
        """Programs in stricter languages than Python read nothing else there."""
        assert '"lora_alpha": 8,' in (adapter / CONFIG).read_text()


FILES: dict[str, Callable[[Path], object]] = {
    f"{WEIGHTS} is missing": lambda folder: (folder / WEIGHTS).unlink(),
    f"{CONFIG} is missing": lambda folder: (folder / CONFIG).unlink(),
    "tokenizer.json is missing": lambda folder: (folder / "tokenizer.json").unlink(),
    f"more.bin is not in {MANIFEST}": lambda folder: (folder / "more.bin").write_bytes(b"x"),
    "README.md is not what was written": lambda folder: (folder / "README.md").write_text("x"),
    f"{WEIGHTS} is not what": lambda folder: flip_a_bit(folder / WEIGHTS),
    "cannot be read (FileNotFoundError": lambda folder: (folder / MANIFEST).unlink(),
    "cannot be read (JSONDecodeError": lambda folder: (folder / MANIFEST).write_text('{"fil'),
    "cannot be read (KeyError": lambda folder: (folder / MANIFEST).write_text("{}"),
}


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("problem", FILES)
def test_damaged_files_are_refused(job: TrainingJob, adapter: Path, problem: str) -> None:
    FILES[problem](adapter)
    assert problem in refusal(job, adapter)


CONFIGS: list[tuple[str, Any, str]] = [
    ("peft_type", "LOHA", "peft_type = 'LOHA', expected 'LORA'"),
    ("task_type", None, "task_type"),
    ("bias", "all", "bias = 'all', expected 'none'"),
    ("lora_bias", True, "lora_bias"),
    ("modules_to_save", ["lm_head"], "modules_to_save"),
    ("use_dora", True, "use_dora = True, expected False"),
    ("use_rslora", True, "use_rslora"),
    ("use_qalora", True, "use_qalora"),
    ("rank_pattern", {"q_proj": 8}, "rank_pattern"),
    ("alpha_pattern", {"q_proj": 8}, "alpha_pattern"),
    ("r", 8, "r = 8, expected 4"),
    ("r", "4", "r = '4', expected 4"),
    ("lora_alpha", 16, "lora_alpha = 16, expected 8"),
    ("init_lora_weights", "pissa", "init_lora_weights"),
    ("layer_replication", [[0, 1], [0, 1]], "layer_replication"),
    ("layers_to_transform", [0], "layers_to_transform"),
    ("target_parameters", ["experts.down_proj"], "target_parameters"),
    ("trainable_token_indices", [1], "trainable_token_indices"),
    ("inference_mode", False, "inference_mode"),
    ("base_model_name_or_path", "/somewhere/base", "base_model_name_or_path"),
    ("base_model_name_or_path", None, "base_model_name_or_path"),
    ("revision", None, "revision = None, expected 'abc123'"),
    ("made_up", 1, "a field made_up"),
    ("target_modules", ".*_proj", "sorted list"),
    ("target_modules", [], "sorted list"),
    ("target_modules", [*ALL, "a"], "sorted list"),
    ("target_modules", [*ALL, "v_proj"], "sorted list"),
    ("target_modules", [*ALL, "w_proj"], "no tensors of w_proj"),
    ("target_modules", ALL[1:], "down_proj, which is not in target_modules"),
]


@pytest.mark.parametrize(("key", "value", "problem"), CONFIGS)
def test_a_config_that_some_server_refuses_is_refused(
    job: TrainingJob, adapter: Path, key: str, value: Any, problem: str
) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    assert key == "made_up" or config[key] != value
    (adapter / CONFIG).write_text(json.dumps({**config, key: value}))
    reseal(adapter)
    assert problem in refusal(job, adapter)


@pytest.mark.parametrize("key", ["r", "lora_alpha", "target_modules", "peft_type", "use_dora"])
def test_a_config_without_a_field_is_refused(job: TrainingJob, adapter: Path, key: str) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    del config[key]
    (adapter / CONFIG).write_text(json.dumps(config))
    reseal(adapter)
    assert key in refusal(job, adapter)


def test_other_layers_than_the_jobs_are_refused(job: TrainingJob, adapter: Path) -> None:
    job = replace(job, lora=replace(job.lora, target_modules=["q_proj"]))
    assert "expected ['q_proj']" in refusal(job, adapter)


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def added(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: torch.ones(shape)}


def with_value(name: str, value: float) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        tensors[name][-1, -1] = value
        return tensors

    return change


def as_type(dtype: torch.dtype, only: str = "") -> Callable[[Tensors], Tensors]:
    return lambda tensors: {
        name: value.to(dtype) if only in name else value for name, value in tensors.items()
    }


HEAD = "base_model.model.lm_head"
TENSORS: list[tuple[str, Callable[[Tensors], Tensors]]] = [
    ("holds lm_head.weight", added("lm_head.weight", 2, 2)),
    ("embed_tokens.weight", added("base_model.model.model.embed_tokens.weight", 2, 2)),
    ("lora_embedding_A", added("base_model.model.model.embed_tokens.lora_embedding_A", 4, 2)),
    ("lora_magnitude", added(f"{LAYER}.lora_magnitude_vector", 32)),
    ("lora_B.bias", added(f"{LAYER}.lora_B.bias", 32)),
    ("base_layer.weight", added(f"{LAYER}.base_layer.weight", 32, 32)),
    (
        "no adapter of embeddings or of the head",
        lambda tensors: {
            **tensors,
            f"{HEAD}.lora_A.weight": torch.ones(4, 32),
            f"{HEAD}.lora_B.weight": torch.ones(260, 4),
        },
    ),
    ("expected base_model.model.", renamed("base_model.model.", "")),
    ("expected base_model.model.", renamed(".weight", ".default.weight")),
    ("only lora_A of model.layers.0.self_attn.q_proj", without(B)),
    ("only lora_B of model.layers.0.self_attn.q_proj", without(A)),
    ("no tensors of", lambda _: {}),
    ("lora_A.weight has the shape (8, 32), expected 4 × in", added(A, 8, 32)),
    ("lora_A.weight has the shape (32, 4), expected 4 × in", added(A, 32, 4)),
    ("lora_B.weight has the shape (4, 32), expected out × 4", added(B, 4, 32)),
    ("lora_B.weight has the shape (32,), expected out × 4", added(B, 32)),
    ("lora_A.weight is not finite", with_value(A, float("nan"))),
    ("lora_B.weight is not finite", with_value(B, float("inf"))),
    ("every lora_B is zero", lambda tensors: {n: t * ("lora_A" in n) for n, t in tensors.items()}),
    ("expected one of float32, bfloat16 and float16", as_type(torch.float64)),
    ("torch.bfloat16, torch.float32; expected one", as_type(torch.bfloat16, "lora_A")),
]


@pytest.mark.parametrize(("problem", "change"), TENSORS)
def test_tensors_that_some_server_refuses_are_refused(
    job: TrainingJob, adapter: Path, problem: str, change: Callable[[Tensors], Tensors]
) -> None:
    save_file(change(load_file(adapter / WEIGHTS)), adapter / WEIGHTS)
    reseal(adapter)
    assert problem in refusal(job, adapter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accepted(job: TrainingJob, adapter: Path, dtype: torch.dtype) -> None:
    save_file(as_type(dtype)(load_file(adapter / WEIGHTS)), adapter / WEIGHTS)
    reseal(adapter)
    check_folder(job, adapter)


def test_a_torn_weights_file_is_refused(job: TrainingJob, adapter: Path) -> None:
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-100])
    reseal(adapter)
    assert "cannot be read (SafetensorError" in refusal(job, adapter)
