"""Forecast plans: steps whose network output is extrapolated instead of computed, folded into rows of one call each.

A step without a network call takes for its output the polynomial through the last outputs, of degree ``order``, at its
own timestep t (TaylorSeer, 2503.06923, forecasts features inside a network so; here it is the network's output):

    out(t) = sum_k share_k * out_k        share_k = prod_{j != k} (t - t_j) / (t_k - t_j)

That is linear in earlier outputs, so such steps fold into the row of the call before them: a forecast plan is a plan of
fewer rows than steps, and runs wherever a plan does. What is extrapolated is what the sampler's rows remember, so that
a folded row has all it needs in what the table remembers; the output itself, where they remember nothing; and the
predicted x0, where they then add noise, which an output follows and x0 does not.

The shares add up to 1, and what they multiply by, the sum of their magnitudes, is the condition number of the forecast:
it grows with the order and with the gap between calls, and is bounded, since latents are float32.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np

from ldm_export.errors import InputError
from ldm_export.plan.schedule import Vector
from ldm_export.plan.table import MAX_HISTORY, Entries, Entry, Plan, Row

Form = tuple[float, float]
"""Coefficients of x and of the network's output."""

OUTPUT: Form = (0.0, 1.0)
CALLS = "-calls"
"""What stands between a sampler and a number of calls in the name of a forecast plan's sampler."""
MOST_ORDER = 3
MOST_LEAD = 3
"""Calls that are made without a gap at the start, however many there are: outputs change most there."""
LARGEST_CONDITION = 1e3
"""Largest condition number of a forecast: it costs float32 three of its seven digits."""


@dataclass(frozen=True)
class Forecast:
    """Choice of the network calls of a plan that are made; the outputs between them are extrapolated.

    Attributes
    ----------
    calls : how many, at least 1
    order : degree of the polynomial, 0 to 3; 0 repeats the last output
    at : which calls of the whole plan are made, ascending numbers from 0 on; by default `spaced_calls`
    """

    calls: int
    order: int = 1
    at: tuple[int, ...] = ()

    def numbers(self, rows: int) -> tuple[int, ...]:
        """Numbers of the calls that are made, of a plan of so many rows.

        Raises
        ------
        InputError
            If there are not so many calls, or ``at`` is no ascending choice of them from the first on.
        """
        if not 0 <= self.order <= MOST_ORDER:
            raise InputError(f"order is {self.order}; a forecast is of order 0 to {MOST_ORDER}. 1 is the default.")
        if not 1 <= self.calls <= rows:
            raise InputError(
                f"calls is {self.calls}; the plan makes {rows}, of which 1 to {rows} can be kept. Choose one of those."
            )
        chosen = self.at or spaced_calls(rows, self.calls)
        if chosen[0] != 0 or chosen[-1] >= rows or any(b <= a for a, b in itertools.pairwise(chosen)):
            raise InputError(
                f"the calls {', '.join(map(str, chosen))} were asked for; they are ascending numbers from 0, which is "
                f"always one, to {rows - 1}. Choose others."
            )
        return chosen


def forecast_of(name: str) -> tuple[str, Forecast | None]:
    """The sampler and the forecast that a name stands for: ``ddim-calls16`` is ``ddim`` with 16 calls."""
    sampler, mark, calls = name.rpartition(CALLS)
    if not (sampler and mark and calls.isascii() and calls.isdigit() and len(calls) < 8):
        return name, None
    return sampler, Forecast(int(calls))


