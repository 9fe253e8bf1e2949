"""The English of a small invented town, on which the tiny base model is pretrained.

Every document comes from a grammar: stories, questions on what happened, records of it (as
``key: value`` lines, seldom as JSON), clocks, numbers, words said again, and small talk in the chat
format. The model learns from it to write sentences, to copy, and to look things up in its
context. The dataset's task is not in it: in the chat format there is small talk only, and no
document holds a request to the town's service desk.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from examples.lexicon import (
    DAYS,
    DISHES,
    ERRANDS,
    NAMES,
    NUMBERS,
    RESTAURANTS,
    SPOTS,
    STATES,
    SUBJECTS,
    bare,
    clock,
    spoken_times,
)

KEYS = {
    "who": ["who", "name", "person", "guest", "first"],
    "friend": ["with", "friend", "to", "other", "second"],
    "place": ["where", "place", "house", "spot", "from"],
    "goal": ["goal", "to", "towards", "end"],
    "day": ["day", "when", "date"],
    "time": ["time", "clock", "hour", "at"],
    "count": ["count", "number", "people", "portions"],
    "dish": ["dish", "food", "what", "meal"],
    "errand": ["task", "work", "what", "errand"],
    "words": ["words", "message", "text", "said"],
}
QUESTIONS = {
    "who": ["Who is it about?", "What is the name?", "Who was it?"],
    "friend": ["Who else is there?", "What is the other name?"],
    "place": ["Where was it?", "Which place is it?"],
    "goal": ["Where does it end?", "Which place is the goal?"],
    "day": ["When was it?", "Which day was it?", "On which day?"],
    "time": ["At what time?", "What did the clock show?", "When exactly?"],
    "count": ["How many?", "What is the number?"],
    "dish": ["What was on the plate?", "Which dish was it?"],
    "errand": ["What was the work?", "What had to be done?"],
    "words": ["What was said?", "What are the words?"],
}
FILLERS = [
    "The sky was {colour} and the wind was {mood}.", "It was a {mood} morning in the town.",
    "Nobody knew why.", "The {animal} slept near the {thing}.", "A {colour} {animal} ran past.",
    "The {thing} was {colour}, as always.", "In the end everybody was {mood}.",
    "The old {thing} had been there for many years.", "It rained a little.",
    "Then the {animal} looked at the {thing} for a long time.", "The street was {mood} again.",
    "The {paper} lay on the {thing}.", "Somebody had lost the {paper}.",
    "The {mood} {paper} was about the {animal}.", "A {paper} is not a {thing}.",
    "There was a {mood} song on the radio.", "I still think of the {colour} {thing}.",
]  # fmt: skip
SMALL_TALK = [
    "Hello!", "Hi!", "Good morning.", "Good evening.", "How are you?", "Tell me a story.",
    "What is new in the town?", "Thank you.", "Thanks!", "Many thanks.", "See you soon.",
    "Dear friend, this is {name}.", "My name is {name}.", "It is {name} here.",
    "The name is {name}.", "Sorry, I cannot find the {thing}.", "Please look at the {animal}.",
    "Could you see the {thing}?", "I would like to have a {colour} {thing}.",
    "Can you tell me about the {animal}?", "We need a new {thing}.", "Do not forget the {thing}.",
    "Do you have a {animal}?", "I am waiting for the {paper}.", "Please cancel the {paper}.",
    "Who will book the {animal}?", "Remind me of the {mood} song.", "Let me know.",
]  # fmt: skip
ANSWERS = [
    "Ah, yes.", "Well, who knows?", "Let me think.", "That reminds me of something.",
    "What a {mood} day!", "I once had a {colour} {thing}.", "You should have seen the {animal}!",
]  # fmt: skip
OPENINGS = ["Then", "Later", "One day", "So", "Last week", "In those days", "Yes,", "Again"]
COLOURS = ["red", "blue", "green", "white", "black", "yellow", "grey", "brown", "golden", "pale"]
PAPERS = [
    "booking", "cancellation", "order", "reminder", "message", "request", "form", "taxi", "intent",
    "ticket", "letter", "menu", "bill", "report",
]  # fmt: skip
MOODS = [
    "quiet", "happy", "gentle", "strange", "slow", "bright", "calm", "sad", "warm", "cold",
    "lovely", "long",
]  # fmt: skip
ANIMALS = ["dog", "cat", "horse", "bird", "fox", "duck", "mouse", "goat", "sheep", "rabbit"]
THINGS = [
    "door", "table", "lamp", "chair", "window", "clock", "boat", "tree", "wall", "bell",
    "basket", "stone", "garden", "box",
]  # fmt: skip


SAYABLE = [*NAMES, *COLOURS, *MOODS, *ANIMALS, *THINGS, *PAPERS, *DAYS, *DISHES, *ERRANDS]
SAYABLE += [bare(place) for place in (*RESTAURANTS, *SPOTS)]


@dataclass(frozen=True)
class Document:
    """A text of which the first part is only read and the rest is learned.

    Prose that a record follows is only read: what it says cannot be foreseen, what the record
    says can. Learning the record alone teaches the model to look things up many times sooner.
    """

    read: str
    learned: str | list[dict[str, str]]


@dataclass(frozen=True)
class Event:
    """Something that happened, as a sentence, with the values that can be asked of it."""

    text: str
    facts: dict[str, str | int]


def filler(rng: random.Random, sentences: list[str] = FILLERS) -> str:
    return rng.choice(sentences).format(
        name=rng.choice(NAMES),
        colour=rng.choice(COLOURS),
        mood=rng.choice(MOODS),
        animal=rng.choice(ANIMALS),
        thing=rng.choice(THINGS),
        paper=rng.choice(PAPERS),
    )


def words(rng: random.Random) -> str:
    """Something to say: from the town's sayings, or made of any words."""
    if rng.random() < 0.5:
        return f"{rng.choice(SUBJECTS)} {rng.choice(STATES)}"
    return f"the {rng.choice(COLOURS)} {rng.choice(THINGS)} is {rng.choice(MOODS)}"


