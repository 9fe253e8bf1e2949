"""The strength of the perturbation over a run."""

import math


def sigma_at(step: int, total: int, sigma: float) -> float:
    """Strength at one optimizer step: a cosine rise from ``0`` towards ``sigma``.

    ``sigma_t = sigma * (1 - cos(pi * t / T)) / 2`` (arXiv 2409.14396, section 3.3), with ``t`` the
    index of the optimizer step, counted from 0, and ``T`` the number of optimizer steps of the
    whole run on one rank. Micro-batches do not count.

    The first step therefore gets exactly ``0`` and is plain LoRA. The last one, ``t = T - 1``,
    gets ``sigma * (1 + cos(pi / T)) / 2``: short of ``sigma`` by a share of about ``2.5 / T**2``
    (0.02 % at 100 steps). ``sigma`` itself would be reached at ``t = T``, when the run is over. A
    run of one step is never perturbed.

    Args:
        step: Index ``t`` of the optimizer step, ``0 <= t < total``.
        total: Number ``T`` of optimizer steps.
        sigma: Strength that the schedule rises to, not negative.

    Returns:
        The strength for this step, ``0 <= sigma_t <= sigma``.

    Raises:
        ValueError: If ``total`` is not positive, ``step`` lies outside the run, or ``sigma`` is
            negative or not finite.
    """
    if total < 1:
        raise ValueError(f"a run has at least one optimizer step, got total={total}")
    if not 0 <= step < total:
        raise ValueError(
            f"step {step} lies outside the run: expected 0 <= step <= {total - 1}, "
            f"as the run was announced with {total} optimizer steps"
        )
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma must be finite and not negative, got {sigma}")
    # sin²(x/2) is (1 - cos x)/2 without its cancellation for small x
    return float(sigma * math.sin(math.pi * step / (2 * total)) ** 2)
