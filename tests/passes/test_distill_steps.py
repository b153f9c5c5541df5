"""Step distillation: diffusers' DDIM and LCM schedulers say what a student is taught; then it is taught, and drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from ldm_reference.noise import DiffusionNoise, Levels
from ldm_reference.schedules import alphas_cumprod_from_config
from torch import Tensor, nn

from ldm_export.checkpoint import LatentDiffusion, SamplingDefaults
from ldm_export.errors import InputError
from ldm_export.export.chain import export_bundle
from ldm_export.families import open_checkpoint
from ldm_export.passes import distill_steps
from ldm_export.passes.base import PassContext
from ldm_export.passes.distill_steps import ConsistencyObjective, DistillSteps, ProgressiveObjective
from ldm_export.passes.few_steps import lcm_scalings
from ldm_export.passes.teacher import TeacherData
from ldm_export.runtime import Pipeline
from tests.bundle_fixture import KINDS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers")

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
}
SHAPE = (4, 3, 3)
PREDICTIONS = ("epsilon", "v_prediction", "sample")
METHODS: dict[str, Any] = {"progressive": diffusers.DDIMScheduler, "consistency": diffusers.LCMScheduler}
MakeSetting = Callable[..., PassContext]


def randn(count: int, seed: int) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


class Denoiser(nn.Module):
    """Stands in for a UNet: a function of x and the timesteps."""

    def __init__(self, predict: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.predict = predict

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        return self.predict(x, timesteps)


def prediction_of(x0: Tensor, x: Tensor, timesteps: Tensor, kind: str) -> Tensor:
    """What a network that knows x0 predicts, from the forward process alone."""
    kept = alphas_cumprod_from_config(SCHEDULER)[timesteps][:, None, None, None]
    alpha, sigma = kept.sqrt().float(), (1 - kept).sqrt().float()
    eps = (x - alpha * x0) / sigma
    return {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0.expand_as(x)}[kind]


def knows(x0: Tensor, kind: str) -> Denoiser:
    return Denoiser(lambda x, timesteps: prediction_of(x0, x, timesteps, kind))


def stirs(x: Tensor, timesteps: Tensor) -> Tensor:
    """A nonlinear stand-in that depends on both arguments and mixes neighbours."""
    return torch.tanh(0.7 * x + 0.3 * x.roll(1, 1) + torch.cos(timesteps / 150.0)[:, None, None, None])


def levels_of(config: Mapping[str, Any], timesteps: int | list[int]) -> Levels:
    process = DiffusionNoise(config)
    return process.levels(process.sampled_timesteps(timesteps) if isinstance(timesteps, int) else timesteps)


def ddim(kind: str, steps: int, **changes: Any) -> Any:
    scheduler = diffusers.DDIMScheduler.from_config({**SCHEDULER, "prediction_type": kind, **changes})
    scheduler.set_timesteps(steps)
    return scheduler


def progressive_objective(teacher: Denoiser, kind: str, steps: int, last: bool = True) -> ProgressiveObjective:
    config = {**SCHEDULER, "set_alpha_to_one": last}
    return ProgressiveObjective(teacher, levels_of(config, steps), levels_of(config, 2 * steps), kind)  # type: ignore[arg-type]


# --- progressive: levels and goals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 16, 25, 125])
@pytest.mark.parametrize("last", [True, False])
def test_few_levels_are_every_second_of_many(steps: int, last: bool) -> None:
    few, many = (levels_of({**SCHEDULER, "set_alpha_to_one": last}, count) for count in (steps, 2 * steps))
    assert few.timesteps.tolist() == many.timesteps.tolist()[::2] == ddim("epsilon", steps).timesteps.tolist()
    for name in ("alpha", "sigma"):
        torch.testing.assert_close(getattr(few, name), getattr(many, name)[::2], rtol=0, atol=0)
    judge = ddim("epsilon", steps, set_alpha_to_one=last)
    kept = torch.stack([*judge.alphas_cumprod[few.timesteps], judge.final_alpha_cumprod])
    torch.testing.assert_close(few.alpha.square(), kept, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(few.sigma.square(), 1 - kept, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 4, 125])  # with 125 the last is so near to no noise that its weight is held
@torch.no_grad()
def test_a_perfect_denoiser_has_nothing_to_learn_and_another_what_it_is_off(kind: str, steps: int) -> None:
    """Where x0 is one picture, the goal is that picture: the loss of x0 + d is the mean of d^2 / sigma^2."""
    one, latents, noise, index = randn(1, 0), randn(steps, 1), randn(steps, 2), torch.arange(steps)
    objective = progressive_objective(knows(one, kind), kind, steps)
    assert objective(latents, noise, index)["loss"].item() < 1e-6
    objective.student = knows(one + 0.5, kind)  # type: ignore[assignment]
    weight = (1 / (1 - ddim(kind, steps).alphas_cumprod[objective.few.timesteps])).clamp(max=100.0)
    assert objective(latents, noise, index)["loss"].item() == pytest.approx(0.25 * weight.mean().item(), rel=1e-3)


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("last", [True, False])
@torch.no_grad()
def test_the_goal_takes_ddim_in_one_step_where_the_teacher_came_in_two(kind: str, last: bool) -> None:
    """Both by diffusers; its step is linear in the network's output, which can so be solved for."""
    steps = 5
    latents, noise, index = randn(steps, 1), randn(steps, 2), torch.arange(steps)
    few, many = ddim(kind, steps, set_alpha_to_one=last), ddim(kind, 2 * steps, set_alpha_to_one=last)
    x = few.add_noise(latents, noise, few.timesteps)
    needed = torch.empty_like(x)
    for k, start in enumerate(few.timesteps):
        there = x[k : k + 1]
        for timestep in many.timesteps[2 * k : 2 * k + 2]:
            there = many.step(stirs(there, timestep[None]), timestep, there).prev_sample
        still = few.step(torch.zeros_like(there), start, x[k : k + 1]).prev_sample
        slope = few.step(torch.ones_like(there), start, x[k : k + 1]).prev_sample - still
        needed[k] = ((there - still) / slope)[0]
    objective = progressive_objective(Denoiser(stirs), kind, steps, last)
    before = objective(latents, noise, index)["loss"].item()
    objective.student = Denoiser(lambda x, timesteps: needed)  # type: ignore[assignment]
    assert objective(latents, noise, index)["loss"].item() < 1e-5 * before
    objective.student = Denoiser(lambda x, timesteps: needed * 1.01)  # type: ignore[assignment]
    assert objective(latents, noise, index)["loss"].item() > 1e-5 * before


