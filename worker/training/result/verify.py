"""The finished adapter is loaded by a fresh process, with PEFT alone, and must compute the same.

The trainer leaves a probe: rows of token ids, and the trained model's logits at the end of each.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from worker.training.config import BaseModel, TrainingJob
from worker.training.data.examples import Example
from worker.training.errors import BaseModelUnavailable, PublishFailed
from worker.training.model.base import (
    choose_device,
    choose_dtype,
    load_base,
    load_tokenizer,
    set_mode,
)
from worker.training.model.sharding import is_too_large
from worker.training.ranks import Ranks
from worker.training.result.checks import WEIGHTS, check_folder

log = logging.getLogger(__name__)

PROBE = "probe.safetensors"
PROBE_ROWS, PROBE_TOKENS = 2, 512
PROBE_LOGITS = 16  # places at a row's end, where attention has all of it to read

# Share of the logits' size (root mean square) by which two correct computations of one model may
# differ. A base of 20 M weights in bfloat16 was seen to differ by 0.014: the trainer rounds A and B
# to the base's type, PEFT does not.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
QUANTIZED_TOLERANCE = 8e-2  # 8-bit layers round what goes in, too
# How much of the adapter's effect on the logits must be found again, where it is large enough to be
# told from rounding. With none of it, half or twice, the difference may be within the tolerance.
REPRODUCED = (0.6, 1.5)
JUDGED = 0.5  # of the tolerance


def write_probe(
    folder: Path, model: nn.Module, examples: Sequence[Example], *, ranks: Ranks | None = None
) -> None:
    """Leave token ids and the trained model's logits for ``verify``; all ranks compute them."""
    device = next(model.parameters()).device
    found: dict[str, Tensor] = {}
    for index, example in enumerate(examples[:PROBE_ROWS]):
        ids = torch.from_numpy(example.ids[:PROBE_TOKENS]).long()
        found[f"ids/{index}"] = ids
        found[f"logits/{index}"] = _logits(model, ids.to(device))
    if ranks is None or ranks.is_first:
        save_file(found, folder / PROBE)


def verify(job: TrainingJob, folder: Path) -> dict[str, float | None]:
    """Load base model and adapter as any user of PEFT would, and compare.

    Args:
        job: The job.
        folder: Its own, with the finished ``adapter`` and the probe in it.

    Returns:
        ``logits_difference``, as a share of their size, and ``effect_reproduced``: 1 if the adapter
        changes the base's logits as it did in training, None if it changes them too little to tell.

    Raises:
        PublishFailed: If the adapter's files are not what servers accept, or its logits differ
            from the trained model's.
    """
    adapter = folder / "adapter"
    check_folder(job, adapter)
    probe = load_file(folder / PROBE)
    rows = [probe[f"ids/{index}"] for index in range(len(probe) // 2)]
    expected = torch.cat([probe[f"logits/{index}"] for index in range(len(rows))])
    _check_tokenizer(job, adapter, rows)
    device = choose_device()
    dtype = choose_dtype(job.training, device)
    if is_too_large(job, device, dtype):
        device = torch.device("cpu")
    quantization = job.training.quantization
    model = _attached(load_base(job.base_model, device, dtype, quantization), adapter)
    found = torch.cat([_logits(model, ids.to(device)) for ids in rows])
    with model.disable_adapter():
        base = torch.cat([_logits(model, ids.to(device)) for ids in rows])
    tolerance = QUANTIZED_TOLERANCE if quantization else TOLERANCE[dtype]
    return compare(found, expected, base, tolerance)


def compare(
    found: Float[Tensor, "places vocab"],
    expected: Float[Tensor, "places vocab"],
    base: Float[Tensor, "places vocab"],
    tolerance: float,
) -> dict[str, float | None]:
    """Whether the loaded adapter does to the base's logits what the trained one did.

    Args:
        found: Logits of base and loaded adapter.
        expected: Logits of the trained model.
        base: Logits of the base alone.
        tolerance: Share of the logits' size that rounding may make.

    Returns:
        As ``verify``.

    Raises:
        PublishFailed: If it does not.
    """
    found, expected, base = found.double(), expected.double(), base.double()
    size = _size(expected)
    difference = _size(found - expected) / size if size else math.nan
    if not (math.isfinite(size) and difference <= tolerance):
        raise _differs(f"logits differ by {difference:.3g} of their size, allowed is {tolerance:g}")
    effect = expected - base
    reproduced = None
    if _size(effect) > JUDGED * tolerance * size:
        # the slope of what is found over what was expected; rounding errors average out in it
        reproduced = ((found - base) * effect).sum().item() / effect.square().sum().item()
        if not REPRODUCED[0] <= reproduced <= REPRODUCED[1]:
            raise _differs(f"its effect on the logits is {reproduced:.3g} of what it was")
    return {"logits_difference": difference, "effect_reproduced": reproduced}


def _size(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def _differs(how: str) -> PublishFailed:
    return PublishFailed(
        f"The saved adapter does not compute what the trained model computed: {how}.",
        "Submit the job again; if it happens again, report it.",
    )


def _attached(base: PreTrainedModel, adapter: Path) -> PeftModel:
    """The base with the saved adapter, each of whose tensors has found its place."""
    try:
        model = PeftModel.from_pretrained(base, str(adapter))
    except Exception as error:  # PEFT and torch raise all kinds
        log.exception("PEFT cannot load the adapter")
        raise PublishFailed(
            f"PEFT cannot load the saved adapter ({type(error).__name__}).",
            "The trainer's log on the worker has the details. Please report it.",
        ) from error
    set_mode(model, training=False)
    with safe_open(adapter / WEIGHTS, "pt") as file:
        saved = set(file.keys())
    needed = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if odd := sorted(saved ^ needed):
        name = odd[0]
        has, lacks = ("the file", "the model") if name in saved else ("the model", "the file")
        raise PublishFailed(
            f"The saved adapter and its model do not match in {len(odd)} tensors: {has} has {name} "
            f"and {lacks} has not.",
            "Submit the job again; if it happens again, report it.",
        )
    return model


def _check_tokenizer(job: TrainingJob, adapter: Path, rows: Sequence[Tensor]) -> None:
    """The folder's tokenizer reads text as the base's does, and renders the same."""
    ours = load_tokenizer(job.base_model)
    try:
        saved = load_tokenizer(BaseModel("the adapter", adapter))
    except BaseModelUnavailable as error:
        raise PublishFailed("The saved tokenizer cannot be loaded.", None) from error
    text = ours.decode(torch.cat(list(rows)).tolist())
    if saved.encode(text) != ours.encode(text) or saved.chat_template != ours.chat_template:
        raise PublishFailed(
            "The saved tokenizer or its chat template is not the base model's.",
            "Submit the job again; if it happens again, report it.",
        )


@torch.no_grad()
def _logits(model: nn.Module, ids: Int64[Tensor, " length"]) -> Float[Tensor, "places vocab"]:
    """Logits at the last places of a row, float32, on the CPU."""
    logits: Tensor = model(input_ids=ids[None]).logits[0, -PROBE_LOGITS:]
    return logits.float().cpu().contiguous()
