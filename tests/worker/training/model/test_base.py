"""A base model that cannot be used is refused with what is wrong with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from worker.training.config import BaseModel, TrainingJob
from worker.training.errors import BaseModelUnavailable, ConfigInvalid
from worker.training.model.base import attach_adapter, load_base, load_tokenizer, max_positions

Make = Callable[..., TrainingJob]
CPU = torch.device("cpu")


@pytest.fixture
def base(base_folder: Path, tmp_path: Path) -> BaseModel:
    """A copy that a test may spoil."""
    folder = tmp_path / "copy"
    shutil.copytree(base_folder, folder)
    return BaseModel("file:models/copy", folder)


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def reshape_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] = torch.zeros(3, 5)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def only_a_pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 2956080\n"
    (folder / "model.safetensors").write_text(text)


def name_another_architecture(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no-such-model"}')


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing weight": (drop_a_weight, r"lacks 1 weights .*: model\.layers\.1\.mlp\.down_proj"),
    "a weight of another shape": (reshape_a_weight, "cannot be loaded as a causal language model"),
    "a truncated file": (truncate, "cannot be loaded as a causal language model"),
    "a Git LFS pointer": (only_a_pointer, "cannot be loaded as a causal language model"),
    "an unknown architecture": (name_another_architecture, "cannot be loaded"),
    "an adapter in the folder": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        "holds an adapter_config.json",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_base_that_is_not_whole_is_refused(base: BaseModel, name: str) -> None:
    spoil, message = SPOILT[name]
    spoil(base.path)
    with pytest.raises(BaseModelUnavailable, match=message):
        load_base(base, CPU, torch.float32)


@pytest.mark.parametrize("content", ["", "[]", '{"version": "9"}'], ids=["empty", "list", "other"])
def test_a_tokenizer_that_is_none_is_refused(base: BaseModel, content: str) -> None:
    (base.path / "tokenizer.json").write_text(content)
    with pytest.raises(BaseModelUnavailable, match="The tokenizer of file:models/copy"):
        load_tokenizer(base)


@pytest.mark.parametrize("content", ["", "[1]", "null", '{"text_config": 5}'])
def test_a_config_that_is_none_is_refused(base: BaseModel, content: str) -> None:
    (base.path / "config.json").write_text(content)
    with pytest.raises(BaseModelUnavailable, match=r"no readable config\.json"):
        max_positions(base)


def test_positions_are_found_also_where_a_model_sees_or_hears(base: BaseModel) -> None:
    assert max_positions(base) == 256
    (base.path / "config.json").write_text(
        json.dumps({"text_config": {"max_position_embeddings": 77}})
    )
    assert max_positions(base) == 77


def test_a_model_with_nothing_to_adapt_is_explained(make_job: Make) -> None:
    job = make_job(lora={"target_modules": []})
    with pytest.raises(ConfigInvalid, match="PEFT cannot adapt org/base"):
        attach_adapter(load_base(job.base_model, CPU, torch.float32), job)


@pytest.mark.parametrize(
    ("name", "expected"), [("org/base", "org/base"), ("file:a%20b", "/models/a b")]
)
def test_an_adapter_names_its_base_by_where_it_can_be_loaded_from(name: str, expected: str) -> None:
    assert BaseModel(name, Path("/models/a b")).reference == expected
