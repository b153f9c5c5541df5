"""Plans against their judge: diffusers' scheduler of the same config drives the same network from the same noise.

diffusers keeps its tables in float32 and its sigma-scaled samplers cancel in float32, which costs up to 1e-2 where the
noise is thousands of times the image (cosine or zero-SNR schedules entered at their noisy end). So the judge runs
twice: with all of its arithmetic in float64, over every config, and untouched, over the configs that people use.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from ldm_reference import samplers, schedules

from ldm_export.plan import SAMPLERS, Plan, compile_plan
from ldm_export.plan.schedule import SchedulerConfig
from tests.scheduler_configs import (
    SHAPE,
    base_config,
    diffusers_scheduler,
    network,
    noises,
    relative_error,
    run_diffusers,
    run_plan,
)

pytestmark = [  # diffusers hands tensors to numpy functions, and torch speaks an older array protocol than numpy 2
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context and return_scalar:DeprecationWarning"),
]

FLOAT64_TOLERANCE = 1e-5
FLOAT32_TOLERANCE = 1e-4

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")

REFUSED_BY_DIFFUSERS = {("plms", "sample"), ("euler-ancestral", "sample")}
"""(sampler, prediction_type) that diffusers' class raises for; the tests below hold them against other judges."""

VARIANTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "zero-snr": (
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        ("ddpm", "ddim", "lcm", "euler", "euler-ancestral", "dpmpp-2m", "dpmpp-2m-sde", "unipc"),
    ),
    "clipped": (
        {"clip_sample": True, "clip_sample_range": 0.8, "prediction_type": "v_prediction"},
        ("ddpm", "ddim", "lcm", "heun"),
    ),
    "karras": ({"use_karras_sigmas": True}, ("euler", "heun", "dpmpp-2m", "dpmpp-2m-sde", "unipc", "deis")),
    "karras-zero-snr": (
        {"use_karras_sigmas": True, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        ("euler", "dpmpp-2m", "unipc"),
    ),
    "karras-zero-snr-beyond-its-end": (  # the last timestep, whose noise is capped, has less than the one before
        {
            "use_karras_sigmas": True,
            "rescale_betas_zero_snr": True,
            "prediction_type": "v_prediction",
            "beta_end": 0.2,
            "timestep_spacing": "linspace",
            "num_train_timesteps": 200,
        },
        ("euler", "dpmpp-2m"),
    ),
    "karras-to-sigma-min": (
        {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
        ("euler", "dpmpp-2m", "dpmpp-2m-sde"),  # diffusers' UniPC divides zero by zero there
    ),
    "sigma-min": ({"final_sigmas_type": "sigma_min"}, ("euler", "dpmpp-2m", "dpmpp-2m-sde", "unipc")),
    "alpha-one": ({"set_alpha_to_one": True, "steps_offset": 0}, ("ddim", "plms")),
    "alpha-zero": ({"set_alpha_to_one": False}, ("ddim", "plms")),
    "order-1": ({"solver_order": 1}, ("dpmpp-2m", "dpmpp-2m-sde", "unipc", "deis")),
    "order-3": ({"solver_order": 3}, ("dpmpp-2m", "unipc", "deis")),
    "order-3-throughout": (
        {"solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"},
        ("dpmpp-2m", "unipc", "deis"),
    ),
    "solver-heun": ({"solver_type": "heun"}, ("dpmpp-2m", "dpmpp-2m-sde")),
    "solver-bh1": (  # to zero noise diffusers' bh1 multiplies infinity by zero
        {"solver_type": "bh1", "solver_order": 3, "final_sigmas_type": "sigma_min"},
        ("unipc",),
    ),
    "euler-at-final": ({"euler_at_final": True, "final_sigmas_type": "sigma_min"}, ("dpmpp-2m",)),
    "variance-large": ({"variance_type": "fixed_large", "timestep_spacing": "trailing"}, ("ddpm",)),
    "variance-small-log": ({"variance_type": "fixed_small_log"}, ("ddpm",)),
    "sigmoid": ({"beta_schedule": "sigmoid"}, ("ddpm",)),
    "trained-betas": (
        {"trained_betas": np.linspace(0.001, 0.03, 400).tolist(), "num_train_timesteps": 400},
        tuple(SAMPLERS),
    ),
    "lcm-distilled-on-25": ({"original_inference_steps": 25, "timestep_scaling": 5.0}, ("lcm",)),
}
"""Keys besides the common ones, each with the samplers whose diffusers class reads them."""


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_schedule_spacing_and_prediction(
    sampler: str, prediction_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (sampler, prediction_type) in REFUSED_BY_DIFFUSERS:
        pytest.skip(f"diffusers' {SAMPLERS[sampler].diffusers_class} has no prediction_type {prediction_type!r}")
    for schedule, spacing, steps in itertools.product(SCHEDULES, SPACINGS, (1, 2, 5, 20)):
        config = base_config(beta_schedule=schedule, prediction_type=prediction_type, timestep_spacing=spacing)
        given = run_plan(compile_plan(config, sampler, steps).from_noise(), noises(7))
        expected = run_diffusers(diffusers_scheduler(config, sampler, monkeypatch), steps, 7)
        assert relative_error(given, expected) < FLOAT64_TOLERANCE, (schedule, spacing, steps)


@pytest.mark.parametrize(
    ("variant", "sampler"), [(name, sampler) for name, (_, readers) in VARIANTS.items() for sampler in readers]
)
def test_every_other_key(variant: str, sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = base_config(**VARIANTS[variant][0])
    for steps in (2, 7, 20):
        given = run_plan(compile_plan(config, sampler, steps).from_noise(), noises(7))
        expected = run_diffusers(diffusers_scheduler(config, sampler, monkeypatch), steps, 7)
        assert relative_error(given, expected) < FLOAT64_TOLERANCE, steps


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_ddim_with_noise(prediction_type: str, eta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    config = base_config(prediction_type=prediction_type, set_alpha_to_one=False)
    given = run_plan(compile_plan(config, "ddim", 20, eta=eta).from_noise(), noises(7))
    expected = run_diffusers(diffusers_scheduler(config, "ddim", monkeypatch), 20, 7, eta=eta)
    assert relative_error(given, expected) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_diffusers_as_it_ships(sampler: str) -> None:
    for prediction_type, steps in [("epsilon", 20), ("epsilon", 50), ("v_prediction", 50)]:
        config = base_config(prediction_type=prediction_type)
        given = run_plan(compile_plan(config, sampler, steps).from_noise(), noises(7, torch.float32))
        expected = run_diffusers(diffusers_scheduler(config, sampler), steps, 7, dtype=torch.float32)
        assert relative_error(given, expected) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_empty_config_means_diffusers_defaults(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"skip_prk_steps": True}
    given = run_plan(compile_plan(config, sampler, 10).from_noise(), noises(7))
    expected = run_diffusers(diffusers_scheduler(config, sampler, monkeypatch), 10, 7)
    assert relative_error(given, expected) < FLOAT64_TOLERANCE


def test_ddpm_over_a_thousand_steps() -> None:
    config = base_config(steps_offset=0)
    given = run_plan(compile_plan(config, "ddpm", 1000).from_noise(), noises(7, torch.float32))
    expected = run_diffusers(diffusers_scheduler(config, "ddpm"), 1000, 7, dtype=torch.float32)
    assert relative_error(given, expected) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "plms"])
def test_starting_from_an_image(sampler: str, prediction_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = base_config(prediction_type=prediction_type, solver_order=2 if sampler == "dpmpp-2m-sde" else 3)
    image = np.random.default_rng(3).normal(size=SHAPE)
    for steps, starts in [(6, range(6)), (20, (3, 12, 17))]:
        plan = compile_plan(config, sampler, steps)
        for start in starts:
            given = run_plan(plan.starting_at(start), noises(7), image)
            expected = run_diffusers(diffusers_scheduler(config, sampler, monkeypatch), steps, 7, image, start)
            assert relative_error(given, expected) < FLOAT64_TOLERANCE, (steps, start)


def _denoise(x: torch.Tensor, timestep: int) -> torch.Tensor:
    return torch.from_numpy(network(x.numpy(), timestep))


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "plms"])
def test_the_textbook_samplers(sampler: str, prediction_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = base_config(prediction_type=prediction_type, steps_offset=0, set_alpha_to_one=True)
    alphas_cumprod = schedules.alphas_cumprod_from_betas(schedules.make_betas())
    for steps in (1, 2, 5, 20):
        generator = torch.Generator().manual_seed(7)
        draw = functools.partial(torch.randn, SHAPE, generator=generator, dtype=torch.float64)
        options = {} if sampler == "plms" else {"noise": lambda _, draw=draw: draw()}
        timesteps = schedules.leading_timesteps(1000, steps)
        textbook = getattr(samplers, sampler)(
            _denoise, draw(), alphas_cumprod, timesteps, prediction_type=prediction_type, **options
        ).numpy()
        given = run_plan(compile_plan(config, sampler, steps).from_noise(), noises(7))
        assert relative_error(given, textbook) < FLOAT64_TOLERANCE
        if (sampler, prediction_type) not in REFUSED_BY_DIFFUSERS:
            expected = run_diffusers(diffusers_scheduler(config, sampler, monkeypatch), steps, 7)
            assert relative_error(textbook, expected) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_plms_from_an_image_is_the_textbook_started_there(prediction_type: str) -> None:
    config = base_config(prediction_type=prediction_type, steps_offset=0, set_alpha_to_one=True)
    alphas_cumprod = schedules.alphas_cumprod_from_betas(schedules.make_betas())
    image = np.random.default_rng(3).normal(size=SHAPE)
    plan, timesteps = compile_plan(config, "plms", 12), schedules.leading_timesteps(1000, 12)
    for start in range(12):
        here = torch.full((SHAPE[0],), timesteps[start])
        noised = schedules.add_noise(torch.from_numpy(image), torch.from_numpy(noises(7)()), alphas_cumprod, here)
        expected = samplers.plms(
            _denoise, noised, alphas_cumprod, timesteps[start:], prediction_type=prediction_type
        ).numpy()
        assert relative_error(run_plan(plan.starting_at(start), noises(7), image), expected) < FLOAT64_TOLERANCE, start


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("beta_schedule", schedules.SCHEDULES)
def test_the_tables_are_those_of_the_reference(beta_schedule: str, zero_snr: bool) -> None:
    config = base_config(beta_schedule=beta_schedule, rescale_betas_zero_snr=zero_snr)
    given = SchedulerConfig.from_dict(config, {}).alphas_cumprod()
    betas = schedules.make_betas(beta_schedule, rescale_betas_zero_snr=zero_snr)
    np.testing.assert_allclose(given, schedules.alphas_cumprod_from_betas(betas).numpy(), rtol=1e-9, atol=1e-15)


def _spoilt(plan: Plan, step: int, **changes: Any) -> Plan:
    rows = list(plan.rows)
    rows[step] = dataclasses.replace(rows[step], **changes)
    return dataclasses.replace(plan, rows=tuple(rows))


@pytest.mark.parametrize("field", ["timestep", "keep", "from_sample", "from_output", "weights"])
def test_a_wrong_plan_fails(field: str) -> None:
    plan = compile_plan(base_config(), "unipc", 10)
    row = plan.rows[4]
    if field == "weights":
        value: Any = (row.weights[0], row.weights[1] * 1.01, *row.weights[2:])
    else:
        value = getattr(row, field) * 1.01
    wrong = run_plan(_spoilt(plan, 4, **{field: value}).from_noise(), noises(7, torch.float32))
    expected = run_diffusers(diffusers_scheduler(base_config(), "unipc"), 10, 7, dtype=torch.float32)
    assert relative_error(wrong, expected) > FLOAT32_TOLERANCE