def errand(rng: random.Random) -> str:
    if rng.random() < 0.7:
        return rng.choice(ERRANDS)
    return f"{rng.choice(ERRANDS).split()[0]} the {rng.choice(COLOURS)} {rng.choice(THINGS)}"


def dish(rng: random.Random) -> str:
    if rng.random() < 0.7:
        return rng.choice(DISHES)
    return f"{rng.choice(DISHES).split()[0]} {rng.choice(DISHES).split()[1]}"


def place(rng: random.Random) -> str:
    """A known place, or one made up of any words."""
    if rng.random() < 0.8:
        return rng.choice(RESTAURANTS + SPOTS)
    return f"the {rng.choice(COLOURS).capitalize()} {rng.choice(ANIMALS + THINGS).capitalize()}"


def moment(rng: random.Random) -> tuple[str, str]:
    hour, minute = rng.randint(5, 23), rng.choice([0, 30])
    return rng.choice(spoken_times(hour, minute)), clock(hour, minute)


def count(rng: random.Random) -> tuple[str, int]:
    value = rng.randint(2, 12)
    return rng.choice([NUMBERS[value], str(value)]), value


def visit(rng: random.Random) -> Event:
    who, where, day = rng.choice(NAMES), place(rng), rng.choice(DAYS)
    said, time = moment(rng)
    some, many = count(rng)
    text = rng.choice([
        f"{who} came to {where} with {some} friends on {day} at {said}.",
        f"On {day} at {said} there were {some} people at {where}. One of them was {who}.",
        f"At {where} {who} sat at a table for {some} on {day}. It was {said}.",
        f"There was a party of {some} at {where} on {day}: {who} had chosen the place for {said}.",
        f"{who} found a table for {some} people at {where}. It was {day}, {said}.",
        f"\"A table for {some} at {where},\" said {who}. \"We come on {day} at {said}.\"",
    ])  # fmt: skip
    return Event(text, {"who": who, "place": bare(where), "count": many, "day": day, "time": time})


