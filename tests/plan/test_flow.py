"""Plans of networks trained by flow matching, against diffusers' schedulers of the same configs."""

from __future__ import annotations

import itertools
import math
from typing import Any

import mpmath
import numpy as np
import pytest

from ldm_export.errors import InputError
from ldm_export.plan import compile_plan, sampler_of
from ldm_export.plan.flow import beta_quantile
from ldm_export.plan.samplers import FLOW_SAMPLERS, SAMPLERS
from tests.scheduler_configs import SHAPE, diffusers_scheduler, noises, relative_error, run_diffusers, run_plan

pytestmark = [  # diffusers hands tensors to numpy functions, and torch speaks an older array protocol than numpy 2
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context and return_scalar:DeprecationWarning"),
]

TOLERANCE = 1e-6
EULER, HEUN = "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"
CLASSES = {name: sampler.diffusers_class for name, sampler in FLOW_SAMPLERS.items()}
SOLVERS = ("dpmpp-2m", "dpmpp-2m-sde", "unipc")
STEPS = (2, 7, 28)
TOKENS = (256, 1000, 4096)

VARIANTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": ({}, tuple(CLASSES)),
    "shift-3": ({"shift": 3.0, "flow_shift": 3.0}, tuple(CLASSES)),
    "shift-0.5": ({"shift": 0.5, "flow_shift": 0.5}, tuple(CLASSES)),
    "trained-on-250": ({"num_train_timesteps": 250, "shift": 2.0}, tuple(CLASSES)),
    "dynamic": ({"use_dynamic_shifting": True}, ("euler", *SOLVERS)),
    "dynamic-linear": ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, ("euler", "unipc")),
    "dynamic-as-Flux": ({"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}, ("euler",)),
    "terminal": ({"shift_terminal": 0.02, "shift": 2.0}, ("euler", "unipc")),
    "terminal-dynamic": ({"shift_terminal": 0.1, "use_dynamic_shifting": True}, ("euler", "unipc")),
    "karras": ({"use_karras_sigmas": True, "shift": 3.0}, ("euler",)),
    "exponential": ({"use_exponential_sigmas": True, "shift": 3.0}, ("euler",)),
    "stochastic": ({"stochastic_sampling": True, "shift": 3.0}, ("euler",)),
    "order-1": ({"solver_order": 1}, SOLVERS),
    "order-3": ({"solver_order": 3, "flow_shift": 2.0}, ("dpmpp-2m", "unipc")),
    "heun": ({"solver_type": "heun"}, ("dpmpp-2m", "dpmpp-2m-sde")),
    "euler-at-final": ({"euler_at_final": True}, ("dpmpp-2m",)),
}


def config_of(sampler: str, **changes: Any) -> dict[str, Any]:
    """A config of the class that a sampler equals, as diffusers saves it."""
    own: dict[str, Any] = {"_class_name": CLASSES[sampler], "num_train_timesteps": 1000}
    if sampler in SOLVERS:
        own |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 1.0}
        if sampler == "dpmpp-2m-sde":
            own["algorithm_type"] = "sde-dpmsolver++"
    return own | changes


