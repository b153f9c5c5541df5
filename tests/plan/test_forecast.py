"""Forecast plans, against diffusers' schedulers that are given the very outputs that a forecast stands for."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from ldm_export.errors import InputError
from ldm_export.plan import SAMPLERS, Forecast, Plan, compile_plan
from ldm_export.plan.forecast import spaced_calls
from ldm_export.plan.samplers import FLOW_SAMPLERS
from ldm_export.plan.table import Latents
from tests.plan.test_flow import config_of
from tests.scheduler_configs import SHAPE, base_config, diffusers_scheduler, network, noises, relative_error, run_plan

pytestmark = [  # diffusers hands tensors to numpy functions, and torch speaks an older array protocol than numpy 2
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context and return_scalar:DeprecationWarning"),
]

TOLERANCE = 1e-5
WITHOUT_NOISE = ("ddim", "plms", "euler", "heun", "dpmpp-2m", "unipc", "deis")
FLOW_WITHOUT_NOISE = tuple(name for name in FLOW_SAMPLERS if name != "dpmpp-2m-sde")


def polynomial(known: dict[float, Latents], timestep: float, order: int) -> Latents:
    """The extrapolated output, as a least-squares fit finds it."""
    times, values = list(known)[-order - 1 :], list(known.values())[-order - 1 :]
    origin, scale = times[-1], max(1.0, abs(times[0] - times[-1]))
    matrix = np.vander((np.array(times) - origin) / scale, len(times))
    coefficients = np.linalg.solve(matrix, np.stack([value.ravel() for value in values]))
    share = np.vander([(timestep - origin) / scale], len(times))
    return (share @ coefficients).reshape(values[0].shape)


def forms_of(plan: Plan) -> list[tuple[float, float]]:
    """What of x and of the output is extrapolated at each row: what it remembers, or the output."""
    return [(row.from_sample, row.from_output) if row.weights else (0.0, 1.0) for row in plan.rows]


def run_diffusers(
    scheduler: Any,
    steps: int,
    whole: Plan,
    made: tuple[int, ...],
    order: int,
    image: Latents | None = None,
    start: int = 0,
) -> Latents:
    """The final latents of a scheduler whose network is called where it is ``made`` only."""
    generator = torch.Generator().manual_seed(7)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps[start * scheduler.order :]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * scheduler.order)
    noise = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    latents = noise * scheduler.init_noise_sigma
    if image is not None:
        latents = scheduler.add_noise(torch.from_numpy(image), noise, timesteps[:1])
    extras = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    known: dict[float, Latents] = {}
    for number, (timestep, (of_x, of_output)) in enumerate(zip(timesteps, forms_of(whole)[start:], strict=True)):
        sample = scheduler.scale_model_input(latents, timestep).numpy()
        if number in made:
            output = network(sample, float(timestep))
            known.pop(float(timestep), None)
            known[float(timestep)] = of_x * latents.numpy() + of_output * output
        else:
            output = (polynomial(known, float(timestep), order) - of_x * latents.numpy()) / of_output
        latents = scheduler.step(torch.from_numpy(output), timestep, latents, **extras).prev_sample
    return latents.numpy()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", WITHOUT_NOISE)
def test_equals_the_scheduler_with_extrapolated_outputs(
    sampler: str, prediction_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = base_config(prediction_type=prediction_type)
    judged = 0
    for steps, calls, order in itertools.product((20, 50), (16, 11), (0, 1, 2)):
        whole = compile_plan(config, sampler, steps)
        try:
            plan = compile_plan(config, sampler, steps, forecast=Forecast(calls, order))
        except InputError as error:
            assert "a row remembers 4" in str(error)  # noqa: PT017
            continue
        assert len(plan.rows) == calls
        made = spaced_calls(len(whole.rows), calls)
        expected = run_diffusers(diffusers_scheduler(config, sampler, monkeypatch), steps, whole, made, order)
        assert relative_error(run_plan(plan.from_noise(), noises(7)), expected) < TOLERANCE, (steps, calls, order)
        judged += 1
    assert judged >= 10


@pytest.mark.parametrize("sampler", FLOW_WITHOUT_NOISE)
def test_equals_a_flow_scheduler_with_extrapolated_outputs(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(sampler, shift=2.0)
    for steps, calls in ((28, 10), (50, 16)):
        whole = compile_plan(config, sampler, steps)
        plan = compile_plan(config, sampler, steps, forecast=Forecast(calls))
        made = spaced_calls(len(whole.rows), calls)
        expected = run_diffusers(diffusers_scheduler(config, sampler, monkeypatch), steps, whole, made, 1)
        assert relative_error(run_plan(plan.from_noise(), noises(7)), expected) < TOLERANCE, steps


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp-2m"])
def test_an_entry_from_an_image(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first calls are made as from noise, and then those of the whole plan."""
    config, image = base_config(), np.random.default_rng(1).standard_normal(SHAPE)
    whole, plan = compile_plan(config, sampler, 30), compile_plan(config, sampler, 30, forecast=Forecast(12))
    for start in (0, 1, 7, 20, 28, 29):
        made = tuple(sorted({at - start for at in spaced_calls(30, 12) if at >= start} | {0, 1, 2}))
        judge = diffusers_scheduler(config, sampler, monkeypatch)
        expected = run_diffusers(judge, 30, whole, made, 1, image, start)
        given = run_plan(plan.starting_at(start), noises(7), image)
        assert relative_error(given, expected) < TOLERANCE, start
        assert len(plan.entries[start].warmup) <= 6


