"""The search: what is tried in which order, and what may be chosen.

1. *Free choices.* What changes pictures by rounding alone (the target, another library, threads) is timed in turn with
   the untouched bundle, axis after axis; the fastest becomes the base of all that follows.
2. *Each choice alone.* Every other choice is made on the base, timed in turn with the base, and judged on the tuning
   half of the pictures.
3. *Combinations.* Choices that keep the budget alone and save something are combined, one an axis. Of a combination
   time and bytes are foretold by the product of what its choices save, and each figure by what its choices lose:
   decibels by the sum of their noise, others by the sum of their differences from the truth. Of those that are foretold
   to keep the budget the cheapest is made, timed and judged first; the search ends when none that is left is foretold
   to be cheaper than the best that has kept it, or after :data:`MOST_COMBINATIONS`. Foretelling only orders the tries:
   what it leaves out may be a combination whose parts mend one another, which the search does not find.
4. *The held-out half.* What has kept the budget, the cheapest first, is judged on pictures of prompts, and of seeds,
   that nothing was chosen or calibrated by, its memory is measured in a process of its own, and it is timed in turn
   with the untouched bundle. Only what keeps every budget there may be chosen, and it is the value itself that has to:
   an interval is shown, and not asked for. The first :data:`FINALISTS` that do are compared by that timing, and the
   cheapest is the result; where there is none, the untouched bundle is.

The Pareto front is of all that was judged on the held-out half, which besides those is the front of the tuning half: a
point is on it if no other is at least as cheap and as good in every figure that a budget asks for, and better in one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ldm_export.bench.formatting import milliseconds
from ldm_export.errors import InputError, NumericalError
from ldm_export.recipe.score import FASTER
from ldm_export.tune.candidates import Choice, Configuration, Space, words_for
from ldm_export.tune.measure import Measure, Pictures, Record
from ldm_export.verify.fidelity import KINDS
from ldm_export.verify.gates import Gate
from ldm_export.verify.metrics import Figure

MOST_COMBINATIONS = 16
FINALISTS = 3
MOST_ON_FRONT = 12
"""Points of the tuning half's front that are judged on the held-out half."""
IDENTICAL_DB = 100.0
MACHINE = ("latency_ms", "memory_mb")
"""Budgets that are of the machine, and not of the pictures."""
DECIBELS = ("psnr_db", "psnr_worst_db")

Figures = Mapping[str, Mapping[str, float]]
Progress = Callable[[str, int, int], None]


@dataclass
class Point:
    """A configuration and what was found of it.

    Attributes
    ----------
    name : for people
    choices : names of what was done, of those that the search did
    faster : how many times as fast as the untouched bundle, by the product of ratios that were timed in turn
    tuning, held_out : figures of the two halves; empty where it was not judged
    why : why it cannot be chosen, sentences; empty for what can be
    """

    name: str
    configuration: Configuration
    choices: tuple[str, ...] = ()
    failed: str = ""
    bytes: int = 0
    calls: int = 0
    ms: float = 0.0
    faster: float = 0.0
    memory_mb: float | None = None
    tuning: dict[str, dict[str, float]] = field(default_factory=dict)
    held_out: dict[str, dict[str, float]] = field(default_factory=dict)
    png: list[str] = field(default_factory=list)
    why: list[str] = field(default_factory=list)
    on_front: bool = False
    chosen: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Tried = tuple[Choice, Point]
"""A choice, and the base with it alone."""