# --- progressive: what is learned -----------------------------------------------------------------------------------


@torch.no_grad()
def drawn(unet: Any, model: LatentDiffusion, data: TeacherData, steps: int) -> Tensor:
    """By diffusers' DDIM with trailing timesteps, from noise that no training sees."""
    scheduler = diffusers.DDIMScheduler.from_config(model.scheduler, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    latents = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    states = data.conditions["encoder_hidden_states"].repeat(4, 1, 1)
    for timestep in scheduler.timesteps:
        output = unet(latents, timestep[None], states)
        latents = scheduler.step(output, timestep, latents).prev_sample
    return latents


@pytest.mark.parametrize(("start", "to"), [(4, 2), (4, 1)])
def test_a_student_of_few_steps_arrives_nearer_to_the_teacher_of_many(
    setting: MakeSetting, folded: LatentDiffusion, data: TeacherData, start: int, to: int
) -> None:
    step = DistillSteps(start=start, to=to, updates=60, batch_size=16, learning_rate=5e-3, ema_decay=0.9)
    change = step.apply(setting(folded))
    goal = drawn(folded.load("unet"), folded, data, start)
    untaught = (drawn(folded.load("unet"), folded, data, to) - goal).square().mean().item()
    taught = (drawn(change.networks["unet"], folded, data, to) - goal).square().mean().item()
    assert taught < 0.5 * untaught
    assert change.drawing == SamplingDefaults("ddim", to, 4.0, guidance_distilled=True)
    assert change.report["steps"] == to
    assert list(change.report["loss"]) == [2, 1][: 3 - to]


@pytest.mark.parametrize(("method", "spacing"), [(m, s) for m in METHODS for s in ("leading", "trailing")])
def test_what_is_taught_is_what_is_drawn(
    setting: MakeSetting,
    folded: LatentDiffusion,
    write_small: Callable[..., LatentDiffusion],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    spacing: str,
) -> None:
    """The student's timesteps in training are those of the scheduler that the result is drawn with."""
    small = write_small(tmp_path / "small", timestep_spacing=spacing)
    model = dataclasses.replace(small, drawn_with=folded.drawing)
    seen: set[int] = set()

    def watched(unet: Any, x: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        if unet.conv_in.weight.requires_grad:
            seen.update(timesteps.tolist())
        return predict(unet, x, timesteps, conditions)

    predict = distill_steps.predict
    monkeypatch.setattr(distill_steps, "predict", watched)
    change = DistillSteps(method=method, start=8, to=4, updates=8, batch_size=8).apply(setting(model))
    config = {**model.scheduler, **(change.scheduler or {})}
    scheduler = METHODS[method].from_config(config)
    scheduler.set_timesteps(4 if method == "progressive" else 8)  # of which LCM takes every second for 4 steps
    assert sorted(seen, reverse=True) == scheduler.timesteps.tolist()
    assert (change.scheduler is None) == (method == "progressive" and spacing == "trailing")


# --- consistency ----------------------------------------------------------------------------------------------------


def lcm(kind: str, steps: int, **changes: Any) -> Any:
    return diffusers.LCMScheduler.from_config(
        {**SCHEDULER, "original_inference_steps": steps, "prediction_type": kind, "timestep_scaling": 10.0, **changes}
    )


def consistency_objective(teacher: Denoiser, kind: str, steps: int, last: bool = True) -> ConsistencyObjective:
    timesteps = (torch.arange(steps, 0, -1) * (1000 // steps) - 1).tolist()
    levels = levels_of({**SCHEDULER, "set_alpha_to_one": last}, timesteps)
    return ConsistencyObjective(teacher, levels, kind, lcm_scalings)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", PREDICTIONS)
@torch.no_grad()
def test_the_boundary_condition_is_that_of_diffusers(kind: str) -> None:
    """At timestep 0 too, where the student is to give what it was given."""
    objective = consistency_objective(Denoiser(stirs), kind, 1000)
    judge = lcm(kind, 1000)
    judge.set_timesteps(1000)
    timesteps = torch.tensor([999, 500, 20, 1, 0])
    x, index = randn(5, 3), 999 - timesteps
    level = objective.levels.timesteps[index], objective.levels.alpha[index], objective.levels.sigma[index]
    given = objective._consistent(x, level, {})
    for k, timestep in enumerate(timesteps):
        row = x[k : k + 1]
        judge._step_index = None
        expected = judge.step(stirs(row, timestep[None]), timestep, row, torch.Generator()).denoised
        torch.testing.assert_close(given[k : k + 1], expected, rtol=1e-4, atol=1e-4)
        c_skip, c_out = judge.get_scalings_for_boundary_condition_discrete(timestep)
        x0, _ = objective.denoise(objective.student, row, tuple(part[k : k + 1] for part in level), {})
        torch.testing.assert_close(given[k : k + 1], c_skip * row + c_out * x0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(given[-1], x[-1], rtol=0, atol=0)


@pytest.mark.parametrize("kind", PREDICTIONS)
@torch.no_grad()
def test_the_consistency_function_of_one_picture_has_no_loss(kind: str) -> None:
    steps, dimension = 20, 36
    scale = 0.00054 * dimension**0.5
    one, noise, index = 3 + randn(1, 0), randn(steps, 2), torch.arange(steps)
    judge = lcm(kind, steps)

    def exact(x: Tensor, timesteps: Tensor) -> Tensor:
        scalings = [judge.get_scalings_for_boundary_condition_discrete(timestep) for timestep in timesteps]
        c_skip, c_out = (torch.tensor(values)[:, None, None, None] for values in zip(*scalings, strict=True))
        return prediction_of((one - c_skip * x) / c_out, x, timesteps, kind)

    objective = consistency_objective(knows(one, kind), kind, steps)
    objective.student = Denoiser(exact)  # type: ignore[assignment]
    rows = {"latents": one.expand_as(noise), "noise": noise, "index": index}
    assert objective(**rows)["loss"].item() < 1e-5
    objective.student = knows(one + 0.5, kind)  # type: ignore[assignment]
    loss = objective(**rows)["loss"].item()  # the same in all rows but the last, whose goal is x0
    assert loss == pytest.approx(((0.25 * dimension + scale**2) ** 0.5 - scale) / steps, rel=1e-2)
    objective = consistency_objective(knows(one, kind), kind, steps, last=False)
    objective.student = Denoiser(exact)  # type: ignore[assignment]
    kept = judge.alphas_cumprod[0]  # where the schedule ends: a little noise is left in the last goal
    left = ((1 - kept) / kept * noise[-1].square().sum()).item()
    loss = objective(**rows)["loss"].item()
    assert loss == pytest.approx(((left + scale**2) ** 0.5 - scale) / steps, rel=2e-3)


@pytest.mark.parametrize("make", [consistency_objective, progressive_objective])
def test_gradients_flow_into_the_student_s_own_guess_alone(make: Callable[..., Any]) -> None:
    teacher, student = Denoiser(stirs), Denoiser(stirs)
    calls: list[tuple[str, bool]] = []
    for name, network in (("teacher", teacher), ("student", student)):
        network.register_forward_hook(lambda *_, name=name: calls.append((name, torch.is_grad_enabled())))
    objective = make(teacher, "v_prediction", 20)
    objective.student = student
    objective(randn(20, 1), randn(20, 2), torch.arange(20))
    assert {call for call in calls if call[1]} == {("student", True)}
    assert calls.count(("student", True)) == 1
    assert ("teacher", False) in calls


def test_a_consistency_model_is_drawn_as_by_diffusers(
    setting: MakeSetting, folded: LatentDiffusion, tmp_path: Path, traced_once: None
) -> None:
    step = DistillSteps(method="consistency", start=20, to=4, updates=3, batch_size=8)
    change = step.apply(setting(folded))
    assert change.drawing == SamplingDefaults("lcm", 4, 4.0, guidance_distilled=True)
    assert change.report["loss"] > 0
    assert change.scheduler is not None
    changed = folded.save_changed(tmp_path / "few", change.networks, change.scheduler, change.drawing, [])
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(changed.path)
    pipe.set_progress_bar_config(disable=True)
    pipe.check_inputs = lambda *_, **__: None  # it wants multiples of 8, whatever the autoencoder
    assert isinstance(pipe.scheduler, diffusers.LCMScheduler)
    kept = {key: value for key, value in folded.scheduler.items() if key not in change.scheduler}
    assert not kept
    assert (pipe.scheduler.config.original_inference_steps, pipe.scheduler.config.timestep_scaling) == (20, 10.0)
    prompts = ["a red circle", "a blue square"]
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 11)]
    expected = pipe(
        prompts, num_inference_steps=4, guidance_scale=1.0, generator=generators, output_type="latent"
    ).images
    bundle = export_bundle(changed, tmp_path / "bundle")
    assert (bundle.manifest.model["default_sampler"], bundle.manifest.model["default_steps"]) == ("lcm", 4)
    given = torch.from_numpy(Pipeline(bundle, "cpu").generate(prompts, seed=[7, 11]).latents)
    assert (given - expected).abs().max() < 2e-5 * expected.abs().max()


# --- what is refused ------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "not halved": ({"start": 24, "to": 4}, "start = 24 cannot be halved to 4 steps; use 4 times a power of 2."),
    "odd": ({"start": 9, "to": 4}, "start = 9 cannot be halved to 4 steps; use 4 times a power of 2."),
    "no fewer": ({"start": 4, "to": 4}, "start = 4 must be at least 5."),
    "more": ({"method": "consistency", "start": 4, "to": 8}, "start = 4 must be at least 9."),
    "none": ({"to": 0}, "to = 0 must be at least 1."),
    "method": (
        {"method": "adversarial"},
        "method = 'adversarial' is not supported; allowed are 'progressive', 'consistency'.",
    ),
    "no updates": ({"updates": 0}, "updates = 0 must be at least 1."),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_one_sentence(case: str) -> None:
    options, message = WRONG[case]
    with pytest.raises(InputError) as refused:
        DistillSteps(**options)
    assert str(refused.value) == message


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_is_drawn_with_guidance(setting: MakeSetting, model: LatentDiffusion, method: str) -> None:
    with pytest.raises(
        InputError, match=r"small is drawn with guidance; put distill-guidance, .*, before this pass\.$"
    ):
        DistillSteps(method=method, start=8, updates=1).apply(setting(model))


def test_a_consistency_model_is_not_halved(setting: MakeSetting, tiny_checkpoint: Path, tmp_path: Path) -> None:
    KINDS["lcm"](tmp_path / "lcm", tiny_checkpoint)
    model = dataclasses.replace(
        open_checkpoint(tmp_path / "lcm"), drawn_with=SamplingDefaults("lcm", 4, 4.0, guidance_distilled=True)
    )
    with pytest.raises(InputError, match=r"lcm is a consistency model already; leave this pass out\.$"):
        DistillSteps(start=8, updates=1).apply(setting(model))


def test_a_grid_that_does_not_fit_the_timesteps(setting: MakeSetting, folded: LatentDiffusion) -> None:
    with pytest.raises(InputError, match=r"start = 32 must divide the 1000 timesteps of small\.$"):
        DistillSteps(method="consistency", start=32, updates=1).apply(setting(folded))
