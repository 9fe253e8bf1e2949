"""The benchmarks run to their end on tiny shapes, and refuse ratios of things that differ."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import agreement, drift, llama, perturbation, published, report, step_time, timing
from benchmarks.trainer import Trainer
from flatlora import FlatLora, FlatLoraConfig, ops
from flatlora.ops import Stream

CPU = torch.device("cpu")
STREAM = Stream((1, 2), 3, 4)
STEP_TIME = ["--small", "--tokens", "16,48", "--seconds", "0.05"]


def results(path: Path) -> Any:
    record = json.loads(path.read_text())
    facts = {"command", "commit", "kernels", "device", "torch", "triton", "date"}
    assert facts <= record["machine"].keys()
    return record["results"]


@pytest.fixture
def diverging_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that is 1 % too wide wherever the reference is not asked for."""
    forced = False
    use, noisy_copy = ops.use, ops.noisy_copy

    @contextmanager
    def watched(backend: ops.Backend) -> Iterator[None]:
        nonlocal forced
        with use(backend):
            before, forced = forced, backend == "reference"
            try:
                yield
            finally:
                forced = before

    def wide(weight: Tensor, std: Tensor, stream: Stream, *, out: Tensor) -> Tensor:
        return noisy_copy(weight, std if forced else std * 1.01, stream, out=out)

    monkeypatch.setattr(ops, "use", watched)
    monkeypatch.setattr(ops, "noisy_copy", wide)


def test_perturbation_measures_copies_and_a_step(tmp_path: Path) -> None:
    path = tmp_path / "perturbation.json"
    assert perturbation.main(["--small", "--rounds", "2", "--json", str(path)]) == 0
    found = results(path)
    assert [tuple(copy["shape"]) for copy in found["copies"]] == list(perturbation.SMALL_SHAPES)
    for copy in found["copies"]:
        if torch.cuda.is_available():
            assert copy["agreement"]["z_error"] <= agreement.Z_TOLERANCE
        else:
            assert copy["agreement"] == report.NO_KERNELS
            assert copy["reference_over_noisy_copy"] is None
        assert copy["share_of_copy_bandwidth"] > 0
    step = found["step"]
    assert step["targets"] == 7 * llama.TINY.layers
    assert step["bytes"] == 2 * llama.TINY.layers * sum(
        out * features for out, features in llama.TINY.linears().values()
    )
    kinds = ["resident", *(f"streamed, {k}" for k in ("entry", "1 micro-batch", "4 micro-batches"))]
    for ratios in ("over_copy", "published_over", "published_over_wall"):
        assert list(step[ratios]) == kinds
        assert all(ratio > 0 for ratio in step[ratios].values())
    for mode in perturbation.MODES:
        assert step["agreement"][mode]["layers"] == step["targets"]
        assert step["set_up"][mode]["base_norms"] > 0


@pytest.mark.usefixtures("diverging_kernel")
def test_perturbation_refuses_a_ratio_of_other_noise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    path = tmp_path / "perturbation.json"
    with ops.use("triton"):
        assert perturbation.main(["--small", "--rounds", "1", "--json", str(path)]) == 1
    said = capsys.readouterr()
    assert "disagree" in said.err
    assert not said.out
    assert not path.exists()


class Broken(FlatLora):
    """An engine that does what its class says, but in one respect."""

    def __init__(self, model: Any, config: FlatLoraConfig, total_steps: int) -> None:
        super().__init__(model, self.configured(config), total_steps)

    def configured(self, config: FlatLoraConfig) -> FlatLoraConfig:
        return config


class Weaker(Broken):
    def configured(self, config: FlatLoraConfig) -> FlatLoraConfig:
        return FlatLoraConfig(0.3 * config.sigma, config.seed, memory=config.memory)


class OtherSeed(Broken):
    def configured(self, config: FlatLoraConfig) -> FlatLoraConfig:
        return FlatLoraConfig(config.sigma, config.seed + 1, memory=config.memory)


class OtherDraw(Broken):
    def perturbed(self, step: int, draw: int | None = None) -> Any:
        return super().perturbed(step, 1)


class NoNoise(Broken):
    def perturbed(self, step: int, draw: int | None = None) -> Any:
        return super().perturbed(0)


class SameNoiseAtEveryStep(Broken):
    """What it draws at the first step that is checked."""

    first: int | None = None

    def perturbed(self, step: int, draw: int | None = None) -> Any:
        self.first = step if self.first is None else self.first
        return super().perturbed(self.first, draw)


