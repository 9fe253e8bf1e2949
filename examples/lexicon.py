"""The words of the small town that both the pretraining corpus and the dataset speak of.

Open slots (names, places, dishes, errands, messages) are split once, here: the training rows
draw from one part, the test rows from the other. The pretraining corpus uses all of them.
"""

from collections.abc import Sequence
from typing import TypeVar

Value = TypeVar("Value")

NAMES = [
    "Rosa", "Ada", "Tom", "Mia", "Leo", "Nora", "Ivan", "Clara", "Hugo", "Edith", "Omar", "Lena",
    "Felix", "Greta", "Paul", "Ines", "Jonas", "Maya", "Carl", "Zoe", "Anton", "Vera", "Simon",
    "Iris", "Max", "Elsa", "Victor", "Ruth", "Oscar", "Lucy", "Bruno", "Alma", "Henry", "Nina",
    "Theo", "Olga", "Karim", "Julia", "Peter", "Sofia", "Ben", "Amara", "Walter", "Dora", "Luis",
    "Helen", "Emil", "Wanda", "Ravi", "Molly", "Arthur", "Fatima", "Dylan", "Irma", "Pablo",
    "Stella", "George", "Hanna", "Milo", "Tessa", "Boris", "Camille", "Erik", "Naomi", "Samuel",
    "Petra", "Idris", "Bella", "Conrad", "Yara", "Martin", "Lydia", "Viktor", "Salma", "Gustav",
    "Flora", "Kenji", "Marta", "Abel", "Priya", "Otto", "Jane", "Rafael", "Selma", "Noah",
    "Agnes", "Tariq", "Ellen", "Mario", "Rita", "Dmitri", "Pearl", "Stefan", "Lila", "Cyrus",
    "Hilda",
]  # fmt: skip

RESTAURANTS = [
    "Luigi's", "the Blue Door", "the Old Mill", "the Golden Lion", "Casa Verde", "the Red Lantern",
    "the Copper Pot", "Marco's", "the Garden Room", "Little Tokyo", "the Silver Fork", "Chez Anna",
    "the Green Table", "the Harbour House", "Bombay Palace", "the White Horse", "the Lemon Tree",
    "Sakura", "the Black Olive", "Mama Lou's", "the River Cafe", "the Brass Bell", "La Luna",
    "the Stone Oven", "the Corner Bistro", "the Wild Goose", "Pepper Hill", "the Tin Roof",
    "the Round Table", "Olive Grove", "the Crooked Spoon", "the Winter Garden",
]  # fmt: skip

SPOTS = [
    "the station", "the airport", "the museum", "Hill Street", "the harbour", "the library",
    "Market Square", "the hospital", "Oak Avenue", "the theatre", "the old bridge", "Mill Lane",
    "the town hall", "the stadium", "Rose Street", "the post office", "the zoo", "King Street",
    "the north gate", "the university", "Park Road", "the castle", "the bus stop", "Elm Street",
    "the concert hall", "the lake", "Church Lane", "the bakery", "the city park", "Bridge Road",
    "the school", "the lighthouse",
]  # fmt: skip

DISHES = [
    "mushroom soup", "cheese pizza", "apple pie", "chicken curry", "fish cake", "onion tart",
    "rice bowl", "bean salad", "lemon cake", "beef stew", "tomato soup", "egg sandwich",
    "noodle soup", "plum cake", "veggie burger", "potato salad", "chicken pie", "ham sandwich",
    "fruit salad", "carrot cake", "lentil curry", "fish soup", "spinach tart", "cherry pie",
    "pumpkin soup", "cheese sandwich", "green salad", "honey cake", "lamb stew", "rice pudding",
    "mushroom pizza", "peach tart",
]  # fmt: skip

ERRANDS = [
    "water the plants", "call the bank", "feed the cat", "pay the rent", "buy some milk",
    "wash the car", "post the letter", "walk the dog", "clean the kitchen", "fix the lamp",
    "visit the doctor", "return the books", "bake the bread", "paint the fence", "lock the shed",
    "pack the bags", "order new shoes", "charge the phone", "iron the shirts", "sweep the yard",
    "buy fresh eggs", "call the plumber", "print the tickets", "sign the papers",
    "renew the passport", "fill the tank", "water the garden", "fold the towels",
    "feed the birds", "pay the phone bill", "wash the windows", "collect the parcel",
]  # fmt: skip

SUBJECTS = [
    "the train", "the meeting", "the key", "the red car", "the parcel", "dinner", "the new sofa",
    "the concert", "the blue coat", "the piano", "the small boat", "lunch", "the old map",
    "the package", "the game", "the white cat",
]  # fmt: skip

STATES = [
    "is late", "is ready", "is in the kitchen", "is on the table", "is at home", "is too loud",
    "is under the stairs", "was moved to Monday", "is still here", "is gone", "is very cold",
    "starts in an hour", "is behind the door", "was a great success", "needs more time",
    "is in the garden",
]  # fmt: skip

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]

NUMBERS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve",
]  # fmt: skip

HELD_OUT_EVERY = 4


def fine_tuning_part(values: Sequence[Value]) -> list[Value]:
    """What training rows may use: three of every four values."""
    return [value for index, value in enumerate(values) if index % HELD_OUT_EVERY]


def held_out_part(values: Sequence[Value]) -> list[Value]:
    """What test rows use, and no training row does."""
    return list(values[::HELD_OUT_EVERY])


def bare(place: str) -> str:
    """A place as it stands in a record: without its article."""
    return place.removeprefix("the ")


def clock(hour: int, minute: int) -> str:
    """A time as it stands in a record: ``19:30``."""
    return f"{hour:02d}:{minute:02d}"


def spoken_times(hour: int, minute: int) -> list[str]:
    """The ways in which people say a time: ``7:30 pm``, ``half past seven in the evening``."""
    twelve = (hour - 1) % 12 + 1
    half_of_day = "am" if hour < 12 else "pm"
    part = "in the morning" if hour < 12 else "in the afternoon" if hour < 18 else "in the evening"
    digits = str(twelve) if minute == 0 else f"{twelve}:{minute:02d}"
    words = NUMBERS[twelve] if minute == 0 else f"half past {NUMBERS[twelve]}"
    short = f"{digits} {half_of_day}"
    return [short, short, f"{words} {part}", clock(hour, minute)]