@dataclass(frozen=True)
class Budget:
    """What is asked for: limits, and what is made least, ``fastest`` or ``smallest``."""

    gates: tuple[Gate, ...]
    goal: str

    @property
    def figures(self) -> list[str]:
        """Figures of pictures that are asked for; decibels where none is."""
        asked = [KINDS[gate.key].figure for gate in self.gates if gate.key not in MACHINE]
        return list(dict.fromkeys(asked)) or ["psnr_db"]

    def cost(self, point: Point) -> tuple[float, float]:
        """What is to be least, and then the other."""
        spent = 1.0 / point.faster if point.faster > 0 else math.inf
        return (spent, point.bytes) if self.goal == "fastest" else (point.bytes, spent)

    def broken(self, figures: Figures, name: str) -> list[str]:
        """What pictures with these figures fall short of, a sentence each."""
        judged = [
            gate.judged(KINDS[gate.key], figures[KINDS[gate.key].figure]["value"], row=name)
            for gate in self.gates
            if gate.key not in MACHINE
        ]
        return [str(each["says"]) for each in judged if not each["passed"]]

    def too_dear(self, point: Point) -> list[str]:
        """What the machine needs for a point beyond what is allowed, a sentence each; what is unknown is beyond."""
        values = {"latency_ms": point.ms, "memory_mb": math.nan if point.memory_mb is None else point.memory_mb}
        judged = [
            gate.judged(KINDS[gate.key], values[gate.key], row=point.name) for gate in self.gates if gate.key in MACHINE
        ]
        return [str(each["says"]) for each in judged if not each["passed"]]


@dataclass(frozen=True)
class Found:
    """What a search came to: every point, the first of the untouched bundle; the chosen one; and what was not tried ->
    why."""

    points: list[Point]
    chosen: Point
    left_out: Mapping[str, str]
    judged: bool