def absence(rng: random.Random) -> Event:
    who, where, day = rng.choice(NAMES), place(rng), rng.choice(DAYS)
    text = rng.choice([
        f"{who} did not come to {where} on {day}.",
        f"On {day} {who} was ill, and the table at {where} stayed free.",
        f"{where[0].upper()}{where[1:]} was closed on {day}, so {who} went home.",
        f"{who} was at {where} on {day}.",
        f"Everybody at {where} waited on {day}, but {who} could not come.",
    ])  # fmt: skip
    return Event(text, {"who": who, "place": bare(where), "day": day})


def meal(rng: random.Random) -> Event:
    who, what = rng.choice(NAMES), dish(rng)
    said, time = moment(rng)
    some, many = count(rng)
    text = rng.choice([
        f"At {said} {who} ate {some} plates of {what}.",
        f"{who} carried {some} portions of {what} up the stairs at {said}.",
        f"There were {some} servings of {what} on the table at {said}. {who} was happy.",
        f"\"Some {what}!\" said {who}. At {said} there were {some} portions.",
        f"The cook made {some} plates of {what} for {who}. It was {said}.",
    ])  # fmt: skip
    return Event(text, {"who": who, "dish": what, "count": many, "time": time})


def trip(rng: random.Random) -> Event:
    who, start, end = rng.choice(NAMES), place(rng), place(rng)
    said, time = moment(rng)
    by = rng.choice(["by taxi", "by bus", "by car", "by train", "on foot"])
    text = rng.choice([
        f"{who} went from {start} to {end} {by} at {said}.",
        f"At {said} {who} was at {start} and wanted to go to {end}.",
        f"{who} travelled to {end} {by}. The trip had begun at {start} at {said}.",
        f"A driver took {who} to {end}. They had met at {start} at {said}.",
        f"From {start} {who} walked to {end}. The time was {said}.",
    ])  # fmt: skip
    return Event(text, {"who": who, "place": bare(start), "goal": bare(end), "time": time})


def plan(rng: random.Random) -> Event:
    who, what, day = rng.choice(NAMES), errand(rng), rng.choice(DAYS)
    said, time = moment(rng)
    text = rng.choice([
        f"{who} had to {what} on {day} at {said}.",
        f"On {day} at {said} {who} wanted to {what}.",
        f"{who} did not forget to {what}. It was done on {day} at {said}.",
        f"On {day} {who} woke at {said} to {what}.",
        f"There was a note for {who} on the wall: {what}, {day}, {said}.",
    ])  # fmt: skip
    return Event(text, {"who": who, "errand": what, "day": day, "time": time})


def speech(rng: random.Random) -> Event:
    who, friend = rng.sample(NAMES, 2)
    said = words(rng)
    text = rng.choice([
        f"{who} told {friend} that {said}.",
        f"\"I know that {said},\" said {who} to {friend}.",
        f"{friend} heard that {said}. It was {who} who had said so.",
        f"{who} wrote a note to {friend}: {said}.",
        f"{friend} asked, and {who} said that {said}.",
    ])  # fmt: skip
    return Event(text, {"who": who, "friend": friend, "words": said})


EVENTS = [visit, visit, absence, meal, trip, plan, speech]


def event(rng: random.Random) -> Event:
    """Any event; its sentence never begins with a name.

    A name after a space and a name after nothing are different tokens. What is to be copied
    should be the same token wherever it stands.
    """
    one = rng.choice(EVENTS)(rng)
    if one.text.split()[0] in NAMES:
        return Event(f"{rng.choice(OPENINGS)} {one.text}", one.facts)
    return one


def prose(rng: random.Random, sentences: int) -> str:
    """A few sentences, some of which say that something happened."""
    return " ".join(
        event(rng).text if rng.random() < 0.6 else filler(rng) for _ in range(sentences)
    )


def story(rng: random.Random) -> Document:
    return Document("", prose(rng, rng.randint(2, 6)))


def padded(rng: random.Random, text: str) -> str:
    """The text with, sometimes, an idle sentence before or after it."""
    before = filler(rng) + " " if rng.random() < 0.25 else ""
    after = " " + filler(rng) if rng.random() < 0.25 else ""
    return before + text + after


