"""Samplers by name, and the scheduler classes of diffusers: which sampler each class is, and what its config means.

Every key of a class's constructor is in one of four places here: read (`SHARED` and ``defaults``), supported with some
values only (``only``), read by `sampler_of` (`CHOSEN_BY`), or without influence (``inert``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ldm_export.errors import InputError
from ldm_export.plan import flow, multistep, onestep
from ldm_export.plan.schedule import (
    Grid,
    SchedulerConfig,
    chained_grid,
    consistency_grid,
    interpolated_grid,
    open_ended_grid,
    short_repr,
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
FLOW_SOLVER_ONLY: Mapping[str, tuple[Any, ...]] = {
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
        only={"invert_sigmas": (False,)},
    ),
    "heun": Sampler(
        "FlowMatchHeunDiscreteScheduler",
        flow.euler_grid,
        flow.heun,
        {"prediction_type": flow.PREDICTION, "shift": 1.0},
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

CHOSEN_BY: Mapping[str, tuple[str, Any, Mapping[Any, str]]] = {
    "PNDMScheduler": ("skip_prk_steps", False, {True: "plms"}),
    "DPMSolverMultistepScheduler": (
        "algorithm_type",
        "dpmsolver++",
        {"dpmsolver++": "dpmpp-2m", "deis": "dpmpp-2m", "sde-dpmsolver++": "dpmpp-2m-sde"},
    ),
    "DEISMultistepScheduler": (
        "algorithm_type",
        "deis",
        {"deis": "deis", "dpmsolver": "deis", "dpmsolver++": "deis"},
    ),
}
"""Classes of which one key says what they compute: the key, its default, and the samplers that its values are."""
PARALLEL: Mapping[str, str] = {"DDIMParallelScheduler": "DDIMScheduler", "DDPMParallelScheduler": "DDPMScheduler"}
"""Classes that step as another one does."""

OF_THE_SAME_KIND: Mapping[str, Mapping[str, Any]] = {
    "DPMSolverSDEScheduler": STABLE_DIFFUSION,
    "DPMSolverSinglestepScheduler": {},
    "KDPM2AncestralDiscreteScheduler": STABLE_DIFFUSION,
    "KDPM2DiscreteScheduler": STABLE_DIFFUSION,
    "LMSDiscreteScheduler": {},
    "SASolverScheduler": {},
    "TCDScheduler": CONSISTENCY,
}
"""Classes that no sampler here is, of networks that all samplers here can solve; each with its defaults that differ."""

NETWORK = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
"""Keys that say how a network was trained, and whose defaults differ between classes."""
FLOW_MATCHING = {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"}
"""Classes for flow matching alone."""
READ_FLOW_SIGMAS = {"DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"}
"""Classes that have the key ``use_flow_sigmas``."""
CLIPPING = {"DDPMScheduler", "DDIMScheduler", "LCMScheduler", "HeunDiscreteScheduler", "TCDScheduler"}
"""Classes that have the key ``clip_sample``."""
NEVER_ZERO_SNR = {"PNDMScheduler", "HeunDiscreteScheduler", "DEISMultistepScheduler"}
"""Classes of `SAMPLERS` that have no key ``rescale_betas_zero_snr``."""


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a config is of a network trained by flow matching.

    Raises
    ------
    InputError
        If it says so of the noise levels and not of what the network predicts, or the other way round.
    """
    name = config.get("_class_name")
    own = [name] if isinstance(name, str) else []
    if own and own[0] in FLOW_MATCHING:
        return True
    reads = not own or own[0] in READ_FLOW_SIGMAS
    levels, predicts = bool(reads and config.get("use_flow_sigmas")), config.get("prediction_type") == flow.PREDICTION
    if levels != predicts:
        raise InputError(
            f"the scheduler config has use_flow_sigmas = {short_repr(config.get('use_flow_sigmas'))} and "
            f"prediction_type = {short_repr(config.get('prediction_type'))}; a network trained by flow matching has "
            f"true and '{flow.PREDICTION}', any other neither. Use the config that the network was trained with."
        )
    return levels


