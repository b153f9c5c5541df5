"""Fitted plans: few network calls whose timesteps and scalars are those that fit a model's own trajectories.

    x_j  ~  keep * x_i + direct * out_i + sum_k weight_k * out_(k calls before)

A teacher plan of many steps is run on calibration prompts. From its trajectories the calls are chosen
(`ldm_export.tune.timesteps`); then row after row is the least squares fit of the teacher's latents to what the fitted
plan itself has come to, so that a row also mends what the rows before it left. Nothing is trained, and the result is a
plan like any other. It is judged on prompts that it has not seen, beside the textbook samplers at as many calls.

Of what is known: DPM-Solver-v3 (2310.13268) computes coefficients from statistics of the model and keeps the form of an
exponential integrator; AYS (2404.14507) and GITS (2409.18114) choose timesteps for a given solver; bespoke solvers
(2310.19075) and LD3 (2405.15506) learn scalars or timesteps by gradients through the network, which a graph does not
give. Here both are fitted, in closed form, from outputs alone, so that any bundle will do, also one in int8.

A fit is for one guidance scale and one size of pictures: the trajectories are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm_export.bundle import Bundle
from ldm_export.bundle.plans import read_plan
from ldm_export.contract import NONE
from ldm_export.errors import InputError
from ldm_export.plan import MAX_HISTORY, Entry, Plan, Row, Trajectory
from ldm_export.reading.hashes import hash_of
from ldm_export.reading.options import check_least
from ldm_export.runtime import Pipeline
from ldm_export.runtime.graph import Array
from ldm_export.tune.timesteps import Matrix, choose_calls, inner_products, least_squares, regressors
from ldm_export.tune.trajectories import (
    Batch,
    Kept,
    Pictures,
    Progress,
    Trajectories,
    open_batches,
    sample_trajectories,
)
from ldm_export.verify.metrics import psnr

FITTED = "fitted"
TEXTBOOK = ("ddim", "euler", "dpmpp-2m", "unipc", "deis")
"""Samplers that a fit is compared with at as many calls, as far as the model's scheduler config has them."""
CALIBRATION_SEED, HELD_OUT_SEED = 1_000_000, 2_000_000
GAIN_PICTURES = 16
GAIN_AT = (0.08, 0.2, 0.34, 0.5, 0.68, 0.86)
"""Shares of the steps after which gains are measured."""
CHANGE = 1e-2
"""Root mean square of the change whose gain is measured, as a share of the latents'."""
BACK = 3
"""Calls between two outputs whose difference is the direction of that change: what a forecast would be wrong by."""


@dataclass(frozen=True)
class FitOptions:
    """Options of a fit.

    Attributes
    ----------
    calls : network calls of the fitted plan
    conditions : prompts, of which a third is held out; or classes; none for unconditional models
    sampler, teacher_steps : the plan that is followed; the bundle's own sampler by default
    guidance : the scale; the bundle's own by default
    pictures, held_out : how many are fitted to, and how many are judged
    """

    calls: int
    conditions: tuple[str | int, ...] = ()
    sampler: str | None = None
    teacher_steps: int = 50
    guidance: float | None = None
    pictures: int = 96
    held_out: int = 64

    def __post_init__(self) -> None:
        for name, least in (("calls", 1), ("teacher_steps", 2), ("pictures", 8), ("held_out", 8)):
            check_least(name, getattr(self, name), least)
        if self.calls >= self.teacher_steps:
            raise InputError(
                f"calls is {self.calls} and teacher_steps {self.teacher_steps}; a fitted plan has fewer calls than the "
                "plan that it follows has steps. Lower the first or raise the second."
            )

    def drawn(self) -> tuple[Pictures, Pictures]:
        """Pictures to fit to and to judge by: other prompts where there are enough, and always other seeds."""
        order = np.random.default_rng(0).permutation(len(self.conditions)).tolist()
        apart = len(order) // 3
        sets = (order[apart:], order[:apart]) if apart and isinstance(self.conditions[0], str) else (order, order)
        counts, seeds = (self.pictures, self.held_out), (CALIBRATION_SEED, HELD_OUT_SEED)
        ours, theirs = (
            Pictures(
                tuple(self.conditions[chosen[k % len(chosen)]] for k in range(count)) if chosen else (),
                tuple(range(seed, seed + count)),
                self.guidance,
            )
            for chosen, count, seed in zip(sets, counts, seeds, strict=True)
        )
        return ours, theirs


