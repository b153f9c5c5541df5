"""ControlNets, with diffusers' pipelines as the judge."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from ldm_export.export import chain
from ldm_export.export.ort_cpu import build_ort_cpu
from ldm_export.families import open_checkpoint
from ldm_export.runtime import Pipeline
from ldm_export.runtime.control import Control
from ldm_export.verify.metrics import psnr_db
from tests.bundle_fixture import perturb
from tests.diffusers_pipelines import assert_same, judged, opened

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers")

Array = np.ndarray[Any, Any]
PROMPTS = ["a red circle", "two green triangles on white"]
NEGATIVES = ["a blue square", "smiling eyes"]
SEEDS = [7, 11]
STEPS = 5
SIZE = (16, 24)
GUIDED: dict[str, Any] = {"steps": STEPS, "guidance": 4.0, "negative_prompt": NEGATIVES}


@pytest.fixture(scope="module")
def pictures() -> Array:
    """Two pictures of noise, uint8 (2, 16, 24, 3)."""
    return np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), np.uint8)


def control_net(unet: Any, seed: int, **config: Any) -> Any:
    """A ControlNet for a UNet, whose convolutions of zeros are not."""
    torch.manual_seed(seed)
    names = inspect.signature(diffusers.ControlNetModel.__init__).parameters.keys() & unet.config.keys()
    own = {"mid_block_type": "UNetMidBlock2DCrossAttn", "conditioning_embedding_out_channels": (16, 32), **config}
    made = diffusers.ControlNetModel(**{**{name: unet.config[name] for name in names}, **own})
    with torch.no_grad():
        for block in [*made.controlnet_down_blocks, made.controlnet_mid_block, made.controlnet_cond_embedding.conv_out]:
            block.weight.normal_(std=0.3)
    return perturb(made)


@pytest.fixture(scope="module")
def sd(tiny_checkpoint: Path, traced_once: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Pipeline]:
    """A Stable Diffusion with two ControlNets: diffusers' pipeline of both, and the bundle's."""
    folder = tmp_path_factory.mktemp("control")
    base = opened(diffusers.StableDiffusionPipeline, tiny_checkpoint)
    nets = [control_net(base.unet, seed) for seed in (0, 1)]
    for name, net in zip(("canny", "depth"), nets, strict=True):
        net.save_pretrained(folder / name)
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **base.components, controlnet=nets, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    model = open_checkpoint(tiny_checkpoint, controls=[(name, folder / name) for name in ("canny", "depth")])
    chain.export_bundle(model, folder / "bundle")
    return pipe, Pipeline.open(folder / "bundle", backend="cpu")


def of_diffusers(pipe: Any, sampler: str, controls: list[Control], **options: Any) -> torch.Tensor:
    """The latents of diffusers' pipeline with all of its ControlNets."""
    return judged(
        pipe,
        sampler,
        PROMPTS,
        SEEDS,
        image=[list(map(Image.fromarray, control.image)) for control in controls],
        controlnet_conditioning_scale=[control.scale for control in controls],
        control_guidance_start=[control.start for control in controls],
        control_guidance_end=[control.end for control in controls],
        **options,
    )


@pytest.mark.parametrize("sampler", ["ddim", "euler-ancestral", "heun", "dpmpp-2m"])
def test_two_controls(sd: tuple[Any, Pipeline], pictures: Array, sampler: str) -> None:
    pipe, pipeline = sd
    controls = [Control(pictures, 0.8, 0.0, 0.6), Control(pictures[::-1].copy(), 1.0, 0.2, 1.0)]
    result = pipeline.generate(
        PROMPTS, sampler=sampler, seed=SEEDS, controls=dict(zip(("canny", "depth"), controls, strict=True)), **GUIDED
    )
    assert_same(result, of_diffusers(pipe, sampler, controls, **GUIDED), pipe.vae)
    without = pipeline.generate(PROMPTS, sampler=sampler, seed=SEEDS, height=SIZE[0], width=SIZE[1], **GUIDED)
    assert psnr_db(without.images, result.images) < 30


def test_a_bundle_with_controls_generates_without(sd: tuple[Any, Pipeline], tiny_bundle: Path) -> None:
    _, pipeline = sd
    options = {**GUIDED, "seed": SEEDS, "height": SIZE[0], "width": SIZE[1]}
    plain = Pipeline.open(tiny_bundle, backend="cpu").generate(PROMPTS, **options)
    assert np.array_equal(pipeline.generate(PROMPTS, **options).images, plain.images)


