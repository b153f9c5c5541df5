"""AutoencoderTiny against diffusers': same keys, same numbers, in both directions; a model with it draws the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from ldm_reference.config import ConfigError
from ldm_reference.layout import save_checkpoint, save_component
from ldm_reference.text_encoder import CLIPTextModel
from ldm_reference.tiny_autoencoder import CERTAIN, AutoencoderTiny
from ldm_reference.tokenizer import save_tokenizer, train_tokenizer
from PIL import Image
from torch import Tensor, nn

from ldm_export.errors import CheckpointError
from ldm_export.export.chain import export_bundle
from ldm_export.families import open_checkpoint
from ldm_export.runtime import Pipeline
from ldm_export.verify.metrics import psnr_db
from tests.conftest import CAPTIONS, TOKENS, perturb

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers")

RTOL, ATOL = 1e-4, 1e-5
"""Allowed difference of float32 outputs whose largest values are about 1."""


def config(encoder: list[int], decoder: list[int], **changes: Any) -> dict[str, Any]:
    """Of these blocks at each resolution, eight channels wide."""
    return {
        "encoder_block_out_channels": [8] * len(encoder),
        "decoder_block_out_channels": [8] * len(decoder),
        "num_encoder_blocks": encoder,
        "num_decoder_blocks": decoder,
        **changes,
    }


CONFIGS = {
    "taesd, narrow": config([1, 3, 3, 3], [3, 3, 3, 1]),
    "factor-1": config([2], [1]),
    "factor-2": config([1, 1], [1, 1]),
    "factor-4": config([1, 2, 0], [2, 1, 0]),
    "no blocks": config([0, 0], [0, 0]),
    "two widths": config([1, 1], [2, 1], encoder_block_out_channels=[6, 6], decoder_block_out_channels=[12, 12]),
    "latents-16": config([1, 1], [1, 1], latent_channels=16, latent_magnitude=4, latent_shift=0.25),
    "grey": config([1, 1], [1, 1], in_channels=1, out_channels=1, latent_channels=3),
    "scaled": config([1, 1], [1, 1], scaling_factor=0.5),
}
SIZES = [(4, 4), (3, 5)]


def random_module(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    module = make()
    perturb(module, 0)
    return module.eval()


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@torch.no_grad()
def assert_same(ours: AutoencoderTiny, theirs: Any) -> None:
    for batch, (height, width) in enumerate(SIZES, start=1):
        factor = ours.config.factor
        pictures = randn(batch, ours.config.in_channels, height * factor, width * factor)
        latents = 2 * randn(batch, ours.config.latent_channels, height, width)
        mean, logvar = ours.encode(pictures).chunk(2, dim=1)
        torch.testing.assert_close(mean, theirs.encode(pictures).latents, rtol=RTOL, atol=ATOL)
        assert (logvar == CERTAIN).all()
        torch.testing.assert_close(ours.decode(latents), theirs.decode(latents).sample, rtol=RTOL, atol=ATOL)


def opened(folder: Path) -> Any:
    """The autoencoder of a checkpoint that has, on disk, no other network."""
    index = {"vae": ["diffusers", "AutoencoderTiny"], "unet": ["diffusers", "UNet2DConditionModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return open_checkpoint(folder).load("vae")


# --- the network ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_by_diffusers(tmp_path: Path, name: str) -> None:
    theirs = random_module(lambda: diffusers.AutoencoderTiny(**CONFIGS[name]))
    theirs.save_pretrained(tmp_path / "vae")
    ours = opened(tmp_path)
    assert isinstance(ours, AutoencoderTiny)
    assert shapes(ours) == shapes(theirs)
    assert ours.config.scaling_factor == theirs.config.scaling_factor
    assert list(ours.config.block_out_channels) == list(theirs.config.block_out_channels)
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_opens_in_diffusers(tmp_path: Path, name: str) -> None:
    ours = random_module(lambda: AutoencoderTiny.from_config(CONFIGS[name]))
    save_component(ours, tmp_path)
    theirs, info = diffusers.AutoencoderTiny.from_pretrained(tmp_path, output_loading_info=True)
    assert {key: list(value) for key, value in info.items() if value} == {}
    assert len(theirs.config.block_out_channels) == len(ours.config.decoder_block_out_channels)
    assert (theirs.config.latent_magnitude, theirs.config.latent_shift) == (
        ours.config.latent_magnitude,
        ours.config.latent_shift,
    )
    assert_same(ours, theirs)


def test_the_comparison_notices_a_changed_weight(tmp_path: Path) -> None:
    theirs = random_module(lambda: diffusers.AutoencoderTiny(**CONFIGS["factor-4"]))
    theirs.save_pretrained(tmp_path / "vae")
    ours = opened(tmp_path)
    with torch.no_grad():
        ours.decoder.layers[2].conv[0].weight.mul_(1.05)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(ours, theirs)


def test_taesd_key_for_key() -> None:
    """The defaults are the published taesd, of 1.2 million parameters a side."""
    with torch.device("meta"):
        ours, theirs = AutoencoderTiny.from_config({}), diffusers.AutoencoderTiny()
    assert shapes(ours) == shapes(theirs)
    assert ours.config.factor == 8
    sides = [sum(p.numel() for p in side.parameters()) for side in (ours.encoder, ours.decoder)]
    assert sides == [1_222_532, 1_222_531]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"act_fn": "silu"}, "act_fn = 'silu' is not supported"),
        ({"upsample_fn": "bilinear"}, "upsample_fn = 'bilinear' is not supported; only 'nearest' is"),
        ({"shift_factor": 0.1}, "shift_factor = 0.1 is not supported"),
        ({"num_decoder_blocks": [1, 1, 1]}, "num_decoder_blocks = (1, 1, 1) must be as long as"),
        (config([1], [1, 1]), "decoder_block_out_channels = (8, 8) and num_decoder_blocks = (1, 1) must be as long"),
        ({"encoder_block_out_channels": [8, 8, 8, 16]}, "(8, 8, 8, 16) must all be one number"),
        ({"decoder_block_out_channels": [0, 0, 0, 0]}, "must hold integers of at least 1"),
        ({"latent_channels": "4"}, "latent_channels = '4' must be int"),
        ({"scaling_factor": 0}, "scaling_factor = 0 must be above 0"),
    ],
)
def test_a_config_of_another_network_is_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AutoencoderTiny.from_config(changes)
    assert sentence in str(caught.value)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(changes))
    with pytest.raises(CheckpointError) as refused:
        opened(tmp_path)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_unknown_key_is_refused_in_a_training_config_only() -> None:
    with pytest.raises(ConfigError, match="unknown key 'norm_num_groups'"):
        AutoencoderTiny.from_config({"norm_num_groups": 8})


# --- a whole model --------------------------------------------------------------------------------------------------

PROMPTS = ["a red circle", "two green triangles on white"]
SEEDS = [7, 11]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint` with a random AutoencoderTiny, whose latents are the UNet's own."""
    tiny = open_checkpoint(tiny_checkpoint)
    folder = tmp_path_factory.mktemp("models") / "tiny-decoder"
    text_encoder = tiny.load("text_encoder")
    assert isinstance(text_encoder, CLIPTextModel)
    save_checkpoint(
        folder,
        vae=random_module(lambda: AutoencoderTiny.from_config(config([1, 1], [2, 1]))),
        unet=tiny.load("unet"),  # type: ignore[arg-type]
        text_encoder=text_encoder,
        tokenizer=lambda path: save_tokenizer(train_tokenizer(CAPTIONS, 560), path, TOKENS),
        scheduler=tiny.scheduler,
        dtype=torch.float32,
    )
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, traced_once: None, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline(export_bundle(open_checkpoint(checkpoint), tmp_path_factory.mktemp("b") / "bundle"), "cpu")


