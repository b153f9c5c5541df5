"""Compiles a scheduler config, a sampler's name and a number of steps into a `Plan`, once and in float64.

A plan gives the latents of the diffusers scheduler of the same config, quirks included, except where that one cannot
be right:

- PLMS from an image starts at the step asked for and doubles it (see `multistep.plms`). It has no Runge-Kutta start:
  ``skip_prk_steps`` is not read, the sampler's name says it.
- ``rescale_betas_zero_snr`` describes the network, so PLMS, Heun and DEIS read it too, unless the config is of their
  own class, which does not.
- Every schedule, ``sigmoid`` included, and every prediction type goes with every sampler.
- DPM-Solver++ with Karras noise on the cosine schedule rounds its timesteps, as UniPC does; diffusers truncates them.
- DEIS with Karras noise and a single step denoises; in diffusers that step goes nowhere.
- A key that the config leaves out and that says how the network was trained (``beta_start``, ``beta_end``,
  ``beta_schedule``) has the default of the config's own class, which ``_class_name`` names, not of the sampler's.
- ``clip_sample`` is off where the config leaves it out and its own class does not clip; diffusers' DDIM and DDPM made
  from such a config clip.
- UniPC with ``solver_type`` bh1 and a last step to zero noise gives numbers; diffusers multiplies infinity by zero.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ldm_export.errors import InputError
from ldm_export.plan.forecast import Forecast, forecast_of, forecast_plan
from ldm_export.plan.onestep import x0_form
from ldm_export.plan.samplers import SAMPLERS, Sampler
from ldm_export.plan.schedule import Grid, Level, SchedulerConfig, short_repr
from ldm_export.plan.scheduler_classes import as_trained, samplers_for
from ldm_export.plan.table import MAX_HISTORY, MOST_STEPS, Entries, Entry, Plan, PlanError, Row


def compile_plan(
    config: Mapping[str, Any],
    sampler: str,
    num_inference_steps: int,
    *,
    eta: float = 0.0,
    tokens: int = 0,
    forecast: Forecast | None = None,
) -> Plan:
    """Compile a sampler into a table.

    Parameters
    ----------
    config : a parsed ``scheduler/scheduler_config.json`` of diffusers. It may belong to another scheduler class: what
        the sampler reads is taken, the rest gets the defaults of the sampler's class, as diffusers' ``from_config``
        does, but for the two keys that the module's docstring names
    sampler : a key of `SAMPLERS`; with ``-calls16`` after it, 16 network calls are made and the others forecast
    num_inference_steps : 1 to ``num_train_timesteps``, and to `MOST_STEPS`
    eta : DDIM's share of DDPM's noise, in [0, 1]; other samplers have none
    tokens : of a picture (`ldm_export.plan.flow.picture_tokens`), which are read where the config shifts dynamically
    forecast : which network calls are made, if the name does not say it; all by default

    Raises
    ------
    InputError
        For an unknown sampler, a number of steps, a scheduler class or a config value that cannot be used, and for a
        forecast that cannot be made.
    """
    sampler, named = forecast_of(sampler)
    forecast = named or forecast
    if sampler not in SAMPLERS:
        known = ", ".join(SAMPLERS)
        raise InputError(f"sampler {short_repr(sampler)} is not known; known are {known}. Use one of them.")
    samplers = samplers_for(config)
    if sampler not in samplers:
        raise InputError(
            f"{sampler} is for networks trained on the noise of DDPM; this one was trained by flow matching, which "
            f"{', '.join(samplers)} can sample. Use one of them."
        )
    spec = samplers[sampler]
    options = SchedulerConfig.from_dict(as_trained(config, spec), spec.defaults, spec.only)
    options = _options(dataclasses.replace(options, tokens=tokens), spec, sampler, eta)
    most = min(options.num_train_timesteps, MOST_STEPS)
    if type(num_inference_steps) is not int or not 1 <= num_inference_steps <= most:
        trained = most == options.num_train_timesteps
        why = "the number of timesteps that the model was trained with" if trained else "the most that a plan may have"
        raise InputError(
            f"num_inference_steps is {num_inference_steps!r}; it must be 1 to {most}, {why}. Choose one of those."
        )
    with _in_float32(sampler, num_inference_steps):
        plan, levels = _plan(spec, options, sampler, num_inference_steps)
        if forecast is None:
            return plan
        noisy = any(row.noise and not row.weights for row in plan.rows)
        return forecast_plan(plan, forecast, _denoised(options, plan.rows, levels) if noisy else ())


@contextmanager
def _in_float32(sampler: str, num_inference_steps: int) -> Iterator[None]:
    """Raise InputError where formulas give what is no finite float32."""
    try:
        with np.errstate(divide="raise", over="raise", invalid="raise"):
            yield
    except (PlanError, ArithmeticError, ValueError) as error:
        raise InputError(
            f"{sampler} with {num_inference_steps} steps of this scheduler config has numbers that float32 does not "
            "hold. Use another sampler or number of steps, or the config that the network was trained with."
        ) from error


def _plan(spec: Sampler, options: SchedulerConfig, sampler: str, num_inference_steps: int) -> tuple[Plan, list[Level]]:
    """The plan of all calls, and the noise level of each of its rows."""
    grid = spec.grid(options, num_inference_steps)
    steps = range(num_inference_steps)
    rows = [spec.rows(options, grid, step, min(step, MAX_HISTORY)) for step in steps]
    firsts = [0, *itertools.accumulate(map(len, rows))]

    def entry(start: int) -> Entry:
        with _in_float32(sampler, num_inference_steps):
            return _entry(spec, options, grid, rows, firsts, start)

    first = grid.here[0]
    init_scale = 1.0
    if spec.edm_scale:
        init_scale = first.ratio if options.timestep_spacing != "leading" else math.hypot(first.ratio, 1)
    plan = Plan(
        sampler=f"{sampler}-eta{options.eta:g}" if options.eta else sampler,  # its own name: it draws other pictures
        num_inference_steps=num_inference_steps,
        init_scale=init_scale,
        rows=tuple(row for step in rows for row in step),
        entries=Entries(num_inference_steps, entry),
        tokens=options.tokens if options.use_dynamic_shifting else 0,
    )
    return plan, [level for step in steps for level in (grid.here[step], grid.there[step])[: len(rows[step])]]


def _denoised(options: SchedulerConfig, rows: Sequence[Row], levels: Sequence[Level]) -> list[tuple[float, float]]:
    """Coefficients of x and of the network's output that give the predicted x0 at each row."""
    forms = [x0_form(options.prediction_type, level) for level in levels]
    return [(of_x * row.input_scale, of_output) for (of_x, of_output), row in zip(forms, rows, strict=True)]