def test_on_the_target_ort_cpu(sd: tuple[Any, Pipeline], pictures: Array) -> None:
    _, pipeline = sd
    build_ort_cpu(pipeline.bundle)
    with Pipeline.open(pipeline.bundle.path, backend="cpu") as built:
        assert "ort-cpu" in built.backend
        for controls in ({}, {"canny": Control(pictures, 0.8, 0.0, 0.6)}):
            options = {**GUIDED, "seed": SEEDS, "height": SIZE[0], "width": SIZE[1], "controls": controls}
            plain, fast = (each.generate(PROMPTS, **options) for each in (pipeline, built))
            assert psnr_db(plain.images, fast.images) > 60


# --- Stable Diffusion XL and 3 --------------------------------------------------------------------------------------


def exported(checkpoint: Path, nets: dict[str, Any], folder: Path) -> Pipeline:
    """The bundle of a checkpoint with ControlNets, opened."""
    for name, net in nets.items():
        net.save_pretrained(folder / name)
    model = open_checkpoint(checkpoint, controls=[(name, folder / name) for name in nets])
    return Pipeline.open(chain.export_bundle(model, folder / "bundle").path, backend="cpu")


def test_stable_diffusion_xl(kinds: Any, pictures: Array, tmp_path: Path) -> None:
    checkpoint, _ = kinds("sdxl")
    base = opened(diffusers.StableDiffusionXLPipeline, checkpoint)
    net = control_net(base.unet, 0)
    pipe = diffusers.StableDiffusionXLControlNetPipeline(**base.components, controlnet=net, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    pipeline = exported(checkpoint, {"canny": net}, tmp_path)
    for negatives in (NEGATIVES, None):
        options = {**GUIDED, "negative_prompt": negatives}
        result = pipeline.generate(PROMPTS, seed=SEEDS, controls={"canny": Control(pictures, 0.7, end=0.8)}, **options)
        expected = judged(
            pipe,
            "euler",
            PROMPTS,
            SEEDS,
            image=list(map(Image.fromarray, pictures)),
            controlnet_conditioning_scale=0.7,
            control_guidance_end=0.8,
            **options,
        )
        assert_same(result, expected, pipe.vae)


SD3_KINDS: dict[str, dict[str, Any]] = {
    "no pooled text, latents without shift": {},
    "pooled text": {"force_zeros_for_pooled_projection": False, "num_layers": 2},
    "positions of the transformer, no text": {
        "force_zeros_for_pooled_projection": False,
        "use_pos_embed": False,
        "joint_attention_dim": None,
        "qk_norm": "rms_norm",
    },
}


@pytest.mark.parametrize("kind", SD3_KINDS)
def test_stable_diffusion_3(
    kinds: Any, pictures: Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    checkpoint, _ = kinds("sd3")
    base = opened(diffusers.StableDiffusion3Pipeline, checkpoint)
    of_base = {key: value for key, value in base.transformer.config.items() if key != "dual_attention_layers"}
    nets = {}
    for seed, name in enumerate(("blur", "tile")):
        torch.manual_seed(seed)
        nets[name] = diffusers.SD3ControlNetModel.from_config({**of_base, "qk_norm": None, **SD3_KINDS[kind]})
        for block in [*nets[name].controlnet_blocks, nets[name].pos_embed_input.proj]:
            torch.nn.init.normal_(block.weight, std=0.3)
        perturb(nets[name])
    pipeline = exported(checkpoint, nets, tmp_path)
    pipe = diffusers.StableDiffusion3ControlNetPipeline(**base.components, controlnet=[*nets.values()])
    pipe.set_progress_bar_config(disable=True)
    distribution = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
    monkeypatch.setattr(distribution, "sample", lambda self: self.mode())  # it draws from torch's global generator
    controls = {"blur": Control(pictures, 0.7), "tile": Control(pictures[::-1].copy(), 0.4, start=0.3)}
    result = pipeline.generate(PROMPTS, seed=SEEDS, controls=controls, **GUIDED)
    expected = judged(
        pipe,
        "euler",
        PROMPTS,
        SEEDS,
        control_image=[[Image.fromarray(image) for image in control.image] for control in controls.values()],
        controlnet_conditioning_scale=[0.7, 0.4],
        control_guidance_start=[0.0, 0.3],
        control_guidance_end=[1.0, 1.0],
        height=SIZE[0],
        width=SIZE[1],
        **GUIDED,
    )
    assert_same(result, expected, pipe.vae)
