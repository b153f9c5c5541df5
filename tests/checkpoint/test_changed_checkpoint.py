"""Checkpoints that passes have changed: what is written, how they are drawn, and each way in which they can lie."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from ldm_reference.tiny_autoencoder import AutoencoderTiny
from ldm_reference.unet import UNet2DConditionModel

from ldm_export.bundle import Bundle
from ldm_export.checkpoint import PASSES, LatentDiffusion, SamplingDefaults
from ldm_export.contract import Guidance
from ldm_export.errors import BundleError, CheckpointError, InputError
from ldm_export.export.chain import export_bundle
from ldm_export.families import open_checkpoint
from ldm_export.passes.distill_guidance import conditioned_copy
from ldm_export.runtime import Pipeline
from tests.bundle_fixture import KINDS, TEXT_UNET, perturb
from tests.checkpoint.test_single_file import write as write_single_file

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers")

PROMPTS, SEEDS = ["a red circle", "two green triangles on white"], [7, 11]
TOLERANCE = 2e-5
"""Allowed max |ours - diffusers'| / max |diffusers'| of latents."""
FOLDED = SamplingDefaults("ddim", 4, 3.0, guidance_distilled=True)
RECORDS: list[dict[str, Any]] = [{"name": "teacher", "key": "a"}, {"name": "distill-guidance", "kept": True}]


def judged(checkpoint: Path, guidance: float, steps: int) -> np.ndarray[Any, Any]:
    """The latents that diffusers draws."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    pipe.check_inputs = lambda *_, **__: None  # it wants multiples of 8, whatever the autoencoder
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    options = {"generator": generators, "output_type": "latent", "num_inference_steps": steps}
    latents: np.ndarray[Any, Any] = pipe(PROMPTS, guidance_scale=guidance, **options).images.numpy()
    return latents


