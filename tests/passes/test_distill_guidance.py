"""Guidance distillation: its loss in closed form, its embedding and its networks against diffusers', what it learns."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from ldm_reference.layout import save_component
from ldm_reference.noise import noise_from_config
from ldm_reference.unet import UNet2DConditionModel
from torch import Tensor

from ldm_export.checkpoint import LatentDiffusion, SamplingDefaults
from ldm_export.errors import InputError
from ldm_export.families import open_checkpoint
from ldm_export.passes import base
from ldm_export.passes.base import Change, PassContext
from ldm_export.passes.distill_guidance import (
    EMBEDDING,
    DistillGuidance,
    GuidanceObjective,
    conditioned_copy,
    guidance_embedding,
)
from ldm_export.passes.teacher import TeacherData
from ldm_export.plan import guidance as plan_guidance
from tests.bundle_fixture import KINDS

SHORT = {"updates": 60, "batch_size": 16, "learning_rate": 5e-3, "ema_decay": 0.9}
MakeSetting = Callable[..., PassContext]


@pytest.fixture(scope="module")
def unet(model: LatentDiffusion) -> UNet2DConditionModel:
    return model.load("unet")  # type: ignore[return-value]


@pytest.fixture(scope="module")
def batch(data: TeacherData) -> dict[str, Tensor]:
    """Rows that no training sees."""
    generator = torch.Generator().manual_seed(99)
    latents, conditions = data.rows(64, generator)
    noise = torch.randn(latents.shape, generator=generator)
    return {
        "latents": latents,
        "noise": noise,
        "timesteps": torch.randint(1000, (64,), generator=generator),
        **conditions,
    }


@pytest.fixture(scope="module")
@torch.no_grad()
def judged(model: LatentDiffusion, data: TeacherData, batch: dict[str, Tensor]) -> SimpleNamespace:
    """diffusers' forward process and UNet on the batch: noisy x, predictions with and without the prompts."""
    theirs = diffusers.UNet2DConditionModel.from_pretrained(model.path / "unet")
    scheduler = diffusers.DDIMScheduler.from_pretrained(model.path / "scheduler")
    x = scheduler.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
    text, none = batch["encoder_hidden_states"], data.empty["encoder_hidden_states"].expand(64, -1, -1)
    return SimpleNamespace(
        x=x,
        positive=theirs(x, batch["timesteps"], text).sample,
        negative=theirs(x, batch["timesteps"], none).sample,
    )


@torch.no_grad()
def error(
    student: Any, batch: dict[str, Tensor], judged: SimpleNamespace, guidance: float, scale: float | None = None
) -> float:
    """Mean squared difference from the guided teacher, which is diffusers', of a student that is told ``scale``."""
    goal = judged.negative + guidance * (judged.positive - judged.negative)
    told = {"encoder_hidden_states": batch["encoder_hidden_states"]}
    if width := student.config.time_cond_proj_dim:
        pipe = diffusers.LatentConsistencyModelPipeline
        scales = torch.full((64,), (guidance if scale is None else scale) - 1.0)
        told["timestep_cond"] = pipe.get_guidance_scale_embedding(None, scales, width)
    return float((student(judged.x, batch["timesteps"], **told) - goal).square().mean())


# --- the objective --------------------------------------------------------------------------------------------------


def objective(student: Any, unet: Any, model: LatentDiffusion, data: TeacherData) -> GuidanceObjective:
    return GuidanceObjective(student, unet, data.empty, noise_from_config(model.scheduler))


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 2.0, 6.5])
def test_the_loss_of_the_teacher_itself(
    unet: UNet2DConditionModel,
    model: LatentDiffusion,
    data: TeacherData,
    batch: dict[str, Tensor],
    judged: SimpleNamespace,
    guidance: float,
) -> None:
    """(w - 1)^2 |positive - negative|^2: nothing where guidance is off."""
    loss = objective(unet, unet, model, data)(scales=torch.full((64,), guidance), **batch)["loss"].item()
    apart = (judged.positive - judged.negative).square().mean().item()
    assert loss == pytest.approx((guidance - 1) ** 2 * apart, rel=1e-3, abs=1e-9 * apart)


@torch.no_grad()
def test_each_row_has_a_scale_of_its_own(
    unet: UNet2DConditionModel, model: LatentDiffusion, data: TeacherData, batch: dict[str, Tensor]
) -> None:
    measure = objective(unet, unet, model, data)
    scales = torch.linspace(1, 8, 64)
    alone = [
        measure(scales=scales[k : k + 1], **{name: rows[k : k + 1] for name, rows in batch.items()})["loss"].item()
        for k in range(64)
    ]
    assert measure(scales=scales, **batch)["loss"].item() == pytest.approx(sum(alone) / 64, rel=1e-4)


