"""The strength of the noise on weights that FSDP2 has sharded.

A sharded weight is whole only while its unit runs, and there the noisy weight is written from it
as from any other: an element's noise is addressed by its place in the whole matrix, so nothing
of the noise depends on the number of ranks. The strength, though, is known before: every rank
enters the perturbation together, computes the strength of the rows it has, and one collective
hands them round. That holds however adapters and base layers are spread over units, and needs no
weight to be gathered beyond what FSDP2 gathers itself.

What is added up is a number on one rank and zeros on all others, so the sum is exact.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from flatlora import ops
from flatlora.parallel import is_sharded, reshard
from flatlora.targets import Target

# Elements of adapters that are whole at a time: 64 MiB in float32.
_BUCKET = 1 << 24


class ShardedStrength:
    """The strength of all sharded targets of a model, over a whole run.

    Args:
        targets: The layers that are perturbed.
    """

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = [target for target in targets if target.units]
        self._square_norms: dict[str, Tensor] = {}

    @torch.no_grad()
    def std(self, sigma: float) -> dict[str, Float[Tensor, "#rows #cols"]]:
        """Standard deviation of the noise by target, see `flatlora.ops.merged_row_std`.

        Every rank must ask at the same time.

        Args:
            sigma: Strength.

        Returns:
            One value per output unit for every target with a sharded parameter, on all ranks.
        """
        reshard(unit for target in self._targets for unit in target.units)
        targets = [target for target in self._targets if _has_shards(target)]
        parts = []
        for bucket in _buckets(targets):
            a = _whole([_part(target.lora_a) for target in bucket])
            b = _whole([_part(target.lora_b) for target in bucket])
            parts += [self._std_part(*factors, sigma) for factors in zip(bucket, a, b, strict=True)]
        return dict(zip([target.name for target in targets], _whole(parts), strict=True))

    def _std_part(
        self,
        target: Target,
        a: Float[Tensor, "rank in"],
        b: Float[Tensor, "out rank"],
        sigma: float,
    ) -> "_Part":
        """The strength of the output units of which this rank has the weights."""
        weight, unit_dim = _part(target.weight), int(target.transposed)
        if weight.group is not None and weight.dim != unit_dim:  # a part of every output unit
            (whole,) = _whole([weight])
            weight = _all_of(whole)
        matrix, first = weight.local, weight.start
        units = matrix.shape[unit_dim]
        std_shape = (1, units) if target.transposed else (units, 1)
        if units == 0:  # more ranks than rows
            std = matrix.new_empty(std_shape, dtype=_precise(matrix.dtype))
        else:
            with torch.autocast(matrix.device.type, enabled=False):  # norms keep their precision
                std = ops.merged_row_std(
                    matrix,
                    self._square_norm(target, matrix),
                    a,
                    b[first : first + units],
                    scaling=target.scaling,
                    sigma=sigma,
                    transposed=target.transposed,
                )
        return weight._replace(local=std, dim=unit_dim)

    def _square_norm(self, target: Target, matrix: Tensor) -> Float[Tensor, " units"]:
        norm = self._square_norms.get(target.name)
        if norm is None:  # once per run: the base weight is frozen
            norm = ops.row_square_norm(matrix, transposed=target.transposed)
        self._square_norms[target.name] = norm.to(matrix.device)
        return self._square_norms[target.name]


def _has_shards(target: Target) -> bool:
    return any(is_sharded(t) for t in (target.weight, target.lora_a, target.lora_b))


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Part(NamedTuple):
    """What one rank has of a tensor.

    Attributes:
        local: That part.
        dim: The dimension that is divided.
        start: Where the part begins.
        size: Size of the whole in that dimension.
        group: The ranks that have the other parts, None if this is the whole.
    """

    local: Tensor
    dim: int
    start: int
    size: int
    group: Any

    def padded(self) -> Tensor:
        """The whole tensor, with zeros for the parts of others."""
        shape = [*self.local.shape]
        shape[self.dim] = self.size
        padded = self.local.new_zeros(shape)
        padded.narrow(self.dim, self.start, self.local.shape[self.dim]).copy_(self.local)
        return padded


def _all_of(tensor: Tensor) -> _Part:
    return _Part(tensor, 0, 0, tensor.shape[0], None)


def _part(tensor: Any) -> _Part:
    """This rank's part of a DTensor, or the whole of a plain tensor."""
    if not is_sharded(tensor):
        return _all_of(tensor)
    # what stands before the last are replicas: `parallel.sharding_faults` lets nothing else pass
    dim, last = tensor.placements[-1].dim, tensor.device_mesh.ndim - 1
    size, ranks = tensor.shape[dim], tensor.device_mesh.size(last)
    start = min(tensor.device_mesh.get_local_rank(last) * -(-size // ranks), size)
    return _Part(tensor.to_local(), dim, start, size, tensor.device_mesh.get_group(last))


def _whole(parts: Sequence[_Part]) -> list[Tensor]:
    """Whole tensors, by one collective for each group of ranks and dtype among them."""
    whole = [part.local if part.group is None else part.padded() for part in parts]
    flights: dict[tuple[Any, torch.dtype], list[Tensor]] = {}
    for part, tensor in zip(parts, whole, strict=True):
        if part.group is not None:
            flights.setdefault((part.group, tensor.dtype), []).append(tensor)
    for (group, _), tensors in flights.items():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat, group=group)
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()
    return whole


def _buckets(targets: Sequence[Target]) -> Iterator[list[Target]]:
    bucket: list[Target] = []
    size = 0
    for target in targets:
        bucket.append(target)
        size += target.lora_a.numel() + target.lora_b.numel()
        if size >= _BUCKET:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