def relative_error(given: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    return float(np.abs(given - expected).max() / np.abs(expected).max())


# --- what is written ------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> LatentDiffusion:
    """A copy with what training leaves beside the networks."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "tiny"))
    for name in ("training", "logs", "samples"):
        (folder / name).mkdir()
        (folder / name / "large").write_text("much")
    return open_checkpoint(folder)


@pytest.fixture
def tiny_vae() -> AutoencoderTiny:
    torch.manual_seed(0)
    widths = {f"{side}_block_out_channels": [8, 8] for side in ("encoder", "decoder")}
    blocks = {f"num_{side}_blocks": [1, 1] for side in ("encoder", "decoder")}
    return AutoencoderTiny.from_config({**widths, **blocks})


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_what_differs_is_replaced_and_the_rest_is_copied(
    checkpoint: LatentDiffusion, tiny_vae: AutoencoderTiny, tmp_path: Path
) -> None:
    before = files_of(checkpoint.path)
    weights = {key: tensor.clone() for key, tensor in tiny_vae.state_dict().items()}
    scheduler = {**checkpoint.scheduler, "_class_name": "LCMScheduler", "original_inference_steps": 20}
    changed = checkpoint.save_changed(tmp_path / "changed", {"vae": tiny_vae}, scheduler, FOLDED, RECORDS)
    assert files_of(checkpoint.path) == before
    after = files_of(changed.path)
    assert {name for name in before if before[name] != after.get(name)} == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "training/large",
        "logs/large",
        "samples/large",
    }
    assert after.keys() - before.keys() == {PASSES}
    saved = safetensors.torch.load(after["vae/diffusion_pytorch_model.safetensors"])
    assert {tensor.dtype for tensor in saved.values()} == {torch.float16}
    loaded = changed.load("vae").state_dict()
    for key, tensor in weights.items():
        torch.testing.assert_close(loaded[key], tensor.half().float(), rtol=0, atol=0)
    assert changed.index["vae"] == ["diffusers", "AutoencoderTiny"]
    assert changed.index["scheduler"] == ["diffusers", "LCMScheduler"]
    others = {key: value for key, value in changed.index.items() if key not in ("vae", "scheduler")}
    assert others == {key: value for key, value in checkpoint.index.items() if key in others}
    assert changed.scheduler == scheduler
    assert changed.drawing == FOLDED
    assert changed.passes == RECORDS
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(changed.path)
    assert isinstance(pipe.vae, diffusers.AutoencoderTiny)
    assert isinstance(pipe.scheduler, diffusers.LCMScheduler)
    assert pipe.scheduler.config.original_inference_steps == 20


def test_what_was_changed_once_is_changed_again(checkpoint: LatentDiffusion, tmp_path: Path) -> None:
    once = checkpoint.save_changed(tmp_path / "once", {}, None, FOLDED, RECORDS[:1])
    unet = once.load("unet")
    twice = once.save_changed(tmp_path / "twice", {"unet": unet}, None, SamplingDefaults("ddim", 2, 3.0, True), RECORDS)
    assert (once.drawing, once.passes) == (FOLDED, RECORDS[:1])
    assert (twice.drawing, twice.passes) == (SamplingDefaults("ddim", 2, 3.0, guidance_distilled=True), RECORDS)
    assert twice.sha256("unet") != once.sha256("unet") == checkpoint.sha256("unet")
    assert twice.sha256("vae") == checkpoint.sha256("vae")
    assert twice.scheduler == checkpoint.scheduler


def test_record_passes_keeps_the_drawing(checkpoint: LatentDiffusion, tmp_path: Path) -> None:
    changed = checkpoint.save_changed(tmp_path / "changed", {}, None, FOLDED, RECORDS[:1])
    changed.record_passes(RECORDS)
    again = open_checkpoint(changed.path)
    assert (again.drawing, again.passes) == (FOLDED, RECORDS)
    assert json.loads((changed.path / PASSES).read_text())["drawing"] == {
        **{"sampler": "ddim", "steps": 4, "guidance": 3.0, "guidance_distilled": True}
    }


def test_a_single_file_is_not_changed(tmp_path: Path) -> None:
    file, _ = write_single_file(tmp_path, "sd1")
    model = open_checkpoint(file)
    assert (model.drawing, model.passes) == (SamplingDefaults(), [])
    with pytest.raises(CheckpointError) as refused:
        model.save_changed(tmp_path / "changed", {}, None, SamplingDefaults(), [])
    assert str(refused.value) == f"{file} is one file; passes need a folder in diffusers layout. Save it as one."
    assert not (tmp_path / "changed").exists()


# --- how it is drawn ------------------------------------------------------------------------------------------------


def test_what_no_pass_has_changed_is_drawn_as_its_scheduler_says(tiny_checkpoint: Path, tmp_path: Path) -> None:
    KINDS["lcm"](tmp_path / "lcm", tiny_checkpoint)
    consistency, plain = open_checkpoint(tmp_path / "lcm"), open_checkpoint(tiny_checkpoint)
    assert (consistency.drawing, consistency.passes) == (SamplingDefaults("lcm", 4, 4.0), [])
    assert (plain.drawing, plain.passes) == (SamplingDefaults("ddim", 20, 4.0), [])


@pytest.fixture(scope="module")
def folded(
    tiny_checkpoint: Path, traced_once: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LatentDiffusion, Bundle]:
    """The tiny model, as if guidance 3 were in its UNet and four steps were enough, and its bundle."""
    folder = tmp_path_factory.mktemp("folded")
    model = open_checkpoint(tiny_checkpoint).save_changed(folder / "checkpoint", {}, None, FOLDED, RECORDS)
    return model, export_bundle(model, folder / "bundle")


def test_a_folded_model_is_called_once_a_step(folded: tuple[LatentDiffusion, Bundle]) -> None:
    """Drawn with its own guidance it is what diffusers draws without any."""
    model, bundle = folded
    expected = judged(model.path, guidance=1.0, steps=4)
    pipeline = Pipeline(bundle, "cpu")
    shapes = []
    bind = pipeline._graph("unet").bind

    def watched(inputs: Any, *more: Any) -> Any:
        shapes.append(inputs["sample"].shape)
        return bind(inputs, *more)

    pipeline._graph("unet").bind = watched  # type: ignore[method-assign]
    for options in ({}, {"guidance": 3.0, "negative_prompt": ""}, {"negative_prompt": ["", ""]}):
        drawn = pipeline.generate(PROMPTS, seed=SEEDS, **options)  # type: ignore[arg-type]
        assert relative_error(drawn.latents, expected) < TOLERANCE
        assert len(drawn.timings.denoiser_ms) == 4
    assert shapes == [(2, 4, 8, 8)] * 3


def test_a_model_for_few_steps_is_drawn_as_it_was_made_for(folded: tuple[LatentDiffusion, Bundle]) -> None:
    _, bundle = folded
    assert not (bundle.path / "plans").exists()
    facts = bundle.manifest.model
    assert [facts[key] for key in ("default_sampler", "default_steps")] == ["ddim", 4]
    assert bundle.roles.guidance == Guidance("none", 3.0)


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"guidance": 4.0}, "Guidance 4 was asked for"),
        ({"guidance": 1.0}, "Guidance 1 was asked for"),
        ({"negative_prompt": "blue"}, "A negative prompt was asked for"),
        ({"negative_prompt": ["", "blue"]}, "A negative prompt was asked for"),
    ],
)
def test_another_guidance_than_the_folded_is_refused(
    folded: tuple[LatentDiffusion, Bundle], options: dict[str, Any], asked: str
) -> None:
    with pytest.raises(InputError) as refused:
        Pipeline(folded[1], "cpu").steps(PROMPTS, **options)
    assert str(refused.value) == (
        f"{asked}; this model was distilled with guidance 3 and takes no other, and no negative prompt. "
        "Leave it out, or use the bundle of the model that it was distilled from."
    )


@pytest.mark.parametrize("guidance", [float("nan"), -1.0])
def test_a_guidance_that_is_none(folded: tuple[LatentDiffusion, Bundle], guidance: float) -> None:
    with pytest.raises(InputError, match=r"give a number from 0 to 1e\+06"):
        Pipeline(folded[1], "cpu").steps(PROMPTS, guidance=guidance)


def test_a_conditioned_model_is_told_the_guidance(tiny_checkpoint: Path, traced_once: None, tmp_path: Path) -> None:
    """Through ``timestep_cond``, in one call a step, as diffusers does; what it is told shows."""
    torch.manual_seed(0)
    teacher = perturb(UNet2DConditionModel.from_config({**TEXT_UNET, "cross_attention_dim": 32}))
    student = conditioned_copy(teacher)  # type: ignore[arg-type]
    torch.nn.init.normal_(student.time_embedding.cond_proj.weight, std=0.2)  # type: ignore[union-attr]
    drawing = SamplingDefaults("ddim", 10, 5.0)
    tiny = open_checkpoint(tiny_checkpoint)
    model = tiny.save_changed(tmp_path / "conditioned", {"unet": student}, None, drawing, RECORDS)
    pipeline = Pipeline(export_bundle(model, tmp_path / "bundle"), "cpu")
    assert pipeline.bundle.roles.guidance.scale == 5.0
    assert pipeline.bundle.roles.guidance.kind == "input"
    assert "timestep_cond" in {tensor.name for tensor in pipeline.bundle.manifest.graphs["unet"].inputs}
    latents = {}
    for guidance in (None, 2.5):
        drawn = pipeline.generate(PROMPTS, seed=SEEDS, steps=10, guidance=guidance)
        assert len(drawn.timings.denoiser_ms) == 10
        assert relative_error(drawn.latents, judged(model.path, guidance or 5.0, 10)) < TOLERANCE
        latents[guidance] = drawn.latents
    assert relative_error(latents[None], latents[2.5]) > 100 * TOLERANCE
    with pytest.raises(InputError, match=r"^A negative prompt was given; this model was distilled to be given"):
        pipeline.generate(PROMPTS, negative_prompt="blue")
    pipeline.generate(PROMPTS, negative_prompt="", steps=10)


# --- what lies ------------------------------------------------------------------------------------------------------

PLAIN = {"sampler": "ddim", "steps": 4, "guidance": 3.0, "guidance_distilled": True}
LIES: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "is not readable JSON"),
    "no object": ("[]", "holds a list; a JSON object is needed"),
    "no drawing": (json.dumps({"passes": []}), "does not say how to draw ('drawing')"),
    "a list": (json.dumps({"drawing": ["ddim", 4]}), "does not say how to draw"),
    "unknown key": (json.dumps({"drawing": {**PLAIN, "eta": 1}}), "unexpected keyword argument 'eta'"),
    "sampler": (json.dumps({"drawing": {**PLAIN, "sampler": 5}}), "does not say how to draw (sampler = 5)"),
    "steps": (json.dumps({"drawing": {**PLAIN, "steps": "4"}}), "does not say how to draw (steps = '4')"),
    "guidance": (json.dumps({"drawing": {**PLAIN, "guidance": None}}), "does not say how to draw (guidance = None)"),
    "folded": (
        json.dumps({"drawing": {**PLAIN, "guidance_distilled": "no"}}),
        "does not say how to draw (guidance_distilled = 'no')",
    ),
    "passes": (json.dumps({"drawing": PLAIN, "passes": 3}), "does not say what passes did"),
    "a pass": (json.dumps({"drawing": PLAIN, "passes": ["half"]}), "does not say what passes did"),
}


@pytest.mark.parametrize("lie", LIES)
def test_passes_json_that_lies(checkpoint: LatentDiffusion, lie: str) -> None:
    content, sentence = LIES[lie]
    (checkpoint.path / PASSES).write_text(content)
    with pytest.raises(CheckpointError) as refused:
        _ = checkpoint.drawing, checkpoint.passes
    assert str(checkpoint.path / PASSES) in str(refused.value)
    assert sentence in str(refused.value)
    assert str(refused.value).count(". ") >= 1  # and what to do
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("key", "value"), [("scale", "4"), ("scale", None), ("kind", 1), ("kind", "folded")], ids=str)
def test_a_manifest_that_lies_about_guidance(
    folded: tuple[LatentDiffusion, Bundle], tmp_path: Path, key: str, value: Any
) -> None:
    folder = Path(shutil.copytree(folded[1].path, tmp_path / "bundle"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["roles"]["guidance"][key] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=rf"manifest.json: roles.guidance.{key} is .* Export the bundle anew"):
        Pipeline.open(folder)


def test_only_what_is_read_is_copied(checkpoint: LatentDiffusion, tmp_path: Path) -> None:
    """Links are resolved; a pipe, which no copy would come to the end of, is not touched."""
    source = shutil.copytree(checkpoint.path, tmp_path / "source")
    for left in (".git/objects/pack", "samples/1.png", "unet/optimizer.pt", "unet/.cache/x", "notes.txt"):
        (source / left).parent.mkdir(parents=True, exist_ok=True)
        (source / left).write_bytes(b"left behind")
    weights = source / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copyfile(weights, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    weights.rename(tmp_path / "blob")
    weights.symlink_to(tmp_path / "blob")
    os.mkfifo(source / "tokenizer" / "pipe.json.lock")
    changed = open_checkpoint(source).save_changed(tmp_path / "changed", {}, None, FOLDED, RECORDS)
    files = {str(file.relative_to(changed.path)) for file in changed.path.rglob("*") if file.is_file()}
    kept = {str(file.relative_to(checkpoint.path)) for file in checkpoint.path.rglob("*") if file.is_file()}
    assert files <= kept | {PASSES}
    assert {"model_index.json", "tokenizer/vocab.json", "unet/config.json", PASSES} < files
    assert not any(file.is_symlink() for file in changed.path.rglob("*"))
    assert {name: changed.sha256(name) for name in changed.components} == {
        name: checkpoint.sha256(name) for name in checkpoint.components
    }


def test_a_pipe_for_a_config_is_refused(checkpoint: LatentDiffusion, tmp_path: Path) -> None:
    source = shutil.copytree(checkpoint.path, tmp_path / "source")
    os.mkfifo(source / "tokenizer" / "added_tokens.json")
    with pytest.raises(CheckpointError, match=r"added_tokens\.json is no regular file"):
        open_checkpoint(source).save_changed(tmp_path / "changed", {}, None, FOLDED, RECORDS)


@pytest.mark.parametrize(("sample_size", "expected"), [(None, (128, 128)), (8, (16, 16)), ([8, 12], (16, 24))], ids=str)
def test_the_size_of_pictures(
    checkpoint: LatentDiffusion, tmp_path: Path, sample_size: Any, expected: tuple[int, int]
) -> None:
    source = shutil.copytree(checkpoint.path, tmp_path / "source")
    config = json.loads((source / "unet" / "config.json").read_text())
    (source / "unet" / "config.json").write_text(json.dumps({**config, "sample_size": sample_size}))
    model = open_checkpoint(source)
    assert (model.pixels_per_latent, model.picture_size) == (2, expected)