def test_the_teacher_stays_as_it_is(model: LatentDiffusion, data: TeacherData, unet: UNet2DConditionModel) -> None:
    student = copy.deepcopy(unet).requires_grad_(True)
    module = objective(student, unet, model, data).train()
    assert student.training
    assert not unet.training
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained == {f"student.{name}" for name, _ in student.named_parameters()}


# --- the conditioned student ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_conditioned_copy_begins_as_its_teacher(unet: UNet2DConditionModel, batch: dict[str, Tensor]) -> None:
    student = conditioned_copy(unet).eval()
    assert student.config == dataclasses.replace(unet.config, time_cond_proj_dim=EMBEDDING)
    inputs = batch["latents"], batch["timesteps"], batch["encoder_hidden_states"]
    for guidance in (1.0, 7.5):
        told = guidance_embedding(torch.full((64,), guidance), EMBEDDING)
        assert torch.equal(student(*inputs, timestep_cond=told), unet(*inputs))
    with torch.no_grad():
        student.time_embedding.cond_proj.weight.fill_(0.1)  # type: ignore[union-attr]
    assert not torch.equal(student(*inputs, timestep_cond=told), unet(*inputs))


@pytest.mark.parametrize("dim", [1, 4, 5, 10, 65, 256])
def test_the_guidance_embedding_is_diffusers(dim: int) -> None:
    scales = torch.tensor([1.0, 1.5, 4.0, 8.0, 50.0])
    theirs = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, scales - 1.0, dim)
    ours = guidance_embedding(scales, dim)
    assert ours.shape == theirs.shape == (5, dim)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3)  # float32 angles of up to 49000
    torch.testing.assert_close(ours[:4], theirs[:4], rtol=0, atol=1e-3)
    for row, scale in zip(ours, scales.tolist(), strict=True):  # and the runtime's, in float64
        torch.testing.assert_close(
            row, torch.from_numpy(plan_guidance.guidance_embedding(scale, dim)), rtol=0, atol=5e-3
        )


# --- what is learned ------------------------------------------------------------------------------------------------


def test_a_fixed_student_draws_near_the_guided_teacher(
    setting: MakeSetting, model: LatentDiffusion, unet: Any, batch: dict[str, Tensor], judged: SimpleNamespace
) -> None:
    change = DistillGuidance(**SHORT).apply(setting(model))
    student = change.networks["unet"]
    assert error(student, batch, judged, 4.0) < 0.4 * error(unet, batch, judged, 4.0)
    assert error(student, batch, judged, 1.0) > error(student, batch, judged, 4.0)
    assert change.networks.keys() == {"unet"}
    assert change.drawing == SamplingDefaults("ddim", 20, 4.0, guidance_distilled=True)
    assert change.scheduler is None
    assert change.report == {"calls_a_step": {"before": 2, "after": 1}}
    assert not student.training
    assert not any(parameter.requires_grad for parameter in student.parameters())


def test_a_conditioned_student_draws_near_the_teacher_at_the_scale_that_it_is_told(
    setting: MakeSetting,
    model: LatentDiffusion,
    unet: Any,
    batch: dict[str, Tensor],
    judged: SimpleNamespace,
    tmp_path: Path,
) -> None:
    options = {"method": "conditioned", "guidance": 5.0, "updates": 160}
    change = DistillGuidance(**{**SHORT, **options}).apply(setting(model))
    student: Any = change.networks["unet"]
    for guidance, other in ((3.0, 8.0), (5.0, 1.0), (7.0, 1.0)):
        near = error(student, batch, judged, guidance)
        assert near < (0.7 if guidance == 3 else 0.3) * error(unet, batch, judged, guidance)
        assert near < 0.5 * error(student, batch, judged, guidance, scale=other)  # it listens to the scale
    assert change.drawing == SamplingDefaults("ddim", 20, 5.0, guidance_distilled=False)
    assert student.time_embedding.cond_proj.weight.abs().max() > 0  # the scale is listened to
    save_component(student, tmp_path / "unet")
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    told = guidance_embedding(torch.full((64,), 5.0), EMBEDDING)
    with torch.no_grad():
        expected = theirs(judged.x, batch["timesteps"], batch["encoder_hidden_states"], timestep_cond=told).sample
        given = student(judged.x, batch["timesteps"], batch["encoder_hidden_states"], timestep_cond=told)
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


# --- training that every pass shares ----------------------------------------------------------------------------------


def weights(change: Change) -> dict[str, Tensor]:
    return dict(change.networks["unet"].state_dict())


