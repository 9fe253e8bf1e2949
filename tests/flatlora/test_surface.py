"""What the library shows, and what it needs."""

import subprocess
import sys

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