def spaced_calls(rows: int, calls: int) -> tuple[int, ...]:
    """Numbers of ``calls`` rows out of ``rows``: the first third, at most `MOST_LEAD`, the last, and evenly between."""
    first = max(1, min(MOST_LEAD, calls // 3))
    return (*range(first - 1), *(round(at) for at in np.linspace(first - 1, rows - 1, calls - first + 1).tolist()))


def forecast_plan(plan: Plan, forecast: Forecast, denoised: Sequence[Form]) -> Plan:
    """The plan with only some of its network calls, of the same steps.

    An entry from an image makes its first calls without a gap, as many as the whole does and at most `MOST_LEAD`, and
    then the same calls.

    Parameters
    ----------
    denoised : what gives the predicted x0 at each row, if the sampler adds noise

    Raises
    ------
    InputError
        If it cannot be folded: the message says why, and what can be.
    """
    rows, made = plan.rows, forecast.numbers(len(plan.rows))
    if len(made) == len(rows):
        return plan
    lead = next((k for k, at in enumerate(made[:MOST_LEAD]) if k != at), min(len(made), MOST_LEAD))
    folded = fold(rows, denoised, frozenset(made), forecast.order)

    def entry(step: int) -> Entry:
        whole, entry = plan.starting_at(step).rows, plan.entries[step]
        before = len(rows) - len(whole)  # counted from the end, since a solver that starts anew may do a step twice
        own = {at - before for at in made if at >= before} | set(range(min(lead, len(whole))))
        ours = fold(whole, denoised[max(before, 0) :], own, forecast.order)
        same = 0
        while same < min(len(ours), len(folded)) and _alike(ours[-1 - same], folded[-1 - same]):
            same += 1
        return Entry(entry.image_scale, entry.noise_scale, ours[: len(ours) - same], len(folded) - same)

    return Plan(
        sampler=f"{plan.sampler}{CALLS}{len(made)}",
        num_inference_steps=plan.num_inference_steps,
        init_scale=plan.init_scale,
        rows=folded,
        entries=Entries(plan.num_inference_steps, entry),
        tokens=plan.tokens,
    )


def fold(rows: Sequence[Row], denoised: Sequence[Form], made: Set[int], order: int) -> tuple[Row, ...]:
    """Rows of one call each that do what ``rows`` do when only the calls ``made`` are.

    Values are coordinates over x at the last call, the output there, the noise of each step, and what each call's row
    remembers.

    Parameters
    ----------
    denoised : what gives the predicted x0 at each row, if rows that remember nothing add noise
    made : numbers of the rows that call the network, 0 among them

    Raises
    ------
    InputError
        If a row would need what the table does not remember, or a forecast is too far.
    """
    noises, memories = 2, 2 + len(rows)  # the first coordinate of each

    def axis(number: int) -> Vector:
        value = np.zeros(2 + len(rows) + len(made))
        value[number] = 1.0
        return value

    x, output, folded = axis(0), axis(1), list[Row]()
    known: dict[float, Vector] = {}  # what is extrapolated, by timestep, the newest last
    remembered: list[Vector] = []  # by the rows before they are folded, the newest first
    for number, row in enumerate(rows):
        form = _form(row, denoised[number] if denoised else OUTPUT)
        if number in made:
            value, output, x = axis(memories + len(folded)), axis(1), axis(0)
            known.pop(row.timestep, None)
            known = dict([*known.items(), (row.timestep, value)][-MOST_ORDER - 1 :])
            called = row, form
        else:
            value = _extrapolated(known, row.timestep, order)
            output = (value - form[0] * x) / form[1]
        remembered = [value, *remembered[: MAX_HISTORY - 1]]
        x = row.keep * x + row.direct * output
        x[noises + number] += row.noise
        for weight, h in zip(row.weights, remembered, strict=False):
            x = x + weight * h
        if number + 1 in made or number + 1 == len(rows):
            folded.append(_folded(*called, x, len(rows), len(folded)))
    return tuple(folded)


def _form(row: Row, otherwise: Form) -> Form:
    """What of x and of the output is extrapolated at a row: what it remembers, if anything."""
    return (row.from_sample, row.from_output) if row.weights else otherwise


def _folded(called: Row, form: Form, x: Vector, steps: int, number: int) -> Row:
    """The row of call ``number`` after which x is where these coordinates say."""
    weights = np.trim_zeros(x[2 + steps : 3 + steps + number][::-1], "b")  # newest first
    if len(weights) > MAX_HISTORY:
        raise InputError(
            f"call {number + 1} of this forecast needs what was remembered {len(weights) - 1} calls before; a row "
            f"remembers {MAX_HISTORY - 1}. Lower the order, make more calls, or use a sampler that remembers less."
        )
    return Row(
        called.timestep,
        called.input_scale,
        *form,
        clip=called.clip,
        keep=float(x[0]),
        direct=float(x[1]),
        weights=tuple(weights.tolist()),
        noise=math.hypot(*x[2 : 2 + steps].tolist()),
    )


def _extrapolated(known: Mapping[float, Vector], timestep: float, order: int) -> Vector:
    """The polynomial through the newest known values at a timestep (the module's docstring)."""
    newest = list(known.items())[-order - 1 :]
    shares = [math.prod((timestep - s) / (t - s) for s, _ in newest if s != t) for t, _ in newest]
    if not sum(map(abs, shares)) <= LARGEST_CONDITION:
        raise InputError(
            f"a forecast of order {order} at timestep {timestep:g} from {', '.join(f'{t:g}' for t, _ in newest)} has "
            f"condition number {sum(map(abs, shares)):.2g}; at most {LARGEST_CONDITION:g} is allowed. Lower the order, "
            "or make more calls."
        )
    return np.asarray(np.array(shares) @ np.stack([value for _, value in newest]))


def _alike(a: Row, b: Row) -> bool:
    """Whether two rows do the same, but for the rounding of how they came about."""
    ours, theirs = (
        (row.timestep, row.input_scale, row.from_sample, row.from_output, row.clip, row.keep, row.direct, row.noise,
         *row.weights) for row in (a, b)
    )  # fmt: skip
    return len(ours) == len(theirs) and bool(np.allclose(ours, theirs, rtol=1e-9, atol=1e-12))