def _options(options: SchedulerConfig, spec: Sampler, sampler: str, eta: float) -> SchedulerConfig:
    """What the config and the sampler make of each other."""
    if not 0 <= eta <= 1 or (eta and sampler != "ddim"):
        raise InputError(f"eta is {eta} with sampler {sampler}; ddim takes 0 to 1, the others 0. Use ddim or leave it.")
    if options.solver_order > spec.orders:
        raise InputError(
            f"the scheduler config has solver_order = {options.solver_order}; {sampler} has orders 1 to {spec.orders}. "
            "Lower it."
        )
    if (
        sampler == "unipc"
        and not options.lower_order_final
        and (options.final_sigmas_type == "zero" or options.use_karras_sigmas)
    ):
        raise InputError(
            "the scheduler config has lower_order_final = false; unipc's last step is infinite with final_sigmas_type "
            "'zero' and empty with use_karras_sigmas. Set lower_order_final to true."
        )
    solver_type = options.solver_type if options.solver_type in spec.solver_types else spec.solver_types[0]
    return dataclasses.replace(options, solver_type=solver_type, eta=float(eta))


def _entry(
    spec: Sampler, options: SchedulerConfig, grid: Grid, rows: list[list[Row]], firsts: list[int], start: int
) -> Entry:
    """Start at a step with an empty history, until its rows are those of the whole run, as all after them then are.

    ``firsts`` has the number of the first row of each step, and of one more.
    """
    warmup: list[Row] = []
    resume = start
    while resume < len(rows) and (fresh := spec.rows(options, grid, resume, resume - start)) != rows[resume]:
        warmup += fresh
        resume += 1
    level = grid.here[start]
    image_scale, noise_scale = (1.0, level.ratio) if spec.edm_scale else level
    return Entry(
        image_scale=image_scale,
        noise_scale=noise_scale,
        warmup=tuple(warmup),
        resume=firsts[resume],
    )
