"""The callback in a ``Trainer`` that compiles its model."""

from pathlib import Path
from typing import Any

import pytest

from tests.flatlora.trainers import (
    MakeModel,
    adapter,
    assert_same,
    callback,
    make_trainer,
)


@pytest.mark.usefixtures("as_users_compile")
@pytest.mark.torture
def test_a_compiled_run_after_a_plain_one_trains_what_an_eager_one_does(
    peft_model: MakeModel, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "max_steps": 2,
        "gradient_accumulation_steps": 1,
        "train_sampling_strategy": "sequential",
    }
    eager, plain, compiled = peft_model(), peft_model(), peft_model()
    make_trainer(tmp_path, eager, callback(), **settings).train()
    settings |= {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    make_trainer(tmp_path, plain, **settings).train()
    # the first step is clean: its graph is the plain run's, in which no hook of a layer is
    make_trainer(tmp_path, compiled, callback(), **settings).train()
    assert_same(adapter(compiled), adapter(eager))
    with pytest.raises(AssertionError):
        assert_same(adapter(plain), adapter(eager))