def prediction_of(config: Mapping[str, Any]) -> str:
    """What the network of a scheduler config predicts, as ``prediction_type`` has it."""
    return flow.PREDICTION if is_flow(config) else str(config.get("prediction_type") or "epsilon")


def samplers_for(config: Mapping[str, Any]) -> Mapping[str, Sampler]:
    """The samplers that can sample a network of this scheduler config, by name."""
    return FLOW_SAMPLERS if is_flow(config) else SAMPLERS


def class_of(config: Mapping[str, Any]) -> str | None:
    """Scheduler class that a config names, or None.

    Raises
    ------
    InputError
        For a class whose networks no sampler here can solve, such as ``EDMEulerScheduler``.
    """
    name = config.get("_class_name")
    if name is None:
        return None
    own = PARALLEL.get(name, name) if isinstance(name, str) else name
    known = [sampler.diffusers_class for sampler in (*SAMPLERS.values(), *FLOW_SAMPLERS.values())]
    if own not in [*known, *OF_THE_SAME_KIND]:
        raise InputError(
            f"the scheduler is {short_repr(name)}; a network with that scheduler cannot be sampled by "
            f"{', '.join(SAMPLERS)}, which are for networks trained on the noise of DDPM or by flow matching. "
            "Use another checkpoint."
        )
    return str(own)


def sampler_of(config: Mapping[str, Any]) -> str:
    """Sampler that equals the scheduler class and options that a config names.

    Raises
    ------
    InputError
        If there is none, with what can be done about it.
    """
    own, samplers = class_of(config), samplers_for(config)
    covered = {sampler.diffusers_class: name for name, sampler in samplers.items()}
    if own is not None and own in CHOSEN_BY:
        key, default, chosen = CHOSEN_BY[own]
        given = config.get(key)
        given = default if given is None else given
        if isinstance(given, (str, bool)) and chosen.get(given) in samplers:
            return chosen[given]
        what = f"{own} with {key} = {short_repr(given)}"
    elif own in covered:
        return covered[own]
    else:
        what = own or "not named"
    raise InputError(
        f"the scheduler is {what}; none of {', '.join(samplers)} equals it. Say which one to use in its place, such as "
        "--sampler euler; the pictures will then differ from those of diffusers."
    )


def as_trained(config: Mapping[str, Any], sampler: Sampler) -> dict[str, Any]:
    """The config with what its own class fills in of how the network was trained, for any sampler to read.

    A sampler's class would fill in its own defaults, as diffusers' ``from_config`` does. For the noise schedule, which
    is a fact about the network, and for clipping, which nobody asked for where the own class does not clip, that is
    not followed.
    """
    values, own = dict(config), class_of(config)
    if is_flow(config):
        return _as_flow(values)
    if own is None:
        return values
    defaults = OF_THE_SAME_KIND.get(own) or next(
        (known.defaults for known in SAMPLERS.values() if known.diffusers_class == own), {}
    )
    for key in NETWORK:
        if values.get(key) is None:
            values[key] = defaults.get(key, getattr(SchedulerConfig, key))
    if own not in CLIPPING and values.get("clip_sample") is None:
        values["clip_sample"] = False
    if own == sampler.diffusers_class and own in NEVER_ZERO_SNR:
        values.pop("rescale_betas_zero_snr", None)
    return values


def _as_flow(values: dict[str, Any]) -> dict[str, Any]:
    """The config of a network trained by flow matching with its shift under the names of every class."""
    for key in ("prediction_type", *NO_NOISE_SCHEDULE):
        values.pop(key, None)
    for key, other in (("shift", "flow_shift"), ("flow_shift", "shift")):
        if values.get(key) is None:
            values[key] = values.get(other)
    if not values.get("shift_terminal"):
        values.pop("shift_terminal", None)
    return values
