"""Samplers by name: the scheduler class of diffusers that each equals, and how it is compiled.

Every key of a class's constructor is in one of four places: read (`SHARED` and ``defaults``), supported with some
values only (``only``), read by `ldm_export.plan.scheduler_classes.sampler_of`, or without influence (``inert``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ldm_export.plan import flow, multistep, onestep
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
from ldm_export.plan.table import Row


@dataclass(frozen=True)
class Sampler:
    """How one sampler is compiled.

    ``rows(config, grid, step, age)`` gives the one or two rows of a step that was preceded by ``age`` others (counted
    up to `MAX_HISTORY`: older ones are forgotten). ``defaults`` are the keys of the config that it reads besides the
    shared ones, with the defaults of ``diffusers_class``; ``only`` those with the values that it supports, the first
    being the default; ``inert`` those that change nothing then. ``solver_types`` are the words it knows for one of
    them, any other meaning the first, and ``orders`` is how many solver orders it has. ``edm_scale`` says that its
    latents are x0 + ratio * eps instead of alpha * x0 + sigma * eps.
    """

    diffusers_class: str
    grid: Callable[[SchedulerConfig, int], Grid]
    rows: Callable[[SchedulerConfig, Grid, int, int], list[Row]]
    defaults: Mapping[str, Any]
    edm_scale: bool = False
    solver_types: tuple[str, ...] = ("midpoint",)
    orders: int = 3
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    inert: tuple[str, ...] = ()


LEADING: Mapping[str, Any] = {"timestep_spacing": "leading"}
LINSPACE: Mapping[str, Any] = {"timestep_spacing": "linspace"}
CLIP: Mapping[str, Any] = {"clip_sample": True, "clip_sample_range": 1.0}
NO_CLIP: Mapping[str, Any] = {"clip_sample": False, "clip_sample_range": 1.0}
KARRAS: Mapping[str, Any] = {"use_karras_sigmas": False}
SOLVER: Mapping[str, Any] = {**LINSPACE, **KARRAS, "solver_order": 2, "lower_order_final": True}
FINAL: Mapping[str, Any] = {"final_sigmas_type": "zero"}
STABLE_DIFFUSION: Mapping[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012}
CONSISTENCY: Mapping[str, Any] = {**STABLE_DIFFUSION, "beta_schedule": "scaled_linear"}

UNTHRESHOLDED: Mapping[str, tuple[Any, ...]] = {"thresholding": (False,)}
THRESHOLDS = ("dynamic_thresholding_ratio", "sample_max_value")
NO_OTHER_SIGMAS: Mapping[str, tuple[Any, ...]] = {"use_exponential_sigmas": (False,), "use_beta_sigmas": (False,)}
SIGMA_BOUNDS: Mapping[str, tuple[Any, ...]] = {"sigma_min": (None,), "sigma_max": (None,)}
NO_FLOW: Mapping[str, tuple[Any, ...]] = {
    **UNTHRESHOLDED,
    **NO_OTHER_SIGMAS,
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
}
FLOW = (*THRESHOLDS, "flow_shift", "time_shift_type")
DPM_SOLVER_ONLY: Mapping[str, tuple[Any, ...]] = {
    **NO_FLOW,
    "use_lu_lambdas": (False,),
    "lambda_min_clipped": (float("-inf"),),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}

SAMPLERS: Mapping[str, Sampler] = {
    "ddpm": Sampler(
        "DDPMScheduler",
        chained_grid,
        onestep.ddpm,
        {**LEADING, **CLIP, "variance_type": "fixed_small"},
        only=UNTHRESHOLDED,
        inert=THRESHOLDS,
    ),
    "ddim": Sampler(
        "DDIMScheduler",
        strided_grid,
        onestep.ddim,
        {**LEADING, **CLIP, "set_alpha_to_one": True},
        only=UNTHRESHOLDED,
        inert=THRESHOLDS,
    ),
    "plms": Sampler("PNDMScheduler", strided_grid, multistep.plms, {**LEADING, "set_alpha_to_one": False}),
    "lcm": Sampler(
        "LCMScheduler",
        consistency_grid,
        onestep.lcm,
        {**CONSISTENCY, **NO_CLIP, "original_inference_steps": 50, "timestep_scaling": 10.0},
        only=UNTHRESHOLDED,
        inert=(*THRESHOLDS, "set_alpha_to_one"),
    ),
    "euler": Sampler(
        "EulerDiscreteScheduler",
        interpolated_grid,
        onestep.euler,
        {**LINSPACE, **KARRAS, **FINAL},
        edm_scale=True,
        only={
            **NO_OTHER_SIGMAS,
            **SIGMA_BOUNDS,
            "interpolation_type": ("linear",),
            "timestep_type": ("discrete",),
        },
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
        only=NO_OTHER_SIGMAS,
    ),
    "dpmpp-2m": Sampler(
        "DPMSolverMultistepScheduler",
        solver_grid,
        multistep.dpm_solver_2m,
        {**SOLVER, **FINAL, "solver_type": "midpoint", "euler_at_final": False},
        solver_types=("midpoint", "heun"),
        only=DPM_SOLVER_ONLY,
        inert=FLOW,
    ),
    "dpmpp-2m-sde": Sampler(
        "DPMSolverMultistepScheduler",
        solver_grid,
        multistep.dpm_solver_2m_sde,
        {**SOLVER, **FINAL, "solver_type": "midpoint", "euler_at_final": False},
        solver_types=("midpoint", "heun"),
        orders=2,
        only=DPM_SOLVER_ONLY,
        inert=FLOW,
    ),
    "unipc": Sampler(
        "UniPCMultistepScheduler",
        solver_grid,
        multistep.unipc,
        {**SOLVER, **FINAL, "solver_type": "bh2"},
        solver_types=("bh2", "bh1"),
        only={
            **NO_FLOW,
            **SIGMA_BOUNDS,
            "predict_x0": (True,),
            "disable_corrector": ([],),
            "solver_p": (None,),
            "shift_terminal": (None,),
        },
        inert=FLOW,
    ),
    "deis": Sampler(
        "DEISMultistepScheduler",
        open_ended_grid,
        multistep.deis,
        SOLVER,
        only=NO_FLOW,
        inert=(*FLOW, "solver_type"),
    ),
}
"""Samplers of networks trained on the noise of DDPM, by name: the diffusers class that each equals, and how it is
compiled."""

SHIFTING: Mapping[str, Any] = {
    **{"use_dynamic_shifting": False, "time_shift_type": "exponential", "base_shift": 0.5, "max_shift": 1.15},
    **{"base_image_seq_len": 256, "max_image_seq_len": 4096},
}
FLOW_SOLVER: Mapping[str, Any] = {
    **{"prediction_type": flow.PREDICTION, "solver_order": 2, "lower_order_final": True, "flow_shift": 1.0},
    **SHIFTING,
}
NOT_INVERTED: Mapping[str, tuple[Any, ...]] = {"invert_sigmas": (False,)}
FLOW_SOLVER_ONLY: Mapping[str, tuple[Any, ...]] = {
    **NOT_INVERTED,
    **UNTHRESHOLDED,
    **NO_OTHER_SIGMAS,
    "use_karras_sigmas": (False,),
    "final_sigmas_type": ("zero",),
}
NO_NOISE_SCHEDULE = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
FLOW_DPM_SOLVER: Mapping[str, Any] = {**FLOW_SOLVER, "solver_type": "midpoint", "euler_at_final": False}
FLOW_DPM_SOLVER_ONLY: Mapping[str, tuple[Any, ...]] = {
    **FLOW_SOLVER_ONLY,
    "use_lu_lambdas": (False,),
    "time_shift_type": ("exponential",),
    "shift_terminal": (None,),
}
FLOW_SAMPLERS: Mapping[str, Sampler] = {
    "euler": Sampler(
        "FlowMatchEulerDiscreteScheduler",
        flow.euler_grid,
        flow.euler,
        {
            **{"prediction_type": flow.PREDICTION, "shift": 1.0, "shift_terminal": 0.0, "stochastic_sampling": False},
            **{"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False},
            **SHIFTING,
        },
        only=NOT_INVERTED,
    ),
    "heun": Sampler(
        "FlowMatchHeunDiscreteScheduler",
        flow.euler_grid,
        flow.heun,
        {"prediction_type": flow.PREDICTION, "shift": 1.0},
        only={
            **NOT_INVERTED,
            **NO_OTHER_SIGMAS,
            "use_dynamic_shifting": (False,),
            "use_karras_sigmas": (False,),
            "shift_terminal": (None,),
        },
    ),
    "dpmpp-2m": Sampler(
        "DPMSolverMultistepScheduler",
        flow.solver_grid,
        multistep.dpm_solver_2m,
        FLOW_DPM_SOLVER,
        solver_types=("midpoint", "heun"),
        only=FLOW_DPM_SOLVER_ONLY,
    ),
    "dpmpp-2m-sde": Sampler(
        "DPMSolverMultistepScheduler",
        flow.solver_grid,
        multistep.dpm_solver_2m_sde,
        FLOW_DPM_SOLVER,
        solver_types=("midpoint", "heun"),
        orders=2,
        only=FLOW_DPM_SOLVER_ONLY,
    ),
    "unipc": Sampler(
        "UniPCMultistepScheduler",
        flow.unipc_grid,
        multistep.unipc,
        {**FLOW_SOLVER, "solver_type": "bh2", "shift_terminal": 0.0},
        solver_types=("bh2", "bh1"),
        only={
            **FLOW_SOLVER_ONLY,
            **SIGMA_BOUNDS,
            "predict_x0": (True,),
            "disable_corrector": ([],),
            "solver_p": (None,),
        },
    ),
}
"""Samplers of networks trained by flow matching, of the same names where they are the same method."""
