"""The search on figures that are made up: what is tried, what may be chosen, and what is on the front."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from ldm_export.errors import InputError
from ldm_export.tune.candidates import Choice, Configuration, Space
from ldm_export.tune.search import Budget, Found, Point, Search, foretold_figures, on_front, why_not
from ldm_export.verify.fidelity import KINDS
from ldm_export.verify.gates import Gate, gate_from_text
from ldm_export.verify.metrics import psnr

TRUTH = Configuration("ddim", 50)
PLANS = [Choice("plan", f"{steps} steps", {"sampler": "ddim", "steps": steps}) for steps in (20, 10, 5)]
INT8 = Choice("int8 decoder", "int8 decoder", {"passes": ("int8 decoder",)})
TARGET = Choice("run by", "target ort-cpu", {"target": True}, exact=True)
NOISE = {20: 1e-4, 10: 1e-3, 5: 1e-2}
"""Mean squared errors of plans, of pixels up to 1: 40, 30 and 20 dB."""


def decibels(noise: float) -> float:
    return -10 * math.log10(noise) if noise else 100.0


def noise_of(configuration: Configuration) -> float:
    return NOISE.get(configuration.steps, 0.0) + 2e-4 * bool(configuration.passes)


class Figures:
    """Stands in for Measure: a picture takes as long as its steps, a fifth less with the target, a tenth with int8.

    ``held_out`` is by how many dB pictures of the second half are worse, by configuration.
    """

    def __init__(self, held_out: Callable[[Configuration], float] = lambda configuration: 0.0):
        self.held_out, self.asked = held_out, []  # type: ignore[var-annotated]

    def made(self, configuration: Configuration) -> dict[str, Any]:
        if "half precision" in configuration.passes:
            return {"failed": "half is not for this model"}
        return {"bytes": 60 if configuration.passes else 100, "calls": configuration.steps}

    def latency(self, configuration: Configuration, beside: Configuration) -> dict[str, Any]:
        return {"ms": self.ms(configuration), "faster": self.ms(beside) / self.ms(configuration)}

    @staticmethod
    def ms(configuration: Configuration) -> float:
        if configuration.bundle:
            return 1.0
        return configuration.steps * (0.8 if configuration.target else 1.0) * (0.9 if configuration.passes else 1.0)

    def quality(self, configuration: Configuration, half: Any) -> dict[str, Any]:
        self.asked.append((half, configuration))
        value = 12.0 if configuration.bundle else decibels(noise_of(configuration))
        value -= self.held_out(configuration) if half == "held out" else 0.0
        if math.isnan(value):
            return {"failed": "the latents are no finite numbers"}
        figure = {"value": value, "low": value - 3, "high": value + 3}
        ratio = {"value": 1.0 + noise_of(configuration) * 100, "low": 0.0, "high": 9.0}
        return {"figures": {"psnr_db": figure, "frechet_ratio": ratio}, "png": ["AAAA"]}

    def memory(self, configuration: Configuration) -> dict[str, Any]:
        return {"peak_rss_bytes": 300_000_000 if configuration.target else 200_000_000}


def searched(
    *budgets: str,
    measure: Figures | None = None,
    choices: tuple[Choice, ...] = (TARGET, *PLANS, INT8),
    goal: str = "fastest",
    others: tuple[Configuration, ...] = (),
    judged: bool = True,
    fit: Callable[[int], tuple[str, int]] = lambda calls: ("fitted", calls),
) -> Found:
    budget = Budget(tuple(gate_from_text(text, KINDS, "--budget") for text in budgets), goal)
    halves: Any = ("tuning", "held out") if judged else None
    given: Any = measure or Figures()
    space = Space(choices, {})
    return Search(given, space, TRUTH, others, budget, halves, fit, lambda what, done, of: None).run()


def named(found: Found) -> dict[tuple[str, ...], Point]:
    return {point.choices: point for point in found.points}


# --- what is chosen -------------------------------------------------------------------------------------------------


def test_the_fastest_combination_within_the_budget() -> None:
    chosen = searched("psnr=29").chosen
    assert chosen.choices == ("target ort-cpu", "10 steps", "int8 decoder")
    assert chosen.configuration == Configuration("ddim", 10, ("int8 decoder",), target=True)
    assert chosen.faster == pytest.approx(50 / (10 * 0.8 * 0.9))
    assert chosen.why == []


@pytest.mark.parametrize(("limit", "steps"), [(35.5, 20), (30.1, 20), (29.9, 10), (19.0, 5)])
def test_a_budget_is_kept_and_used(limit: float, steps: int) -> None:
    chosen = searched(f"psnr={limit}", choices=(TARGET, *PLANS)).chosen
    assert chosen.configuration.steps == steps
    assert chosen.held_out["psnr_db"]["value"] >= limit


def test_every_budget_is_to_be_kept() -> None:
    assert searched("psnr=19", choices=tuple(PLANS)).chosen.configuration.steps == 5
    assert searched("psnr=19", "frechet_ratio=1.05", choices=tuple(PLANS)).chosen.configuration.steps == 20
    assert searched("psnr=19", "latency_ms=7", choices=tuple(PLANS)).chosen.configuration.steps == 5
    assert searched("psnr=29", "latency_ms=7", choices=tuple(PLANS)).chosen.configuration == TRUTH


def test_what_breaks_the_budget_on_held_out_pictures_alone_is_not_chosen() -> None:
    overfits = Figures(lambda configuration: 15.0 if configuration.steps == 10 else 0.0)
    found = searched("psnr=29", measure=overfits)
    assert found.chosen.configuration.steps == 20
    point = named(found)["target ort-cpu", "10 steps"]
    assert point.tuning["psnr_db"]["value"] == pytest.approx(30.0)
    assert point.why == ["the median PSNR of ddim, 10 steps + target ort-cpu is 15 dB; at least 29 dB is asked for"]
    assert why_not(point, found.chosen) == point.why[0]


def test_nothing_is_chosen_by_held_out_pictures() -> None:
    """They are drawn when the search is over."""
    measure = Figures()
    searched("psnr=29", measure=measure)
    halves = [half for half, _ in measure.asked]
    assert halves == sorted(halves, reverse=True)
    assert {"tuning", "held out"} == {*halves}


def test_where_nothing_keeps_it_the_untouched_bundle_is_the_result() -> None:
    found = searched("psnr=99", choices=tuple(PLANS))
    assert found.chosen is found.points[0]
    assert (found.chosen.name, found.chosen.why) == ("untouched", [])
    assert all(point.why for point in found.points[1:])


def test_not_even_the_untouched_bundle() -> None:
    found = searched("psnr=30", "latency_ms=2")
    assert found.chosen is found.points[0]
    assert found.chosen.why == ["a picture of untouched takes 50 ms; at most 2 ms is asked for"]


def test_pictures_that_are_no_numbers_are_never_chosen() -> None:
    found = searched("psnr=10", measure=Figures(lambda configuration: math.nan if configuration.steps == 5 else 0.0))
    assert found.chosen.configuration.steps == 10
    assert any(point.failed == "the latents are no finite numbers" for point in found.points)


def test_memory_excludes() -> None:
    found = searched("psnr=29", "memory_mb=250")
    assert not found.chosen.configuration.target
    assert found.chosen.memory_mb == 200.0


def test_memory_that_is_not_known_is_beyond_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Figures, "memory", lambda self, configuration: {"peak_rss_bytes": None})
    assert searched("psnr=29").chosen.configuration.steps == 10
    assert searched("psnr=29", "memory_mb=250").chosen.name == "untouched"


def test_the_smallest() -> None:
    chosen = searched("psnr=35", goal="smallest").chosen
    assert (chosen.bytes, chosen.configuration.passes) == (60, ("int8 decoder",))
    assert searched("psnr=39", goal="smallest").chosen.bytes == 100


def test_another_bundle_is_judged_by_the_same_truth() -> None:
    student = Configuration("lcm", 4, bundle="student.bundle")
    found = searched("psnr=35", others=(student,))
    assert found.chosen.configuration.bundle == ""
    assert "is 12 dB; at least 35 dB is asked for" in why_not(found.points[-1], found.chosen) or any(
        "is 12 dB" in why_not(point, found.chosen) for point in found.points
    )
    assert searched("frechet_ratio=1.05", others=(student,)).chosen.configuration is student


# --- how it is searched ---------------------------------------------------------------------------------------------


def test_without_pictures_only_what_is_exact_is_chosen() -> None:
    measure = Figures()
    found = searched(measure=measure, judged=False)
    assert found.chosen.choices == ("target ort-cpu",)
    assert measure.asked == []
    assert {point.choices[-1] for point in found.points[1:]} == {"target ort-cpu", "int8 decoder"} | {
        choice.name for choice in PLANS
    }


def test_what_cannot_be_made_says_why() -> None:
    half = Choice("stored weights", "half precision", {"passes": ("half precision",)})
    found = searched("psnr=29", choices=(half, *PLANS))
    assert named(found)["half precision",].failed == "half is not for this model"
    assert found.chosen.configuration.steps == 10


def test_a_fitted_plan_is_a_choice() -> None:
    fitted = Choice("plan", "fitted plan of 5 calls", {}, fitted=5)
    chosen = searched("psnr=19", choices=(fitted,)).chosen
    assert (chosen.configuration.sampler, chosen.configuration.steps) == ("fitted", 5)

    def refuse(calls: int) -> tuple[str, int]:
        raise InputError("The plan adds noise.")

    found = searched("psnr=19", choices=(fitted,), fit=refuse)
    assert found.left_out == {"fitted plan of 5 calls": "The plan adds noise."}


def test_foretold_decibels_are_those_of_noise_that_adds_up() -> None:
    generator = np.random.default_rng(0)
    truth = np.full((8, 64, 64, 3), 128, np.uint8)
    noises = [generator.normal(0, deviation, truth.shape) for deviation in (6.0, 9.0)]
    values = [psnr(np.uint8(np.rint(128 + noise)), truth) for noise in (*noises, sum(noises))]
    alone = [{"psnr_db": {"value": float(np.median(value))}} for value in values]
    found = foretold_figures({"psnr_db": {"value": 100.0}}, alone[:2])
    assert found["psnr_db"]["value"] == pytest.approx(alone[2]["psnr_db"]["value"], abs=0.1)


def test_foretold_differences_add_up() -> None:
    base: Mapping[str, Mapping[str, float]] = {"frechet_ratio": {"value": 1.0}, "psnr_db": {"value": 100.0}}
    changed = [{"frechet_ratio": {"value": value}, "psnr_db": {"value": 100.0}} for value in (1.02, 0.99)]
    found = foretold_figures(base, changed)
    assert found["frechet_ratio"]["value"] == pytest.approx(1.01)
    assert found["psnr_db"]["value"] == 100.0


# --- the front ------------------------------------------------------------------------------------------------------


def test_the_front_is_of_points_that_no_other_beats() -> None:
    budget = Budget((Gate("psnr", 30.0),), "fastest")
    values = {"a": (1.0, 50.0), "b": (2.0, 40.0), "c": (1.5, 39.0), "d": (4.0, 20.0), "e": (2.0, 40.0)}
    points = [
        Point(name, dataclasses.replace(TRUTH, sampler=name), faster=faster, tuning={"psnr_db": {"value": value}})
        for name, (faster, value) in values.items()
    ]
    front = on_front(points, budget, lambda point: point.tuning)
    assert [point.name for point in front] == ["d", "b", "e", "a"]


def test_the_front_holds_what_breaks_the_budget_too() -> None:
    found = searched("psnr=29")
    front = [point for point in found.points if point.on_front]
    assert len(front) > 2
    assert any(point.why for point in front)
    assert found.chosen.on_front
    assert all(point.held_out and point.png for point in front)