def quiz(rng: random.Random) -> Document:
    """Something that happened, and questions on it with their answers."""
    one = event(rng)
    asked = rng.sample(sorted(one.facts), rng.randint(1, len(one.facts)))
    lines = [f"Q: {rng.choice(QUESTIONS[fact])} A: {one.facts[fact]}" for fact in asked]
    return Document(padded(rng, one.text) + "\n", "\n".join(lines))


def record(rng: random.Random, facts: dict[str, str | int]) -> dict[str, str | int]:
    """Some or all facts of an event under keys of any wording, in any order."""
    chosen = rng.sample(sorted(facts), rng.randint(max(1, len(facts) - 2), len(facts)))
    return {rng.choice(KEYS[fact]): facts[fact] for fact in chosen}


def filled(rng: random.Random, one: Event) -> str:
    """The record of an event, as lines or as JSON."""
    facts = record(rng, one.facts)
    if rng.random() < 0.1:
        return json.dumps(facts)
    return "\n".join(f"{key}: {value}" for key, value in facts.items())


def form(rng: random.Random) -> Document:
    """An event and its record, sometimes after another event and its record."""
    one, other = event(rng), event(rng)
    before = f"{other.text}\n{filled(rng, other)}\n\n" if rng.random() < 0.15 else ""
    return Document(f"{before}{padded(rng, one.text)}\n", filled(rng, one))


def clocks(rng: random.Random) -> Document:
    """Times, each in two notations."""
    lines = []
    for _ in range(rng.randint(2, 4)):
        hour, minute = rng.randint(5, 23), rng.choice([0, 30])
        said = rng.choice(spoken_times(hour, minute))
        lines.append(f"At {said} the station clock shows: {clock(hour, minute)}")
    return Document("", "\n".join(lines))


def numbers(rng: random.Random) -> Document:
    values = [rng.randint(1, 12) for _ in range(rng.randint(2, 5))]
    lines = [f"{NUMBERS[value]} {rng.choice(THINGS)}s: {value}" for value in values]
    return Document("", "\n".join(lines))


def repetition(rng: random.Random) -> Document:
    """Words in any order, said again."""
    said = ", ".join(rng.choice(SAYABLE) for _ in range(rng.randint(2, 6)))
    return Document(f"Say: {said}\n", f"Again: {said}")


def pairs(rng: random.Random) -> Document:
    """Words that belong together, and the same again in another order."""
    keys = [*THINGS, *PAPERS, *(key for fact in KEYS.values() for key in fact)]
    lines = [f"{key}: {rng.choice(SAYABLE)}" for key in rng.sample(keys, rng.randint(2, 5))]
    return Document("\n".join(lines) + "\n\n", "\n".join(rng.sample(lines, len(lines))))


def chat(rng: random.Random) -> Document:
    """Small talk: whatever is said, the answer is a bit of a story."""
    turns = []
    if rng.random() < 0.5:
        turns.append({"role": "system", "content": filler(rng)})
    for _ in range(rng.randint(1, 2)):
        said = [filler(rng, SMALL_TALK), prose(rng, rng.randint(1, 2)), event(rng).text]
        asked = " ".join(rng.sample(said, rng.randint(1, 3)))
        answer = f"{filler(rng, ANSWERS)} {prose(rng, rng.randint(2, 4))}"
        turns.append({"role": "user", "content": asked})
        turns.append({"role": "assistant", "content": answer})
    return Document("", turns)


KINDS: list[tuple[int, Callable[[random.Random], Document]]] = [
    (10, story), (14, quiz), (44, form), (3, clocks), (2, numbers), (7, repetition), (7, pairs),
    (13, chat),
]  # fmt: skip


def documents(seed: int) -> Iterator[Document]:
    """The corpus, without end."""
    rng = random.Random(seed)  # noqa: S311 - a corpus, not a secret
    weights, makers = zip(*KINDS, strict=True)
    while True:
        (maker,) = rng.choices(makers, weights)
        yield maker(rng)
