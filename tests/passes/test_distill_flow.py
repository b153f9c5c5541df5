"""Step distillation of networks trained by flow matching: diffusers' Euler says what is taught, and draws it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from ldm_reference.noise import FlowNoise, Levels, noise_from_config
from torch import Tensor, nn

from ldm_export.checkpoint import LatentDiffusion, SamplingDefaults
from ldm_export.errors import InputError
from ldm_export.export.chain import export_bundle
from ldm_export.passes import distill_steps
from ldm_export.passes.base import PassContext
from ldm_export.passes.distill_steps import ConsistencyObjective, DistillSteps, ProgressiveObjective
from ldm_export.passes.few_steps import FewSteps, consistency, progressive, unscaled
from ldm_export.passes.imitation import timesteps_drawn
from ldm_export.passes.teacher import TeacherData
from ldm_export.plan import compile_plan
from ldm_export.plan.scheduler_classes import is_flow, prediction_of
from ldm_export.runtime import Pipeline
from tests.diffusers_pipelines import judged, opened

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
METHODS = ("progressive", "consistency")
MakeSetting = Callable[..., PassContext]


def few_steps(method: str, start: int, to: int, **scheduler: Any) -> FewSteps:
    model: Any = SimpleNamespace(name="flow", scheduler={**FLOW, **scheduler})
    return progressive(model, to) if method == "progressive" else consistency(model, start, to)


def euler(config: Mapping[str, Any], steps: int) -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    return scheduler


def randn(count: int, seed: int) -> Tensor:
    return torch.randn(count, 4, 3, 3, generator=torch.Generator().manual_seed(seed))


class Denoiser(nn.Module):
    """Stands in for a UNet: a function of x and the timesteps."""

    def __init__(self, predict: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.predict = predict

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        return self.predict(x, timesteps)


def stirs(x: Tensor, timesteps: Tensor) -> Tensor:
    """A nonlinear stand-in that depends on both arguments and mixes neighbours."""
    return torch.tanh(0.7 * x + 0.3 * x.roll(1, 1) + torch.cos(timesteps / 150.0)[:, None, None, None])


def halving(teacher: Denoiser, steps: int, **scheduler: Any) -> ProgressiveObjective:
    few = few_steps("progressive", 2 * steps, steps, **scheduler)
    return ProgressiveObjective(teacher, few.levels(steps), few.levels(2 * steps), "flow_prediction")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def flow(write_small: Callable[..., LatentDiffusion], tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusion:
    """A text model by flow matching, drawn without guidance. Read-only."""
    model = write_small(tmp_path_factory.mktemp("flow") / "flow", **FLOW, shift=2.0)
    return dataclasses.replace(model, drawn_with=SamplingDefaults("euler", 8, 4.0, guidance_distilled=True))


# --- levels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheduler", [{}, {"shift": 3.0}, {"shift": 0.5, "use_karras_sigmas": True}], ids=str)
@pytest.mark.parametrize("to", [1, 2, 4, 5])
def test_levels_are_those_of_the_plan_and_of_diffusers(method: str, scheduler: dict[str, Any], to: int) -> None:
    few = few_steps(method, 4 * to, to, **scheduler)
    levels, judge = few.levels(to), euler(few.scheduler, to)
    plan = compile_plan(few.scheduler, few.sampler, to)
    torch.testing.assert_close(levels.timesteps, torch.tensor([row.timestep for row in plan.rows]))
    torch.testing.assert_close(levels.timesteps, judge.timesteps)
    torch.testing.assert_close(levels.sigma, judge.sigmas)
    torch.testing.assert_close(levels.alpha, 1 - levels.sigma)
    many = few.levels(4 * to)
    torch.testing.assert_close(many.sigma[::4], levels.sigma)
    torch.testing.assert_close(many.sigma.diff().reshape(to, 4), (levels.sigma.diff() / 4)[:, None].expand(to, 4))


def test_unshifted_steps_are_all_as_large() -> None:
    """Those of diffusers without a terminal level are not: the last of four is a thousandth."""
    levels = few_steps("progressive", 32, 4).levels(4)
    torch.testing.assert_close(levels.sigma, torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))
    assert euler(FLOW, 4).sigmas[-2].item() == pytest.approx(1e-3)


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        {"_class_name": "FlowMatchHeunDiscreteScheduler"},
        {
            "_class_name": "UniPCMultistepScheduler",
            "use_flow_sigmas": True,
            "prediction_type": "flow_prediction",
            "flow_shift": 3.0,
        },
        {"_class_name": "UniPCMultistepScheduler", "prediction_type": "epsilon"},
        {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    ],
    ids=str,
)
def test_the_reference_and_the_plan_agree_on_what_flow_matching_is(config: dict[str, Any]) -> None:
    process = noise_from_config(config)
    assert isinstance(process, FlowNoise) == is_flow(config)
    assert process.prediction_type == prediction_of(config)


@pytest.mark.parametrize(("steps", "sampler"), [(20, "euler"), (4, "euler"), (4, "heun")])
def test_timesteps_of_smaller_students_are_those_of_the_sampler(
    flow: LatentDiffusion, steps: int, sampler: str
) -> None:
    found = timesteps_drawn(dataclasses.replace(flow, drawn_with=SamplingDefaults(sampler, steps)))
    expected = torch.arange(1.0, 1001.0) if steps == 20 else euler(flow.scheduler, 4).timesteps.flip(0)
    torch.testing.assert_close(found, expected)


# --- progressive ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4, 8])
@torch.no_grad()
def test_what_moves_at_constant_velocity_has_nothing_to_learn(steps: int) -> None:
    """The goal is that velocity, and the loss the squared error from it."""
    velocity, index = randn(1, 0), torch.arange(steps)
    objective = halving(Denoiser(lambda x, timesteps: velocity.expand_as(x)), steps)
    rows = {"latents": randn(steps, 1), "noise": randn(steps, 2), "index": index}
    assert objective(**rows)["loss"].item() < 1e-9
    objective.student = Denoiser(lambda x, timesteps: velocity.expand_as(x) + 0.5)  # type: ignore[assignment]
    assert objective(**rows)["loss"].item() == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@torch.no_grad()
def test_the_goal_is_the_velocity_between_where_the_teacher_left_and_arrived(shift: float) -> None:
    """Diffusers' scheduler, given the levels without a shift, is the judge."""
    steps = 5
    latents, noise, index = randn(steps, 1), randn(steps, 2), torch.arange(steps)
    objective = halving(Denoiser(stirs), steps, shift=shift)
    sigmas = objective.many.sigma
    judge = diffusers.FlowMatchEulerDiscreteScheduler()
    judge.set_timesteps(sigmas=sigmas[:-1].tolist())
    x = judge.scale_noise(latents, judge.timesteps[::2], noise)
    needed = torch.empty_like(x)
    for k in range(steps):
        there = x[k : k + 1]
        for timestep in judge.timesteps[2 * k : 2 * k + 2]:
            judge._step_index = None
            there = judge.step(stirs(there, timestep[None]), timestep, there).prev_sample
        needed[k] = ((there - x[k]) / (sigmas[2 * k + 2] - sigmas[2 * k]))[0]
    before = objective(latents, noise, index)["loss"].item()
    objective.student = Denoiser(lambda x, timesteps: needed)  # type: ignore[assignment]
    assert objective(latents, noise, index)["loss"].item() < 1e-6 * before
    objective.student = Denoiser(lambda x, timesteps: needed * 1.01)  # type: ignore[assignment]
    assert objective(latents, noise, index)["loss"].item() > 1e-5 * before


