"""A fresh process finds in the folder what was trained, and nothing else passes for it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from tests.worker.training.canary import pickled
from tests.worker.training.result.finished import finish, reseal
from worker.training.config import TrainingJob
from worker.training.errors import PublishFailed
from worker.training.result.checks import WEIGHTS
from worker.training.result.verify import PROBE, compare, verify

Make = Callable[..., TrainingJob]


def change_weights(adapter: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    weights = load_file(adapter / WEIGHTS)
    save_file({name: change(name, value) for name, value in weights.items()}, adapter / WEIGHTS)
    reseal(adapter)


def wide_base(folder: Path, tokenizer: Path) -> Path:
    """With layers as wide as a block of 4-bit weights: on a CPU no narrower ones are computed."""
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


class TestAccepted:
    def test_what_was_trained_and_it_says_how_near_it_is(
        self, job: TrainingJob, adapter: Path
    ) -> None:
        found = verify(job, adapter.parent)
        assert found["logits_difference"] == pytest.approx(0, abs=1e-5)
        assert found["effect_reproduced"] == pytest.approx(1, abs=1e-4)

    def test_a_base_in_bfloat16(self, make_job: Make, tmp_path: Path) -> None:
        job = make_job(training={"precision": "bf16"})
        finish(job, tmp_path, dtype=torch.bfloat16)
        assert verify(job, tmp_path)["effect_reproduced"] == pytest.approx(1, abs=0.1)

    @pytest.mark.parametrize("quantization", ["4bit", "8bit"])
    def test_a_quantised_base_and_not_the_one_on_the_disk(
        self, make_job: Make, tmp_path: Path, quantization: Literal["4bit", "8bit"]
    ) -> None:
        job = make_job(training={"quantization": quantization})
        base = wide_base(tmp_path / "base", job.base_model.path)
        job = replace(job, base_model=replace(job.base_model, path=base))
        adapter = finish(job, tmp_path)
        assert "BitsAndBytesConfig(" in (adapter / "README.md").read_text()
        assert verify(job, tmp_path)["effect_reproduced"] == pytest.approx(1, abs=0.1)
        with pytest.raises(PublishFailed, match="logits differ by"):
            verify(replace(job, training=replace(job.training, quantization=None)), tmp_path)

    def test_the_probe_reads_whole_rows(self, adapter: Path) -> None:
        probe = load_file(adapter.parent / PROBE)
        assert sorted(probe) == ["ids/0", "ids/1", "logits/0", "logits/1"]
        assert len(probe["ids/0"]) > 30
        assert probe["logits/0"].shape == (16, 260)


class TestRefused:
    @pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
    def test_weights_of_another_size(self, job: TrainingJob, adapter: Path, factor: float) -> None:
        change_weights(adapter, lambda name, value: value * (factor if "lora_A" in name else 1))
        with pytest.raises(PublishFailed, match="does not compute what the trained model computed"):
            verify(job, adapter.parent)

    def test_weights_of_another_size_on_a_base_in_bfloat16(
        self, make_job: Make, tmp_path: Path
    ) -> None:
        job = make_job(training={"precision": "bf16"})
        adapter = finish(job, tmp_path, dtype=torch.bfloat16)
        change_weights(adapter, lambda name, value: value * (0.5 if "lora_A" in name else 1))
        with pytest.raises(PublishFailed, match="does not compute what the trained model computed"):
            verify(job, tmp_path)

    def test_a_shape_that_does_not_fit_the_base(self, job: TrainingJob, adapter: Path) -> None:
        change_weights(
            adapter, lambda name, value: value[:, :-1].clone() if "q_proj.lora_A" in name else value
        )
        with pytest.raises(PublishFailed, match=r"PEFT cannot load .* \(RuntimeError\)"):
            verify(job, adapter.parent)

    @pytest.fixture
    def named(self, make_job: Make) -> TrainingJob:
        """Names its layers for all blocks of the model at once."""
        return make_job(lora={"target_modules": ["q_proj", "up_proj"]})

    @pytest.mark.filterwarnings("ignore:Found missing adapter keys")
    def test_a_layer_of_which_nothing_was_saved(self, named: TrainingJob, tmp_path: Path) -> None:
        """PEFT only warns, and computes with an untrained one."""
        adapter = finish(named, tmp_path)
        weights = load_file(adapter / WEIGHTS)
        kept = {name: weights[name] for name in weights if "layers.1.mlp.up_proj" not in name}
        save_file(kept, adapter / WEIGHTS)
        reseal(adapter)
        with pytest.raises(PublishFailed, match=r"in 2 tensors: the model has .*up_proj"):
            verify(named, tmp_path)

    def test_a_layer_that_the_base_has_not(self, named: TrainingJob, tmp_path: Path) -> None:
        adapter = finish(named, tmp_path)
        weights = load_file(adapter / WEIGHTS)
        more = {
            name.replace("layers.1", "layers.7"): value.clone()
            for name, value in weights.items()
            if "layers.1" in name
        }
        save_file({**weights, **more}, adapter / WEIGHTS)
        reseal(adapter)
        with pytest.raises(
            PublishFailed, match=r"the file has .*layers\.7.* and the model has not"
        ):
            verify(named, tmp_path)

    @pytest.mark.parametrize("what", ["template", "tokens"])
    def test_another_tokenizer(self, job: TrainingJob, tmp_path: Path, what: str) -> None:
        def change(tokenizer: PreTrainedTokenizerBase) -> None:
            if what == "template":
                tokenizer.chat_template = "{{ messages }}"
            else:
                tokenizer.add_tokens(["twice"])

        finish(job, tmp_path, change=change)
        with pytest.raises(PublishFailed, match="tokenizer or its chat template"):
            verify(job, tmp_path)

    def test_no_tokenizer(self, job: TrainingJob, adapter: Path) -> None:
        (adapter / "tokenizer.json").write_text("{}")
        reseal(adapter)
        with pytest.raises(PublishFailed, match="tokenizer cannot be loaded"):
            verify(job, adapter.parent)


def random(size: float, seed: int) -> Tensor:
    return torch.randn(32, 500, generator=torch.Generator().manual_seed(seed)) * size


class TestCompare:
    """By made-up logits: an effect that is near the tolerance, and rounding about it."""

    @pytest.fixture
    def base(self) -> Tensor:
        return random(3.0, seed=0)

    def test_rounding_within_the_tolerance_is_accepted(self, base: Tensor) -> None:
        expected = base + random(0.15, seed=1)
        for seed in range(2, 7):
            found = compare(expected + random(0.05, seed), expected, base, 0.05)
            assert found["effect_reproduced"] == pytest.approx(1, abs=0.1)
            assert found["logits_difference"] == pytest.approx(0.05 / 3, rel=0.1)

    def test_rounding_beyond_the_tolerance_is_refused(self, base: Tensor) -> None:
        expected = base + random(1.0, seed=1)
        with pytest.raises(PublishFailed, match="logits differ by"):
            compare(expected + random(0.2, seed=2), expected, base, 0.05)

    @pytest.mark.parametrize("share", [0.0, 0.5, 1.9])
    def test_an_effect_of_another_size_is_refused_though_within_the_tolerance(
        self, base: Tensor, share: float
    ) -> None:
        effect = random(0.12, seed=1)
        with pytest.raises(PublishFailed, match="its effect on the logits is"):
            compare(base + share * effect, base + effect, base, 0.05)

    def test_the_effect_of_another_adapter_is_refused(self, base: Tensor) -> None:
        with pytest.raises(PublishFailed, match="its effect on the logits is"):
            compare(base + random(0.09, seed=2), base + random(0.09, seed=1), base, 0.05)

    def test_an_effect_smaller_than_rounding_is_not_judged(self, base: Tensor) -> None:
        expected = base + random(0.001, seed=1)
        assert compare(base, expected, base, 0.05)["effect_reproduced"] is None

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_not_finite_is_refused(self, base: Tensor, value: float) -> None:
        found = base.clone()
        found[3, 7] = value
        with pytest.raises(PublishFailed, match="logits differ by"):
            compare(found, base, base, 0.05)
        with pytest.raises(PublishFailed, match="logits differ by"):
            compare(base, found, base, 0.05)


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_model.bin"])
def test_a_pickle_in_place_of_the_weights_is_not_opened(
    job: TrainingJob, adapter: Path, tmp_path: Path, name: str
) -> None:
    canary = tmp_path / "canary"
    (adapter / WEIGHTS).unlink()
    (adapter / name).write_bytes(pickled(canary))
    reseal(adapter)
    with pytest.raises(PublishFailed):
        verify(job, adapter.parent)
    assert not canary.exists()
