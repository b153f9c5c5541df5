"""What students learn from: conditions and latents, with diffusers' text encoder, UNet, pipeline and DDIM as judges."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from ldm_export.checkpoint import LatentDiffusion, SamplingDefaults
from ldm_export.errors import InputError
from ldm_export.families import open_checkpoint
from ldm_export.families.tokenizers import open_tokenizer
from ldm_export.passes import teacher
from ldm_export.passes.teacher import (
    Conditions,
    TeacherData,
    draw_latents,
    encode_conditions,
    encode_pictures,
    predict_guided,
)
from ldm_export.plan.scheduler_classes import sampler_of
from tests.bundle_fixture import CLASSES, KINDS
from tests.conftest import CAPTIONS
from tests.diffusers_pipelines import judged, opened

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers")

TOLERANCE = 2e-5
"""Allowed max |ours - theirs| / max |theirs|."""
STEPS, GUIDANCE, SEED = 5, 4.0, 3
DRAWING = SamplingDefaults("ddim", STEPS, GUIDANCE)
TINY_WIDTHS = {"encoder_block_out_channels": [8, 8], "decoder_block_out_channels": [8, 8]}
Told = tuple[Conditions, Conditions]


def relative_error(given: Tensor, expected: Tensor) -> float:
    assert given.shape == expected.shape
    return float((given - expected).abs().max() / expected.abs().max())


def draw(model: LatentDiffusion, told: Told, file: Path, count: int = 6, **changes: Any) -> TeacherData:
    drawing = dataclasses.replace(DRAWING, **{k: v for k, v in changes.items() if k in ("steps", "guidance")})
    progress = changes.get("progress", lambda what, done, of: None)
    precision = changes.get("mixed_precision", "no")
    return draw_latents(model, *told, drawing, count, changes.get("seed", SEED), file, progress, precision)


def without_text(kind: str, tiny: Path, folder: Path) -> LatentDiffusion:
    KINDS[kind](folder, tiny)
    return open_checkpoint(folder)


# --- conditions -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_prompts_are_encoded_as_by_diffusers(model: LatentDiffusion, told: Told) -> None:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(model.path)
    prompts, negatives = pipe.encode_prompt(list(CAPTIONS), "cpu", 1, True, [""] * len(CAPTIONS))
    conditions, empty = told
    assert conditions.keys() == empty.keys() == {"encoder_hidden_states"}
    assert relative_error(conditions["encoder_hidden_states"], prompts) < TOLERANCE
    assert relative_error(empty["encoder_hidden_states"].expand_as(negatives), negatives) < TOLERANCE


def test_more_prompts_than_go_through_the_encoder_at_once(model: LatentDiffusion, told: Told) -> None:
    tokenize = open_tokenizer(model.tokenizer_folder("text_encoder"))
    many = [CAPTIONS[k % 4] for k in range(300)]
    conditions, _ = encode_conditions(model, many, lambda prompts: torch.from_numpy(tokenize(prompts)))
    states = told[0]["encoder_hidden_states"]
    assert relative_error(conditions["encoder_hidden_states"], states.repeat(75, 1, 1)) < TOLERANCE


def test_classes_and_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    labels = without_text("class-conditional", tiny_checkpoint, tmp_path / "classes")
    conditions, empty = encode_conditions(labels, range(CLASSES), None)
    assert conditions["class_labels"].tolist() == list(range(CLASSES))
    assert conditions["class_labels"].dtype == torch.int64
    assert empty == {}
    nothing = without_text("unconditional", tiny_checkpoint, tmp_path / "nothing")
    assert encode_conditions(nothing, [], None) == ({}, {})


@pytest.mark.parametrize("kind", ["sdxl", "lcm"])
def test_a_model_with_more_conditions_is_refused(tiny_checkpoint: Path, tmp_path: Path, kind: str) -> None:
    model = without_text(kind, tiny_checkpoint, tmp_path / kind)
    message = f"{kind} has more conditions than one text encoder's output.* Leave the trained"
    with pytest.raises(InputError, match=message) as refusal:
        encode_conditions(model, CAPTIONS, None)
    assert "\n" not in str(refusal.value)


def test_rows_are_latents_with_the_conditions_that_they_were_drawn_under(data: TeacherData) -> None:
    latents, conditions = data.rows(64, torch.Generator().manual_seed(0))
    again, _ = data.rows(64, torch.Generator().manual_seed(0))
    torch.testing.assert_close(latents, again, rtol=0, atol=0)
    seen = set()
    for row, states in zip(latents, conditions["encoder_hidden_states"], strict=True):
        index = next(k for k, one in enumerate(data.latents) if torch.equal(one, row))
        seen.add(index)
        assert torch.equal(states, data.conditions["encoder_hidden_states"][data.owner[index]])
    assert len(seen) > 16


# --- guidance -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "guidance", [4.0, torch.tensor([1.0, 2.5, 7.0, 0.0])[:, None, None, None]], ids=["one", "each"]
)
def test_a_guided_prediction_is_two_calls(model: LatentDiffusion, told: Told, guidance: float | Tensor) -> None:
    conditions, empty = told
    unet = diffusers.UNet2DConditionModel.from_pretrained(model.path / "unet")
    x, timesteps = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([999, 500, 20, 0])
    positive = unet(x, timesteps, conditions["encoder_hidden_states"]).sample
    negative = unet(x, timesteps, empty["encoder_hidden_states"].expand(4, -1, -1)).sample
    ours = predict_guided(model.load("unet"), x, timesteps, conditions, empty, guidance)  # type: ignore[arg-type]
    assert relative_error(ours, negative + guidance * (positive - negative)) < TOLERANCE
    alone = predict_guided(model.load("unet"), x, timesteps, conditions, {}, guidance)  # type: ignore[arg-type]
    assert relative_error(alone, positive) < TOLERANCE


# --- latents --------------------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, dict[str, Any]] = {
    "leading, epsilon": {},
    "trailing, v": {"timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    "ending at no noise": {"set_alpha_to_one": True, "prediction_type": "sample"},
    "flow matching": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_latents_are_those_of_diffusers(
    write_small: Callable[..., LatentDiffusion], told: Told, tmp_path: Path, small_chunks: None, scheduler: str
) -> None:
    """Six of four prompts: the first two are drawn twice, each with a seed of its own."""
    model = write_small(tmp_path / "small", **SCHEDULERS[scheduler])
    pipe = opened(diffusers.StableDiffusionPipeline, model.path)
    drawn = draw(model, told, tmp_path / "latents.safetensors")
    sampler, seeds = sampler_of(model.scheduler), range(SEED, SEED + 6)
    expected = judged(pipe, sampler, [*CAPTIONS, *CAPTIONS[:2]], seeds, steps=STEPS, guidance=GUIDANCE)
    assert drawn.owner.tolist() == [0, 1, 2, 3, 0, 1]
    assert drawn.guidance == GUIDANCE
    assert relative_error(drawn.latents, expected) < TOLERANCE


@pytest.mark.parametrize("kind", ["unconditional", "class-conditional"])
@torch.no_grad()
def test_latents_of_models_without_text(tiny_checkpoint: Path, tmp_path: Path, kind: str) -> None:
    model = without_text(kind, tiny_checkpoint, tmp_path / "model")
    labels = list(range(CLASSES)) if kind == "class-conditional" else []
    drawn = draw(model, encode_conditions(model, labels, None), tmp_path / "latents.safetensors", CLASSES + 1)
    unet = diffusers.UNet2DConditionModel.from_pretrained(model.path / "unet")
    scheduler = diffusers.DDIMScheduler.from_pretrained(model.path / "scheduler")
    scheduler.set_timesteps(STEPS)
    classes = torch.tensor([*labels, 0]) if labels else None
    noise = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(SEED + k)) for k in range(CLASSES + 1)]
    latents = torch.cat(noise)
    for timestep in scheduler.timesteps:
        output = unet(latents, timestep, None, class_labels=classes).sample
        latents = scheduler.step(output, timestep, latents).prev_sample
    assert relative_error(drawn.latents, latents) < TOLERANCE


def test_the_size_is_the_unet_s(model: LatentDiffusion, told: Told, tmp_path: Path) -> None:
    folder = shutil.copytree(model.path, tmp_path / "wide")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "sample_size": [8, 12]}))
    drawn = draw(open_checkpoint(folder), told, tmp_path / "latents.safetensors", 2)
    assert drawn.latents.shape == (2, 4, 8, 12)


def test_bf16_is_near_float32_and_not_the_same(model: LatentDiffusion, told: Told, tmp_path: Path) -> None:
    full, half = (draw(model, told, tmp_path / name, 4, mixed_precision=name) for name in ("no", "bf16"))
    assert half.latents.dtype == torch.float32
    assert 1e-5 < relative_error(half.latents, full.latents) < 0.1


@pytest.mark.parametrize("autoencoder", ["AutoencoderKL", "AutoencoderTiny"])
@torch.no_grad()
def test_pictures_are_encoded_as_by_diffusers(model: LatentDiffusion, tmp_path: Path, autoencoder: str) -> None:
    """More of them than go through the encoder at once."""
    pictures = np.random.default_rng(0).integers(0, 256, (70, 8, 12, 3), dtype=np.uint8)
    sample = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    if autoencoder == "AutoencoderKL":
        theirs = diffusers.AutoencoderKL.from_pretrained(model.path / "vae")
        expected = theirs.encode(sample).latent_dist.mean * theirs.config.scaling_factor
    else:
        torch.manual_seed(0)
        tiny = diffusers.AutoencoderTiny(num_encoder_blocks=[1, 1], num_decoder_blocks=[1, 1], **TINY_WIDTHS)
        expected = tiny.encode(sample).latents
        folder = shutil.copytree(model.path, tmp_path / "tiny")
        tiny.save_pretrained(folder / "vae")
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, "vae": ["diffusers", autoencoder]}))
        model = open_checkpoint(folder)
    assert relative_error(encode_pictures(model, pictures), expected) < TOLERANCE


# --- a file that is gone on with ------------------------------------------------------------------------------------


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two latents at a time, written after every second time."""
    monkeypatch.setattr(teacher, "CHUNK", 2)
    monkeypatch.setattr(teacher, "SAVE_EVERY", 2)


