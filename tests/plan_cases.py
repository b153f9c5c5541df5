"""Scheduler configs, samplers and numbers of steps on which both compilers of plans are compared, by the thousand."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from ldm_export.plan import CALLS, SAMPLERS
from ldm_export.plan.samplers import FLOW_SAMPLERS
from ldm_export.plan.scheduler_classes import OF_THE_SAME_KIND, PARALLEL

Case = tuple[dict[str, Any], str, Any]
"""A scheduler config, a sampler, a number of steps."""
TOKENS = "tokens of the picture"
"""Key of a config, which no sampler reads, that says what ``tokens`` is compiled with."""

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}

KEYS: dict[str, tuple[Any, ...]] = {
    "num_train_timesteps": (1000, 40, 100, 999, 7),
    "beta_start": (0.00085, 0.0001, 0.01),
    "beta_end": (0.012, 0.02, 0.3),
    "beta_schedule": SCHEDULES,
    "trained_betas": (np.linspace(0.001, 0.03, 40).tolist(), []),
    "prediction_type": PREDICTIONS,
    "timestep_spacing": SPACINGS,
    "steps_offset": (0, 1, 3),
    "rescale_betas_zero_snr": (True, False),
    "set_alpha_to_one": (True, False, 1, 0.0),
    "clip_sample": (True, False),
    "clip_sample_range": (0.8, 2),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
    "use_karras_sigmas": (True, False),
    "final_sigmas_type": ("zero", "sigma_min"),
    "solver_order": (1, 2, 3),
    "solver_type": ("midpoint", "heun", "bh1", "bh2", "logrho"),
    "lower_order_final": (True, False),
    "euler_at_final": (True, False),
    "original_inference_steps": (50, 25, 7),
    "timestep_scaling": (10.0, 5),
    "_class_name": (*sorted({spec.diffusers_class for spec in SAMPLERS.values()}), *OF_THE_SAME_KIND, *PARALLEL),
    "lambda_min_clipped": (-math.inf,),
    "thresholding": (False,),
}
"""Values that a key may have."""

WRONG: tuple[Any, ...] = (
    *(
        "",
        "none",
        "it's",
        "\u00e9\n\x7f\\",
        '"',
        [],
        [0],
        [0.1, 0.2],
        ["a", None, [True, {}]],
        {},
        {"a": -0.0},
        True,
        False,
    ),
    *(-1, 0, 1, 2, 3, 4, 100_000, 100_001, 10**12, 2**62, 0.0, -0.0, 0.5, 1.0, 1.5, 1e16, 1e-5, 123456.789, 1e300),
    *(5e-324, 1.7976931348623157e308, -1e-300, math.nan, math.inf, -math.inf, "x" * 100, list(range(50)), [math.nan]),
)
"""Values that some keys take and most do not."""

READ_WITH_ONE_VALUE = (
    *("thresholding", "use_exponential_sigmas", "use_beta_sigmas", "sigma_min", "sigma_max", "use_flow_sigmas"),
    *("use_dynamic_shifting", "use_lu_lambdas", "lambda_min_clipped", "interpolation_type", "timestep_type"),
    *("predict_x0", "disable_corrector", "solver_p", "shift_terminal", "algorithm_type", "skip_prk_steps"),
)


def grid() -> Iterator[Case]:
    """Every sampler with every schedule, spacing and prediction type, and each other key."""
    for sampler, schedule, prediction, spacing, zero, steps in itertools.product(
        SAMPLERS, SCHEDULES, PREDICTIONS, SPACINGS, (False, True), (1, 2, 3, 5, 8, 14, 15, 20)
    ):
        yield (
            {
                **STABLE_DIFFUSION,
                "beta_schedule": schedule,
                "prediction_type": prediction,
                "timestep_spacing": spacing,
                "rescale_betas_zero_snr": zero,
            },
            sampler,
            steps,
        )
    for (key, values), sampler, steps in itertools.product(KEYS.items(), SAMPLERS, (1, 2, 4, 11, 23)):
        for value, prediction in itertools.product(values, ("epsilon", "v_prediction")):
            yield {**STABLE_DIFFUSION, "prediction_type": prediction, key: value}, sampler, steps


def drawn(count: int, seed: int = 0) -> Iterator[Case]:
    """Random configs of values that are meant."""
    choose = random.Random(seed)
    for _ in range(count):
        keys = choose.sample(sorted(KEYS), choose.randint(1, 12))
        config = {key: choose.choice(KEYS[key]) for key in keys}
        if config.get("trained_betas"):
            config["num_train_timesteps"] = len(config["trained_betas"])
        yield config, choose.choice(sorted(SAMPLERS)), choose.choice((1, 2, 3, 4, 6, 10, 13, 17, 25, 30, 39))


def long() -> Iterator[Case]:
    """As many steps as there are training timesteps, or nearly."""
    for sampler, spacing in itertools.product(SAMPLERS, SPACINGS):
        for trained, steps in ((1000, 999), (1000, 1000), (1000, 333), (60, 59), (2000, 50)):
            config = {
                **STABLE_DIFFUSION,
                "num_train_timesteps": trained,
                "timestep_spacing": spacing,
                "steps_offset": 0,
            }
            yield {**config, "original_inference_steps": trained}, sampler, steps


def wrong(count: int, seed: int = 1) -> Iterator[Case]:
    """Random configs of which some values are not meant, and numbers of steps that are none."""
    choose = random.Random(seed)
    keys = [*KEYS, *READ_WITH_ONE_VALUE]
    for key, value in itertools.product(keys, WRONG):
        yield {**STABLE_DIFFUSION, key: value}, choose.choice(sorted(SAMPLERS)), 10
    for config, sampler, steps in drawn(count, seed):
        for _ in range(choose.randint(1, 2)):
            config[choose.choice(keys)] = choose.choice(WRONG)
        yield config, sampler, steps
    for sampler in SAMPLERS:
        for steps in (0, 1001, 10_001, 100_000, 2**31 - 1):
            yield {}, sampler, steps
            yield {"num_train_timesteps": 100_000}, sampler, steps
    for sampler in ("", "ddimm", "DDIM", "it's", "../ddim", "x" * 100):
        yield {}, sampler, 10


FLOW_KEYS: dict[str, tuple[Any, ...]] = {
    "num_train_timesteps": (1000, 100, 40),
    "shift": (1.0, 3.0, 0.5, 7.3),
    "flow_shift": (1.0, 2.5, 12.0),
    "use_dynamic_shifting": (True, False),
    "time_shift_type": ("exponential", "linear"),
    "base_shift": (0.5, 0.3),
    "max_shift": (1.15, 0.9),
    "base_image_seq_len": (256, 64),
    "max_image_seq_len": (4096, 8192),
    "shift_terminal": (None, 0.02, 0.1, 0),
    "use_karras_sigmas": (False, True),
    "use_exponential_sigmas": (False, True),
    "use_beta_sigmas": (False, True),
    "stochastic_sampling": (False, True),
    "solver_order": (1, 2, 3),
    "solver_type": ("midpoint", "heun", "bh1", "bh2"),
    "lower_order_final": (True,),
    "euler_at_final": (True, False),
    "algorithm_type": ("dpmsolver++",),
}
"""Values that a key of a network trained by flow matching may have."""
FLOW_CLASSES = sorted({sampler.diffusers_class for sampler in FLOW_SAMPLERS.values()})


def flows(count: int, seed: int = 2) -> Iterator[Case]:
    """Random configs of networks trained by flow matching."""
    choose = random.Random(seed)
    for _ in range(count):
        keys = choose.sample(sorted(FLOW_KEYS), choose.randint(1, 8))
        config = {key: choose.choice(FLOW_KEYS[key]) for key in keys}
        config["_class_name"] = name = choose.choice(FLOW_CLASSES)
        if not name.startswith("FlowMatch"):
            config |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        config[TOKENS] = choose.choice((64, 256, 1000, 4096, 16384))
        yield config, choose.choice(sorted(FLOW_SAMPLERS)), choose.choice((1, 2, 3, 4, 7, 13, 20, 28, 40))


def wrong_flows(count: int, seed: int = 3) -> Iterator[Case]:
    """Random configs of such networks of which some values are not meant, or samplers of other networks."""
    choose = random.Random(seed)
    keys = [*FLOW_KEYS, "prediction_type", "use_flow_sigmas", "_class_name", "invert_sigmas", *READ_WITH_ONE_VALUE]
    for config, sampler, steps in flows(count, seed):
        if choose.random() < 0.8:
            config[choose.choice(keys)] = choose.choice(WRONG)
            yield config, sampler, steps
        else:
            yield config, choose.choice(sorted(SAMPLERS)), steps


FAR_SHIFTS: dict[str, tuple[Any, ...]] = {
    "time_shift_type": ("linear", "exponential"),
    "base_shift": (0.5, 1e-300, 100.0, 710.0, 1e308),
    "max_shift": (1.15, 5e-324, 800.0, 1e308),
    "base_image_seq_len": (1, 16, 256, 4096, 2**40, 2**62),
    "max_image_seq_len": (1, 16, 256, 4096, 2**62),
    "shift_terminal": (0.1, 0.9, 1.0, 2.0),
    "num_train_timesteps": (1000, 40, 2, 1),
    "use_karras_sigmas": (True,),
    "use_exponential_sigmas": (True,),
}


def far_shifts(count: int, seed: int = 4) -> Iterator[Case]:
    """Random configs whose noise levels are by a number of tokens, often beyond what any sampler has."""
    choose = random.Random(seed)
    for _ in range(count):
        keys = choose.sample(sorted(FAR_SHIFTS), choose.randint(0, 3))
        config = {key: choose.choice(FAR_SHIFTS[key]) for key in keys}
        config |= {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": choose.choice((True, 1))}
        config[TOKENS] = choose.choice((1, 16, 60, 256, 4096, 4097, 10**6, 2**40))
        yield config, choose.choice(sorted(FLOW_SAMPLERS.keys() - {"heun"})), choose.choice((1, 2, 3, 7))


NO_CALLS = ("", "-5", "+5", "1e1", " 5", "5 ", "0x5", "\u0663", "5-calls3", "12345678", "99999999999999999999")
"""What no number of calls is."""


def forecasts(count: int, seed: int = 5) -> Iterator[Case]:
    """Random configs of both kinds of networks, of which only some calls are made, and numbers of calls that are none.

    Betas up to 0.3 are left out: from noise of 1e12 and more down to an image, folded rows lose all their digits.
    """
    choose = random.Random(seed)
    cases = itertools.chain(*zip(drawn(count, seed), flows(count, seed), strict=True))
    for config, sampler, steps in itertools.islice((case for case in cases if case[0].get("beta_end") != 0.3), count):
        calls: Any = choose.randint(1, steps)
        if choose.random() < 0.1:
            calls = choose.choice((0, steps, steps + 1, 2 * steps, 2 * steps + 1, 1_000_000, f"0{calls}", *NO_CALLS))
        yield config, f"{sampler}{CALLS}{calls}", steps


def long_forecasts() -> Iterator[Case]:
    """Dozens and hundreds of steps, of which one, some, or all but one are calls."""
    for config, sampler, steps in long():
        if steps < 100 or (steps == 333 and (sampler, config["timestep_spacing"]) == ("unipc", "linspace")):
            for calls in (1, 16, steps - 1) if steps < 100 else (111,):
                yield config, f"{sampler}{CALLS}{calls}", steps
    yield {**STABLE_DIFFUSION, "num_train_timesteps": 3000, "steps_offset": 0}, f"ddim{CALLS}6", 2600  # too far apart


def wrong_forecasts(count: int, seed: int = 6) -> Iterator[Case]:
    """Configs of which some values are not meant, of which only some calls are made."""
    choose = random.Random(seed)
    cases = [*wrong(count, seed), *wrong_flows(count, seed), *far_shifts(count, seed)]
    for config, sampler, steps in choose.sample(cases, count):
        yield config, f"{sampler}{CALLS}{choose.randint(1, max(steps, 1))}", steps
