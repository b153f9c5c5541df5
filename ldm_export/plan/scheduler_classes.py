"""Scheduler classes of diffusers: which sampler each is, what its config means, and which samplers suit a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm_export.errors import InputError
from ldm_export.plan import flow
from ldm_export.plan.samplers import CONSISTENCY, FLOW_SAMPLERS, NO_NOISE_SCHEDULE, SAMPLERS, STABLE_DIFFUSION, Sampler
from ldm_export.plan.schedule import SchedulerConfig, short_repr

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