def test_all_calls_are_the_plan_itself() -> None:
    config = base_config()
    assert compile_plan(config, "ddim", 10, forecast=Forecast(10)) == compile_plan(config, "ddim", 10)


def _stepwise(plan: Plan, forms: list[tuple[float, float]], made: tuple[int, ...], draw: Any) -> Latents:
    """The definition: every step of the whole plan, its output made from an extrapolated x0 where it is not called."""
    x, known, remembered = plan.init_scale * draw(), {}, []
    for number, (row, (of_x, of_output)) in enumerate(zip(plan.rows, forms, strict=True)):
        if number in made:
            output = network(row.input_scale * x, row.timestep)
            x0 = of_x * x + of_output * output
            x0 = np.clip(x0, -row.clip, row.clip) if row.clip else x0
            known.pop(row.timestep, None)
            known[row.timestep] = x0
        else:
            x0 = polynomial(known, row.timestep, 1)
            output = (x0 - of_x * x) / of_output
        remembered.insert(0, x0 if row.clip else row.from_sample * x + row.from_output * output)
        x = row.keep * x + row.direct * output + sum(w * h for w, h in zip(row.weights, remembered, strict=False))
        if row.noise:
            x = x + row.noise * draw()
    return x


def _x0_forms(config: dict[str, Any], plan: Plan) -> list[tuple[float, float]]:
    alphas_cumprod = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    kept = alphas_cumprod[[int(row.timestep) for row in plan.rows]]
    ratios = np.sqrt((1 - kept) / kept)
    assert config["prediction_type"] == "epsilon"
    return [(row.input_scale * math.hypot(1, r), -r) for row, r in zip(plan.rows, ratios.tolist(), strict=True)]


def test_a_clipped_sampler_extrapolates_the_clipped_x0() -> None:
    config = base_config(clip_sample=True, clip_sample_range=0.8)
    whole = compile_plan(config, "ddim", 30)
    expected = _stepwise(whole, _x0_forms(config, whole), spaced_calls(30, 12), noises(3))
    plan = compile_plan(config, "ddim", 30, forecast=Forecast(12))
    assert relative_error(run_plan(plan.from_noise(), noises(3)), expected) < 1e-9


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler-ancestral", "dpmpp-2m-sde"])
def test_noise_of_steps_without_a_call(sampler: str) -> None:
    """Steps whose noise is drawn as zero are those of the definition, and the variance that a folded row adds is that
    of the noises that it stands for, each carried to the row's end."""
    config = base_config(steps_offset=0, timestep_spacing="trailing")
    eta = 0.7 if sampler == "ddim" else 0.0
    whole = compile_plan(config, sampler, 30, eta=eta)
    made = spaced_calls(30, 12)
    plan = compile_plan(config, sampler, 30, eta=eta, forecast=Forecast(12))
    first = noises(3)()

    def only_the_first() -> Any:
        drawn = iter([first])
        return lambda: next(drawn, np.zeros(SHAPE))

    forms = _x0_forms(config, whole)
    expected = _stepwise(whole, forms, made, only_the_first())
    assert relative_error(run_plan(plan.from_noise(), only_the_first()), expected) < 1e-9
    for row, begin, end in zip(plan.rows, made, (*made[1:], 30), strict=True):
        variance = 0.0
        for number in range(begin, end):
            carried = whole.rows[number].noise
            for skipped, (of_x, of_output) in zip(whole.rows[number + 1 : end], forms[number + 1 : end], strict=True):
                carried *= skipped.keep - skipped.direct * of_x / of_output  # a forecast x0 does not follow x
            variance += carried**2
        assert row.noise == pytest.approx(math.sqrt(variance), rel=1e-9, abs=1e-12)


