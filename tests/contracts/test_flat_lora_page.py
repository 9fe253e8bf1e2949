"""The code on the library's page runs as it stands there, and does what the page says."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset  # type: ignore[import-untyped]  # it has no types
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]  # imported lazily by TRL

from flatlora import EvaluatedWhilePerturbed, FlatLoraError

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "flat-lora.md").read_text()
README = (ROOT / "README.md").read_text()
TINY_BASE = str(ROOT / "examples" / "tiny-base")
HUB_ID = "Qwen/Qwen3-0.6B"  # stands for any base model; the tests have no network
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

Batch = dict[str, Tensor]


def block(page: str, words: str) -> str:
    """The only block of code on a page that contains some words."""
    (found,) = [code for code in BLOCK.findall(page) if words in code]
    assert isinstance(found, str)
    return found


def statements(code: str) -> list[str]:
    """The lines that do something, without imports."""
    lines = [line for line in code.splitlines() if line.strip()]
    return [line for line in lines if not line.startswith(("import ", "from "))]


def run(code: str, **names: Any) -> dict[str, Any]:
    """What the code leaves behind, given some names."""
    exec(code, names)  # noqa: S102  # the page's own code is what is tested
    return names


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(100, (count, 2, 8), generator=generator)
    return [{"input_ids": batch, "labels": batch} for batch in tokens]


def tiny_model() -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(TINY_BASE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(target_modules="all-linear"))
    assert isinstance(model, PeftModel)
    return model.train()


def adapter(model: Any) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def frozen(model: Any) -> list[Tensor]:
    return [p.detach() for p in model.parameters() if not p.requires_grad]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    assert len(some) == len(others)
    return all(map(torch.equal, some, others))


class TestTheLibraryAlone:
    CODE = block(PAGE, "flat.perturbed(step)").replace(HUB_ID, TINY_BASE)

    def run(self, sigma: str) -> Any:
        assert "sigma=0.05" in self.CODE
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            code = self.CODE.replace("sigma=0.05", f"sigma={sigma}")
            return run(code, batches=batches(4))["model"]

    def test_it_takes_ten_lines(self) -> None:
        assert len(statements(self.CODE)) == 10

    def test_they_train_and_save_an_adapter_on_an_untouched_base(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        model = self.run("0.05")
        assert same(frozen(model), frozen(tiny_model()))
        base = AutoModelForCausalLM.from_pretrained(TINY_BASE)
        loaded = PeftModel.from_pretrained(base, "adapter", is_trainable=True)
        assert same(adapter(loaded), adapter(model))
        assert all(bool(factor.any()) for factor in adapter(model))

    def test_they_train_with_noise(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert not same(adapter(self.run("0.05")), adapter(self.run("0.0")))

    def test_the_readmes_loop_trains_too(self) -> None:
        model = tiny_model()
        before = adapter(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        loader = [batches(2)] * 3
        left = run(
            block(README, "flat.perturbed(step)"),
            peft_model=model,
            optimizer=optimizer,
            loader=loader,
        )
        assert left["step"] == 2
        assert not same(adapter(model), before)


class TestWithATrainer:
    CODE = block(PAGE, "FlatLoraCallback")

    def test_it_takes_three_lines(self) -> None:
        assert len([line for line in self.CODE.splitlines() if line]) == 3

    @pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
    def test_they_train_with_noise(self, tmp_path: Path, kind: str) -> None:
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "report_to": "none",
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "save_strategy": "no",
        }
        if kind == "Trainer":
            rows = [{name: tensor[0] for name, tensor in batch.items()} for batch in batches(8)]
            names = {"Trainer": Trainer, "args": TrainingArguments(**settings), "data": rows}
        else:
            # transformers warns of TRL's default of activation_checkpointing, an old name
            args = SFTConfig(**settings, activation_checkpointing=False)
            told = Dataset.from_list([{"prompt": "The fox", "completion": " went home."}] * 8)
            names = {"Trainer": SFTTrainer, "args": args, "data": told}
        left = run(self.CODE, model=tiny_model(), **names)
        log = [entry for entry in left["trainer"].state.log_history if "loss" in entry]
        assert [entry["flat_lora_sigma"] for entry in log] == pytest.approx([0, 0.0125, 0.0375])
        assert same(frozen(left["trainer"].model), frozen(tiny_model()))


def test_the_curve_of_the_loss_under_noise_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    left = run(block(PAGE, "import sharpness"), model=tiny_model(), validation=batches(2))
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == ["σ = 0.05", "σ = 0.1", "σ = 0.2"]
    assert left["curve"].clean_loss > 0


def test_every_block_of_code_is_run_here() -> None:
    assert len(BLOCK.findall(PAGE)) == 3


def test_every_error_of_the_library_is_there_with_what_to_do() -> None:
    errors = FlatLoraError.__subclasses__()
    assert EvaluatedWhilePerturbed in errors
    assert [error for error in errors if f"| `{error.__name__}` |" not in PAGE] == []
