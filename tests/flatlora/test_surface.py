"""What the library shows, and what it needs."""

import subprocess
import sys

import pytest

import flatlora


def test_the_public_names_are_sorted_and_there() -> None:
    assert flatlora.__all__ == sorted(flatlora.__all__)
    assert all(hasattr(flatlora, name) for name in flatlora.__all__)


def test_importing_it_needs_torch_and_nothing_of_the_service() -> None:
    code = "import sys, flatlora; print(*sorted({n.partition('.')[0] for n in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "torch" in loaded
    assert not loaded & {"app", "worker", "peft", "transformers", "fastapi", "sqlalchemy"}


def test_the_callback_alone_needs_transformers() -> None:
    code = """
import sys
sys.modules["transformers"] = None
import flatlora
print(flatlora.FlatLora.__name__, flush=True)
print(flatlora.FlatLoraCallback)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "FlatLora\n"
    assert "ModuleNotFoundError: No module named 'transformers" in done.stderr


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'flatlora' has no attribute 'SharpLora'"):
        flatlora.SharpLora  # noqa: B018  # asking is the test