def test_what_a_row_cannot_remember_is_refused() -> None:
    with pytest.raises(InputError, match=r"needs what was remembered \d+ calls before; a row remembers 4"):
        compile_plan(base_config(), "plms", 50, forecast=Forecast(10, order=3))


def test_a_forecast_too_far_is_refused() -> None:
    with pytest.raises(InputError, match=r"has condition number .*; at most 1000 is allowed. Lower the order"):
        compile_plan(base_config(), "ddim", 50, forecast=Forecast(4, order=3, at=(0, 1, 2, 3)))


@pytest.mark.parametrize(
    ("forecast", "says"),
    [
        (Forecast(0), "calls is 0; the plan makes 20, of which 1 to 20 can be kept"),
        (Forecast(21), "calls is 21; the plan makes 20"),
        (Forecast(5, order=4), "order is 4; a forecast is of order 0 to 3"),
        (Forecast(5, order=-1), "order is -1"),
        (Forecast(3, at=(1, 4, 9)), "the calls 1, 4, 9 were asked for; they are ascending numbers from 0"),
        (Forecast(3, at=(0, 9, 4)), "the calls 0, 9, 4 were asked for"),
        (Forecast(2, at=(0, 20)), "to 19. Choose others"),
    ],
)
def test_a_wrong_forecast_is_one_sentence(forecast: Forecast, says: str) -> None:
    with pytest.raises(InputError) as caught:
        compile_plan(base_config(), "ddim", 20, forecast=forecast)
    assert says in str(caught.value)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 50, 99])
def test_spaced_calls_are_different_ones_from_the_first_to_the_last(rows: int) -> None:
    for calls in range(1, rows + 1):
        made = spaced_calls(rows, calls)
        assert len(set(made)) == len(made) == calls
        assert list(made) == sorted(made)
        assert made[0] == 0
        assert made[-1] == (rows - 1 if calls > 1 else 0)


def test_a_forecast_plan_reads_back() -> None:
    plan = compile_plan(base_config(), "ddim", 50, forecast=Forecast(16))
    assert plan.file_name == "ddim-calls16-50.json"
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("sampler", ["ddim", "deis", "dpmpp-2m", "unipc"])
@pytest.mark.parametrize(
    "forecast", [Forecast(27), Forecast(20), Forecast(22, 3, (*range(16), *range(17, 27, 2), 27)), Forecast(1, 0)]
)
def test_entries_have_few_rows_of_their_own(sampler: str, forecast: Forecast) -> None:
    """However many calls are made, so that a file of the plan can be read."""
    plan = compile_plan(base_config(), sampler, 28, forecast=forecast)
    assert Plan.from_json(plan.to_json()) == plan


def test_every_sampler_can_be_forecast() -> None:
    for sampler in SAMPLERS:
        config = base_config(clip_sample=False, original_inference_steps=50)
        assert len(compile_plan(config, sampler, 20, forecast=Forecast(12)).rows) == 12, sampler


def test_a_name_says_the_calls() -> None:
    config = base_config()
    assert compile_plan(config, "ddim-calls16", 50) == compile_plan(config, "ddim", 50, forecast=Forecast(16))
    with pytest.raises(InputError, match="calls is 1048576; the plan makes 50"):
        compile_plan(config, "ddim-calls1048576", 50)
    for name in ("ddim-calls", "-calls5", "ddim-calls-5", "ddim-calls1e1", "ddim-calls٣"):
        with pytest.raises(InputError, match="is not known"):
            compile_plan(config, name, 50)
