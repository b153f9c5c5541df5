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
import math
from collections.abc import Mapping
from typing import Any

from ldm_export.errors import InputError
from ldm_export.plan.samplers import SAMPLERS, Sampler, as_trained
from ldm_export.plan.schedule import Grid, SchedulerConfig
from ldm_export.plan.table import MAX_HISTORY, Entry, Plan, Row


def compile_plan(config: Mapping[str, Any], sampler: str, num_inference_steps: int, *, eta: float = 0.0) -> Plan:
    """Compile a sampler into a table.

    Parameters
    ----------
    config : a parsed ``scheduler/scheduler_config.json`` of diffusers. It may belong to another scheduler class: what
        the sampler reads is taken, the rest gets the defaults of the sampler's class, as diffusers' ``from_config``
        does, but for the two keys that the module's docstring names
    sampler : a key of `SAMPLERS`
    num_inference_steps : 1 to ``num_train_timesteps``
    eta : DDIM's share of DDPM's noise, in [0, 1]; other samplers have none

    Raises
    ------
    InputError
        For an unknown sampler, a number of steps, a scheduler class or a config value that cannot be used.
    """
    if sampler not in SAMPLERS:
        raise InputError(f"sampler {sampler!r} is not known; known are {', '.join(SAMPLERS)}. Use one of them.")
    spec = SAMPLERS[sampler]
    options = _options(SchedulerConfig.from_dict(as_trained(config, spec), spec.defaults, spec.only), sampler, eta)
    if type(num_inference_steps) is not int or not 1 <= num_inference_steps <= options.num_train_timesteps:
        raise InputError(
            f"num_inference_steps is {num_inference_steps!r}; it must be 1 to {options.num_train_timesteps}, the "
            "number of timesteps that the model was trained with. Choose one of those."
        )
    grid = spec.grid(options, num_inference_steps)
    steps = range(num_inference_steps)
    rows = [spec.rows(options, grid, step, min(step, MAX_HISTORY)) for step in steps]
    first = grid.here[0]
    init_scale = 1.0
    if spec.edm_scale:
        init_scale = first.ratio if options.timestep_spacing != "leading" else math.hypot(first.ratio, 1)
    return Plan(
        sampler=f"{sampler}-eta{eta:g}" if eta else sampler,  # its own name: it draws other pictures
        num_inference_steps=num_inference_steps,
        init_scale=init_scale,
        rows=tuple(row for step in rows for row in step),
        entries=tuple(_entry(spec, options, grid, rows, start) for start in steps),
    )


def _options(options: SchedulerConfig, sampler: str, eta: float) -> SchedulerConfig:
    """What the config and the sampler make of each other."""
    spec = SAMPLERS[sampler]
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


def _entry(spec: Sampler, options: SchedulerConfig, grid: Grid, rows: list[list[Row]], start: int) -> Entry:
    """Start at a step with an empty history, until its rows are those of the whole run."""
    resume = min(start + MAX_HISTORY, len(rows))
    fresh = [spec.rows(options, grid, step, step - start) for step in range(start, resume)]
    while fresh and fresh[-1] == rows[resume - 1]:
        fresh.pop()
        resume -= 1
    level = grid.here[start]
    image_scale, noise_scale = (1.0, level.ratio) if spec.edm_scale else level
    return Entry(
        image_scale=image_scale,
        noise_scale=noise_scale,
        warmup=tuple(row for step in fresh for row in step),
        resume=sum(len(step) for step in rows[:resume]),
    )
