"""A dataset's file on the hub arrives with the commit that it is of, or it is told why not."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, hf_hub_download

from tests.worker.hub import COMMITS, Hub, point_library_at, small_hub
from tests.worker.ordering import ROWS, order_of
from worker import hub as worker_hub
from worker.hub import bring_hub_file
from worker.training.errors import DatasetUnavailable

OTHERS = ROWS + ROWS


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with small_hub() as hub:
        hub.files = {
            (COMMITS[0], "data/rows.jsonl"): ROWS, (COMMITS[1], "data/rows.jsonl"): OTHERS,
        }  # fmt: skip
        point_library_at(hub, tmp_path, monkeypatch)
        monkeypatch.setattr(worker_hub, "FIRST_WAIT", 0.01)
        yield hub


def why(uri: str, folder: Path, **settings: Any) -> str:
    with pytest.raises(DatasetUnavailable) as caught:
        bring_hub_file(order_of(uri, folder, **settings))
    assert caught.value.hint
    assert not (folder / "train").exists()
    return caught.value.message


@pytest.mark.parametrize(
    ("revision", "commit", "rows"),
    [("", COMMITS[0], ROWS), ("@main", COMMITS[0], ROWS), (f"@{COMMITS[1]}", COMMITS[1], OTHERS)],
)
def test_it_is_pinned_to_a_commit(
    hub: Hub, tmp_path: Path, revision: str, commit: str, rows: bytes
) -> None:
    order = order_of(f"hf://datasets/org/name{revision}/data/rows.jsonl", tmp_path)
    arrived = bring_hub_file(order)
    assert (arrived.filename, arrived.revision) == ("rows.jsonl", commit)
    assert arrived.sha256 == hashlib.sha256(rows).hexdigest()
    assert (tmp_path / "train").read_bytes() == rows
    asked = {path for path, _ in hub.site.asked if "/org/name" in path}
    files = {path.rpartition("/resolve/")[2].partition("/")[2] for path in asked}
    assert files == {"data/rows.jsonl"}  # no script, no list of what else there is
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("hf://datasets/org/other/a.jsonl", "The hub has no dataset org/other"),
        ("hf://datasets/org/name@v9/data/rows.jsonl", "no revision v9"),
        ("hf://datasets/org/name/data/no.jsonl", "has no file data/no.jsonl"),
    ],
)
def test_what_is_not_there_is_told(hub: Hub, tmp_path: Path, uri: str, words: str) -> None:
    assert words in why(uri, tmp_path)


def test_a_gated_one_wants_a_token(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.is_gated = True
    uri = "hf://datasets/org/name/data/rows.jsonl"
    assert "wants an access token" in why(uri, tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    assert bring_hub_file(order_of(uri, tmp_path)).revision == COMMITS[0]


def test_what_is_too_large_is_not_even_begun(hub: Hub, tmp_path: Path) -> None:
    uri = "hf://datasets/org/name/data/rows.jsonl"
    assert "more than 100 bytes" in why(uri, tmp_path, max_dataset_bytes=100)
    assert len(hub.site.asked) == 1


def test_a_hub_in_trouble_is_asked_again_but_not_for_ever(hub: Hub, tmp_path: Path) -> None:
    uri = "hf://datasets/org/name/data/rows.jsonl"
    hub.fails = 2
    assert bring_hub_file(order_of(uri, tmp_path / "once")).revision == COMMITS[0]
    hub.fails = 1000
    assert "cannot get hf://datasets/org/name/data/rows.jsonl from the hub" in why(uri, tmp_path)


def test_offline_it_comes_from_the_cache(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = "hf://datasets/org/name/data/rows.jsonl"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "from the hub" in why(uri, tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hf_hub_download("org/name", "data/rows.jsonl", repo_type="dataset")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    arrived = bring_hub_file(order_of(uri, tmp_path))
    assert (arrived.revision, arrived.filename) == (COMMITS[0], "rows.jsonl")
    assert (tmp_path / "train").read_bytes() == ROWS


def test_of_a_model_nothing_is_fetched_that_runs_or_unpickles() -> None:
    from huggingface_hub.utils._paths import filter_repo_objects

    from worker.download import DESCRIPTION, NEVER, WEIGHTS

    wanted = ["config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "vocab.txt",
              "chat_template.jinja", "model-00001-of-00002.safetensors",
              "model.safetensors.index.json"]  # fmt: skip
    unwanted = ["modeling_evil.py", "tokenizer.py", "tokenizer/evil.py", "vocab.pkl", "merges.bin",
                "pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.ckpt",
                "vocab.joblib", "tokenizer.so"]  # fmt: skip
    found = filter_repo_objects(
        [*wanted, *unwanted], allow_patterns=[*DESCRIPTION, WEIGHTS], ignore_patterns=NEVER
    )
    assert list(found) == wanted
