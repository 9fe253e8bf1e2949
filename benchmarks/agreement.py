"""Checks that come before every ratio: two ways compute the same thing, to a stated tolerance.

The kernels' normals differ from the reference's by the hardware's approximate functions alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from benchmarks.report import Disagreement
from flatlora import FlatLora, ops, sigma_at
from flatlora.ops import reference

Z_TOLERANCE = 1e-4
"""How far a normal may lie from the reference's, absolute."""
STD_TOLERANCE = 1e-4
"""How far a row's standard deviation may lie from the reference's, relative."""
BFLOAT16_STD_TOLERANCE = 2e-2
"""The same for one that is computed in bfloat16 throughout, as the published one is."""
ROUNDED_SHARE = 0.01
"""Share of a noisy copy's elements that may be rounded the other way."""
BAND = 16
"""Neighbouring rows of a weight that are compared: the first, the middle and the last of them."""


def require_same_normals(
    shape: tuple[int, int], stream: ops.Stream, device: torch.device
) -> dict[str, float]:
    """The kernel's normals are the reference's; a weight of zeros and a std of one show them.

    Returns:
        The largest difference.

    Raises:
        Disagreement: If any differs by more than `Z_TOLERANCE`.
    """
    zeros = torch.zeros(shape, device=device)
    std = torch.ones(shape[0], 1, device=device)
    found, expected = both_noisy_copies(zeros, std, stream)
    difference = float((found - expected).abs().max())
    if not difference <= Z_TOLERANCE:
        raise Disagreement(f"normals of {shape} differ by {difference:.2e} > {Z_TOLERANCE:.0e}")
    return {"z_error": difference}


def require_same_noisy_copy(weight: Tensor, std: Tensor, stream: ops.Stream) -> dict[str, float]:
    """The kernel's noisy copy is the reference's but for roundings; see `require_rounded_alike`."""
    found, expected = both_noisy_copies(weight, std, stream)
    return require_rounded_alike(found, expected, std)


def require_rounded_alike(found: Tensor, expected: Tensor, std: Tensor) -> dict[str, float]:
    """Two noisy copies are equal, but for a few elements rounded the other way.

    Such an element may be the next bfloat16 (float16) above or below. Where noise and weight all
    but cancel, these are closer together than the normals agree: there the difference may be
    `Z_TOLERANCE` standard deviations. A float32 may differ by that much, or by two roundings.

    Args:
        found: Noisy copy.
        expected: The reference's.
        std: Standard deviation of the noise, broadcastable to both.

    Returns:
        The share of 16-bit elements that differ.

    Raises:
        Disagreement: If one differs by more, or `ROUNDED_SHARE` of them differ at all.
    """
    difference = (found.float() - expected.float()).abs()
    near = difference <= Z_TOLERANCE * std  # false if not a number
    if found.itemsize == 2:
        apart = (_rank(found) - _rank(expected)).abs_()
        share, neighbours = float((apart > 0).float().mean()), apart <= 1
    else:
        share, neighbours = 0.0, difference <= 2 * torch.finfo(torch.float32).eps * expected.abs()
    far = ~(near | neighbours)
    if bool(far.any()):
        raise Disagreement(f"{int(far.sum())} elements differ by more than a rounding")
    if not share < ROUNDED_SHARE:
        raise Disagreement(f"{share:.2%} of the elements differ, more than roundings explain")
    return {"rounded_otherwise": share}


