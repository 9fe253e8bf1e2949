"""A base model that is made to run code, or to have a pickle opened, does neither."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.worker.training.canary import pickled
from worker.training.config import BaseModel
from worker.training.errors import BaseModelUnavailable
from worker.training.model.base import load_base, load_tokenizer
from worker.training.model.shape import read_config

CPU = torch.device("cpu")


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def base(base_folder: Path, tmp_path: Path) -> BaseModel:
    folder = tmp_path / "copy"
    shutil.copytree(base_folder, folder)
    return BaseModel("file:models/copy", folder)


def load_all(base: BaseModel) -> None:
    load_tokenizer(base)
    read_config(base)
    load_base(base, CPU, torch.float32)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_canary_is_made_by_a_pickle_that_is_opened(canary: Path) -> None:
    pickle.loads(pickled(canary))  # noqa: S301 - that is the point
    assert canary.exists()


PICKLES = (
    "pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt",
    "rng_state.pth", "model.ckpt", "tf_model.h5", "flax_model.msgpack", "vocab.pkl",
    "tokenizer.pkl", "model.joblib", "spiece.model", "weights.npy",
)  # fmt: skip


@pytest.mark.parametrize("zipped", [False, True])
def test_pickles_beside_the_weights_are_not_opened(
    base: BaseModel, canary: Path, zipped: bool
) -> None:
    for name in PICKLES:
        (base.path / name).write_bytes(pickled(canary, zipped=zipped))
    load_all(base)
    assert not canary.exists()


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "tokenizer.json"])
def test_nor_in_their_place(base: BaseModel, canary: Path, name: str, zipped: bool) -> None:
    if name.endswith(".bin"):
        (base.path / "model.safetensors").unlink()
    (base.path / name).write_bytes(pickled(canary, zipped=zipped))
    with pytest.raises(BaseModelUnavailable):
        load_all(base)
    assert not canary.exists()


def index_of(base: BaseModel, name: Any) -> None:
    """Weights in parts, one of which has this name."""
    weights = load_file(base.path / "model.safetensors")
    (base.path / "model.safetensors").unlink()
    first, *others = sorted(weights)
    part = {key: weights[key] for key in others}
    save_file(part, base.path / "model-00002-of-00002.safetensors", {"format": "pt"})
    places = dict.fromkeys(others, "model-00002-of-00002.safetensors") | {first: name}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (base.path / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("zipped", [False, True])
def test_an_index_that_names_a_pickle_is_refused(
    base: BaseModel, canary: Path, zipped: bool
) -> None:
    """transformers would open it, if with ``weights_only``."""
    index_of(base, "model-00001-of-00002.bin")
    (base.path / "model-00001-of-00002.bin").write_bytes(pickled(canary, zipped=zipped))
    with pytest.raises(BaseModelUnavailable, match=r"names 'model-00001-of-00002\.bin'") as caught:
        load_all(base)
    assert "pickles are never opened" in str(caught.value.hint)
    assert not canary.exists()


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/model.safetensors", "a/../../b.safetensors", 5, None]
)
def test_an_index_leads_to_no_file_elsewhere(base: BaseModel, name: Any) -> None:
    index_of(base, name)
    with pytest.raises(BaseModelUnavailable, match=r"names .* as a file of its weights"):
        load_all(base)


@pytest.mark.parametrize("name", ["evil.bin", "../evil.safetensors", "sub/x.safetensors"])
def test_nor_does_a_config(base: BaseModel, name: str) -> None:
    change(base.path / "config.json", transformers_weights=name)
    with pytest.raises(BaseModelUnavailable, match=r"names .* as a file of its weights"):
        load_all(base)


def code(canary: Path) -> str:
    return f"import os\nos.mknod({str(canary)!r})\n"


MAPS = {
    "AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoModel": "evil.Model",
    "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
}  # fmt: skip
FILES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "config.json": lambda maps: {"auto_map": maps},
    "tokenizer_config.json": lambda maps: {"auto_map": maps, "tokenizer_class": "Evil"},
    "generation_config.json": lambda maps: {"auto_map": maps, "custom_generate": "evil"},
}


@pytest.fixture
def evil(base: BaseModel, canary: Path) -> BaseModel:
    """With scripts in all places where transformers looks for any."""
    for name in ("evil", "configuration_evil", "modeling_evil", "tokenization_evil"):
        (base.path / f"{name}.py").write_text(code(canary))
    (base.path / "custom_generate").mkdir()
    (base.path / "custom_generate" / "generate.py").write_text(code(canary))
    (base.path / "generation_config.json").write_text("{}")
    return base


def test_code_that_nobody_needs_is_not_run(evil: BaseModel, canary: Path) -> None:
    """Models come with such code for older versions: transformers' own is taken."""
    for name, values in FILES.items():
        if name != "tokenizer_config.json":
            change(evil.path / name, **values(MAPS))
    load_all(evil)
    assert not canary.exists()


@pytest.mark.parametrize("repo", ["", "evil/repo--"])
def test_a_model_that_needs_its_own_code_is_refused_by_its_name(
    evil: BaseModel, canary: Path, repo: str
) -> None:
    maps = dict.fromkeys(MAPS, f"{repo}evil.Class")
    change(evil.path / "config.json", auto_map=maps, model_type="evil")
    with pytest.raises(BaseModelUnavailable, match=r"needs Python code of its own \(auto_map\)"):
        load_base(evil, CPU, torch.float32)
    with pytest.raises(Exception):  # noqa: B017, PT011 - of transformers
        read_config(evil)
    assert not canary.exists()


def test_a_kernel_of_the_hub_is_not_fetched(evil: BaseModel) -> None:
    for values in (
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "evil/kernel@main:attention"},
        {"attn_implementation": {"": "evil/kernel"}},
        {"text_config": {"attn_implementation": "paged|evil/kernel"}},
    ):
        change(evil.path / "config.json", **values)
        with pytest.raises(BaseModelUnavailable, match=r"asks for the code .*evil/kernel"):
            load_all(evil)