def test_an_interrupted_run_goes_on_to_the_same_latents(
    model: LatentDiffusion, told: Told, tmp_path: Path, small_chunks: None
) -> None:
    whole = draw(model, told, tmp_path / "whole.safetensors", 9)

    def interrupt(what: str, done: int, of: int) -> None:
        if done == 6:
            raise KeyboardInterrupt

    file, starts = tmp_path / "latents.safetensors", []
    with pytest.raises(KeyboardInterrupt):
        draw(model, told, file, 9, progress=interrupt)
    resumed = draw(model, told, file, 9, progress=lambda what, done, of: starts.append((what, done, of)))
    assert starts == [("teacher draws", 6, 9), ("teacher draws", 8, 9)]
    torch.testing.assert_close(resumed.latents, whole.latents, rtol=0, atol=0)
    assert file.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    starts.clear()
    again = draw(model, told, file, 9, progress=lambda what, done, of: starts.append((what, done, of)))
    assert starts == []
    torch.testing.assert_close(again.latents, whole.latents, rtol=0, atol=0)


CHANGES: dict[str, dict[str, Any]] = {
    "guidance": {"guidance": 5.0},
    "steps": {"steps": STEPS + 1},
    "seed": {"seed": SEED + 1},
    "count": {"count": 5},
    "precision": {"mixed_precision": "bf16"},
}


