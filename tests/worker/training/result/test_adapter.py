"""The finished adapter is plain LoRA that computes what was trained, in bytes that do not vary."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.worker.training.conftest import Recorder, folder_bytes, make_tokenizer
from worker.training.config import TrainingJob
from worker.training.data.dataset import prepare
from worker.training.data.rendering import Renderer
from worker.training.errors import ConfigInvalid
from worker.training.result.verify import verify
from worker.training.run import run

Make = Callable[..., TrainingJob]
ROOT = Path(__file__).resolve().parents[3]


def hashes(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in folder_bytes(folder).items()}


class TestFolder:
    def test_it_holds_what_servers_need_and_nothing_they_refuse(
        self, make_job: Make, tmp_path: Path
    ) -> None:
        run(make_job(), tmp_path, Recorder(), Recorder())
        adapter = tmp_path / "adapter"
        assert {path.name for path in adapter.iterdir()} == {
            "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
            "tokenizer.json", "tokenizer_config.json", "training_curves.svg",
            "training_manifest.json",
        }  # fmt: skip
        config = json.loads((adapter / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "org/base"
        assert config["revision"] == "abc123"
        assert config["inference_mode"] is True
        assert (config["r"], config["bias"], config["modules_to_save"]) == (4, "none", None)
        weights = load_file(adapter / "adapter_model.safetensors")
        assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in weights)
        assert {weight.dtype for weight in weights.values()} == {torch.float32}

    @pytest.mark.torture
    def test_another_process_in_another_folder_writes_the_same_bytes(
        self, make_job: Make, tmp_path: Path
    ) -> None:
        job = make_job()
        run(job, tmp_path / "one", Recorder(), Recorder())
        script = (
            "import pickle, sys\n"
            "from pathlib import Path\n"
            "from tests.worker.training.conftest import Recorder\n"
            "from worker.training.run import run\n"
            "job = pickle.loads(sys.stdin.buffer.read())\n"
            f"run(job, Path({str(tmp_path / 'other')!r}), Recorder(), Recorder())\n"
        )
        import pickle

        subprocess.run(
            [sys.executable, "-c", script], input=pickle.dumps(job), cwd=ROOT, check=True
        )
        assert folder_bytes(tmp_path / "one" / "adapter") == folder_bytes(
            tmp_path / "other" / "adapter"
        )

    def test_no_file_tells_of_the_worker(self, make_job: Make, tmp_path: Path) -> None:
        run(make_job(), tmp_path, Recorder(), Recorder())
        for name, content in folder_bytes(tmp_path / "adapter").items():
            assert str(tmp_path).encode() not in content, name

    def test_the_card_and_the_manifest_say_how_it_was_made(
        self, make_job: Make, tmp_path: Path
    ) -> None:
        job = make_job()
        result = run(job, tmp_path, Recorder(), Recorder())
        card = (tmp_path / "adapter" / "README.md").read_text()
        assert f"| loss | {result['held_out']['before']['loss']:.4f} |" in card
        assert "| σ | 0.05, rising" in card
        manifest = json.loads((tmp_path / "adapter" / "training_manifest.json").read_text())
        assert manifest["dataset"]["sha256"] == job.dataset.sha256
        assert manifest["settings"]["sigma"] == 0.05
        assert manifest["result"] == result
        assert set(manifest["base_model"]["files"]) >= {"model.safetensors", "config.json"}


class TestTruth:
    def test_the_bases_files_are_not_touched(
        self, make_job: Make, base_folder: Path, tmp_path: Path
    ) -> None:
        before = hashes(base_folder)
        run(make_job(), tmp_path, Recorder(), Recorder())
        assert hashes(base_folder) == before

    def test_peft_reproduces_the_held_out_loss(
        self, make_job: Make, base_folder: Path, tmp_path: Path
    ) -> None:
        job = make_job()
        result = run(job, tmp_path, Recorder(), Recorder())
        base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
        held_out = prepare(job, Renderer(tokenizer, "assistant")).held_out
        total, count = 0.0, 0
        for example in held_out:
            ids = torch.from_numpy(example.ids).long()
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            mask = torch.from_numpy(example.in_loss[1:])
            total, count = total + losses[mask].sum().item(), count + int(mask.sum())
        reported = result["held_out"]["after"]["loss"]
        assert total / count == pytest.approx(reported, abs=1e-5)
        assert reported < result["held_out"]["before"]["loss"]

    def test_a_length_of_zero_learning_is_refused(self, make_job: Make, tmp_path: Path) -> None:
        job = make_job(training={"learning_rate": 1e-45})
        with pytest.raises(ConfigInvalid, match="every lora_B is zero"):
            run(job, tmp_path, Recorder(), Recorder())


def test_it_passes_its_check(make_job: Make, tmp_path: Path) -> None:
    job = make_job()
    run(job, tmp_path, Recorder(), Recorder())
    assert verify(job, tmp_path)["effect_reproduced"] == pytest.approx(1, abs=1e-3)


def test_the_saved_tokenizer_is_the_bases(make_job: Make, tmp_path: Path) -> None:
    run(make_job(), tmp_path, Recorder(), Recorder())
    saved = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert saved.chat_template == make_tokenizer().chat_template
    assert saved.eos_token == "<|im_end|>"  # noqa: S105 - not a password
