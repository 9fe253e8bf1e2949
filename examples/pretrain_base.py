"""Make the tiny base model from nothing: corpus, tokenizer, weights.

    python -m examples.pretrain_base

About fifteen minutes on two cores. The corpus is made by ``corpus.py``; the model is of the
Llama architecture with tied embeddings and has fewer than two million parameters.
"""

import argparse
import math
import random
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.corpus import Document, documents

FOLDER = Path(__file__).parent / "tiny-base"
START, TURN, END, PAD = SPECIAL = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
VOCABULARY = 1280
Example = tuple[list[int], int]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SEED = 7
BATCH_TOKENS = 3072
PEAK_RATE = 4e-3
WARM_UP = 100


def plain(document: Document) -> str:
    """A document as bare text, for the tokenizer's training."""
    if isinstance(document.learned, str):
        return document.read + document.learned
    return "\n".join(message["content"] for message in document.learned)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE; digits stand alone, so that a time is spelled by its digits."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((plain(one) for one in islice(documents(SEED), 20_000)), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=1024,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL.index(START),
        eos_token_id=SPECIAL.index(END),
        pad_token_id=SPECIAL.index(PAD),
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, document: Document) -> Example:
    """The tokens of a document between two ``<|endoftext|>``, and how many are only read."""
    learned = document.learned
    text = learned if isinstance(learned, str) else rendered(tokenizer, learned)
    around = SPECIAL.index(START)
    read = [around, *tokenizer.encode(document.read, add_special_tokens=False)]
    return [*read, *tokenizer.encode(text, add_special_tokens=False), around], len(read)


def rendered(tokenizer: PreTrainedTokenizerFast, turns: list[dict[str, str]]) -> str:
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


def batches(tokenizer: PreTrainedTokenizerFast) -> Iterator[list[Example]]:
    """Documents of about one length, each alone in its row, up to a number of tokens."""
    rng = random.Random(SEED)  # noqa: S311 - an order, not a secret
    stream = documents(SEED + 1)
    while True:
        pool = sorted(
            (encode(tokenizer, document) for document in islice(stream, 1024)),
            key=lambda example: len(example[0]),
        )
        cut: list[list[Example]] = [[]]
        for example in pool:
            if len(example[0]) * (len(cut[-1]) + 1) > BATCH_TOKENS:
                cut.append([])
            cut[-1].append(example)
        yield from rng.sample(cut, len(cut))


def tensors(batch: list[Example]) -> tuple[Tensor, Tensor]:
    """Token ids and labels, padded at the right."""
    length = max(len(ids) for ids, _ in batch)
    pad = SPECIAL.index(PAD)
    ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in batch])
    read = torch.tensor([[read] for _, read in batch])
    unlearned = (ids == pad) | (torch.arange(length) < read)
    return ids, ids.masked_fill(unlearned, -100)


def rate(step: int, steps: int) -> float:
    """Warm-up, then a cosine down to a hundredth."""
    if step < WARM_UP:
        return PEAK_RATE * (step + 1) / WARM_UP
    return PEAK_RATE * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers: they learn to look up sooner. AdamW for the rest."""
    inner = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    within = {id(parameter) for parameter in inner}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in within]
    return [
        torch.optim.Muon(inner, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    both = optimizers(model)
    began = time.monotonic()
    for step, batch in enumerate(islice(batches(tokenizer), steps)):
        ids, labels = tensors(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in both:
            optimizer.param_groups[0]["lr"] = rate(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            seconds = time.monotonic() - began
            sys.stdout.write(f"step {step}  loss {loss.item():.3f}  {seconds:.0f} s\n")
            sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--to", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    tokenizer, model = make_tokenizer(), make_model()
    train(model, tokenizer, arguments.steps)
    model.bfloat16().save_pretrained(arguments.to)
    tokenizer.save_pretrained(arguments.to)


if __name__ == "__main__":
    main()
