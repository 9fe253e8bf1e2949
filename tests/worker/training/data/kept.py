"""Reading that keeps every row, for tests that look at them."""

from dataclasses import dataclass, fields

from worker.training.config import Data, DataFile
from worker.training.data import reading
from worker.training.data.conversations import Conversation
from worker.training.data.examples import Example
from worker.training.data.reading import Read
from worker.training.data.rendering import Renderer


@dataclass(frozen=True)
class Kept(Read):
    """What was found in a file, and its good rows."""

    conversations: list[Conversation]
    examples: list[Example]


def read(file: DataFile, options: Data, renderer: Renderer | None = None) -> Kept:
    """The rows of a file; with a renderer, also as the model sees them."""
    conversations: list[Conversation] = []
    examples: list[Example] = []

    def take(conversation: Conversation) -> None:
        if renderer:
            examples.append(renderer.render(conversation))
        conversations.append(conversation)

    found = reading.read(file, options, take)
    named = {field.name: getattr(found, field.name) for field in fields(found)}
    return Kept(**named, conversations=conversations, examples=examples)