class Search:
    """Searches a space.

    Parameters
    ----------
    others : other bundles of the same prompts, judged as they stand
    fit : makes a plan of so many network calls and gives its sampler and steps
    halves : tuning and held-out; None where nothing is judged, and then only free choices are chosen
    """

    def __init__(
        self,
        measure: Measure,
        space: Space,
        truth: Configuration,
        others: Sequence[Configuration],
        budget: Budget,
        halves: tuple[Pictures, Pictures] | None,
        fit: Callable[[int], tuple[str, int]],
        progress: Progress,
    ):
        self._measure, self._space, self._truth, self._others = measure, space, truth, others
        self._budget, self._halves, self._fit, self._progress = budget, halves, fit, progress
        self._points: dict[Configuration, Point] = {}
        self.left_out = dict(space.left_out)
        """What was not tried -> why."""

    def run(self) -> Found:
        untouched = self._point(self._truth, ())
        made, timed = self._measure.made(self._truth), self._measure.latency(self._truth, self._truth)
        if failed := made.get("failed") or timed.get("failed"):
            raise InputError(f"The untouched bundle could not be measured: {failed}")
        untouched.bytes, untouched.calls = made["bytes"], made["calls"]
        untouched.faster, untouched.ms = 1.0, timed["ms"]
        if self._halves is not None:
            self._judge(untouched)
        base = self._free(untouched)
        alone = self._alone(base)
        if self._halves is None:
            base.chosen = True
            return Found([*self._points.values()], base, self.left_out, judged=False)
        for number, other in enumerate(self._others):
            self._progress(f"{other.bundle}", number, len(self._others))
            self._try(other, (), base)
        self._combined(base, alone)
        chosen = self._chosen(untouched)
        return Found([*self._points.values()], chosen, self.left_out, judged=True)

    # --- stages -----------------------------------------------------------------------------------------------------

    def _free(self, untouched: Point) -> Point:
        best = untouched
        axes = dict.fromkeys(choice.axis for choice in self._space.choices if choice.exact)
        for axis in axes:
            start = best
            choices = [choice for choice in self._space.choices if choice.exact and choice.axis == axis]
            for number, choice in enumerate(choices):
                self._progress(f"free: {choice.name}", number, len(choices))
                point = self._try(choice.applied(start.configuration), (*start.choices, choice.name), untouched)
                if not point.failed and not point.why and point.faster * FASTER > best.faster:
                    best = point
        return best

    def _alone(self, base: Point) -> list[Tried]:
        choices = [choice for choice in self._space.choices if not choice.exact]
        found = []
        for number, choice in enumerate(choices):
            self._progress(f"alone: {choice.name}", number, len(choices))
            if choice.fitted:
                try:
                    sampler, steps = self._fit(choice.fitted)
                except (InputError, NumericalError) as error:
                    self.left_out[choice.name] = str(error)
                    continue
                choice = replace(choice, fields={"sampler": sampler, "steps": steps}, fitted=0)
            names = (*base.choices, choice.name)
            found.append((choice, self._try(choice.applied(base.configuration), names, base)))
        return found

    def _combined(self, base: Point, alone: Sequence[Tried]) -> None:
        useful = [each for each in alone if not each[1].failed and not each[1].why and self._saves(each[1], base)]
        for tried, (foretold, choices) in enumerate(self._foretold(base, useful)):
            if tried == MOST_COMBINATIONS or foretold >= self._best(base):
                return
            configuration = base.configuration
            for choice in choices:
                configuration = choice.applied(configuration)
            names = (*base.choices, *(choice.name for choice in choices))
            self._progress(f"together: {', '.join(names)}", tried, MOST_COMBINATIONS)
            self._try(configuration, names, base)

    def _chosen(self, untouched: Point) -> Point:
        """Judge on the held-out half, and choose."""
        within = sorted((p for p in self._points.values() if not p.failed and not p.why), key=self._budget.cost)
        outside = [p for p in self._points.values() if not p.failed and p.why and p.tuning]
        front = on_front([*within, *outside], self._budget, lambda point: point.tuning)[:MOST_ON_FRONT]
        self._progress(f"held out: {untouched.name}", 0, len(front))
        self._hold_out(untouched, untouched)
        kept = 0
        for number, point in enumerate([*within, *front]):
            if point.held_out or (point not in front and kept >= FINALISTS):
                continue
            self._progress(f"held out: {point.name}", number, len(within) + len(front))
            self._hold_out(point, untouched)
            kept += not point.why
        finalists = [point for point in within if point.held_out and not point.why]
        cheaper = [point for point in finalists if self._budget.cost(point) < self._budget.cost(untouched)]
        chosen = min(cheaper, key=self._budget.cost, default=untouched)
        chosen.chosen = True
        for point in on_front(
            [p for p in self._points.values() if p.held_out], self._budget, lambda point: point.held_out
        ):
            point.on_front = True
        return chosen

    # --- points -----------------------------------------------------------------------------------------------------

    def _point(self, configuration: Configuration, choices: tuple[str, ...]) -> Point:
        if configuration not in self._points:
            self._points[configuration] = Point(words_for(configuration, self._truth), configuration, choices)
        return self._points[configuration]

    def _try(self, configuration: Configuration, choices: tuple[str, ...], beside: Point) -> Point:
        """Make, time and judge a configuration."""
        if configuration in self._points:
            return self._points[configuration]
        point = self._point(configuration, choices)
        made = self._measure.made(configuration)
        timed = made if "failed" in made else self._measure.latency(configuration, beside.configuration)
        if "failed" in timed:
            point.failed = timed["failed"]
            return point
        point.bytes, point.calls = made["bytes"], made["calls"]
        point.ms, point.faster = timed["ms"], timed["faster"] * beside.faster
        if self._halves is not None:
            self._judge(point)
        return point

    def _judge(self, point: Point) -> None:
        assert self._halves is not None
        found = self._measure.quality(point.configuration, self._halves[0])
        point.tuning = self._figures(point, found)
        if point.tuning:
            point.why = self._budget.broken(point.tuning, point.name)

    def _hold_out(self, point: Point, untouched: Point) -> None:
        assert self._halves is not None
        found = self._measure.quality(point.configuration, self._halves[1])
        point.held_out, point.png = self._figures(point, found), found.get("png", [])
        if not point.held_out:
            return
        if point is not untouched:
            timed = self._measure.latency(point.configuration, self._truth)
            point.ms, point.faster = timed["ms"], timed["faster"]
        needs = self._measure.memory(point.configuration).get("peak_rss_bytes")
        point.memory_mb = None if needs is None else needs / 1e6
        point.why = [*self._budget.broken(point.held_out, point.name), *self._budget.too_dear(point)]

    @staticmethod
    def _figures(point: Point, found: Record) -> dict[str, dict[str, float]]:
        if "failed" in found:  # pictures of no finite numbers, for instance
            point.failed = found["failed"]
            point.why = [found["failed"]]
            return {}
        figures: dict[str, dict[str, float]] = found["figures"]
        return figures

    # --- combinations -----------------------------------------------------------------------------------------------

    def _saves(self, point: Point, base: Point) -> bool:
        ours, theirs = self._budget.cost(point)[0], self._budget.cost(base)[0]
        return ours < theirs * FASTER

    def _best(self, base: Point) -> float:
        kept = [point for point in self._points.values() if not point.failed and not point.why]
        return min(self._budget.cost(point)[0] for point in (base, *kept))

    def _foretold(self, base: Point, useful: Sequence[Tried]) -> Iterator[tuple[float, tuple[Choice, ...]]]:
        """Combinations of two and more that are foretold to keep the budget, with their foretold cost, cheapest first.

        They are foretold by what is alone, and not anew by what was measured of other combinations meanwhile.
        """
        axes: dict[str, list[Tried | None]] = {}
        for tried in useful:
            axes.setdefault(tried[0].axis, [None]).append(tried)
        start = self._budget.cost(base)[0]
        found = []
        for picked in itertools.product(*axes.values()):
            tried_ones = [each for each in picked if each is not None]
            if len(tried_ones) < 2:
                continue
            figures = foretold_figures(base.tuning, [point.tuning for _, point in tried_ones])
            if self._budget.broken(figures, ""):
                continue
            cost = start * math.prod(self._budget.cost(point)[0] / start for _, point in tried_ones)
            found.append((cost, tuple(choice for choice, _ in tried_ones)))
        yield from sorted(found, key=lambda each: each[0])


