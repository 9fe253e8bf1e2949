import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatlora import sigma_at

totals = st.integers(min_value=1, max_value=10**7)
sigmas = st.floats(min_value=0, max_value=10)


@given(totals, sigmas, st.data())
def test_equals_the_formula_of_the_paper(total: int, sigma: float, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, total - 1))
    expected = sigma * 0.5 * (1 - math.cos(math.pi * step / total))
    assert sigma_at(step, total, sigma) == pytest.approx(expected, abs=1e-15 * max(sigma, 1))


@given(totals, sigmas, st.data())
def test_never_falls_and_stays_within_sigma(total: int, sigma: float, data: st.DataObject) -> None:
    first, second = sorted(data.draw(st.lists(st.integers(0, total - 1), min_size=2, max_size=2)))
    assert 0 <= sigma_at(first, total, sigma) <= sigma_at(second, total, sigma) <= sigma


@given(totals, sigmas)
def test_first_step_is_plain_lora(total: int, sigma: float) -> None:
    assert sigma_at(0, total, sigma) == 0


@pytest.mark.parametrize("total", [10, 100, 5000])
def test_last_step_is_short_of_sigma_by_a_known_share(total: int) -> None:
    share = 1 - sigma_at(total - 1, total, 1.0)
    assert share == pytest.approx((math.pi / (2 * total)) ** 2, rel=0.01)


def test_half_way_is_half_of_sigma() -> None:
    assert sigma_at(50, 100, 0.1) == pytest.approx(0.05)


@pytest.mark.parametrize("step", [-1, 7, 8])
def test_a_step_outside_the_run_is_named_with_the_range(step: int) -> None:
    with pytest.raises(ValueError, match=rf"step {step} .* 0 <= step <= 6.* 7 optimizer steps"):
        sigma_at(step, 7, 0.1)


@pytest.mark.parametrize(
    ("total", "sigma", "message"),
    [
        (0, 0.1, "at least one optimizer step"),
        (3, -0.1, "sigma must be finite and not negative, got -0.1"),
        (3, math.nan, "got nan"),
    ],
)
def test_a_bad_total_or_sigma_is_named(total: int, sigma: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sigma_at(0, total, sigma)