def test_an_interrupted_training_goes_on_to_the_same_weights(
    setting: MakeSetting, model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = base.Optimisation
    monkeypatch.setattr(base, "Optimisation", lambda **options: often(**{**options, "save_every": 4}))
    step = DistillGuidance(updates=10, batch_size=4)
    whole = step.apply(setting(model, folder=tmp_path / "whole"))

    def interrupt(what: str, done: int, of: int) -> None:
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        step.apply(setting(model, folder=tmp_path / "cut", progress=interrupt))
    seen: list[tuple[str, int, int]] = []
    resumed = step.apply(
        setting(model, folder=tmp_path / "cut", progress=lambda what, done, of: seen.append((what, done, of)))
    )
    assert [(done, of) for _, done, of in seen] == [(done, 10) for done in range(5, 11)]
    assert seen[0][0].startswith("distill-guidance: loss 0.")
    assert weights(resumed).keys() == weights(whole).keys()
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], tensor, rtol=0, atol=0)


def test_a_seed_is_a_student(setting: MakeSetting, model: LatentDiffusion, tmp_path: Path) -> None:
    first, again, other = (
        weights(DistillGuidance(updates=2, batch_size=4, seed=seed).apply(setting(model, folder=tmp_path / name)))
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_state_of_other_options_or_another_model_is_refused(
    setting: MakeSetting, model: LatentDiffusion, write_small: Callable[..., LatentDiffusion], tmp_path: Path
) -> None:
    DistillGuidance(updates=2, batch_size=4).apply(setting(model))
    other = write_small(tmp_path / "other")
    weights_file = other.path / "unet" / "diffusion_pytorch_model.safetensors"
    content = weights_file.read_bytes()
    weights_file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for updates, changed in ((3, model), (2, other)):
        with pytest.raises(InputError, match=r"distill-guidance\.safetensors was made with another config.*\.$") as no:
            DistillGuidance(updates=updates, batch_size=4).apply(setting(changed))
        assert "\n" not in str(no.value)


def test_half_precision_that_this_machine_has_not(setting: MakeSetting, model: LatentDiffusion) -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    with pytest.raises(InputError, match=r"'fp16' needs a GPU; use 'bf16' or 'no' on a processor\.$"):
        DistillGuidance(updates=2, mixed_precision="fp16").apply(setting(model))


def test_a_loss_that_is_no_number(setting: MakeSetting, model: LatentDiffusion, data: TeacherData) -> None:
    spoiled = dataclasses.replace(data, latents=torch.full_like(data.latents, torch.nan))
    with pytest.raises(InputError, match=r"'distill-guidance' is not a number at step 0 .*lower learning_rate"):
        DistillGuidance(updates=2, batch_size=4).apply(setting(model, data=spoiled))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no updates": ({"updates": 0}, "updates = 0 must be at least 1."),
    "no rows": ({"batch_size": 0}, "batch_size = 0 must hold integers of at least 1."),
    "no rate": ({"learning_rate": 0.0}, "learning_rate = 0.0 must be a number above 0."),
    "endless rate": ({"learning_rate": float("inf")}, "learning_rate = inf must be a number above 0."),
    "average of nothing": ({"ema_decay": 1.0}, "ema_decay = 1.0 must be in [0, 1)."),
    "precision": (
        {"mixed_precision": "fp8"},
        "mixed_precision = 'fp8' is not supported; allowed are 'no', 'bf16', 'fp16'.",
    ),
    "method": ({"method": "both"}, "method = 'both' is not supported; allowed are 'fixed', 'conditioned'."),
    "below off": ({"guidance": 0.5}, "guidance = 0.5 must be from 1 to 50."),
    "no number": ({"guidance": float("nan")}, "guidance = nan must be from 1 to 50."),
    "empty range": ({"method": "conditioned", "lowest": 9.0}, "lowest = 9.0 must be from 1 to 8."),
    "outside the range": ({"method": "conditioned", "guidance": 9.0}, "guidance = 9.0 must be from 1 to 8."),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_one_sentence(case: str) -> None:
    options, message = WRONG[case]
    with pytest.raises(InputError) as refused:
        DistillGuidance(**options)
    assert str(refused.value) == message


# --- models that cannot be taught -------------------------------------------------------------------------------------


def refusal(setting: PassContext) -> str:
    with pytest.raises(InputError) as refused:
        DistillGuidance(updates=1).apply(setting)
    assert not setting.folder.exists()
    return str(refused.value)


def test_a_model_without_guidance(
    setting: MakeSetting, data: TeacherData, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    KINDS["class-conditional"](tmp_path / "classes", tiny_checkpoint)
    classes = dataclasses.replace(data, conditions={"class_labels": torch.arange(4)}, empty={})
    given = setting(open_checkpoint(tmp_path / "classes"), data=classes)
    assert refusal(given) == "distill-guidance: classes is drawn without guidance; leave this pass out."


def test_a_model_that_has_guidance_in_itself(
    setting: MakeSetting, folded: LatentDiffusion, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    KINDS["lcm"](tmp_path / "lcm", tiny_checkpoint)
    for model in (folded, open_checkpoint(tmp_path / "lcm")):
        sentence = f"distill-guidance: {model.name} has guidance in its network already; leave this pass out."
        assert refusal(setting(model)) == sentence
