"""The card can be read by people and by a model hub; the manifest says all that went in."""

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from tests.worker.training.conftest import folder_bytes
from tests.worker.training.result.finished import (
    finish,
    made_up_result,
    made_up_state,
    report_of,
)
from worker.training.config import DataFile, Evaluation, Resources, TrainingJob
from worker.training.files import sha256_of
from worker.training.plan import Plan
from worker.training.result.card import write_card
from worker.training.result.curves import curves_of
from worker.training.result.facts import Facts
from worker.training.result.usage import vllm_rank
from worker.training.state import State

Make = Callable[..., TrainingJob]


def card_of(
    job: TrainingJob,
    folder: Path,
    *,
    result: Mapping[str, Any] | None = None,
    report: Mapping[str, Any] | None = None,
    state: State | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> str:
    """The card of a job with a made-up history."""
    about = {**report_of(job), **(report or {})}
    facts = Facts(
        job, made_up_result(**(result or {})), state or made_up_state(), about, quantization
    )
    curves = curves_of(job, facts.state, about["steps"])
    write_card(folder / "README.md", facts, curves, "training_curves.svg")
    return (folder / "README.md").read_text()


def header_of(card: str) -> Any:
    """What a hub reads of it."""
    return ModelCard(card).data


def block(card: str, language: str, after: str) -> str:
    """The first code block of a language after some words."""
    _, _, rest = card.partition(after)
    return rest.partition(f"```{language}\n")[2].partition("```")[0]


class TestHeader:
    def test_a_hub_reads_base_library_task_and_results(
        self, make_job: Make, tmp_path: Path
    ) -> None:
        data = header_of(card_of(make_job(), tmp_path))
        assert data.base_model == "org/base"
        assert data.get("base_model_relation") == "adapter"
        assert (data.library_name, data.pipeline_tag) == ("peft", "text-generation")
        assert data.tags == ["lora", "sft", "flat-lora"]
        assert data.license is None

    def test_the_results_are_a_valid_model_index(self, make_job: Make, tmp_path: Path) -> None:
        data = header_of(card_of(make_job(), tmp_path))
        name, results = model_index_to_eval_results(data.to_dict()["model-index"])
        assert name == "base-lora"
        found = {result.metric_type: result.metric_value for result in results}
        assert found == {"loss": 2.25, "perplexity": 9.487736, "accuracy": 0.5}
        assert {result.dataset_type for result in results} == {"json"}
        assert {result.dataset_name for result in results} == {"held-out rows of file:rows.jsonl"}

    def test_a_folder_is_not_given_out_as_a_model_of_the_hub(
        self, make_job: Make, base_folder: Path, tmp_path: Path
    ) -> None:
        job = make_job()
        job = replace(job, base_model=replace(job.base_model, name="file:base", revision=None))
        card = card_of(job, tmp_path)
        assert header_of(card).base_model is None
        assert "base_model_relation" not in card
        assert f"vllm serve {base_folder} \\\n" in card
        assert f"--base {base_folder} --outtype" in card

    def test_names_that_look_like_yaml_or_markdown_stay_names(
        self, make_job: Make, tmp_path: Path
    ) -> None:
        job = make_job()
        odd = "file:a: [b] | `c` #d.jsonl"
        job = replace(job, dataset=replace(job.dataset, uri=odd))
        card = card_of(job, tmp_path)
        results = header_of(card).eval_results
        assert results
        assert results[0].dataset_name == f"held-out rows of {odd}"
        assert "| file | `` file:a: [b] \\| `c` #d.jsonl ``, SHA-256 `" in card

    def test_plain_lora_is_not_given_out_as_flat(self, make_job: Make, tmp_path: Path) -> None:
        card = card_of(make_job(sigma=0.0), tmp_path)
        assert header_of(card).tags == ["lora", "sft"]
        assert "Plain LoRA" in card
        assert "2409.14396" not in card


class TestText:
    def test_it_begins_with_what_came_out(self, make_job: Make, tmp_path: Path) -> None:
        text = ModelCard(card_of(make_job(), tmp_path)).text
        assert text.startswith("\n# LoRA adapter for org/base\n")
        assert "from 5.5000 to **2.2500**, the perplexity from 244.7 to **9.488**" in text
        assert text.index("training_curves.svg") < text.index("## Evaluation")

    def test_every_setting_that_matters_is_in_it(self, make_job: Make, tmp_path: Path) -> None:
        job = make_job(
            lora={"rslora": True, "target_modules": ["v_proj", "q_proj"]},
            training={"loraplus_lr_ratio": 16.0, "weight_decay": 0.1},
            resources=Resources(gpus=2),
        )
        plan = Plan(max_length=128, micro_batch_size=2, packing=True).to_json()
        card = card_of(job, tmp_path, result={"plan": plan})
        for line in (
            "| base model | `org/base` |",
            "| revision | `abc123` |",
            "| rank, alpha | 4, 8; scaled by alpha / √rank = 4 |",
            "| target modules | `v_proj, q_proj` |",
            "| dropout | 0.1 |",
            "| σ | 0.05, rising from 0 as ½ (1 − cos(π t / T)) |",
            "| optimizer steps | 8 |",
            "| batch | 4 rows |",
            "| learning rate | 0.01; of B 16 times that (LoRA+) |",
            "| schedule | cosine, after a warm-up of 3 % of the steps |",
            "| optimizer | AdamW, weight decay 0.1 |",
            "| gradients | clipped at norm 1 |",
            f"| longest row | {report_of(job)['length']['max']} tokens |",
            "| packing | yes |",
            "| micro-batch | 2 packed rows |",
            "| activation checkpointing | no |",
            "| base held | in float32 |",
            "| computed in | float32; adapter and optimizer in float32 |",
            "| GPUs | 2 |",
            "| seed | 7 |",
        ):
            assert line in card

    def test_it_counts_the_rows_and_quotes_none(self, make_job: Make, tmp_path: Path) -> None:
        job = make_job()
        card = card_of(job, tmp_path)
        assert f"| file | `file:rows.jsonl`, SHA-256 `{job.dataset.sha256}` |" in card
        assert "| format | chat in jsonl |" in card
        assert "| rows read | 40 |" in card
        assert "| rows held out | 2 |" in card
        assert "Say " not in card

    def test_what_the_preflight_warned_of_is_among_the_limits(
        self, make_job: Make, tmp_path: Path
    ) -> None:
        card = card_of(make_job(), tmp_path, report={"warnings": ["3 rows* were <cut>."]})
        assert "\n- 3 rows\\* were \\<cut\\>.\n" in card

    def test_a_validation_file_is_named(self, make_job: Make, tmp_path: Path) -> None:
        job = make_job()
        path = tmp_path / "validation.jsonl"
        path.write_bytes(job.dataset.path.read_bytes())
        validation = DataFile("file:validation.jsonl", path, path.name, sha256_of(path))
        card = card_of(replace(job, validation=validation), tmp_path)
        assert "3 rows of `file:validation.jsonl`; 17 tokens in the loss" in card
        assert f"| held-out file | `file:validation.jsonl`, SHA-256 `{validation.sha256}` |" in card
        assert "| its format | chat in jsonl |" in card
        assert "| its rows | 40 read, 3 held out, 37 beyond evaluation.max_rows |" in card
        assert "| rows to train on | 40 |" in card
        assert "| rows held out |" not in card
        assert "are like the rows it was trained on" not in card

    def test_rows_of_text_are_not_said_to_have_turns(self, make_job: Make, tmp_path: Path) -> None:
        rows = [{"text": f"Once {n}."} for n in range(40)]
        job = make_job(rows=rows, data={"format": "text"})
        card = card_of(job, tmp_path)
        assert "| loss on | all tokens, and the end of each text |" in card
        assert "assistant" not in card
        assert "the chat template" not in card
        assert "sft" not in header_of(card).tags

    def test_it_saw_no_more_than_its_longest_row(self, make_job: Make, tmp_path: Path) -> None:
        job = make_job()
        longest = report_of(job)["length"]["max"]
        assert longest < job.data.max_length
        assert f"It saw no more than {longest} tokens at once." in card_of(job, tmp_path)

    def test_patience_counts_what_is_lower_by_enough(self, make_job: Make, tmp_path: Path) -> None:
        evaluation = Evaluation(max_rows=3, patience=2, min_delta=0.01)
        card = card_of(replace(make_job(), evaluation=evaluation), tmp_path)
        line = "after 2 evaluations without a loss lower by more than 0.01"
        assert f"| early stopping | {line} |" in card

    def test_an_early_end_and_the_kept_step_are_told(self, make_job: Make, tmp_path: Path) -> None:
        card = card_of(
            make_job(),
            tmp_path,
            report={"steps": 20},
            result={"stopped_early": True, "kept": "best", "kept_step": 4},
        )
        assert "| optimizer steps | 8 of 20, then stopped early |" in card
        assert "The adapter is that of step 4, where the held-out loss was lowest." in card
        assert "| adapter of | step 4, the best one |" in card

    def test_many_evaluations_are_sampled_to_their_end(
        self, make_job: Make, tmp_path: Path
    ) -> None:
        state = made_up_state()
        state.held_out = [{"step": n, "loss": 3.0, "accuracy": 0.5} for n in range(101)]
        card = card_of(make_job(), tmp_path, state=state)
        table = card.partition("<details>")[2].partition("</details>")[0]
        steps = [line.split("|")[1].strip() for line in table.splitlines() if line[:3] == "| 1"]
        assert "18 of 101 evaluations" in table
        assert steps[-1] == "100"


class TestUse:
    def test_the_python_in_it_runs(self, make_job: Make, tmp_path: Path) -> None:
        job = make_job()
        base = replace(job.base_model, name="file:base", revision=None)
        adapter = finish(replace(job, base_model=base), tmp_path)
        program = block((adapter / "README.md").read_text(), "python", "## Use")
        program = program.replace("path/to/this/folder", str(adapter))
        program = program.replace('    device_map="auto",\n', "").replace("256", "2")
        names: dict[str, Any] = {}
        exec(compile(program, "card", "exec"), names)  # noqa: S102 - it is what users would run
        assert isinstance(names["model"], peft.PeftModel)
        assert names["answer"].shape == (2,)

    @pytest.mark.parametrize(
        ("rank", "needed"), [(1, 1), (4, 8), (16, 16), (100, 128), (300, 320), (512, 512)]
    )
    def test_vllm_is_told_the_smallest_rank_that_it_takes(self, rank: int, needed: int) -> None:
        assert vllm_rank(rank) == needed
        assert vllm_rank(513) is None

    def test_commands_name_base_revision_and_rank(self, make_job: Make, tmp_path: Path) -> None:
        card = card_of(make_job(lora={"rank": 20}), tmp_path)
        vllm = shlex.split(block(card, "bash", "vLLM"))
        assert vllm[:5] == ["vllm", "serve", "org/base", "--revision", "abc123"]
        assert vllm[vllm.index("--max-lora-rank") + 1] == "32"
        sglang = shlex.split(block(card, "bash", "SGLang"))
        assert sglang[sglang.index("--max-lora-rank") + 1] == "20"
        assert "--base-model-id org/base --outtype f16" in block(card, "bash", "llama.cpp")

    def test_a_rank_that_vllm_does_not_take_is_told(self, make_job: Make, tmp_path: Path) -> None:
        card = card_of(make_job(lora={"rank": 600}), tmp_path)
        assert "vLLM takes ranks up to 512, and this adapter's is 600" in card
        assert "vllm serve" not in card

    def test_llama_cpp_is_told_how_rslora_is_scaled(self, make_job: Make, tmp_path: Path) -> None:
        """It divides alpha by the rank, so an alpha times √rank is the same."""
        card = card_of(make_job(lora={"rslora": True, "rank": 16, "alpha": 8.0}), tmp_path)
        assert "`lora_alpha` 32." in card

    def test_a_quantised_base_is_loaded_as_it_was_trained_on(
        self, make_job: Make, tmp_path: Path
    ) -> None:
        job = make_job(training={"quantization": "4bit"})
        how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        card = card_of(job, tmp_path, quantization=how)
        program = block(card, "python", "## Use")
        compile(program, "card", "exec")
        assert "AutoTokenizer, BitsAndBytesConfig" in program
        assert "BitsAndBytesConfig(bnb_4bit_quant_type='nf4', load_in_4bit=True)" in program
        assert "The base was held in 4 bits while it was trained." in card

    def test_text_is_not_asked_for_by_a_chat_template(self, make_job: Make, tmp_path: Path) -> None:
        report = {"format": {"name": "text", "file": "csv", "compression": None}}
        card = card_of(make_job(), tmp_path, report=report)
        assert "apply_chat_template" not in card
        assert 'tokenizer("…", return_tensors="pt")' in card


class TestManifest:
    def test_it_has_inputs_versions_history_and_hashes(
        self, make_job: Make, tmp_path: Path
    ) -> None:
        adapter = finish(make_job(), tmp_path)
        manifest = json.loads((adapter / "training_manifest.json").read_text())
        assert manifest["settings"] == {"sigma": 0.05}
        assert manifest["versions"].keys() >= {
            "python", "torch", "transformers", "peft", "flatlora", "flatlora-service",
        }  # fmt: skip
        assert manifest["versions"]["torch"] == torch.__version__.partition("+")[0]
        assert manifest["held_out"] == made_up_state().held_out
        assert manifest["data"]["rows"]["read"] == 40
        assert manifest["files"] == {
            path.name: sha256_of(path)
            for path in adapter.iterdir()
            if path.name != "training_manifest.json"
        }

    def test_no_row_and_no_measure_of_the_machine_is_in_it(
        self, make_job: Make, tmp_path: Path
    ) -> None:
        bad = [{"place": "line 3", "problem": "found Say what"}]
        validation = {"bad_rows": bad, "rows": {"read": 4}, "format": {"file": "csv"}}
        report = {"seconds": 12.5, "bad_rows": bad, "validation": validation}
        adapter = finish(make_job(), tmp_path, report=report)
        text = (adapter / "training_manifest.json").read_text()
        assert "Say" not in text
        assert "seconds" not in text
        del validation["bad_rows"]
        assert json.loads(text)["data"]["validation"] == validation

    def test_two_attempts_write_the_same_bytes(self, make_job: Make, tmp_path: Path) -> None:
        job = make_job()
        one, two = finish(job, tmp_path / "one"), finish(job, tmp_path / "two")
        assert folder_bytes(one) == folder_bytes(two)
