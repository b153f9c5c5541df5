"""IP-Adapters, with diffusers' pipelines as the judge."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

from ldm_export.errors import CheckpointError, InputError
from ldm_export.export import chain
from ldm_export.export.ort_cpu import build_ort_cpu
from ldm_export.families import open_checkpoint
from ldm_export.runtime import Pipeline
from ldm_export.runtime.image_prompt import encoder_pixels
from ldm_export.verify.metrics import psnr_db
from tests.bundle_fixture import perturb
from tests.diffusers_pipelines import assert_same, judged, opened

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers")

Array = np.ndarray[Any, Any]
PROMPTS = ["a red circle", "two green triangles on white"]
SEEDS = [7, 11]
GUIDED: dict[str, Any] = {"steps": 4, "guidance": 4.0}
HIDDEN, PROJECTED, SIDE = 32, 24, 32


@pytest.fixture(scope="module")
def picture() -> Array:
    """uint8 (50, 71, 3)"""
    return np.random.default_rng(0).integers(0, 256, (50, 71, 3), np.uint8)


def write_adapter(folder: Path, unet: Any, kind: str, *, read: int | None = None) -> Path:
    """The file of an IP-Adapter of random weights, in the names that they are published under, and its encoder."""
    config = transformers.CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=48,
        projection_dim=PROJECTED,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=8,
    )
    torch.manual_seed(0)
    perturb(transformers.CLIPVisionModelWithProjection(config)).save_pretrained(folder / "image_encoder")
    width = unet.config.cross_attention_dim
    tensors = {}
    if kind == "plain":
        tensors |= {"proj.weight": torch.randn(4 * width, read or PROJECTED), "proj.bias": torch.randn(4 * width)}
        tensors |= {"norm.weight": torch.randn(width), "norm.bias": torch.randn(width)}
    else:
        inner, queries = 16, 5
        tensors |= {"latents": torch.randn(1, queries, inner), "proj_in.weight": torch.randn(inner, read or HIDDEN)}
        tensors |= {"proj_in.bias": torch.randn(inner), "proj_out.weight": torch.randn(width, inner)}
        tensors |= {name: torch.randn(width) for name in ("proj_out.bias", "norm_out.weight", "norm_out.bias")}
        for layer in range(4):  # as many as diffusers reads
            own = {f"0.{norm}.{part}": torch.randn(inner) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
            own |= {"0.to_q.weight": torch.randn(64, inner), "0.to_kv.weight": torch.randn(128, inner)}
            own |= {"0.to_out.weight": torch.randn(inner, 64), "1.0.weight": torch.randn(inner)}
            own |= {"1.0.bias": torch.randn(inner), "1.1.weight": torch.randn(4 * inner, inner)}
            own |= {"1.3.weight": torch.randn(inner, 4 * inner)}
            tensors |= {f"layers.{layer}.{name}": 0.3 * tensor for name, tensor in own.items()}
    saved = {f"image_proj.{name}": tensor for name, tensor in tensors.items()}
    names = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    for number, name in enumerate(names):
        channels = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
        for part in ("to_k_ip", "to_v_ip"):
            saved[f"ip_adapter.{2 * number + 1}.{part}.weight"] = 0.3 * torch.randn(channels, width)
    save_file(saved, folder / "ip.safetensors")
    return folder / "ip.safetensors"


def loaded(pipe: Any, file: Path) -> Any:
    """A pipeline of diffusers with an IP-Adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.load_ip_adapter(
            str(file.parent), subfolder="", weight_name=file.name, image_encoder_folder="image_encoder"
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("shape", [(50, 71), (71, 50), (32, 32), (20, 20), (20, 31), (32, 47), (300, 32)])
def test_the_encoders_pixels(shape: tuple[int, int]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    processor = CLIPImageProcessorPil(size=SIDE, crop_size=SIDE, do_normalize=False)
    expected = processor(Image.fromarray(image), return_tensors="np").pixel_values[0]
    assert np.abs(encoder_pixels(image, SIDE) - expected).max() < 1e-6


@pytest.mark.parametrize("kind", ["plain", "plus"])
def test_stable_diffusion(tiny_checkpoint: Path, traced_once: None, picture: Array, tmp_path: Path, kind: str) -> None:
    pipe = opened(diffusers.StableDiffusionPipeline, tiny_checkpoint)
    file = write_adapter(tmp_path, pipe.unet, kind)
    model = open_checkpoint(tiny_checkpoint, image_adapter=(file, None))
    bundle = chain.export_bundle(model, tmp_path / "bundle")
    pipeline = Pipeline.open(bundle.path, backend="cpu")
    plain = pipeline.generate(PROMPTS, seed=SEEDS, **GUIDED)
    assert_same(plain, judged(pipe, "ddim", PROMPTS, SEEDS, **GUIDED), pipe.vae)
    loaded(pipe, file)
    for scale, guidance in ((0.6, 4.0), (1.0, 1.0)):
        pipe.set_ip_adapter_scale(scale)
        options = {**GUIDED, "guidance": guidance}
        result = pipeline.generate(PROMPTS, seed=SEEDS, ip_adapter_image=picture, ip_adapter_scale=scale, **options)
        given = [[Image.fromarray(picture)] * 2]  # one a picture
        assert_same(result, judged(pipe, "ddim", PROMPTS, SEEDS, ip_adapter_image=given, **options), pipe.vae)
        assert psnr_db(plain.images, result.images) < 40
    off = pipeline.generate(PROMPTS, seed=SEEDS, ip_adapter_image=picture, ip_adapter_scale=0, **GUIDED)
    assert psnr_db(plain.images, off.images) > 80
    build_ort_cpu(bundle)
    with Pipeline.open(bundle.path, backend="cpu") as built:
        assert "ort-cpu" in built.backend
        fast = built.generate(PROMPTS, seed=SEEDS, ip_adapter_image=picture, **options)
        assert psnr_db(fast.images, result.images) > 60


@pytest.fixture(scope="module")
def xl(kinds: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Pipeline, Path]:
    """An SDXL with an IP-Adapter: diffusers' pipeline, the bundle's, and the adapter's file."""
    folder = tmp_path_factory.mktemp("ip")
    checkpoint, _ = kinds("sdxl")
    pipe = opened(diffusers.StableDiffusionXLPipeline, checkpoint)
    file = write_adapter(folder, pipe.unet, "plain")
    chain.export_bundle(open_checkpoint(checkpoint, image_adapter=(file, None)), folder / "bundle")
    return loaded(pipe, file), Pipeline.open(folder / "bundle", backend="cpu"), file


def test_stable_diffusion_xl(xl: tuple[Any, Pipeline, Path], picture: Array) -> None:
    pipe, pipeline, _ = xl
    pipe.set_ip_adapter_scale(0.7)
    options = {**GUIDED, "negative_prompt": ["a blue square", "smiling eyes"]}
    result = pipeline.generate(
        PROMPTS, seed=SEEDS, ip_adapter_image=picture, ip_adapter_scale=0.7, height=16, width=16, **options
    )
    given = [[Image.fromarray(picture)] * 2]
    expected = judged(pipe, "euler", PROMPTS, SEEDS, ip_adapter_image=given, height=16, width=16, **options)
    assert_same(result, expected, pipe.vae)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ip_adapter_image": np.zeros((8, 8), np.uint8)}, "has shape (8, 8) and dtype uint8; uint8 (H, W, 3)"),
        ({"ip_adapter_image": np.zeros((3, 8, 8, 3), np.uint8)}, "3 IP-Adapter pictures were given for 2 pictures"),
        ({"ip_adapter_image": np.zeros((8, 8, 3), np.uint8), "ip_adapter_scale": -1}, "ip_adapter_scale is -1"),
        ({"ip_adapter_scale": 0.5}, "ip_adapter_scale was given without ip_adapter_image"),
        ({"controls": {"canny": np.zeros((16, 16, 3), np.uint8)}}, "this bundle has no ControlNet"),
    ],
)
def test_what_is_no_picture_for_it(xl: tuple[Any, Pipeline, Path], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        xl[1].generate(PROMPTS, seed=SEEDS, steps=2, **options)
    assert message in str(raised.value)


def test_a_bundle_without_an_adapter(tiny_bundle: Path, picture: Array) -> None:
    with pytest.raises(InputError, match="this bundle has none"):
        Pipeline.open(tiny_bundle, backend="cpu").generate(PROMPTS, ip_adapter_image=picture)


def test_adapters_that_cannot_be_used(
    xl: tuple[Any, Pipeline, Path], tiny_checkpoint: Path, kinds: Any, tmp_path: Path
) -> None:
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny_checkpoint / "unet")

    def refused(file: Path, encoder: Path | None = None, checkpoint: Path = tiny_checkpoint) -> str:
        with pytest.raises((CheckpointError, InputError)) as raised:
            chain.export_bundle(open_checkpoint(checkpoint, image_adapter=(file, encoder)), tmp_path / "bundle")
        assert not (tmp_path / "bundle").exists()
        return str(raised.value)

    assert "Use one that was trained for this model" in refused(xl[2])
    assert "cannot be exported with one" in refused(xl[2], None, kinds("sd3")[0])
    narrow = write_adapter(tmp_path, unet, "plain", read=20)
    assert "it reads embeddings 20 wide" in refused(narrow)
    encoder = narrow.parent / "image_encoder"
    narrow.with_suffix(".bin").write_bytes(b"")
    assert "is a pickle" in refused(narrow.with_suffix(".bin"))
    assert "There is no image encoder in" in refused(narrow.parent / "away" / narrow.name)
    save_file({"lora.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    assert "has the weight 'lora.weight'" in refused(tmp_path / "lora.safetensors", encoder)
    save_file({"image_proj.proj.weight": torch.full((1, 1), torch.nan)}, tmp_path / "nan.safetensors")
    assert "holds NaN" in refused(tmp_path / "nan.safetensors", encoder)
    (tmp_path / "cut.safetensors").write_bytes(narrow.read_bytes()[:100])
    assert "truncated" in refused(tmp_path / "cut.safetensors", encoder)
