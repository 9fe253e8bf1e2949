"""Rows lie end to end on the disk: they come back as they were, and memory holds little of each."""

import gc
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.worker.training.conftest import chat, make_tokenizer
from worker.training.config import Data, DataFile
from worker.training.data.conversations import Conversation
from worker.training.data.examples import (
    Example,
    Examples,
    ExampleWriter,
    lengths_of,
    targets_of,
)
from worker.training.data.keys import as_keys, copies, found_in, key_of, split
from worker.training.data.rendering import Renderer
from worker.training.data.usable import read_usable

MAX_BYTES_OF_A_ROW = 150

tokens = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=9)
letters = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=30)


def example(row: list[tuple[int, bool]]) -> Example:
    ids, in_loss = zip(*row, strict=True)
    return Example(np.array(ids, np.int32), np.array(in_loss, bool))


def written(examples: list[Example], folder: Path | None = None) -> Examples:
    with ExampleWriter(folder) as writer:
        for one in examples:
            writer.append(one)
        assert len(writer) == len(examples)
        return writer.rows()


def plain(examples: "list[Example] | Examples") -> list[tuple[list[int], list[bool]]]:
    return [(one.ids.tolist(), one.in_loss.tolist()) for one in examples]


class TestExamples:
    @given(st.lists(tokens, max_size=12), st.data())
    def test_they_are_what_was_written(
        self, rows: list[list[tuple[int, bool]]], data: st.DataObject
    ) -> None:
        before = [example(row) for row in rows]
        found = written(before)
        assert plain(found) == plain(before)
        some = data.draw(st.lists(st.integers(0, len(rows) - 1))) if rows else []
        chosen = found.chosen(np.array(some, np.int64))
        assert plain(chosen) == plain([before[row] for row in some])
        assert plain(chosen[1:5:2]) == plain([before[row] for row in some][1:5:2])
        for ours in (found, chosen):
            assert ours.lengths.tolist() == lengths_of(list(ours)).tolist()
            assert ours.targets.tolist() == targets_of(list(ours)).tolist()

    def test_no_file_of_theirs_is_seen_and_they_outlive_it(self, tmp_path: Path) -> None:
        rows = written([example([(n, True)] * 1000) for n in range(50)], tmp_path)
        assert not list(tmp_path.iterdir())
        gc.collect()
        assert [int(row.ids[0]) for row in rows] == list(range(50))

    def test_there_is_none_beyond_the_last(self) -> None:
        with pytest.raises(IndexError):
            written([example([(1, True)])])[1]


class TestKeys:
    @given(letters, st.integers(0, 5), st.floats(0.01, 0.9), st.integers(1, 9))
    def test_a_split_takes_groups_of_equal_rows_in_the_order_of_their_hashes(
        self, names: list[str], seed: int, share: float, max_rows: int
    ) -> None:
        keys = [key_of(Conversation([], text=name), seed) for name in names]
        if len(set(keys)) < 2:
            return
        wanted = max(1, min(round(share * len(keys)), max_rows))
        held: set[bytes] = set()
        sizes = sorted(Counter(keys).items())
        for key, size in sizes:
            if sum(keys.count(one) for one in held) + size <= wanted:
                held.add(key)
        held = held or {min(sizes, key=lambda item: item[1])[0]}
        found = split(as_keys(b"".join(keys)), share, max_rows)
        assert found.tolist() == [key in held for key in keys]

    @given(letters, letters)
    def test_copies_are_counted_within_a_file_and_between_two(
        self, ours: list[str], theirs: list[str]
    ) -> None:
        keys = [
            as_keys(b"".join(key_of(Conversation([], text=name), 1) for name in names))
            for names in (ours, theirs)
        ]
        assert copies(keys[0]) == len(ours) - len(set(ours))
        assert found_in(*keys) == sum(name in theirs for name in ours)

    def test_another_text_or_seed_is_another_key(self) -> None:
        talks = [Conversation(chat("a", text)["messages"]) for text in "bc"]
        assert len({key_of(talk, seed) for talk in talks for seed in (1, 2)}) == 4
        assert key_of(talks[0], 1) == key_of(Conversation(chat("a", "b")["messages"]), 1)


def test_memory_holds_some_tens_of_bytes_of_each_row(
    data_file: Callable[..., DataFile], tmp_path: Path
) -> None:
    """Each is 24 tokens on the disk, and 16 bytes of a hash until they are split."""
    renderer = Renderer(make_tokenizer(), "assistant")

    def peak(rows: int) -> int:
        file = data_file([chat(f"{n:04}", "b") for n in range(rows)])
        tracemalloc.start()
        try:
            found = read_usable(file, Data(), renderer, max_length=99, seed=1, folder=tmp_path)
            assert len(found.examples) == rows
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(200), peak(1200)
    assert (many - few) / 1000 < MAX_BYTES_OF_A_ROW
