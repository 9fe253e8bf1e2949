"""The finished adapter is loaded by a fresh process, with PEFT alone, and must compute the same.

The trainer leaves a probe: a few token ids and the trained model's logits on them.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from worker.training.config import TrainingJob
from worker.training.data.rendering import Example
from worker.training.errors import PublishFailed
from worker.training.model.base import choose_device, choose_dtype, load_base
from worker.training.result.adapter import CONFIG, WEIGHTS

PROBE = "probe.safetensors"
PROBE_ROWS, PROBE_TOKENS = 2, 16

# Share of the largest logit by which two correct computations of the same model may differ.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def write_probe(folder: Path, model: nn.Module, examples: Sequence[Example]) -> None:
    """Leave token ids and the trained model's logits for ``verify``."""
    device = next(model.parameters()).device
    found: dict[str, Tensor] = {}
    for index, example in enumerate(examples[:PROBE_ROWS]):
        ids = torch.from_numpy(example.ids[:PROBE_TOKENS]).long()
        found[f"ids/{index}"] = ids
        found[f"logits/{index}"] = _logits(model, ids.to(device)).cpu().contiguous()
    save_file(found, folder / PROBE)


def verify(job: TrainingJob, folder: Path) -> None:
    """Load base model and adapter as any user of PEFT would, and compare.

    Raises:
        PublishFailed: If the adapter's files are not what servers accept, or its logits differ
            from the trained model's.
    """
    adapter = folder / "adapter"
    check_files(job, adapter)
    device = choose_device()
    dtype = choose_dtype(job.training, device)
    model = PeftModel.from_pretrained(load_base(job.base_model, device, dtype), str(adapter))
    model.eval()
    probe = load_file(folder / PROBE)
    for name in (name for name in probe if name.startswith("ids/")):
        expected = probe[name.replace("ids/", "logits/")]
        found = _logits(model, probe[name].to(device)).cpu()
        difference = (found - expected).abs().max().item()
        allowed = TOLERANCE[dtype] * expected.abs().max().item()
        if not difference <= allowed:
            raise PublishFailed(
                "The saved adapter does not compute what the trained model computed: logits "
                f"differ by {difference:.3g}, allowed is {allowed:.3g}.",
                "Submit the job again; if it happens again, report it.",
            )


def check_files(job: TrainingJob, adapter: Path) -> None:
    """That config and tensors are plain LoRA of the promised rank, as vLLM and PEFT accept it.

    Raises:
        PublishFailed: With the first thing that is not.
    """
    config = json.loads((adapter / CONFIG).read_text())
    promised = {
        "peft_type": "LORA",
        "r": job.lora.rank,
        "bias": "none",
        "modules_to_save": None,
        "use_dora": False,
        "base_model_name_or_path": job.base_model.reference,
    }
    for key, value in promised.items():
        if config.get(key) != value:
            raise _unfit(f"{CONFIG} has {key} = {config.get(key)!r}, expected {value!r}")
    for name, tensor in load_file(adapter / WEIGHTS).items():
        if not name.endswith((".lora_A.weight", ".lora_B.weight")):
            raise _unfit(f"{WEIGHTS} holds {name}, expected lora_A and lora_B alone")
        if job.lora.rank not in tensor.shape:
            raise _unfit(f"{name} has the shape {tuple(tensor.shape)}, rank is {job.lora.rank}")
        if not bool(tensor.isfinite().all()):
            raise _unfit(f"{name} is not finite")


def _unfit(problem: str) -> PublishFailed:
    return PublishFailed(f"The saved adapter is not fit to be served: {problem}.", None)


@torch.no_grad()
def _logits(model: nn.Module, ids: Int64[Tensor, " length"]) -> Float[Tensor, "length vocab"]:
    logits: Tensor = model(input_ids=ids[None]).logits[0]
    return logits.float()