@pytest.mark.parametrize("change", [*CHANGES, "weights", "fewer prompts"])
def test_another_teacher_s_file_is_refused(model: LatentDiffusion, told: Told, tmp_path: Path, change: str) -> None:
    file = tmp_path / "latents.safetensors"
    draw(model, told, file, 4)
    before = file.read_bytes()
    options = {"count": 4, **CHANGES.get(change, {})}
    if change == "weights":
        folder = Path(shutil.copytree(model.path, tmp_path / "other"))
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        tail = weights.read_bytes()
        weights.write_bytes(tail[:-1] + bytes([tail[-1] ^ 1]))
        model = open_checkpoint(folder)
    elif change == "fewer prompts":
        told = {name: rows[:3] for name, rows in told[0].items()}, told[1]
    with pytest.raises(InputError, match=r"latents\.safetensors was drawn by another teacher or another recipe") as no:
        draw(model, told, file, **options)
    assert str(no.value).endswith("Use another --work folder.")
    assert file.read_bytes() == before


@pytest.mark.parametrize("fault", ["truncated", "no numbers"])
def test_a_damaged_file_is_refused(model: LatentDiffusion, told: Told, tmp_path: Path, fault: str) -> None:
    file = tmp_path / "latents.safetensors"
    draw(model, told, file, 4)
    content = file.read_bytes()
    spoiled = {"truncated": content[:-8], "no numbers": content[:-4] + b"\x00\x00\xc0\x7f"}
    file.write_bytes(spoiled[fault])
    words = {"truncated": "is damaged", "no numbers": "holds values that are no numbers"}
    with pytest.raises(InputError, match=f"{words[fault]}.*Delete it, and it is drawn anew") as refused:
        draw(model, told, file, 4)
    assert "\n" not in str(refused.value)


def test_timesteps_that_ddim_here_does_not_know(
    write_small: Callable[..., LatentDiffusion], told: Told, tmp_path: Path
) -> None:
    model = write_small(tmp_path / "small", timestep_spacing="linspace")
    with pytest.raises(InputError, match=r"small: timestep_spacing = 'linspace' is not supported; .*\.$"):
        draw(model, told, tmp_path / "latents.safetensors")