@torch.no_grad()
def require_same_noise(
    model: nn.Module, flat: FlatLora, *, step: int, total_steps: int, sigma: float, seed: int
) -> dict[str, float]:
    """All adapted layers compute with the reference's noisy weight inside a step.

    They are PEFT's layers, found without the engine; strength and seed are the caller's, not what
    the engine says of itself. A frozen layer that is given the unit matrix answers with the weight
    that it computes with, forward and backward. Some rows of each are compared (see `BAND`), whose
    normals the reference draws in no time.

    Args:
        model: The engine's model, with linear layers alone adapted.
        flat: The engine.
        step: Index of the step.
        total_steps: Steps of the schedule.
        sigma: Strength at its end.
        seed: Seed of the noise.

    Returns:
        Number of layers compared, and the largest share of elements rounded the other way.

    Raises:
        Disagreement: If a layer computes with another weight.
    """
    layers = adapted_layers(model)
    strength, worst = sigma_at(step, total_steps, sigma), 0.0
    with flat.perturbed(step):
        for name, layer in layers.items():
            stream = ops.Stream(ops.noise_key(seed, name), step, 0)
            units, expected, std = _reference_units(layer, strength, stream)
            passes = {"forward": _forward_units, "backward": _backward_units}
            for direction, found in passes.items():
                try:
                    agreed = require_rounded_alike(found(layer, units), expected, std)
                except Disagreement as reason:
                    raise Disagreement(f"{name}, {direction}, step {step}: {reason}") from reason
                worst = max(worst, agreed["rounded_otherwise"])
    return {"layers": len(layers), "rounded_otherwise": worst}


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's LoRA layers by the name that they have in the base model."""
    return {
        path.removeprefix("base_model.model."): module
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def compared_rows(layer: Any) -> list[range]:
    """Bands of rows of the stored weight; one of all rows where an output unit is a column."""
    rows = layer.base_layer.weight.shape[0]
    if layer.fan_in_fan_out or rows <= 3 * BAND:
        return [range(rows)]
    return [range(first, first + BAND) for first in (0, rows // 2, rows - BAND)]


def compared_units(layer: Any) -> Tensor:
    """The output units that are compared."""
    device = layer.base_layer.weight.device
    if layer.fan_in_fan_out:
        return torch.arange(layer.out_features, device=device)
    return torch.tensor([row for band in compared_rows(layer) for row in band], device=device)


def reference_std(layer: Any, units: Tensor, strength: float) -> Tensor:
    """The reference's standard deviations of these output units, shaped as `merged_row_std`'s."""
    transposed = layer.fan_in_fan_out
    weight = layer.base_layer.weight
    weight = weight if transposed else weight[units]
    return reference.merged_row_std(
        weight,
        reference.row_square_norm(weight, transposed=transposed),
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight[units],
        scaling=layer.scaling["default"],
        sigma=strength,
        transposed=transposed,
    )


def _reference_units(
    layer: Any, strength: float, stream: ops.Stream
) -> tuple[Tensor, Tensor, Tensor]:
    """Which output units, their noisy weights (units x in) and standard deviations."""
    weight, units = layer.base_layer.weight, compared_units(layer)
    std = reference_std(layer, units, strength)
    cols = weight.shape[1]
    bands = compared_rows(layer)
    normals = [
        reference.standard_normals(stream, band.start * cols, len(band) * cols, weight.device)
        for band in bands
    ]
    clean = torch.cat([weight[band.start : band.stop] for band in bands])
    noisy = (torch.cat(normals).view_as(clean) * std + clean).to(weight.dtype)
    return (units, noisy.T, std.T) if layer.fan_in_fan_out else (units, noisy, std)


def _forward_units(layer: Any, units: Tensor) -> Tensor:
    weight = layer.base_layer.weight
    unit = torch.eye(layer.in_features, dtype=weight.dtype, device=weight.device)
    with _without_bias(layer.base_layer) as base:
        found: Tensor = base(unit)
    return found[:, units].T


def _backward_units(layer: Any, units: Tensor) -> Tensor:
    weight = layer.base_layer.weight
    with torch.enable_grad(), _without_bias(layer.base_layer) as base:
        x = weight.new_zeros(len(units), layer.in_features).requires_grad_()
        out = base(x)
        chosen = torch.zeros_like(out)
        chosen[torch.arange(len(units), device=units.device), units] = 1.0
        grads: tuple[Tensor, ...] = torch.autograd.grad(out, x, chosen)
    return grads[0]


@contextmanager
def _without_bias(base: Any) -> Iterator[Any]:
    """The layer, with a bias of zeros if it has one: `Conv1D` cannot do without."""
    bias = base.bias
    if bias is not None:
        base.bias = nn.Parameter(torch.zeros_like(bias), requires_grad=False)
    try:
        yield base
    finally:
        base.bias = bias


def require_same_std(
    found: Tensor, expected: Tensor, tolerance: float = STD_TOLERANCE
) -> dict[str, float]:
    """Two ways to the rows' standard deviations agree.

    Raises:
        Disagreement: If one differs by more than the tolerance, a share of itself.
    """
    difference = float(((found - expected) / expected).abs().max())
    if not difference <= tolerance:
        raise Disagreement(f"standard deviations differ by {difference:.2e} of themselves")
    return {"std_error": difference}


def both_noisy_copies(weight: Tensor, std: Tensor, stream: ops.Stream) -> tuple[Tensor, Tensor]:
    """A noisy copy as the library makes it, and as the reference does."""
    found = ops.noisy_copy(weight, std, stream, out=torch.full_like(weight, torch.nan))
    with ops.use("reference"):
        expected = ops.noisy_copy(weight, std, stream, out=torch.full_like(weight, torch.nan))
    return found, expected


def _rank(values: Tensor) -> Tensor:
    """Place of each bfloat16 among all of them in order of size, both zeros at 0."""
    bits = values.view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)
