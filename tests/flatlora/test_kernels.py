"""Law 9: the Triton kernels draw the reference's integers and agree with its normals to rounding.

On a GPU the kernels run there (``pytest -m gpu``); without one, through Triton's interpreter.
"""

import math
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from flatlora import FlatLora, FlatLoraConfig, ops
from flatlora.config import Memory
from flatlora.ops import Stream, noise_key, reference
from tests.flatlora.interpreter import DEVICE, KERNELS

pytestmark = KERNELS

MakeModel = Callable[..., PeftModel]
MakeBatch = Callable[..., dict[str, Tensor]]
STREAM = Stream(noise_key(42, "layer"), step=9, draw=3)
FLOATS = [torch.bfloat16, torch.float16, torch.float32]
# rows of eight, odd ones, rows of part of a tile, one element, a stack of matrices
SHAPES = [(5, 63), (100, 64), (7, 1032), (3, 2048), (1, 1), (2, 16, 64), (3, 5, 7)]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def noisy(weight: Tensor, std: Tensor, backend: ops.Backend, stream: Stream = STREAM) -> Tensor:
    with ops.use(backend):
        return ops.noisy_copy(weight, std, stream, out=torch.full_like(weight, torch.nan))


def steps_apart(a: Tensor, b: Tensor) -> int:
    """The largest distance of two tensors in representable numbers."""
    integers = {2: torch.int16, 4: torch.int32}[a.element_size()]
    ordered = []
    for tensor in (a, b):
        bits = tensor.view(integers).long()
        ordered.append(torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits))
    return int((ordered[0] - ordered[1]).abs().max())


class TestNoisyCopy:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("by_row", [True, False], ids=["rows", "columns"])
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_it_is_the_references_to_rounding(
        self, shape: tuple[int, ...], by_row: bool, dtype: torch.dtype
    ) -> None:
        weight = random(*shape, dtype=dtype)
        std = random(*(shape[:-1] if by_row else shape[:-2]), 1 if by_row else shape[-1], seed=1)
        std = std.abs().view(*shape[:-1], 1) if by_row else std.abs().unsqueeze(-2)
        std = std if by_row else std.view(*shape[:-2], 1, shape[-1])
        expected, found = (noisy(weight, std, b) for b in ("reference", "triton"))
        noise = (expected.float() - weight.float()).abs()
        tolerance = 2e-5 * std.float() + noise * 1e-6
        if dtype != torch.float32:  # one rounding may go the other way
            tolerance = tolerance + expected.float().abs() * torch.finfo(dtype).eps
            assert float((expected != found).float().mean()) <= 0.01
        assert bool(((found.float() - expected.float()).abs() <= tolerance + 1e-6).all())

    @pytest.mark.parametrize(
        "stream",
        [
            Stream((0, 0), 0, 0),
            Stream((2**32 - 1, 2**32 - 1), 2**32 - 1, 2**32 - 1),
            Stream(noise_key(2**64 - 1, "x"), 2**31, 5),
        ],
        ids=["zeros", "ones", "mixed"],
    )
    def test_the_integers_are_the_references(self, stream: Stream) -> None:
        # Neighbouring integers make normals at least 1e-5 apart nearly everywhere, so normals that
        # agree to 2e-5 in 8,000 places were made from the same integers.
        zero, one = torch.zeros(4, 2048, device=DEVICE), torch.ones(4, 1, device=DEVICE)
        expected, found = (noisy(zero, one, b, stream) for b in ("reference", "triton"))
        assert float((expected - found).abs().max()) < 2e-5
        assert float(expected.std()) == pytest.approx(1, abs=0.05)

    @pytest.mark.parametrize("shape", [(64, 1), (3, 8, 1)], ids=str)
    def test_a_single_output_stored_transposed_has_a_strength_of_its_own(
        self, shape: tuple[int, ...]
    ) -> None:
        weight = random(*shape)
        std = random(*shape[:-2], 1, 1, seed=1).abs()
        expected, found = (noisy(weight, std, b) for b in ("reference", "triton"))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert bool(found.isfinite().all())

    def test_a_weight_that_is_not_contiguous_is_not_launched(self) -> None:
        weight = random(16, 24).T
        with pytest.raises(AssertionError, match="stored order"), ops.use("triton"):
            ops.noisy_copy(
                weight, torch.ones(24, 1, device=DEVICE), STREAM, out=torch.empty_like(weight)
            )

    def test_a_failed_launch_tells_how_to_do_without(self) -> None:
        from flatlora.ops.kernels import add_way_out

        failed, full = RuntimeError("Failed to find C compiler"), torch.OutOfMemoryError()
        for error in (failed, full, None):
            add_way_out(error)
        assert "FLATLORA_KERNELS=0" in failed.__notes__[0]
        assert not hasattr(full, "__notes__")

    def test_whole_rows_and_single_elements_give_the_same_bits(self) -> None:
        weight = random(6, 64, dtype=torch.bfloat16)
        std = torch.full((6, 1), 0.3, device=DEVICE)
        by_column = torch.full((1, 64), 0.3, device=DEVICE)
        assert torch.equal(noisy(weight, std, "triton"), noisy(weight, by_column, "triton"))


