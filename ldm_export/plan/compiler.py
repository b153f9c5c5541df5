"""Compiles a scheduler config, a sampler's name and a number of steps into a `Plan`, once and in float64.

A plan gives the latents of the diffusers scheduler of the same config, quirks included, except where that one cannot
be right:

- PLMS from an image starts at the step asked for and doubles it (see `multistep.plms`). It has no Runge-Kutta start:
  ``skip_prk_steps`` is not read, the sampler's name says it.
- ``rescale_betas_zero_snr`` describes the network, so PLMS, Heun and DEIS read it too.
- Every schedule, ``sigmoid`` included, and every prediction type goes with every sampler.
- DPM-Solver++ with Karras noise on the cosine schedule rounds its timesteps, as UniPC does; diffusers truncates them.
- DEIS with Karras noise and a single step denoises; in diffusers that step goes nowhere.
- UniPC with ``solver_type`` bh1 and a last step to zero noise gives numbers; diffusers multiplies infinity by zero.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ldm_export.errors import InputError
from ldm_export.plan import multistep, onestep
from ldm_export.plan.schedule import (
    Grid,
    SchedulerConfig,
    chained_grid,
    consistency_grid,
    interpolated_grid,
    open_ended_grid,
    solver_grid,
    strided_grid,
)
from ldm_export.plan.table import MAX_HISTORY, Entry, Plan, Row


@dataclass(frozen=True)
class Sampler:
    """How one sampler is compiled.

    ``rows(config, grid, step, age)`` gives the one or two rows of a step that was preceded by ``age`` others (counted
    up to `MAX_HISTORY`: older ones are forgotten). ``defaults`` are the keys of the config that it reads besides the
    shared ones, with the defaults of ``diffusers_class``; ``solver_types`` the words it knows for one of them, any
    other meaning the first, and ``orders`` how many solver orders it has. ``edm_scale`` says that its latents are
    x0 + ratio * eps instead of alpha * x0 + sigma * eps.
    """

    diffusers_class: str
    grid: Callable[[SchedulerConfig, int], Grid]
    rows: Callable[[SchedulerConfig, Grid, int, int], list[Row]]
    defaults: Mapping[str, Any]
    edm_scale: bool = False
    solver_types: tuple[str, ...] = ("midpoint",)
    orders: int = 3


LEADING: Mapping[str, Any] = {"timestep_spacing": "leading"}
LINSPACE: Mapping[str, Any] = {"timestep_spacing": "linspace"}
CLIP: Mapping[str, Any] = {"clip_sample": True, "clip_sample_range": 1.0}
NO_CLIP: Mapping[str, Any] = {"clip_sample": False, "clip_sample_range": 1.0}
KARRAS: Mapping[str, Any] = {"use_karras_sigmas": False}
SOLVER: Mapping[str, Any] = {**LINSPACE, **KARRAS, "solver_order": 2, "lower_order_final": True}
FINAL: Mapping[str, Any] = {"final_sigmas_type": "zero"}
STABLE_DIFFUSION: Mapping[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012}

SAMPLERS: Mapping[str, Sampler] = {
    "ddpm": Sampler("DDPMScheduler", chained_grid, onestep.ddpm, {**LEADING, **CLIP, "variance_type": "fixed_small"}),
    "ddim": Sampler("DDIMScheduler", strided_grid, onestep.ddim, {**LEADING, **CLIP, "set_alpha_to_one": True}),
    "plms": Sampler("PNDMScheduler", strided_grid, multistep.plms, {**LEADING, "set_alpha_to_one": False}),
    "lcm": Sampler(
        "LCMScheduler",
        consistency_grid,
        onestep.lcm,
        {
            **STABLE_DIFFUSION,
            **NO_CLIP,
            "beta_schedule": "scaled_linear",
            "original_inference_steps": 50,
            "timestep_scaling": 10.0,
        },
    ),
    "euler": Sampler(
        "EulerDiscreteScheduler", interpolated_grid, onestep.euler, {**LINSPACE, **KARRAS, **FINAL}, edm_scale=True
    ),
    "euler-ancestral": Sampler(
        "EulerAncestralDiscreteScheduler", interpolated_grid, onestep.euler_ancestral, LINSPACE, edm_scale=True
    ),
    "heun": Sampler(
        "HeunDiscreteScheduler",
        interpolated_grid,
        multistep.heun,
        {**LINSPACE, **KARRAS, **NO_CLIP, **STABLE_DIFFUSION},
        edm_scale=True,
    ),
    "dpmpp-2m": Sampler(
        "DPMSolverMultistepScheduler",
        solver_grid,
        multistep.dpm_solver_2m,
        {**SOLVER, **FINAL, "solver_type": "midpoint", "euler_at_final": False},
        solver_types=("midpoint", "heun"),
    ),
    "dpmpp-2m-sde": Sampler(
        "DPMSolverMultistepScheduler",
        solver_grid,
        multistep.dpm_solver_2m_sde,
        {**SOLVER, **FINAL, "solver_type": "midpoint", "euler_at_final": False},
        solver_types=("midpoint", "heun"),
        orders=2,
    ),
    "unipc": Sampler(
        "UniPCMultistepScheduler",
        solver_grid,
        multistep.unipc,
        {**SOLVER, **FINAL, "solver_type": "bh2"},
        solver_types=("bh2", "bh1"),
    ),
    "deis": Sampler("DEISMultistepScheduler", open_ended_grid, multistep.deis, SOLVER),
}
"""Every sampler by name, the diffusers class that it equals, and how it is compiled."""


def compile_plan(config: Mapping[str, Any], sampler: str, num_inference_steps: int, *, eta: float = 0.0) -> Plan:
    """Compile a sampler into a table.

    Parameters
    ----------
    config : a parsed ``scheduler/scheduler_config.json`` of diffusers. It may belong to another scheduler class: what
        the sampler reads is taken, the rest gets the defaults of its own class, as diffusers' ``from_config`` does
    sampler : a key of `SAMPLERS`
    num_inference_steps : 1 to ``num_train_timesteps``
    eta : DDIM's share of DDPM's noise, in [0, 1]; other samplers have none

    Raises
    ------
    InputError
        For an unknown sampler, a number of steps or a config value that cannot be used.
    """
    if sampler not in SAMPLERS:
        raise InputError(f"sampler {sampler!r} is not known; known are {', '.join(SAMPLERS)}. Use one of them.")
    spec = SAMPLERS[sampler]
    options = _options(SchedulerConfig.from_dict(config, spec.defaults), sampler, eta)
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