# --- consistency ------------------------------------------------------------------------------------------------------


def agreeing(teacher: Denoiser, levels: Levels) -> ConsistencyObjective:
    return ConsistencyObjective(teacher, levels, "flow_prediction", unscaled)  # type: ignore[arg-type]


@torch.no_grad()
def test_the_consistency_function() -> None:
    """x - sigma out: x itself at the end, and one picture for a network that knows but that one."""
    one, noise, index = randn(1, 0), randn(8, 2), torch.arange(8)
    levels = few_steps("consistency", 8, 4).levels(8)

    def knows(x0: Tensor) -> Denoiser:
        return Denoiser(lambda x, timesteps: (x - x0) / (timesteps / 1000)[:, None, None, None])

    objective = agreeing(knows(one), levels)
    level = levels.timesteps, levels.alpha[:-1], levels.sigma[:-1]
    x, end = randn(8, 3), (torch.tensor([1.0]), torch.ones(1), torch.zeros(1))
    torch.testing.assert_close(objective._consistent(x, level, {}), one.expand_as(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(objective._consistent(x[:1], end, {}), x[:1], rtol=0, atol=0)
    rows = {"latents": one.expand_as(noise), "noise": noise, "index": index}
    assert objective(**rows)["loss"].item() < 1e-5
    objective.student = knows(one + 0.5)  # type: ignore[assignment]
    scale = 0.00054 * 36**0.5  # the same in all rows but the last, whose goal is x0
    assert objective(**rows)["loss"].item() == pytest.approx(((9.0 + scale**2) ** 0.5 - scale) / 8, rel=1e-2)


# --- what is learned --------------------------------------------------------------------------------------------------


@torch.no_grad()
def drawn(unet: Any, sigmas: Tensor, data: TeacherData) -> Tensor:
    """Latents that diffusers' scheduler reaches over these noise levels, from noise that no training sees."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())
    latents = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    states = data.conditions["encoder_hidden_states"].repeat(4, 1, 1)
    for timestep in scheduler.timesteps:
        latents = scheduler.step(unet(latents, timestep[None], states), timestep, latents).prev_sample
    return latents


def test_a_student_of_two_steps_arrives_nearer_to_the_teacher_of_eight(
    setting: MakeSetting, flow: LatentDiffusion, data: TeacherData
) -> None:
    step = DistillSteps(start=8, to=2, updates=60, batch_size=16, learning_rate=1e-3, ema_decay=0.9)
    change = step.apply(setting(flow))
    assert change.scheduler is not None
    few, many = euler(change.scheduler, 2).sigmas, progressive(flow, 2).levels(8).sigma
    goal = drawn(flow.load("unet"), many, data)
    untaught = (drawn(flow.load("unet"), few, data) - goal).square().mean().item()
    taught = (drawn(change.networks["unet"], few, data) - goal).square().mean().item()
    assert taught < 0.5 * untaught
    assert change.drawing == SamplingDefaults("euler", 2, 4.0, guidance_distilled=True)
    assert list(change.report["loss"]) == [4, 2]


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss(setting: MakeSetting, flow: LatentDiffusion, tmp_path: Path, method: str) -> None:
    losses = {}
    for updates in (1, 60):
        options: dict[str, Any] = {"batch_size": 16, "learning_rate": 5e-3, "ema_decay": 0.9}
        step = DistillSteps(method=method, start=8, to=4, updates=updates, **options)
        report = step.apply(setting(flow, folder=tmp_path / str(updates))).report["loss"]
        losses[updates] = report[4] if method == "progressive" else report
    assert losses[60] < 0.7 * losses[1]


@pytest.mark.parametrize("method", METHODS)
def test_what_is_taught_is_what_is_drawn(
    setting: MakeSetting, flow: LatentDiffusion, tmp_path: Path, traced_once: None, method: str
) -> None:
    """The student's timesteps in training are those of its scheduler, whose pictures diffusers' pipeline draws too."""
    seen: set[float] = set()

    def watched(unet: Any, x: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        if unet.conv_in.weight.requires_grad:
            seen.update(timesteps.tolist())
        return predict(unet, x, timesteps, conditions)

    predict = distill_steps.predict
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill_steps, "predict", watched)
        step = DistillSteps(method=method, start=8, to=4, updates=8, batch_size=8)
        change = step.apply(setting(flow))
    assert change.scheduler is not None
    own = euler(change.scheduler, 4).timesteps
    taught = torch.tensor(sorted(seen, reverse=True))
    torch.testing.assert_close(taught if method == "progressive" else taught[::2], own)

    changed = flow.save_changed(tmp_path / "few", change.networks, change.scheduler, change.drawing, [])
    pipe = opened(diffusers.StableDiffusionPipeline, changed.path)
    assert isinstance(pipe.scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    assert pipe.scheduler.config.stochastic_sampling == (method == "consistency")
    prompts, seeds = ["a red circle", "a blue square"], [7, 11]
    expected = judged(pipe, "euler", prompts, seeds, steps=4, guidance=1.0)
    bundle = export_bundle(changed, tmp_path / "bundle")
    assert (bundle.manifest.model["default_sampler"], bundle.manifest.model["default_steps"]) == ("euler", 4)
    given = torch.from_numpy(Pipeline(bundle, "cpu").generate(prompts, seed=seeds).latents)
    assert (given - expected).abs().max() < 2e-5 * expected.abs().max()


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_consistency_model_is_not_halved() -> None:
    with pytest.raises(InputError, match=r"flow is a consistency model already; leave this pass out\.$"):
        few_steps("progressive", 8, 4, stochastic_sampling=True)


def test_a_grid_that_lacks_the_student_s_levels() -> None:
    with pytest.raises(InputError, match=r"^distill-steps: start = 10 must be a multiple of to = 4 for flow\.$"):
        few_steps("consistency", 10, 4)
