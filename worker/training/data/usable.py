"""The rows of a file as the model sees them; of their text nothing is kept."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from worker.training.config import Data, DataFile
from worker.training.data.conversations import Conversation
from worker.training.data.examples import Examples, ExampleWriter
from worker.training.data.keys import Keys, as_keys, key_of
from worker.training.data.reading import Read, read
from worker.training.data.rendering import Renderer
from worker.training.data.tally import Tally
from worker.training.errors import DatasetInvalid


@dataclass(frozen=True)
class Usable:
    """Good rows, cut to a length, that still hold something to learn; and how many do not.

    Attributes:
        found: What was found in the file.
        examples: The usable rows.
        keys: Of the usable rows, by which equal ones are known.
        keys_of_all: Of all good rows.
        truncated: How many rows were cut, whatever became of them.
        without_targets: How many rows were dropped: no token in the loss was left in them.
        learns_to_stop: Whether any row, before it was cut, ends with an end-of-turn token that is
            learnt.
    """

    found: Read
    examples: Examples
    keys: Keys
    keys_of_all: Keys
    truncated: int
    without_targets: int
    learns_to_stop: bool


class _Rows:
    """Takes conversations, and keeps what training needs of them."""

    def __init__(
        self, renderer: Renderer, max_length: int, seed: int, examples: ExampleWriter
    ) -> None:
        self._renderer = renderer
        self._max_length = max_length
        self._seed = seed
        self._examples = examples
        self._keys = bytearray()
        self._is_usable = bytearray()
        self._truncated = 0
        self._learns_to_stop = False

    def take(self, conversation: Conversation) -> None:
        """Render one.

        Raises:
            RowRefused: If that cannot be done.
        """
        whole = self._renderer.render(conversation)
        example = whole.cut(self._max_length)
        self._keys += key_of(conversation, self._seed)
        self._is_usable.append(example.targets > 0)
        self._truncated += len(whole.ids) > self._max_length
        self._learns_to_stop = self._learns_to_stop or self._renderer.learns_to_stop(whole)
        if example.targets:
            self._examples.append(example)

    def usable(self, found: Read) -> Usable:
        keys = as_keys(self._keys)
        is_usable: Bool[np.ndarray, " rows"] = np.frombuffer(self._is_usable, np.bool_)
        return Usable(
            found,
            self._examples.rows(),
            keys=keys[is_usable],
            keys_of_all=keys,
            truncated=self._truncated,
            without_targets=len(keys) - len(self._examples),
            learns_to_stop=self._learns_to_stop,
        )


def read_usable(
    file: DataFile,
    options: Data,
    renderer: Renderer,
    *,
    max_length: int,
    seed: int,
    folder: Path | None = None,
    tally: Tally | None = None,
) -> Usable:
    """Read, check and render the rows of a file, cut what is too long, drop what teaches nothing.

    Args:
        file: The local file.
        options: How to read its rows.
        renderer: Renders with the base model's chat template.
        max_length: Tokens that rows are cut at.
        seed: Of the keys.
        folder: Where rows are kept, as text while they are read, as tokens for as long as they are
            used; by default the system's folder for temporary files.
        tally: Counts them.

    Raises:
        DatasetInvalid: If rows are bad, or nothing is left.
        ConfigInvalid: If the mapping or the chat template fits no row.
        Stopped: If somebody wishes so.
    """
    with ExampleWriter(folder) as examples:
        rows = _Rows(renderer, max_length, seed, examples)
        usable = rows.usable(read(file, options, rows.take, folder=folder, tally=tally))
    if not len(usable.examples):
        raise DatasetInvalid(
            f"After cutting rows at {max_length} tokens nothing is left of {file.uri}: no "
            "row has an assistant's token within that length.",
            "Raise data.max_length, or shorten the prompts.",
        )
    return usable
