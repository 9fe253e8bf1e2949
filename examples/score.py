"""Let a model answer the questions of a dataset, and count the answers that are right."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


def load_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def reference(row: Row) -> str:
    """What the last assistant turn of a row says."""
    content: str = row["messages"][-1]["content"]
    return content


@torch.inference_mode()
def answer(
    model: Any, tokenizer: Any, rows: Sequence[Row], max_new_tokens: int = 80, batch: int = 50
) -> list[str]:
    """Greedy answers to all turns of each row but the last; `model` may be a `PeftModel`."""
    model.eval()
    answers: list[str] = []
    for first in range(0, len(rows), batch):
        prompts = tokenizer.apply_chat_template(
            [row["messages"][:-1] for row in rows[first : first + batch]],
            add_generation_prompt=True,
            padding=True,
            tokenizer_kwargs={"padding_side": "left"},
            return_dict=True,
            return_tensors="pt",
        ).to(model.device)
        replies = model.generate(
            **prompts,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )[:, prompts["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(replies, skip_special_tokens=True)
    return answers


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The share of predictions that equal their reference, from 0 to 1."""
    pairs = zip(predictions, references, strict=True)
    return sum(said.strip() == right for said, right in pairs) / len(references)
