"""Write the instruction dataset of the first run: a guest's message becomes a filled form.

    python -m examples.make_dataset

Six kinds of message, each said in several ways. The names, places, dishes, errands and messages
of the test rows occur in no training row (``lexicon.held_out_part``); phrasings, days, numbers
and times are shared. The files are the same, byte for byte, wherever this runs.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
    fine_tuning_part,
    held_out_part,
    spoken_times,
)

DATA = Path(__file__).parent / "data"
SYSTEM = "Turn the guest's message into a form."
TRAIN_ROWS = 600
TEST_ROWS = 100

GREETINGS = ["", "", "", "Hi! ", "Hello, ", "Good morning. ", "Good evening. ", "Dear team, "]
CLOSINGS = ["", "", "", " Thanks!", " Thank you.", " Many thanks.", " See you soon."]

Fields = dict[str, str | int]
Row = dict[str, list[dict[str, str]]]


@dataclass(frozen=True)
class Values:
    """The values of the open slots that one split may use."""

    names: list[str]
    restaurants: list[str]
    spots: list[str]
    dishes: list[str]
    errands: list[str]
    messages: list[str]


def split(part: Callable[[list[str]], list[str]]) -> Values:
    """The lexicon cut to one split; a message is new in its subject and in its predicate."""
    messages = [f"{subject} {state}" for subject in part(SUBJECTS) for state in part(STATES)]
    places = part(RESTAURANTS), part(SPOTS)
    return Values(part(NAMES), *places, part(DISHES), part(ERRANDS), messages)


def someone(rng: random.Random, values: Values) -> tuple[str, str]:
    """A name, and a sentence by which a guest gives it."""
    name = rng.choice(values.names)
    said = rng.choice(["This is {}.", "My name is {}.", "The name is {}.", "It is {} here."])
    return name, said.format(name)


def sometime(rng: random.Random) -> tuple[str, str]:
    """A time as a guest says it, and as a record has it."""
    hour, minute = rng.randint(7, 21), rng.choice([0, 30])
    return rng.choice(spoken_times(hour, minute)), clock(hour, minute)


def number(rng: random.Random, least: int, most: int) -> tuple[str, int]:
    count = rng.randint(least, most)
    return rng.choice([NUMBERS[count], str(count)]), count


def book_table(rng: random.Random, values: Values) -> tuple[str, Fields]:
    name, me = someone(rng, values)
    place, day = rng.choice(values.restaurants), rng.choice(DAYS)
    people, count = number(rng, 2, 12)
    said, time = sometime(rng)
    text = rng.choice([
        f"{me} Please book a table for {people} at {place} on {day} at {said}.",
        f"Could I have a table for {people} at {place}? {me} We come on {day} at {said}.",
        f"{me} We are {people} people and want to eat at {place} on {day} at {said}.",
        f"Do you have room for {people} at {place} on {day}? We would be there at {said}. {me}",
        f"On {day} at {said} we need a table for {people} at {place}. {me}",
        f"A table at {place} for {people}, please: {day}, {said}. {me}",
    ])  # fmt: skip
    fields: Fields = {"name": name, "place": bare(place), "people": count}
    return text, {**fields, "day": day, "time": time}


def cancel_table(rng: random.Random, values: Values) -> tuple[str, Fields]:
    name, me = someone(rng, values)
    place, day = rng.choice(values.restaurants), rng.choice(DAYS)
    text = rng.choice([
        f"{me} Please cancel my table at {place} on {day}.",
        f"We cannot come to {place} on {day}. {me}",
        f"Sorry, I have to cancel {day} at {place}. {me}",
        f"{me} I booked a table at {place} for {day}, but I am ill.",
        f"My table on {day} at {place} can be given away. {me}",
    ])  # fmt: skip
    return text, {"name": name, "place": bare(place), "day": day}


def order_food(rng: random.Random, values: Values) -> tuple[str, Fields]:
    name, me = someone(rng, values)
    dish = rng.choice(values.dishes)
    portions, count = number(rng, 2, 9)
    said, time = sometime(rng)
    text = rng.choice([
        f"{me} I would like {portions} portions of {dish} at {said}.",
        f"Please bring {portions} servings of {dish} to my room at {said}. {me}",
        f"{me} Can we get {portions} plates of {dish}? We want to eat at {said}.",
        f"At {said} I would love some {dish}, {portions} portions. {me}",
        f"Food for {said}, please: {portions} portions of {dish}. {me}",
    ])  # fmt: skip
    return text, {"name": name, "dish": dish, "portions": count, "time": time}


def call_taxi(rng: random.Random, values: Values) -> tuple[str, Fields]:
    name, me = someone(rng, values)
    start, end = rng.sample(values.spots, 2)
    said, time = sometime(rng)
    text = rng.choice([
        f"{me} I need a taxi from {start} to {end} at {said}.",
        f"Please send a car to {start} at {said}. I am going to {end}. {me}",
        f"I have to be picked up at {start} and want to go to {end}. {me} The time is {said}.",
        f"Can a driver take me to {end}? I am waiting at {start} at {said}. {me}",
        f"At {said} I want to go from {start} to {end} by taxi. {me}",
    ])  # fmt: skip
    return text, {"name": name, "from": bare(start), "to": bare(end), "time": time}


def set_reminder(rng: random.Random, values: Values) -> tuple[str, Fields]:
    errand, day = rng.choice(values.errands), rng.choice(DAYS)
    said, time = sometime(rng)
    text = rng.choice([
        f"Remind me to {errand} on {day} at {said}.",
        f"On {day} at {said} I have to {errand}. Please do not let me forget.",
        f"I must not forget to {errand}. Can you tell me on {day} at {said}?",
        f"Please wake me on {day} at {said}, because I want to {errand}.",
        f"Set a reminder for {day}, {said}: {errand}.",
    ])  # fmt: skip
    return text, {"task": errand, "day": day, "time": time}


def send_message(rng: random.Random, values: Values) -> tuple[str, Fields]:
    name, me = someone(rng, values)
    other = rng.choice([value for value in values.names if value != name])
    words = rng.choice(values.messages)
    text = rng.choice([
        f"{me} Please tell {other} that {words}.",
        f"Can you let {other} know that {words}? {me}",
        f"{me} I have a message for {other}: {words}.",
        f"Send a note to {other} and write that {words}. {me}",
        f"If {other} asks, say that {words}. {me}",
    ])  # fmt: skip
    return text, {"name": name, "to": other, "message": words}


INTENTS = {
    "booking": book_table,
    "cancellation": cancel_table,
    "order": order_food,
    "taxi": call_taxi,
    "reminder": set_reminder,
    "message": send_message,
}


def make_row(rng: random.Random, values: Values) -> Row:
    intent = rng.choice(list(INTENTS))
    text, fields = INTENTS[intent](rng, values)
    lines = {"intent": intent, **fields}
    answer = "\n".join(f"{key}: {value}" for key, value in lines.items())
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": rng.choice(GREETINGS) + text + rng.choice(CLOSINGS)},
            {"role": "assistant", "content": answer},
        ]
    }


def make_rows(seed: int, values: Values, count: int) -> list[Row]:
    """Rows that all differ in the guest's message."""
    rng = random.Random(seed)  # noqa: S311 - a dataset, not a secret
    rows: dict[str, Row] = {}
    while len(rows) < count:
        row = make_row(rng, values)
        rows.setdefault(row["messages"][1]["content"], row)
    return list(rows.values())


def write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(folder: Path = DATA) -> None:
    write(folder / "train.jsonl", make_rows(1, split(fine_tuning_part), TRAIN_ROWS))
    write(folder / "test.jsonl", make_rows(2, split(held_out_part), TEST_ROWS))


if __name__ == "__main__":
    main()