def mu_of(config: dict[str, Any], tokens: int) -> dict[str, float]:
    """What diffusers' pipelines hand to ``set_timesteps`` (their ``calculate_shift``)."""
    if not config.get("use_dynamic_shifting"):
        return {}
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (high - low) / (4096 - 256)
    return {"mu": tokens * slope + low - slope * 256}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("variant", "sampler"), [(name, each) for name, (_, each) in VARIANTS.items() for each in each]
)
def test_from_noise_and_from_an_image(variant: str, sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(sampler, **VARIANTS[variant][0])
    image = np.random.default_rng(1).standard_normal(SHAPE)
    for steps, tokens in itertools.product(STEPS, TOKENS if "use_dynamic_shifting" in config else (0,)):
        options = mu_of(config, tokens)
        plan = compile_plan(config, sampler, steps, tokens=tokens)
        scheduler = diffusers_scheduler(config, sampler, monkeypatch)
        given, expected = run_plan(plan.from_noise(), noises(7)), run_diffusers(scheduler, steps, 7, **options)
        assert relative_error(given, expected) < TOLERANCE, steps
        start = steps // 2
        given = run_plan(plan.starting_at(start), noises(7), image)
        scheduler = diffusers_scheduler(config, sampler, monkeypatch)
        expected = run_diffusers(scheduler, steps, 7, image, start, **options)
        assert relative_error(given, expected) < TOLERANCE, (steps, start)


@pytest.mark.parametrize("share", [0.0, 1e-9, 1e-3, 0.1, 0.25, 0.5, 0.75, 0.999, 1.0])
def test_quantiles_of_the_beta_distribution(share: float) -> None:
    """diffusers takes them from scipy; mpmath's regularized incomplete beta function undoes ours."""
    quantile = beta_quantile(share)
    assert 0 <= quantile <= 1
    assert float(mpmath.betainc(0.6, 0.6, 0, quantile, regularized=True)) == pytest.approx(share, rel=1e-9, abs=1e-11)


def test_beta_sigmas_lie_between_the_ends() -> None:
    plan = compile_plan(config_of("euler", use_beta_sigmas=True, shift=3.0), "euler", 9)
    timesteps = [row.timestep for row in plan.rows]
    ends = [row.timestep for row in compile_plan(config_of("euler", shift=3.0), "euler", 9).rows]
    assert (timesteps[0], timesteps[-1]) == pytest.approx((ends[0], ends[-1]), abs=1e-9)
    expected = [ends[-1] + beta_quantile(1 - k / 8) * (ends[0] - ends[-1]) for k in range(9)]
    assert timesteps == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("sampler", CLASSES)
def test_each_class_is_the_sampler_that_equals_it(sampler: str) -> None:
    assert sampler_of(config_of(sampler)) == sampler


@pytest.mark.parametrize("sampler", SOLVERS)
def test_a_network_is_shifted_alike_by_any_sampler(sampler: str) -> None:
    """A shift is of the network, so other samplers take it over; diffusers asks for ``flow_shift`` by hand."""
    given = compile_plan(config_of("euler", shift=3.0), sampler, 7)
    assert given == compile_plan(config_of(sampler, flow_shift=3.0), sampler, 7)
    back = compile_plan(config_of(sampler, flow_shift=3.0), "euler", 7)
    assert back == compile_plan(config_of("euler", shift=3.0), "euler", 7)


def test_by_euler_the_latents_end_at_the_picture() -> None:
    """A network that knows the picture is followed to it from any noise, whatever the shift."""
    image, noise = (np.random.default_rng(seed).standard_normal(SHAPE) for seed in (1, 2))
    for sampler in ("euler", "heun"):
        plan = compile_plan(config_of(sampler, shift=3.0), sampler, 5)
        latents = run_plan(plan.from_noise(), lambda: noise, model=lambda sample, timestep: noise - image)
        np.testing.assert_allclose(latents, image, atol=1e-12)


@pytest.mark.parametrize("sampler", sorted(SAMPLERS.keys() - FLOW_SAMPLERS.keys()))
def test_samplers_for_other_networks(sampler: str) -> None:
    message = f"^{sampler} is for networks trained on the noise of DDPM; this one was trained by flow matching, which"
    with pytest.raises(InputError, match=message):
        compile_plan(config_of("euler"), sampler, 5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (config_of("unipc", prediction_type="epsilon"), "use_flow_sigmas = True and prediction_type = 'epsilon'"),
        (config_of("unipc", use_flow_sigmas=False), "use_flow_sigmas = False and prediction_type = 'flow_prediction'"),
        ({"_class_name": "EulerDiscreteScheduler", "prediction_type": "flow_prediction"}, "use_flow_sigmas = None and"),
        (config_of("unipc", use_karras_sigmas=True), "use_karras_sigmas = True; only False is supported"),
        (config_of("unipc", final_sigmas_type="sigma_min"), "only 'zero' is supported"),
        (config_of("euler", invert_sigmas=True), "invert_sigmas = True; only False is supported"),
        (config_of("unipc", invert_sigmas=True), "invert_sigmas = True; only False is supported"),
        (config_of("euler", shift=0.0), "shift = 0.0; it must be a positive number"),
        (config_of("euler", use_dynamic_shifting=True), "by the number of a picture's tokens, and none were given"),
        (config_of("euler", use_dynamic_shifting=True, time_shift_type="square"), "exponential, linear"),
        (config_of("euler", shift_terminal=0.1), "numbers that float32 does not hold"),
    ],
)
def test_configs_that_no_plan_is_made_of(config: dict[str, Any], message: str) -> None:
    sampler = "unipc" if config["_class_name"].startswith("UniPC") else "euler"
    with pytest.raises(InputError, match=message):
        compile_plan(config, sampler, 1)


@pytest.mark.parametrize("spacing", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_a_shift_below_zero(spacing: str) -> None:
    """As a linear one is of pictures far from those that the network was trained on."""
    config = config_of("euler", use_dynamic_shifting=True, time_shift_type="linear", max_shift=0.1, **{spacing: True})
    assert compile_plan(config, "euler", 5, tokens=4096).tokens == 4096
    with pytest.raises(InputError, match="numbers that float32 does not hold"):
        compile_plan(config, "euler", 5, tokens=10**6)


@pytest.mark.parametrize(
    ("sampler", "key", "value"),
    [
        ("heun", "use_dynamic_shifting", True),
        ("heun", "use_karras_sigmas", True),
        ("heun", "shift_terminal", 0.1),
        ("dpmpp-2m", "shift_terminal", 0.1),
        ("dpmpp-2m", "use_beta_sigmas", True),
    ],
)
def test_what_a_sampler_does_not_read_of_the_networks_levels_is_refused(sampler: str, key: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{key} = {value}; only"):
        compile_plan(config_of("euler", **{key: value}), sampler, 5)


def test_a_class_whose_sampler_there_is_none_of() -> None:
    config = {"_class_name": "DEISMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    with pytest.raises(InputError, match="none of euler, heun, dpmpp-2m, dpmpp-2m-sde, unipc equals it"):
        sampler_of(config)
    assert math.isfinite(compile_plan(config, "euler", 3).rows[0].direct)