class HalfOfTheTargets(Broken):
    @contextmanager
    def perturbed(self, step: int, draw: int | None = None) -> Iterator[None]:
        with super().perturbed(step, draw):
            for forward in self._perturbation._forwards[::2]:
                forward.take_back()
            yield


class OneTargetLeftOut(Broken):
    """One of the middle, which neither the first nor the last layer has."""

    @contextmanager
    def perturbed(self, step: int, draw: int | None = None) -> Iterator[None]:
        with super().perturbed(step, draw):
            forwards = self._perturbation._forwards
            forwards[len(forwards) // 2].take_back()
            yield


class OtherBackward(Broken):
    """The streamed backward pass meets the noise of the next step."""

    @contextmanager
    def perturbed(self, step: int, draw: int | None = None) -> Iterator[None]:
        with super().perturbed(step, draw):
            for noise in self._perturbation._noises:
                forward = noise.write_to_workspace
                noise.write_to_workspace = _alternating(forward)  # type: ignore[method-assign]
            yield
            for noise in self._perturbation._noises:
                del noise.write_to_workspace


def _alternating(write: Callable[..., Tensor]) -> Callable[..., Tensor]:
    calls = 0

    def later_at_every_third(tensor: Tensor, std: Tensor, clock: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return write(tensor, std, clock + (calls % 3 == 0))

    return later_at_every_third


BROKEN = [
    Weaker, OtherSeed, OtherDraw, NoNoise, SameNoiseAtEveryStep, HalfOfTheTargets,
    OneTargetLeftOut, OtherBackward,
]  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("benchmark", [perturbation, step_time])
def test_a_broken_engine_is_refused(
    broken: type[Broken],
    benchmark: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(benchmark, "FlatLora", broken)
    if benchmark is perturbation:
        with pytest.raises(report.Disagreement):
            perturbation.step_times(llama.TINY, CPU, rounds=1)
    else:
        assert step_time.main(STEP_TIME) == 1
        assert "disagree" in capsys.readouterr().err


class StaleGraph:
    """A graph that replays the noise that it was captured with."""

    def __init__(self, trainer: Trainer, batches: Sequence[Tensor]) -> None:
        trainer.forget()
        self.loss = trainer.passes(batches)

    def replay(self) -> Tensor:
        return self.loss.clone()


def test_a_stale_graph_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_time, "Graph", StaleGraph)
    assert step_time.main([*STEP_TIME, "--graph"]) == 1
    assert "a graph's loss" in capsys.readouterr().err


def test_step_time_measures_every_mode(tmp_path: Path) -> None:
    path = tmp_path / "step_time.json"
    assert step_time.main([*STEP_TIME, "--json", str(path)]) == 0
    small, large = results(path)["steps"]
    assert [small["tokens"], large["tokens"]] == [16, 48]
    assert small["micro_batches"] == [[1, 16]]
    for step in (small, large):
        assert list(step["kinds"]) == [step_time.PLAIN, *step_time.MODES]
        assert step["auto"] in step_time.MODES
        for kind in step["kinds"].values():
            assert all(len(block) >= step_time.ENOUGH_STEPS for block in kind["seconds"])
        for mode in step_time.MODES:
            assert step["kinds"][mode]["same_losses_as_resident"]
            assert step["kinds"][mode]["over_plain"] > 0


def test_a_step_holds_all_its_tokens() -> None:
    model = llama.language_model(llama.TINY, CPU, torch.float32)
    trainer = Trainer(model, CPU, llama.TINY.vocab, 2, 16)
    for tokens, shapes in [(8, [(1, 8)]), (16, [(1, 16)]), (32, [(2, 16)]), (96, [(2, 16)] * 3)]:
        assert [tuple(batch.shape) for batch in trainer.batches(tokens)] == shapes


def test_step_time_measures_a_base_model_of_ones_own(tmp_path: Path) -> None:
    model = llama.language_model(llama.TINY, CPU, torch.float32).unload()
    model.save_pretrained(tmp_path)
    arguments = ["--base-model", str(tmp_path), "--rows", "2", "--length", "8", "--seconds", "0.05"]
    assert step_time.main(arguments) == 0


def test_step_time_refuses_modes_that_train_otherwise() -> None:
    same = step_time.Measured(losses=[1.0, 2.0], norms=[1.0, 1.0])
    plain = step_time.Measured(losses=[1.5, 2.5], norms=[1.0, 1.0])
    other = step_time.Measured(losses=[1.0, 2.1], norms=[1.0, 1.0])
    step_time.require_agreement({"plain LoRA": plain, "resident": same, "streamed": same})
    for measured in (
        {"plain LoRA": plain, "resident": same, "streamed": other},
        {"plain LoRA": same, "resident": same, "streamed": same},
    ):
        with pytest.raises(report.Disagreement):
            step_time.require_agreement(measured)


def test_a_limit_shortens_blocks(tmp_path: Path) -> None:
    path = tmp_path / "step_time.json"
    assert step_time.main([*STEP_TIME, "--limit", "0", "--json", str(path)]) == 0
    for step in results(path)["steps"]:
        blocks = step["kinds"][step_time.PLAIN]["seconds"]
        assert [len(block) for block in blocks] == [step_time.FEWEST_STEPS] * 2


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_biases_and_transposed_weights_are_compared_too(
    peft_model: Callable[..., Any], transposed: bool
) -> None:
    model = peft_model("gpt2" if transposed else "llama")
    flat = FlatLora(model, FlatLoraConfig(0.1, 3), total_steps=4)

    def compare(seed: int) -> dict[str, float]:
        return agreement.require_same_noise(
            model, flat, step=2, total_steps=4, sigma=0.1, seed=seed
        )

    assert compare(3)["layers"] == len(flat.targets)
    with pytest.raises(report.Disagreement):
        compare(4)


def test_drift_is_nothing_for_ours_and_something_for_add_and_subtract(tmp_path: Path) -> None:
    path = tmp_path / "drift.json"
    assert drift.main(["--small", "--steps", "10", "--json", str(path)]) == 0
    ours, *theirs = results(path)["methods"].values()
    assert [found["steps"] for found in ours["drift"]] == [1, 10]
    assert all(found["bytes_changed"] == 0 for found in ours["drift"])
    for method in theirs:
        assert method["drift"][-1]["bytes_changed"] > 0
        assert method["drift"][-1]["relative_distance"] > 0


def test_drift_refuses_a_comparison_with_weaker_noise() -> None:
    strong = {"relative_change_of_outputs": 0.1}
    drift.require_same_strength({"flatlora": strong, "other": strong})
    with pytest.raises(report.Disagreement, match="other"):
        drift.require_same_strength(
            {"flatlora": {"relative_change_of_outputs": 0.09}, "other": strong}
        )


def test_drift_counts_every_changed_byte() -> None:
    before = torch.ones(3, 4, dtype=torch.bfloat16)
    after = before.clone()
    after[0, 0], after[1, 1] = 2.0, 1 + 2.0**-7  # 3f80 becomes 4000, and 3f81
    found = drift.drift([after, before], [before + 0, before])
    assert found["bytes_changed"] == 3
    assert found["weights_changed"] == 2 / 24


def test_roundings_are_told_from_other_values() -> None:
    one, std = torch.ones(1, 1000, dtype=torch.bfloat16), torch.ones(1, 1)
    neighbour = torch.nextafter(one, torch.tensor(2.0, dtype=torch.bfloat16))
    few, many, far, none = (one.clone() for _ in range(4))
    few[0, 0], many[0, :20], far[0, 0], none[0, 0] = neighbour[0, 0], neighbour[0, 0], 1.5, math.nan
    assert agreement.require_rounded_alike(few, one, std) == {
        "rounded_otherwise": pytest.approx(1e-3)
    }
    for other in (many, far, none):
        with pytest.raises(report.Disagreement):
            agreement.require_rounded_alike(other, one, std)


def test_where_noise_and_weight_cancel_the_normals_decide() -> None:
    zeros, std = torch.zeros(1, 1000, dtype=torch.bfloat16), torch.ones(1, 1)
    found = zeros.clone()
    found[0, 0] = 1e-5
    agreement.require_rounded_alike(found, zeros, std)
    with pytest.raises(report.Disagreement):
        agreement.require_rounded_alike(found, zeros, std / 100)


def test_the_published_std_is_ours_to_its_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(*s, generator=generator) for s in ((40, 24), (3, 24), (40, 3)))
    ours = ops.merged_row_std(
        weight, ops.row_square_norm(weight, transposed=False), a, b,
        scaling=2.0, sigma=0.1, transposed=False,
    )  # fmt: skip
    theirs = published.merged_row_std(weight, a, b, scaling=2.0, sigma=0.1)
    torch.testing.assert_close(ours, theirs)


def test_a_kind_is_called_as_often_as_it_says() -> None:
    seen: list[int] = []
    times = timing.take_turns({"kind": timing.Kind(seen.append, calls=3)}, CPU, rounds=2)
    assert seen == [0, 1, 2] * 4
    assert 0 <= times["kind"].host <= times["kind"].wall
