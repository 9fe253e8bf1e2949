"""On a GPU: the same noise as on a CPU, and the same laws. Run by hand with ``pytest -m gpu``."""

import gc
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from flatlora import FlatLora, FlatLoraConfig, ops
from flatlora.config import Memory
from flatlora.ops import Stream, merged_row_std, noise_key, noisy_copy, row_square_norm
from flatlora.ops.reference import standard_normals

pytestmark = pytest.mark.gpu

MakeModel = Callable[..., PeftModel]
MakeBatch = Callable[..., dict[str, Tensor]]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
STREAM = Stream(noise_key(42, "layer"), step=9, draw=3)
SIZES = [(1, 63), (100, 63), (1000, 8), (300, 4097)]


@pytest.mark.parametrize("start", [0, 5, 2**35 - 11])
def test_the_normals_are_the_same_bits_as_on_a_cpu(start: int) -> None:
    here = standard_normals(STREAM, start, 100_003, CPU)
    assert torch.equal(standard_normals(STREAM, start, 100_003, CUDA).cpu(), here)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_the_references_noisy_copy_is_the_same_bits_as_on_a_cpu(
    size: tuple[int, int], dtype: torch.dtype, transposed: bool
) -> None:
    weight = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    std = torch.rand((1, size[1]) if transposed else (size[0], 1))
    here = noisy_copy(weight, std, STREAM, out=torch.empty_like(weight))
    there = weight.to(CUDA)
    with ops.use("reference"):
        found = noisy_copy(there, std.to(CUDA), STREAM, out=torch.full_like(there, torch.nan))
    assert torch.equal(found.cpu(), here)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_the_row_std_agrees_with_a_cpus_to_rounding(
    size: tuple[int, int], transposed: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, a = (torch.randn(rows, size[1], generator=generator) for rows in (size[0], 3))
    b = torch.randn(size[0], 3, generator=generator)

    def std(device: torch.device) -> Tensor:
        stored = (weight.T.contiguous() if transposed else weight).to(device, torch.bfloat16)
        norm = row_square_norm(stored, transposed=transposed)
        return merged_row_std(
            stored, norm, a.to(device), b.to(device),
            scaling=2.0, sigma=0.1, transposed=transposed,
        ).cpu()  # fmt: skip

    torch.testing.assert_close(std(CUDA), std(CPU), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_both_memories_give_the_same_gradients_and_leave_the_base(
    peft_model: MakeModel, make_batch: MakeBatch, kind: str
) -> None:
    def gradients(memory: Memory) -> list[Tensor]:
        model = peft_model(kind, dtype=torch.bfloat16).to(CUDA)
        frozen = [p for p in model.parameters() if not p.requires_grad]
        before = [parameter.clone() for parameter in frozen]
        flat = FlatLora(model, FlatLoraConfig(sigma=0.1, memory=memory), total_steps=4)
        batch = {name: value.to(CUDA) for name, value in make_batch().items()}
        with flat.perturbed(3):
            torch.autograd.backward(model(**batch).loss)
        assert all(map(torch.equal, frozen, before))
        return [p.grad for p in model.parameters() if p.grad is not None]

    resident, streamed = gradients("resident"), gradients("streamed")
    assert len(resident) == len(streamed) > 0
    assert all(map(torch.equal, resident, streamed))


def _wide(rank: int) -> nn.Module:
    """Four layers of 64 MiB each in bfloat16, with an adapter; a fifth that is smaller."""
    with torch.device(CUDA):
        layers = [nn.Linear(*((8192, 4096) if i % 2 else (4096, 8192))) for i in range(4)]
        base = nn.Sequential(*layers, nn.Linear(4096, 1024)).to(torch.bfloat16)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[str(i) for i in range(5)])
    return get_peft_model(base, config).train()


@pytest.mark.parametrize("rank", [16, 64])
def test_streamed_takes_one_workspace_and_little_else(rank: int) -> None:
    model = _wide(rank)
    largest = 8192 * 4096 * 2

    def peak(memory: Memory | None) -> int:
        """Most bytes of three steps, the first of which sets the engine up."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        flat = None
        if memory is not None:
            flat = FlatLora(model, FlatLoraConfig(sigma=0.1, memory=memory), total_steps=10)
        x = torch.ones(512, 4096, dtype=torch.bfloat16, device=CUDA)
        for step in (4, 5, 6):
            with nullcontext() if flat is None else flat.perturbed(step):
                model(x).float().square().mean().backward()
            model.zero_grad(set_to_none=True)
        return torch.cuda.max_memory_allocated() - before

    peak(None)  # what libraries take once
    peak("streamed")
    beyond = peak("streamed") - peak(None)
    assert 0 < beyond <= largest + 16_000_000
