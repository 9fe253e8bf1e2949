"""Nothing outside the roots, whatever the URI."""

import os
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.uris import (
    UriError,
    check_hub_id,
    file_uri,
    resolve_dataset_file,
    resolve_model_folder,
)
from tests.app.service import make_model

PIECES = ["..", ".", "a", "in.jsonl", "out.jsonl", "up", "/", "//", "%2e%2e", "%2f", "%00", "%",
          "~", "\\", "?", "#", "localhost", "file:", " ", "é", "\0", "\n"]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a file, a link out of it, and a file beside it."""
    parent = tmp_path_factory.mktemp("world")
    root = parent / "root"
    (root / "a").mkdir(parents=True)
    (root / "in.jsonl").write_text("in")
    (root / "a" / "in.jsonl").write_text("in")
    (parent / "out.jsonl").write_text("out")
    (parent / "root-too").mkdir()
    (parent / "root-too" / "in.jsonl").write_text("out")
    (root / "up").symlink_to(parent)
    return root


class TestDatasetFile:
    @given(pieces=st.lists(st.sampled_from(PIECES), max_size=8), absolute=st.booleans())
    def test_what_is_resolved_lies_below_a_root(
        self, root: Path, pieces: list[str], absolute: bool
    ) -> None:
        uri = "file:" + (str(root) + "/" if absolute else "") + "/".join(pieces)
        try:
            path = resolve_dataset_file(uri, [root])
        except UriError:
            return
        assert path.read_text() == "in"
        assert Path(os.path.realpath(path)).is_relative_to(root)

    @given(text=st.text(max_size=40))
    def test_any_text_is_resolved_or_refused(self, root: Path, text: str) -> None:
        for uri in (text, f"file:{text}", f"file:{quote(text, errors='replace')}"):
            try:
                assert resolve_dataset_file(uri, [root]).is_file()
            except UriError as error:
                assert error.detail  # noqa: PT017 - either outcome is right

    @pytest.mark.parametrize("prefix", ["file:", "file://", "file://localhost"])
    def test_three_spellings_of_one_path(self, root: Path, prefix: str) -> None:
        assert resolve_dataset_file(f"{prefix}{root}/in.jsonl", [root]) == root / "in.jsonl"

    def test_a_relative_path_is_looked_for_below_each_root(self, root: Path) -> None:
        other = root.parent / "root-too"
        assert resolve_dataset_file("file:in.jsonl", [other, root]) == other / "in.jsonl"
        found = resolve_dataset_file("file:a/in.jsonl", [other, root])
        assert found == root / "a" / "in.jsonl"

    def test_a_folder_that_begins_like_a_root_is_not_below_it(self, root: Path) -> None:
        with pytest.raises(UriError) as caught:
            resolve_dataset_file(f"file:{root}-too/in.jsonl", [root])
        assert caught.value.code == "path_not_allowed"

    def test_a_root_may_be_a_link(self, root: Path) -> None:
        link = root.parent / "link"
        link.symlink_to(root)
        assert resolve_dataset_file("file:in.jsonl", [link]) == root / "in.jsonl"

    def test_without_roots_nothing_is_allowed(self) -> None:
        with pytest.raises(UriError, match="may read: none"):
            resolve_dataset_file("file:/etc/passwd", [])

    def test_a_device_and_a_pipe_are_no_files(self, root: Path) -> None:
        os.mkfifo(root / "pipe")
        for uri, roots in (("file:/dev/null", [Path("/dev")]), ("file:pipe", [root])):
            with pytest.raises(UriError, match="is not a file"):
                resolve_dataset_file(uri, roots)


class TestFileUri:
    @pytest.mark.parametrize("name", ["odd 100%x#?", "é", "%41", os.fsdecode(b"\xff"), "a:b\\c"])
    def test_it_leads_back_to_the_path(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        path.touch()
        assert resolve_dataset_file(file_uri(path), [tmp_path]) == path


def test_a_model_in_a_cache_of_links_is_found(tmp_path: Path) -> None:
    """As the hub's cache lays a snapshot out: weights are links to blobs."""
    folder = make_model(tmp_path / "snapshots" / "abc", "other.json")
    blob = tmp_path / "blob"
    blob.touch()
    (folder / "model.safetensors").symlink_to(blob)
    assert resolve_model_folder("file:snapshots/abc", [tmp_path]) == folder


@given(name=st.text(max_size=30))
def test_a_hub_id_is_no_path_and_no_url(name: str) -> None:
    try:
        check_hub_id(name, ["*"])
    except UriError:
        return
    org, _, model = name.partition("/")
    assert org.isascii()
    assert model.isascii()
    assert ".." not in name
    assert not {":", "\\", "%", " "} & set(name)
