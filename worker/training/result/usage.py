"""How a finished adapter is loaded and served, as sections of its card."""

import json
import shlex
from collections.abc import Iterator, Mapping
from math import sqrt
from typing import Any

from worker.training.config import TrainingJob

HERE = "path/to/this/folder"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes

CHAT = """\
messages = [{"role": "user", "content": "…"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
).to(model.device)"""
THEIRS = "The tokenizer and the chat template\nin this folder are those of the base model."
ITS = (
    "The tokenizer in this folder\nis that of the base model. The adapter has learnt to go on with "
    "plain text, and no chat template."
)
TEXT = 'inputs = tokenizer("…", return_tensors="pt").to(model.device)'


def usage(
    job: TrainingJob, precision: str, quantization: Mapping[str, Any] | None, *, is_chat: bool
) -> list[str]:
    """Sections in Markdown: PEFT, and each server that takes the adapter.

    Args:
        job: The job that made it.
        precision: The type that the base computed in, by its name in torch.
        quantization: Arguments of the base's ``BitsAndBytesConfig``.
        is_chat: Whether it was trained with a chat template.
    """
    prompt = CHAT if is_chat else TEXT
    sections = [
        _peft(job, precision, quantization, prompt),
        _vllm(job),
        _sglang(job),
        _llama_cpp(job, is_chat=is_chat),
    ]
    return ["## Use", *sections]


def vllm_rank(rank: int) -> int | None:
    """The ``--max-lora-rank`` that vLLM needs for a rank; None if it has none large enough."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def _peft(
    job: TrainingJob, precision: str, quantization: Mapping[str, Any] | None, prompt: str
) -> str:
    names = ["AutoModelForCausalLM", "AutoTokenizer"]
    names += ["BitsAndBytesConfig"] if quantization else []
    arguments = "\n".join(f"    {one}," for one in _arguments(job, precision, quantization))
    return f"""With [PEFT](https://github.com/huggingface/peft):

```python
import torch
from peft import PeftModel
from transformers import {", ".join(names)}

base = AutoModelForCausalLM.from_pretrained(
{arguments}
)
model = PeftModel.from_pretrained(base, "{HERE}").eval()
tokenizer = AutoTokenizer.from_pretrained("{HERE}")

{prompt}
answer = model.generate(**inputs, max_new_tokens=256)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
```

The weights are float32, as they were trained; servers round them to the type of the base. Merging
(`model.merge_and_unload()`) rounds every weight of the base once more."""


def _arguments(
    job: TrainingJob, precision: str, quantization: Mapping[str, Any] | None
) -> Iterator[str]:
    yield json.dumps(job.base_model.reference, ensure_ascii=False)
    if job.base_model.revision:
        yield f"revision={json.dumps(job.base_model.revision)}"
    yield f"dtype=torch.{precision}"
    yield 'device_map="auto"'
    if quantization:
        settings = ", ".join(f"{key}={value!r}" for key, value in sorted(quantization.items()))
        yield f"quantization_config=BitsAndBytesConfig({settings})"


def _vllm(job: TrainingJob) -> str:
    rank = vllm_rank(job.lora.rank)
    if rank is None:
        return (
            f"With vLLM: not as it is. vLLM takes ranks up to {VLLM_RANKS[-1]}, and this adapter's "
            f"is {job.lora.rank}: merge it first, with `merge_and_unload()`."
        )
    base, revision = _base(job)
    return f"""With [vLLM](https://docs.vllm.ai), as model `adapter`:

```bash
vllm serve {base}{revision} \\
  --enable-lora --max-lora-rank {rank} --lora-modules adapter={HERE}
```"""


def _sglang(job: TrainingJob) -> str:
    base, revision = _base(job)
    return f"""With [SGLang](https://docs.sglang.io), as `lora_path` or model `…:adapter`:

```bash
python -m sglang.launch_server --model-path {base}{revision} \\
  --enable-lora --max-lora-rank {job.lora.rank} --lora-paths adapter={HERE}
```"""


def _llama_cpp(job: TrainingJob, *, is_chat: bool) -> str:
    base = shlex.quote(job.base_model.reference)
    where = (
        f"--base {base}" if job.base_model.name.startswith("file:") else f"--base-model-id {base}"
    )
    caution = ""
    if job.lora.rslora:
        alpha = job.lora.alpha * sqrt(job.lora.rank)
        caution = (
            " It knows no rsLoRA and would scale this adapter too little: convert a copy of this "
            f"folder whose `adapter_config.json` has `lora_alpha` {alpha:g}."
        )
    return f"""With [llama.cpp](https://github.com/ggml-org/llama.cpp), converted once.{caution}

```bash
python convert_lora_to_gguf.py {where} --outtype f16 \\
  --outfile adapter.gguf {HERE}
llama-server --model base.gguf --lora adapter.gguf
```

Each of these serves the architectures that it knows LoRA for. {THEIRS if is_chat else ITS}"""


def _base(job: TrainingJob) -> tuple[str, str]:
    """The base model and its revision, as words of a command."""
    revision = job.base_model.revision
    return (
        shlex.quote(job.base_model.reference),
        f" --revision {shlex.quote(revision)}" if revision else "",
    )