class TestSweep:
    # a second block of rows, a second chunk of columns; and rows that tiles meet many of
    WIDE, NARROW = [(33, 2048), (3, 2600)], [(33, 64), (5, 72), (2, 1032)]

    @pytest.fixture(params=["wide", "narrow"])
    def shapes(self, request: pytest.FixtureRequest) -> list[tuple[int, int]]:
        return self.WIDE if request.param == "wide" else self.NARROW

    def weights(
        self,
        shapes: list[tuple[int, int]],
        dtype: torch.dtype,
        adapters: torch.dtype,
        rank: int,
        *,
        copies: bool,
    ) -> list["SweptWeight"]:  # type: ignore[name-defined]  # imported where Triton is known to exist  # noqa: F821
        from flatlora.ops.sweep import SweptWeight

        rows = []
        for i, (out, features) in enumerate(shapes):
            weight = random(out, features, dtype=dtype, seed=i) * 0.02
            rows.append(
                SweptWeight(
                    weight=weight,
                    square_norm=reference.row_square_norm(weight, transposed=False),
                    lora_a=random(rank, features, dtype=adapters, seed=10 + i) * 0.02,
                    lora_b=random(out, rank, dtype=adapters, seed=20 + i) * 0.3,
                    scaling=2.0,
                    key=noise_key(1, str(i)),
                    std=torch.full((out, 1), torch.nan, device=DEVICE),
                    copy=torch.full_like(weight, torch.nan) if copies else None,
                )
            )
        return rows

    @pytest.mark.parametrize("rank", [3, 16, 33])
    @pytest.mark.parametrize(
        ("dtype", "adapters"),
        [
            (torch.bfloat16, torch.float32),
            (torch.bfloat16, torch.bfloat16),
            (torch.float16, torch.float32),
        ],
        ids=str,
    )
    def test_the_strengths_are_the_references_with_a_rounded_adapter(
        self,
        shapes: list[tuple[int, int]],
        dtype: torch.dtype,
        adapters: torch.dtype,
        rank: int,
    ) -> None:
        from flatlora.ops.sweep import Sweep

        rows = self.weights(shapes, dtype, adapters, rank, copies=False)
        Sweep(rows).run(0.1, torch.tensor([9, 3], device=DEVICE))
        for row in rows:
            plain = row.square_norm.sqrt().unsqueeze(1) * (0.1 / math.sqrt(row.weight.shape[1]))
            rounding = 2e-2 / math.sqrt(row.weight.shape[1])  # A's averages out over a row
            for a, tolerance in ((row.lora_a, rounding), (row.lora_a.to(dtype), 2e-5)):
                expected = reference.merged_row_std(
                    row.weight, row.square_norm, a.float(), row.lora_b.float(),
                    scaling=2.0, sigma=0.1, transposed=False,
                )  # fmt: skip
                torch.testing.assert_close(row.std, expected, rtol=tolerance, atol=0)
                assert float(((plain - expected) / expected).abs().max()) > 0.1  # adapters count

    def test_one_launch_writes_every_copy_that_single_launches_write(
        self, shapes: list[tuple[int, int]]
    ) -> None:
        from flatlora.ops.sweep import Sweep

        rows = self.weights(shapes, torch.bfloat16, torch.float32, 16, copies=True)
        sweep = Sweep(rows)
        for step in (9, 10):  # the second time over the first one's flags and counters
            before = [row.std._version for row in rows]
            sweep.run(0.1, torch.tensor([step, 3], device=DEVICE))
            assert all(row.std._version > v for row, v in zip(rows, before, strict=True))
            for row in rows:
                assert row.copy is not None
                stream = Stream(row.key, step, 3)
                assert torch.equal(noisy(row.weight, row.std, "triton", stream), row.copy)
                close = noisy(row.weight, row.std, "reference", stream)
                assert float((close != row.copy).float().mean()) < 0.01
                torch.testing.assert_close(row.copy, close, rtol=2**-7, atol=1e-6)

    def test_norms_alone_are_the_same_bits(self, shapes: list[tuple[int, int]]) -> None:
        from flatlora.ops.sweep import Sweep

        clock = torch.tensor([9, 3], device=DEVICE)
        alone, both = (
            self.weights(shapes, torch.bfloat16, torch.float32, 16, copies=copies)
            for copies in (False, True)
        )
        Sweep(alone).run(0.1, clock)
        Sweep(both).run(0.1, clock)
        for a, b in zip(alone, both, strict=True):
            assert torch.equal(a.std, b.std)


class TestEngine:
    def model(self, peft_model: MakeModel, dtype: torch.dtype) -> PeftModel:
        """A model of which some layers are swept and others, of an odd width, are not."""
        model = peft_model(dtype=dtype).to(DEVICE)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        return model

    def gradients(
        self, model: PeftModel, make_batch: MakeBatch, memory: Memory, backend: ops.Backend
    ) -> list[Tensor]:
        with ops.use(backend):
            flat = FlatLora(model, FlatLoraConfig(sigma=0.1, memory=memory), total_steps=4)
            batch = {k: v.to(DEVICE) for k, v in make_batch(sequences=1, length=6).items()}
            for step in (2, 3):  # the second from the same plan
                model.zero_grad()
                with flat.perturbed(step):
                    torch.autograd.backward(model(**batch).loss)
        return [p.grad for p in model.parameters() if p.grad is not None]

    def test_both_memories_give_the_same_gradients_and_the_references_to_rounding(
        self, peft_model: MakeModel, make_batch: MakeBatch
    ) -> None:
        model = self.model(peft_model, torch.bfloat16)
        model.base_model.model.to(torch.bfloat16)
        resident = self.gradients(model, make_batch, "resident", "triton")
        streamed = self.gradients(model, make_batch, "streamed", "triton")
        assert len(resident) > 0
        assert all(map(torch.equal, resident, streamed))
        expected = self.gradients(model, make_batch, "resident", "reference")
        for a, b in zip(resident, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.02 * float(b.abs().max()))