@dataclass(frozen=True)
class Fit:
    """A fitted plan.

    Attributes
    ----------
    report : how it was made and what it is worth: for this plan and for every textbook sampler of as many calls, the
        median and the worst PSNR of the held-out pictures to the teacher's, dB
    """

    plan: Plan
    report: dict[str, Any]

    @property
    def rivals(self) -> list[str]:
        """Names of the textbook samplers that are as good in the median or in the worst picture."""
        scores = self.report["psnr_db"]
        ours = scores[self.plan.sampler]
        others = ((name, score) for name, score in scores.items() if name != self.plan.sampler)
        return [name for name, score in others if score["median"] >= ours["median"] or score["worst"] >= ours["worst"]]

    @property
    def pays(self) -> bool:
        """Whether the fitted plan is better than every textbook sampler, in the median and in the worst picture."""
        return not self.rivals


def fit_plan(bundle: Bundle, options: FitOptions, work: Path, progress: Progress) -> Fit:
    """Fit a plan to a bundle's own trajectories.

    Parameters
    ----------
    work : where trajectories are kept; the same fit goes on there

    Raises
    ------
    InputError
        If the teacher's plan adds noise or makes two calls a step, or the prompts do not suit the model.
    """
    teacher, (ours, theirs) = _teacher(bundle, options), options.drawn()
    kept = Kept(work, hash_of(_hashes(bundle), teacher.to_json(), asdict(ours), asdict(theirs)))
    with Pipeline(bundle, "cpu") as pipeline:
        batches, judged = open_batches(pipeline, ours), open_batches(pipeline, theirs)
        found = sample_trajectories(batches, teacher.from_noise(), "calibration", kept, progress)
        truth = sample_trajectories(judged, teacher.from_noise(), "held-out", kept, progress)
        gains = kept.made("gains", lambda: {"gains": measured_gains(batches, teacher, found, progress)})["gains"]
        products = inner_products(found)
        calls = choose_calls(products, gains, options.calls)
        rows = fitted_rows(batches, teacher, found, calls, progress)
        guidance = None
        if bundle.roles.guidance.kind != NONE:
            guidance = bundle.roles.guidance.scale if options.guidance is None else options.guidance
        plan = Plan(
            sampler=FITTED if guidance is None else f"{FITTED}-guidance{guidance:g}",
            num_inference_steps=len(calls),
            init_scale=teacher.init_scale,
            rows=rows,
            entries=tuple(_entry(teacher, products, calls, number) for number in range(len(calls))),
            tokens=teacher.tokens,
        )
        images = _decoded(pipeline, judged, truth.latents[-1])
        plans = [plan, *_textbook(bundle, options.calls)]
        scores = {each.sampler: _score(pipeline, judged, each, images, progress) for each in plans}
    report = {
        "teacher": teacher.file_name.removesuffix(".json"),
        "guidance": guidance,
        "calls_of_teacher": calls,
        "pictures": len(ours.seeds),
        "held_out": len(theirs.seeds),
        "psnr_db": scores,
    }
    return Fit(plan, report)


def _hashes(bundle: Bundle) -> list[str]:
    """Hashes of all graphs and of what belongs to them, but for what is made of plans."""
    files = bundle.manifest.files.items()
    return sorted(file.sha256 for path, file in files if not path.startswith(("plans/", "fits/", "loops/")))


def _textbook(bundle: Bundle, calls: int) -> Iterator[Plan]:
    """Plans of so many calls of the samplers that the bundle's scheduler config has."""
    for name in TEXTBOOK:
        with suppress(InputError):
            yield read_plan(bundle, name, calls)


def _teacher(bundle: Bundle, options: FitOptions) -> Plan:
    sampler = options.sampler or bundle.manifest.model["default_sampler"]
    plan = read_plan(bundle, sampler, options.teacher_steps)
    fault = None
    if any(row.noise for row in plan.rows):
        fault = "adds noise at each step, so its pictures cannot be followed"
    elif len(plan.rows) != plan.num_inference_steps:
        fault = f"makes {len(plan.rows)} calls in {plan.num_inference_steps} steps"
    if fault:
        raise InputError(
            f"A plan was to be fitted to {sampler} with {options.teacher_steps} steps, which {fault}. Name another "
            "--sampler, one with one call a step and without noise, such as ddim or, for flow matching, euler."
        )
    return plan


