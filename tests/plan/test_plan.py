"""Plans on their own: what they promise, the file they are kept in, and each way that a file or a config can lie."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_export import plan as public
from ldm_export.errors import InputError
from ldm_export.plan import MAX_HISTORY, SAMPLERS, Entry, Plan, Row, Stepper, Trajectory, compile_plan
from ldm_export.plan.schedule import Level, SchedulerConfig
from ldm_export.plan.table import Entries, Latents
from tests.scheduler_configs import SHAPE, base_config, network, noises, run_plan

samplers = st.sampled_from(sorted(SAMPLERS))
predictions = st.sampled_from(["epsilon", "v_prediction", "sample"])
spacings = st.sampled_from(["leading", "trailing", "linspace"])


def test_the_public_surface() -> None:
    names = "CALLS Entry FORMAT_VERSION Forecast MAX_HISTORY Plan Row SAMPLERS Scales Stepper Trajectory"
    functions = "compile_plan forecast_of picture_tokens row_levels sampler_of shifts_dynamically"
    assert sorted(public.__all__) == [*names.split(), *functions.split()]


def test_importing_it_needs_neither_torch_nor_onnx() -> None:
    code = "import sys, ldm_export.plan; sys.exit(any(name in sys.modules for name in ('torch', 'onnx', 'scipy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _perfect_denoiser(config: dict[str, Any], x0: Latents) -> Callable[[Latents, float], Latents]:
    """The network that has learned a single image: it solves x = alpha x0 + sigma eps for what it is to predict."""
    ratios = SchedulerConfig.from_dict(config, {}).ratios()

    def predict(sample: Latents, timestep: float) -> Latents:
        alpha, sigma = Level.from_ratio(float(np.interp(timestep, np.arange(len(ratios)), ratios)))
        eps = (sample - alpha * x0) / sigma
        return {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}[config["prediction_type"]]

    return predict


@settings(max_examples=60, deadline=None)
@given(samplers, predictions, st.sampled_from(["leading", "trailing"]), st.integers(1, 30), st.booleans())
def test_a_perfect_denoiser_gives_back_its_image(
    sampler: str, prediction: str, spacing: str, steps: int, from_image: bool
) -> None:
    if sampler == "plms":  # it mixes what the network predicts, and only eps is the same at every step
        prediction, spacing = "epsilon", "leading"
    elif sampler == "ddim":  # trailing steps that do not divide the timesteps end above no noise, as in diffusers
        spacing = "leading"
    config = base_config(prediction_type=prediction, timestep_spacing=spacing, set_alpha_to_one=True)
    image, x0 = np.random.default_rng(0).normal(size=(2, *SHAPE))
    plan = compile_plan(config, sampler, steps)
    trajectory = plan.starting_at(steps // 2) if from_image else plan.from_noise()
    given_back = run_plan(trajectory, noises(1), image, _perfect_denoiser(config, x0))
    expected = x0
    if sampler == "deis":  # ends at the least noise that was trained, with the eps that it began with
        first = trajectory.rows[0]
        start = trajectory.image_scale * image + trajectory.noise_scale * noises(1)()
        eps = _perfect_denoiser(config | {"prediction_type": "epsilon"}, x0)(start, first.timestep)
        alpha, sigma = Level.from_ratio(SchedulerConfig.from_dict(config, {}).ratios()[0])
        expected = alpha * x0 + sigma * eps
    tolerance = 2e-3 if sampler == "lcm" else 1e-9  # lcm's boundary scaling leaves a trace of x
    np.testing.assert_allclose(given_back, expected, atol=tolerance)


@settings(max_examples=40, deadline=None)
@given(samplers, predictions, spacings, st.integers(1, 40))
def test_a_plan_file_reads_back_to_the_last_bit(sampler: str, prediction: str, spacing: str, steps: int) -> None:
    plan = compile_plan(base_config(prediction_type=prediction, timestep_spacing=spacing), sampler, steps)
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert Plan.from_json(text).to_json() == text
    assert text.endswith("}\n")
    assert plan.file_name == f"{sampler}-{steps}.json"


@settings(max_examples=40, deadline=None)
@given(samplers, st.integers(1, 40))
def test_entries_share_the_plan(sampler: str, steps: int) -> None:
    plan = compile_plan(base_config(), sampler, steps)
    assert plan.starting_at(0).rows == plan.rows
    for start, entry in enumerate(plan.entries):
        rows = plan.starting_at(start).rows
        assert len(entry.warmup) <= MAX_HISTORY + 1
        assert [row.timestep for row in rows] == sorted((row.timestep for row in rows), reverse=True)
        assert len(rows) <= len(plan.rows)


def test_numbers_are_python_floats() -> None:
    """A numpy scalar would lift float32 latents to float64."""
    for sampler in SAMPLERS:
        plan = compile_plan(base_config(use_karras_sigmas=True), sampler, 6)
        for row in plan.rows:
            values = [value for value in vars(row).values() if not isinstance(value, tuple)]
            assert all(type(value) is float for value in (*values, *row.weights))
        assert all(type(value) is float for entry in plan.entries for value in (entry.image_scale, entry.noise_scale))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_stepper_runs_float32_in_place(sampler: str) -> None:
    plan, draw = compile_plan(base_config(clip_sample=True), sampler, 12), noises(5)
    start, drawn = plan.init_scale * draw(), []
    latents = start.astype(np.float32)
    stepper, buffer = Stepper(plan.rows, latents), np.empty_like(latents)
    for row in plan.rows:
        stepper.network_input(out=buffer)
        stepper.advance(network(buffer, row.timestep), lambda: drawn.append(draw().astype(np.float32)) or drawn[-1])
    assert stepper.latents is latents
    assert latents.dtype == np.float32
    assert len(drawn) == sum(row.noise != 0 for row in plan.rows)
    expected = run_plan(plan.from_noise(), noises(5))
    np.testing.assert_allclose(latents, expected, atol=1e-4 * np.abs(expected).max())


def test_strength_counts_steps_as_diffusers_does() -> None:
    plan = compile_plan(base_config(), "ddim", 20)
    for strength, start in [(1.0, 0), (0.6, 8), (0.33, 14), (0.05, 19)]:
        assert plan.for_strength(strength) == plan.starting_at(start)
    for strength in (0.0, 0.04, 1.01, -1.0, math.nan):
        with pytest.raises(InputError, match=rf"strength {strength} of 20 steps.*\[0.05, 1\]"):
            plan.for_strength(strength)
    with pytest.raises(InputError, match="steps 0 to 19"):
        plan.starting_at(20)


@pytest.mark.parametrize(
    ("config", "sampler", "steps", "eta", "message"),
    [
        ({}, "ddimm", 10, 0.0, "'ddimm' is not known; known are ddpm, ddim, plms"),
        ({}, "ddim", 0, 0.0, "num_inference_steps is 0; it must be 1 to 1000"),
        ({}, "ddim", 1001, 0.0, "num_inference_steps is 1001"),
        ({}, "ddim", 10.0, 0.0, "num_inference_steps is 10.0"),
        ({}, "ddim", True, 0.0, "num_inference_steps is True"),
        ({}, "ddim", 10, 1.5, "eta is 1.5"),
        ({}, "euler", 10, 0.5, "eta is 0.5 with sampler euler"),
        ({"beta_schedule": "exp"}, "ddim", 10, 0.0, "beta_schedule = 'exp'; it must be one of linear, scaled_linear"),
        (
            {"prediction_type": "flow_prediction"},
            "unipc",
            10,
            0.0,
            "use_flow_sigmas = None and prediction_type = 'flow",
        ),
        ({"timestep_spacing": "even"}, "ddim", 10, 0.0, "must be one of leading, trailing, linspace"),
        ({"variance_type": "learned_range"}, "ddpm", 10, 0.0, "must be one of fixed_small"),
        ({"final_sigmas_type": "one"}, "euler", 10, 0.0, "must be one of zero, sigma_min"),
        ({"thresholding": True}, "ddim", 10, 0.0, "thresholding = True; only False is supported"),
        ({"use_beta_sigmas": True}, "euler", 10, 0.0, "use_beta_sigmas = True"),
        ({"disable_corrector": [0]}, "unipc", 10, 0.0, r"disable_corrector = \[0\]"),
        ({"num_train_timesteps": "1000"}, "ddim", 10, 0.0, "num_train_timesteps = '1000'; it must be a positive int"),
        ({"num_train_timesteps": 0}, "ddim", 10, 0.0, "num_train_timesteps = 0"),
        ({"beta_start": -0.1}, "ddim", 10, 0.0, "beta_start = -0.1; it must be a positive number"),
        ({"beta_end": math.inf}, "ddim", 10, 0.0, "beta_end = inf"),
        ({"beta_end": 1.5}, "ddim", 10, 0.0, r"inside \(0, 1\)"),
        ({"clip_sample": 2}, "ddim", 10, 0.0, "clip_sample = 2; it must be true or false"),
        ({"steps_offset": -1}, "ddim", 10, 0.0, "steps_offset = -1"),
        ({"trained_betas": [0.1, 0.2]}, "ddim", 10, 0.0, "2 betas"),
        ({"trained_betas": ["a"]}, "ddim", 10, 0.0, "a list of decimal numbers"),
        ({"steps_offset": 1, "timestep_spacing": "leading"}, "ddim", 1000, 0.0, "do not fit into 1000"),
        ({}, "dpmpp-2m", 1000, 0.0, "each must be a different one"),
        ({"original_inference_steps": 8}, "lcm", 9, 0.0, "original_inference_steps 8"),
        ({"solver_order": 4}, "unipc", 10, 0.0, "unipc has orders 1 to 3"),
        ({"solver_order": 3}, "dpmpp-2m-sde", 10, 0.0, "dpmpp-2m-sde has orders 1 to 2"),
        ({"lower_order_final": False}, "unipc", 10, 0.0, "lower_order_final"),
        (
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            "ddim",
            10,
            0.0,
            "'epsilon' cannot start at zero terminal SNR",
        ),
    ],
)
def test_a_config_that_cannot_be_compiled(
    config: dict[str, Any], sampler: str, steps: int, eta: float, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        compile_plan(config, sampler, steps, eta=eta)


def test_zero_terminal_snr_starts_from_nothing_but_noise() -> None:
    config = base_config(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction", set_alpha_to_one=True
    )
    for sampler in ("ddim", "ddpm", "plms"):
        plan = compile_plan(config, sampler, 10)
        assert (plan.entries[0].image_scale, plan.entries[0].noise_scale) == (0.0, 1.0)
    for sampler in ("heun", "deis"):  # diffusers' classes do not read the key; the least SNR is kept off zero
        assert all(math.isfinite(row.keep) for row in compile_plan(config, sampler, 10).rows)


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
@pytest.mark.parametrize("solver_type", ["bh1", "bh2", "midpoint"])
def test_unipc_reaches_zero_noise_with_every_solver_type(solver_type: str, steps: int) -> None:
    config = base_config(solver_type=solver_type, solver_order=3)
    x0 = np.random.default_rng(0).normal(size=SHAPE)
    trajectory = compile_plan(config, "unipc", steps).from_noise()
    given_back = run_plan(trajectory, noises(1), model=_perfect_denoiser(config, x0))
    np.testing.assert_allclose(given_back, x0, atol=1e-9)


def test_a_single_karras_step_of_deis_denoises() -> None:
    row = compile_plan(base_config(use_karras_sigmas=True), "deis", 1).rows[0]
    assert row.keep > 1
    assert row.weights[0] < 0


def _edit(path: tuple[str | int, ...], value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(document: dict[str, Any]) -> None:
        *parents, last = path
        node: Any = document
        for key in parents:
            node = node[key]
        if value is KeyError:
            del node[last]
        else:
            node[last] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_edit(("format_version",), 2), "format_version 2; this package reads 1"),
        (_edit(("format_version",), True), "format_version True"),
        (_edit(("format_version",), KeyError), "format_version None"),
        (_edit(("rows",), KeyError), "must hold exactly"),
        (_edit(("comment",), "hello"), "must hold exactly"),
        (_edit(("sampler",), 3), "sampler = 3; it must be str"),
        (_edit(("num_inference_steps",), 8.0), "num_inference_steps = 8.0; it must be int"),
        (_edit(("num_inference_steps",), 0), "a plan of 0 steps"),
        (_edit(("num_inference_steps",), 3), "a plan of 3 steps has 8 rows"),
        (_edit(("init_scale",), 1e39), r"noise_scale 1e\+39"),
        (_edit(("init_scale",), math.inf), "Infinity is no number"),
        (_edit(("init_scale",), None), "init_scale = None"),
        (_edit(("rows",), {}), "rows = {}; it must be list"),
        (_edit(("rows",), []), "8 steps has 0 rows"),
        (_edit(("rows", 2), 7), "a row holds int"),
        (_edit(("rows", 2, "keep"), KeyError), "a row holds"),
        (_edit(("rows", 2, "keep"), "1"), "keep = '1'; it must be float"),
        (_edit(("rows", 2, "keep"), True), "keep = True"),
        (_edit(("rows", 2, "keep"), math.nan), "NaN is no number"),
        (_edit(("rows", 2, "keep"), 10**400), "beyond a float64"),
        (_edit(("rows", 2, "noise"), -math.inf), "-Infinity is no number"),
        (_edit(("rows", 2, "timestep"), -1.0), "timestep -1.0"),
        (_edit(("rows", 2, "input_scale"), 0.0), "input_scale 0.0"),
        (_edit(("rows", 2, "clip"), -1.0), "clip -1.0"),
        (_edit(("rows", 7, "weights"), [0.0] * 6), "6 weights; at most 5"),
        (_edit(("rows", 7, "weights", 0), -1e39), "weights = .*finite in float32"),
        (_edit(("rows", 7, "weights"), 0.5), "weights = 0.5; it must be list"),
        (_edit(("rows", 1, "weights"), [0.1, 0.2, 0.3]), "call 2 of a plan weighs 3 remembered values; only 2"),
        (_edit(("entries",), []), "8 steps has 0 entries"),
        (_edit(("entries", 3, "resume"), 9), "entry 3 of a plan resumes at row 9"),
        (_edit(("entries", 3, "resume"), -1), "resumes at row -1"),
        (_edit(("entries", 3, "resume"), 4.0), "resume = 4.0; it must be int"),
        (_edit(("entries", 3, "warmup"), []), "weighs 4 remembered values; only 1"),
        (_edit(("entries", 7, "resume"), 8), "with 0 rows"),
        (_edit(("entries", 3, "image_scale"), math.nan), "NaN is no number"),
    ],
)
def test_a_plan_file_that_lies(edit: Callable[[dict[str, Any]], None], message: str) -> None:
    document = json.loads(compile_plan(base_config(solver_order=3), "unipc", 8).to_json())
    edit(document)
    with pytest.raises(InputError, match=message):
        Plan.from_json(json.dumps(document))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format_version": 1}', "\x00", "[" * 100_000])
def test_a_file_that_is_no_plan(text: str) -> None:
    with pytest.raises(InputError, match="Compile the plan again"):
        Plan.from_json(text)


def test_a_trajectory_is_checked_where_it_is_made() -> None:
    with pytest.raises(InputError, match="with 0 rows"):
        Trajectory(0.0, 1.0, ())
    with pytest.raises(InputError, match="only 1 exist"):
        Trajectory(0.0, 1.0, (Row(0.0, weights=(1.0, 1.0)),))


def test_entries_are_made_when_they_are_asked_for() -> None:
    asked: list[int] = []
    whole = compile_plan(base_config(), "unipc", 8)
    made = tuple(whole.entries)

    def make(step: int) -> Entry:
        asked.append(step)
        return made[step]

    plan = dataclasses.replace(whole, entries=Entries(8, make))
    assert plan.from_noise().rows == plan.rows
    assert asked == []
    assert plan.for_strength(0.25) == plan.starting_at(6) == whole.starting_at(6)
    assert asked == [6]
    assert plan.entries[-1] == made[-1]
    assert plan.entries[2:4] == made[2:4]
    assert plan == whole == dataclasses.replace(whole, entries=made)
    assert hash(plan) == hash(dataclasses.replace(whole, entries=made))
    assert plan.to_json() == whole.to_json()
    assert Plan.from_json(plan.to_json()) == plan
    other = (*made[:-1], dataclasses.replace(made[-1], noise_scale=0.5))
    assert plan != dataclasses.replace(whole, entries=other)
    with pytest.raises(IndexError):
        plan.entries[8]


def test_more_steps_than_a_plan_may_have() -> None:
    config = {"num_train_timesteps": 100_000, "beta_start": 1e-6, "beta_end": 1e-4}
    with pytest.raises(InputError, match="must be 1 to 10000, the most that a plan may have"):
        compile_plan(config, "ddim", 10_001)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_start": 5e-324}, r"1000 betas in \[0, 0.02\]"),
        ({"num_train_timesteps": 100_000}, "alphas_cumprod go from 1 to 0; each must be smaller"),
        ({"num_train_timesteps": 1, "rescale_betas_zero_snr": True}, "1 training timestep; it needs 2"),
        ({"clip_sample_range": 1e39}, "ddim with 1 steps of this scheduler config has numbers that float32"),
        ({"beta_end": 1.7e308}, r"1000 betas in \[0.0001, 1.7e\+308\]"),
        ({"prediction_type": "x" * 100_000}, r"prediction_type = 'x{59}\.\.\.; it must be one of"),
        ({"trained_betas": [0] * 100_000}, r"trained_betas = \[0, .{55,58}\.\.\.; it must be a list"),
    ],
)
def test_numbers_that_no_network_was_trained_with(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compile_plan({"clip_sample": True, "timestep_spacing": "trailing", **config}, "ddim", 1)


@pytest.fixture
def flushing() -> Iterator[None]:
    """A thread whose processor takes numbers too small to be normal for 0, as sessions of some runtimes leave it."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("flushing")
def test_a_thread_that_flushes_small_numbers_reads_a_config_alike() -> None:
    with pytest.raises(InputError, match="alphas_cumprod go from 1 to 0; each must be smaller"):
        compile_plan({"num_train_timesteps": 100_000}, "ddim", 1)