def foretold_figures(base: Figures, changed: Sequence[Figures]) -> dict[str, dict[str, float]]:
    """Values of what several changes together come to, from those of each alone, all compared with one truth."""
    found = {}
    for name in base:
        values = [figures[name]["value"] for figures in changed]
        if name in DECIBELS:
            noise = sum(10 ** (-value / 10) for value in values if value < IDENTICAL_DB)
            value = -10 * math.log10(noise) if noise else IDENTICAL_DB
        else:
            value = base[name]["value"] + sum(value - base[name]["value"] for value in values)
        found[name] = Figure(value, value, value)._asdict()
    return found


def on_front(points: Sequence[Point], budget: Budget, figures_of: Callable[[Point], Figures]) -> list[Point]:
    """The points that no other is at least as cheap and as good as, and better in one of the two; cheapest first."""
    kinds = {kind.figure: kind for kind in KINDS.values()}

    def losses(point: Point) -> list[float]:
        values = [(name, figures_of(point)[name]["value"]) for name in budget.figures]
        return [budget.cost(point)[0], *(-value if kinds[name].at_least else value for name, value in values)]

    all_losses = [losses(point) for point in points]

    def dominated(ours: list[float]) -> bool:
        return any(theirs != ours and all(a <= b for a, b in zip(theirs, ours, strict=True)) for theirs in all_losses)

    front = [point for point, ours in zip(points, all_losses, strict=True) if not dominated(ours)]
    return sorted(front, key=budget.cost)


def why_not(point: Point, chosen: Point) -> str:
    """Why a point was not chosen, a sentence."""
    if point.failed:
        return point.failed
    if point.why:
        return "; ".join(point.why)
    if not point.held_out:
        return "it kept the budget, and others that did are foretold or timed to be cheaper"
    return f"it keeps the budget, at {milliseconds(point.ms)} ms; the chosen one takes {milliseconds(chosen.ms)} ms"