def measured_gains(batches: Sequence[Batch], teacher: Plan, found: Trajectories, progress: Progress) -> Array:
    """How much larger a small change of the teacher's latents is at the end, by the call before which it is made:
    (calls + 1,), the root of the mean square over pictures, measured at a few calls and interpolated."""
    steps = len(teacher.rows)
    at = sorted({max(1, round(share * steps)) for share in GAIN_AT})
    gains = []
    for done, step in enumerate(at):
        progress("what errors come to", done, len(at))
        squares: list[float] = []
        for batch in batches:
            part = batch.part
            if part.start >= GAIN_PICTURES:
                break
            latents = found.latents[step, part]
            change = found.outputs[step, part] - found.outputs[max(step - BACK, 0), part]
            size = CHANGE * np.sqrt(np.mean(latents**2)) / np.sqrt(_mean_squares(change))
            change = change * size.astype(np.float32)[:, None, None, None]
            trajectory = teacher.starting_at(step)
            plain = found.latents[-1, part]
            if trajectory.rows != teacher.rows[step:]:  # a sampler that starts anew does not go on as it went
                plain = batch.run(trajectory, latents)
            moved = batch.run(trajectory, latents + change)
            squares += (_mean_squares(moved - plain) / _mean_squares(change)).tolist()
        gains.append(np.sqrt(np.mean(squares)))
    return np.asarray(np.interp(np.arange(steps + 1), [*at, steps], [*gains, 1.0]))


def _mean_squares(values: Array) -> Array:
    """(B, C, h, w) -> (B,), float64."""
    return np.asarray(np.mean(values.astype(np.float64) ** 2, axis=(1, 2, 3)).clip(1e-30))


def fitted_rows(
    batches: Sequence[Batch], teacher: Plan, found: Trajectories, calls: Sequence[int], progress: Progress
) -> tuple[Row, ...]:
    """Rows, one after the other fitted to the teacher's latents on those that the rows before lead to."""
    goals = [*calls[1:], len(teacher.rows)]
    x, outputs, rows = found.latents[0], list[Array](), list[Row]()
    for number, (call, goal) in enumerate(zip(calls, goals, strict=True)):
        progress("fitting rows", number, len(calls))
        row = teacher.rows[call]
        outputs.insert(0, np.concatenate([batch.output(row, x[batch.part]) for batch in batches]))
        values = [x, *outputs[:MAX_HISTORY]]
        matrix = np.stack([value.ravel() for value in values]).astype(np.float64)
        goal_values = found.latents[goal].ravel().astype(np.float64)
        coefficients = least_squares(matrix @ matrix.T / matrix.shape[1], matrix @ goal_values / matrix.shape[1])
        rows.append(_row(row, coefficients))
        x = sum(share * value for share, value in zip(coefficients.tolist(), values, strict=True)).astype(np.float32)
    return tuple(rows)


def _row(call: Row, coefficients: Array) -> Row:
    """The row of a call of the teacher's with coefficients of x, of its output, and of those before."""
    keep, direct, *older = coefficients.tolist()
    weights = (0.0, *older) if older else ()
    return Row(call.timestep, call.input_scale, from_output=1.0, keep=keep, direct=direct, weights=weights)


def _entry(teacher: Plan, products: Matrix, calls: Sequence[int], number: int) -> Entry:
    """Entry from an image into call ``number``: rows of what is remembered by then, fitted to the trajectories, and
    then the plan's own."""
    steps, own = len(teacher.rows), teacher.entries[calls[number]]
    warmup: list[Row] = []
    for later in range(number, len(calls)):
        chosen = regressors(calls[number : later + 1], steps)
        if len(chosen) == len(regressors(calls[: later + 1], steps)):
            break
        goal = [*calls, steps][later + 1]
        coefficients = least_squares(products[np.ix_(chosen, chosen)], products[chosen, goal])
        warmup.append(_row(teacher.rows[calls[later]], coefficients))
    return Entry(own.image_scale, own.noise_scale, tuple(warmup), number + len(warmup))


def _decoded(pipeline: Pipeline, batches: Sequence[Batch], latents: Array) -> Array:
    """Pictures uint8 (N, H, W, C)."""
    return np.concatenate([pipeline.decode(latents[batch.part]) for batch in batches])


def _score(
    pipeline: Pipeline, batches: Sequence[Batch], plan: Plan, truth: Array, progress: Progress
) -> dict[str, float]:
    """The median and the worst PSNR of a plan's pictures to the truth's, dB."""
    trajectory: Trajectory = plan.from_noise()
    ends = []
    for done, batch in enumerate(batches):
        progress(f"judging {plan.sampler}", done, len(batches))
        ends.append(batch.run(trajectory, batch.noise * np.float32(trajectory.noise_scale)))
    values = psnr(_decoded(pipeline, batches, np.concatenate(ends)), truth)
    return {"median": float(np.median(values)), "worst": float(values.min())}
