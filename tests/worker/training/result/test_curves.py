"""The picture shows every curve inside its frame, says what it shows, and is the same each time."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.worker.training.result.finished import made_up_state
from worker.training.config import Evaluation, TrainingJob
from worker.training.result.curves import HEIGHT, WIDTH, Curves, curves_of, draw, summary
from worker.training.result.svg import multiples, number, tick_step

Make = Callable[..., TrainingJob]
NAMESPACE = "{http://www.w3.org/2000/svg}"


def falling(steps: int, every: int) -> list[tuple[float, float]]:
    return [
        (step, 0.9 + 2.1 * math.exp(-5 * step / steps) + 0.1 * math.sin(step))
        for step in range(every, steps + 1, every)
    ]


def curves(steps: int, *, every: int = 1, **more: Any) -> Curves:
    schedule = [(step, 2e-4 * (1 - step / (steps + 1))) for step in range(1, steps + 1)][:200]
    return Curves(
        **{
            "train": falling(steps, every),
            "held_out": [(0, 3.0), (steps, 1.0)],
            "learning_rate": schedule,
            "sigma": schedule,
            **more,
        }
    )


SPIKED = [(step, 31.2 if step in (300, 700) else loss) for step, loss in falling(1000, 20)]
RUNS = {
    "one step": curves(1),
    "two steps": curves(2),
    "many steps": curves(12_000, every=240),
    "peaks": curves(1000, train=SPIKED),
    "ended early": curves(800, every=16, best=(400, 0.987), planned=20_000),
    "plain LoRA": curves(300, sigma=()),
    "nothing learned": curves(50, train=[(step, 2.0) for step in range(1, 51)]),
    "no finite training loss": curves(8, train=[]),
    "no strength yet": curves(1, sigma=[(1, 0.0)]),
    "losses near zero": curves(4, train=[(1, 3e-5)], held_out=[(0, 4e-5), (4, 1e-6)]),
    "an enormous loss": curves(4, held_out=[(0, 4e8), (4, 1.0)]),
}


def parsed(drawn: Curves) -> ElementTree.Element:
    return ElementTree.fromstring(draw(drawn))  # noqa: S314 - we have just written it


def words(drawn: Curves) -> list[str]:
    return [text.text or "" for text in parsed(drawn).iter(f"{NAMESPACE}text")]


def lines_of(drawn: Curves, name: str) -> list[tuple[float, float]]:
    for line in parsed(drawn).iter(f"{NAMESPACE}polyline"):
        if name in line.attrib["class"].split():
            pairs = (pair.split(",") for pair in line.attrib["points"].split())
            return [(float(x), float(y)) for x, y in pairs]
    return []


def boxes(drawn: Curves) -> list[tuple[float, float, float, float]]:
    """Where each text is, at the width of a broad font."""
    found = []
    for text in parsed(drawn).iter(f"{NAMESPACE}text"):
        width = 7.2 * len(text.text or "")
        kind = text.attrib["class"]
        x, y = float(text.attrib["x"]), float(text.attrib["y"])
        x -= width if kind == "end" else width / 2 if kind == "middle" else 0
        found.append((x, y - 10, x + width, y + 2))
    return found


def do_overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


@pytest.mark.parametrize("name", RUNS)
class TestAnyRun:
    def test_everything_is_inside_the_page(self, name: str) -> None:
        for x, y, x2, y2 in boxes(RUNS[name]):
            assert x >= 0
            assert y >= 0
            assert x2 <= WIDTH
            assert y2 <= HEIGHT
        numbers = re.findall(r"\d+\.\d,\d+\.\d", draw(RUNS[name]))
        for x, y in (map(float, pair.split(",")) for pair in numbers):
            assert 60 <= x <= WIDTH - 20
            assert 60 <= y <= HEIGHT - 50

    def test_no_two_words_overlap(self, name: str) -> None:
        found = boxes(RUNS[name])
        for index, box in enumerate(found):
            assert not any(do_overlap(box, other) for other in found[index + 1 :])

    def test_no_number_is_missing_or_not_one(self, name: str) -> None:
        text = draw(RUNS[name])
        assert "nan" not in text
        assert "inf" not in text.replace("linejoin", "")
        assert text == draw(RUNS[name])


class TestWhatIsShown:
    def test_each_axis_is_named(self) -> None:
        found = words(RUNS["many steps"])
        assert found.count("optimizer step") == 3
        assert {"Loss per target token", "Learning rate", "σ, strength of the noise"} <= set(found)
        assert {"training, under noise", "held out, without noise"} <= set(found)
        assert {"0", "12,000", "2e-4"} <= set(found)

    def test_higher_is_higher_and_later_is_further_right(self) -> None:
        held_out = lines_of(RUNS["many steps"], "held")
        assert held_out[0][1] < held_out[1][1]
        assert held_out[0][0] < held_out[1][0]
        train = lines_of(RUNS["many steps"], "train")
        assert len(train) == 50
        assert train[0][1] < train[-1][1]

    def test_both_losses_share_one_axis(self) -> None:
        same = curves(50, train=[(10, 3.0), (50, 1.0)])
        assert lines_of(same, "train")[-1] == lines_of(same, "held")[-1]

    def test_peaks_are_cut_and_told_of_so_that_the_rest_is_seen(self) -> None:
        train = lines_of(RUNS["peaks"], "train")
        assert "Loss per target token; peaks up to 31.2 are cut off" in words(RUNS["peaks"])
        usual = sorted(y for _, y in train)[5:]
        assert usual[-1] - usual[0] > 50

    def test_a_start_far_above_the_end_is_no_peak(self) -> None:
        train = [(step, 10.0 * math.exp(-step / 10) + 1) for step in range(1, 101, 2)]
        assert "Loss per target token" in words(curves(100, train=train, held_out=[(0, 11)]))

    def test_the_best_and_an_early_end_are_marked(self) -> None:
        found = words(RUNS["ended early"])
        assert "lowest: 0.987 at step 400" in found
        assert "ended early: step 800 of 20,000" in found

    def test_plain_lora_has_no_curve_of_strength(self) -> None:
        assert not any("σ" in text or "noise" in text for text in words(RUNS["plain LoRA"]))
        assert not lines_of(RUNS["plain LoRA"], "sigma")

    def test_there_are_colours_for_dark_pages(self) -> None:
        light, dark = draw(RUNS["peaks"]).split("prefers-color-scheme:dark")
        for name in ("page", "grid", "axis", "train", "held", "rate", "sigma", "best", "title"):
            assert f".{name}" in light
            assert f".{name}" in dark

    def test_it_is_described_in_words(self) -> None:
        title = next(parsed(RUNS["many steps"]).iter(f"{NAMESPACE}title"))
        assert title.text == (
            "Training curves over 12,000 optimizer steps: held-out loss from 3 to 1"
        )

    def test_the_words_name_an_early_end_and_the_loss_that_was_kept(self, make_job: Make) -> None:
        state = made_up_state()
        state.held_out[1]["loss"] = 1.5
        job = replace(make_job(), evaluation=Evaluation(keep="best"))
        assert summary(curves_of(job, state, 20)) == (
            "Training curves over 8 of 20 optimizer steps: held-out loss from 5.5 to 2.25, "
            "lowest 1.5 at step 4"
        )


class TestOfARun:
    def test_schedules_are_those_of_the_loop(self, make_job: Make) -> None:
        job = make_job(training={"warmup_ratio": 0.0})
        found = curves_of(job, made_up_state(), 8)
        assert list(found.learning_rate[:1]) == [(1, 1e-2)]
        assert [len(found.learning_rate), len(found.sigma)] == [8, 8]
        first, *_, last = (sigma for _, sigma in found.sigma)
        assert first == 0
        assert 0.04 < last < 0.05
        assert list(found.held_out[-1:]) == [(8, 2.25)]
        assert found.planned is None

    def test_an_early_end_leaves_schedules_where_they_were(self, make_job: Make) -> None:
        job = make_job(training={"warmup_ratio": 0.0})
        found = curves_of(job, made_up_state(), 16)
        assert found.planned == 16
        assert found.sigma[-1][1] < 0.025

    def test_long_schedules_are_sampled_to_their_ends(self, make_job: Make) -> None:
        state = made_up_state()
        state.step = 9000
        found = curves_of(make_job(), state, 9000)
        assert len(found.sigma) == 200
        assert (found.sigma[0][0], found.sigma[-1][0]) == (1, 9000)

    def test_without_noise_there_is_no_strength(self, make_job: Make) -> None:
        assert curves_of(make_job(sigma=0.0), made_up_state(), 8).sigma == []

    @pytest.mark.parametrize(
        ("evaluation", "is_marked"),
        [({"keep": "best"}, True), ({"patience": 2}, True), ({}, False)],
    )
    def test_the_best_is_marked_where_it_matters(
        self, make_job: Make, evaluation: dict[str, Any], is_marked: bool
    ) -> None:
        state = made_up_state()
        state.held_out[1]["loss"] = 1.5
        job = replace(make_job(), evaluation=Evaluation(**evaluation))
        assert curves_of(job, state, 8).best == ((4, 1.5) if is_marked else None)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (2e-4, "2e-4"),
        (1.5e-5, "1.5e-5"),
        (0.05, "0.05"),
        (12000, "12,000"),
        (4.5e8, "4.5e8"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize("span", [1e-7, 0.05, 0.3, 1, 7, 12_345, 3e9])
def test_ticks_are_round_and_neither_few_nor_many(span: float) -> None:
    step = tick_step(span, 6)
    assert f"{step:.0e}"[0] in "125"
    assert 3 <= len(multiples(step, 0, span)) <= 7