def assert_same_pictures(pipe: Any, bundle: Pipeline, given: dict[str, Any], **options: Any) -> None:
    pipe.set_progress_bar_config(disable=True)
    pipe.check_inputs = lambda *_, **__: None  # it wants multiples of 8, whatever the autoencoder
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    theirs = pipe(
        PROMPTS, num_inference_steps=10, guidance_scale=4.0, generator=generators, output_type="np", **given
    ).images
    ours = bundle.generate(PROMPTS, steps=10, guidance=4.0, seed=SEEDS, **options).images
    assert ours.shape == (2, 16, 16, 3)
    assert ours.std() > 10  # there is something to compare
    for a, b in zip(ours, (theirs * 255).round().astype(np.uint8), strict=True):
        assert psnr_db(a, b) > 45


def test_text_to_image_is_that_of_diffusers(checkpoint: Path, bundle: Pipeline) -> None:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(checkpoint)
    assert isinstance(pipe.vae, diffusers.AutoencoderTiny)
    assert [tensor.name for tensor in bundle.bundle.manifest.graphs["vae_encoder"].outputs] == ["latent_sample"]
    assert bundle.bundle.manifest.model["pixels_per_latent"] == 2
    assert_same_pictures(pipe, bundle, {})


def test_image_to_image_is_that_of_diffusers(checkpoint: Path, bundle: Pipeline) -> None:
    """No noise is spent on the latents of the picture, which the encoder gives as they are."""
    y, x = np.mgrid[0:16, 0:16]
    picture = np.stack([np.sin(x / 5), np.cos(y / 4), np.sin((x + y) / 7)], axis=-1)
    picture = ((picture * 0.5 + 0.5) * 255).round().astype(np.uint8)
    pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(checkpoint)
    assert_same_pictures(
        pipe, bundle, {"image": Image.fromarray(picture), "strength": 0.6}, image=picture, strength=0.6
    )


def test_a_picture_there_and_back(checkpoint: Path, bundle: Pipeline) -> None:
    theirs = diffusers.AutoencoderTiny.from_pretrained(checkpoint / "vae")
    pictures = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    sample = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        decoded = theirs.decode(theirs.encode(sample).latents).sample
    expected = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(bundle.reconstruct(pictures).astype(int) - expected).max() <= 1
