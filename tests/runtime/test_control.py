"""ControlNets, with diffusers' pipelines as the judge."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from ldm_export.errors import CheckpointError, InputError
from ldm_export.export import chain
from ldm_export.export.ort_cpu import build_ort_cpu
from ldm_export.families import open_checkpoint
from ldm_export.runtime import Pipeline
from ldm_export.runtime.control import Control
from ldm_export.verify.engines.build import build_engines
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


def test_on_the_target_ort_cpu(sd: tuple[Any, Pipeline], pictures: Array, variants: Callable[[str], Path]) -> None:
    _, pipeline = sd
    build_ort_cpu(pipeline.bundle)
    without_controls = Pipeline.open(variants("target"), backend="cpu")
    with Pipeline.open(pipeline.bundle.path, backend="cpu") as built:
        assert "ort-cpu" in built.backend
        for controls in ({}, {"canny": Control(pictures, 0.8, 0.0, 0.6)}):
            options = {**GUIDED, "seed": SEEDS, "height": SIZE[0], "width": SIZE[1], "controls": controls}
            plain, fast = (each.generate(PROMPTS, **options) for each in (pipeline, built))
            assert psnr_db(plain.images, fast.images) > 60
        cached = [
            each.generate(PROMPTS, deepcache=2, seed=SEEDS, **GUIDED).images for each in (built, without_controls)
        ]
        assert psnr_db(*cached) > 60


def test_no_engines_are_built(sd: tuple[Any, Pipeline]) -> None:
    settings: Any = None  # refused before they are read
    with pytest.raises(InputError, match="of which no engines are built"):
        build_engines(sd[1].bundle, settings)


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


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("controls", "options", "message"),
    [
        ({"pose": "image"}, {}, "The control 'pose' of type str was asked for; this bundle has canny, depth"),
        ([("canny", 1)], {}, "give a dict of pictures"),
        ({"canny": None}, {}, "The picture of canny has shape"),
        ({"canny": np.zeros((16, 24, 4), np.uint8)}, {}, "shape (16, 24, 4) and dtype uint8; uint8 (H, W, 3)"),
        ({"canny": np.zeros((3, 16, 24, 3), np.uint8)}, {}, "3 pictures of canny were given for 2 pictures"),
        ({"canny": Control(np.zeros((16, 24, 3), np.uint8), scale=-1)}, {}, "scale of canny is -1; give a number"),
        ({"canny": Control(np.zeros((16, 24, 3), np.uint8), start=0.5, end=0.5)}, {}, "starts at 0.5 and ends at 0.5"),
        ({"canny": Control(np.zeros((16, 24, 3), np.uint8), end=1.5)}, {}, "end of canny is 1.5; give a number from 0"),
        ({"canny": "image"}, {"height": 16, "width": 16}, "canny is 16x24, and 16x16 is generated"),
        ({"canny": "image", "depth": np.zeros((16, 16, 3), np.uint8)}, {}, "depth is 16x16, and 16x24 is generated"),
        ({"canny": np.zeros((15, 24, 3), np.uint8)}, {}, "The size 15x24 does not fit"),
        ({"canny": "image"}, {"image": np.zeros((16, 16, 3), np.uint8)}, "canny is 16x24, and 16x16 is generated"),
        ({"canny": "image"}, {"deepcache": 3}, "A control was given with deepcache"),
        ({"canny": "image"}, {"whole": True}, "A control was given with the whole loop at once"),
        ({"canny": Control(np.zeros((16, 24, 3), np.uint8), end=0.5)}, {"calls": 3}, "for a part of the steps"),
    ],
)
def test_what_cannot_control(
    sd: tuple[Any, Pipeline], pictures: Array, controls: Any, options: dict[str, Any], message: str
) -> None:
    if isinstance(controls, dict):
        controls = {name: pictures if isinstance(value, str) else value for name, value in controls.items()}
    with pytest.raises(InputError) as raised:
        sd[1].generate(PROMPTS, seed=SEEDS, controls=controls, **{"steps": STEPS, **options})
    assert message in str(raised.value)


def test_a_bundle_without_controls(tiny_bundle: Path, pictures: Array) -> None:
    with pytest.raises(InputError, match="this bundle has no ControlNet"):
        Pipeline.open(tiny_bundle, backend="cpu").generate(PROMPTS, controls={"canny": pictures})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"block_out_channels": (8, 8)}, "channels of the blocks (block_out_channels) are [8, 8]"),
        ({"cross_attention_dim": 24}, "width of the text's states (cross_attention_dim) are 24, and the UNet's 32"),
        ({"conditioning_embedding_out_channels": (8, 16, 16, 32)}, "8 times smaller, and the autoencoder 2 times"),
        ({"conditioning_channels": 1}, "it reads pictures of 1 channels"),
        ({"global_pool_conditions": True}, "global_pool_conditions"),
    ],
)
def test_a_controlnet_of_another_model(
    sd: tuple[Any, Pipeline], tiny_checkpoint: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    control_net(sd[0].unet, 0, **config).save_pretrained(tmp_path / "canny")
    model = open_checkpoint(tiny_checkpoint, controls=[("canny", tmp_path / "canny")])
    with pytest.raises(CheckpointError) as raised:
        chain.export_bundle(model, tmp_path / "bundle")
    assert message in str(raised.value)
    assert not (tmp_path / "bundle").exists()


def test_folders_that_are_no_controlnet(tiny_checkpoint: Path, kinds: Any, tmp_path: Path) -> None:
    def refused(name: str, folder: Path, checkpoint: Path = tiny_checkpoint) -> str:
        with pytest.raises((CheckpointError, InputError)) as raised:
            open_checkpoint(checkpoint, controls=[(name, folder)])
        return str(raised.value)

    assert "config.json" in refused("canny", tmp_path)
    assert "is of a UNet2DConditionModel; ControlNetModel is needed" in refused("canny", tiny_checkpoint / "unet")
    assert "is a pickle" in refused("canny", tmp_path / "canny.pth")
    assert "is no name of letters" in refused("can=ny", tmp_path)
    assert "cannot be exported with one" in refused("canny", tmp_path, kinds("dit")[0])
