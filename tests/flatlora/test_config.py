import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from flatlora import FlatLoraConfig


def test_defaults_are_the_advice_of_the_paper() -> None:
    assert FlatLoraConfig() == FlatLoraConfig(sigma=0.05, seed=42, memory="auto")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sigma": -0.1}, "sigma must be finite and not negative, got -0.1"),
        ({"sigma": math.inf}, "sigma must be finite"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": 2**64}, "seed must be at least 0 and below"),
    ],
)
def test_a_bad_value_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlatLoraConfig(**values)


def test_an_unknown_memory_mode_is_named() -> None:
    config = FlatLoraConfig()
    object.__setattr__(config, "memory", "disk")  # past the type check that tests turn on
    with pytest.raises(ValueError, match=r"memory must be one of .*'disk'"):
        config.__post_init__()


@pytest.mark.parametrize("seed", [42.0, "42", None])
def test_a_seed_of_another_type_is_named(seed: Any) -> None:
    config = FlatLoraConfig()
    object.__setattr__(config, "seed", seed)  # past the type check that tests turn on
    with pytest.raises(ValueError, match=f"seed must be an int, got {seed!r}"):
        config.__post_init__()


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"sigma .*; seed "):
        FlatLoraConfig(sigma=-1.0, seed=-1)


def test_cannot_be_changed_during_a_run() -> None:
    config = FlatLoraConfig()
    with pytest.raises(FrozenInstanceError):
        config.sigma = 0.1  # type: ignore[misc]  # the error is the point
