"""Checkpoints that tests of several parts share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from ldm_reference.autoencoder import AutoencoderKL
from ldm_reference.layout import save_checkpoint
from ldm_reference.text_encoder import CLIPTextModel
from ldm_reference.tokenizer import END, save_tokenizer, train_tokenizer
from ldm_reference.unet import UNet2DConditionModel

from ldm_export.bundle import Bundle
from ldm_export.bundle.atomic import locked
from ldm_export.export import chain
from ldm_export.export.ort_cpu import build_ort_cpu
from ldm_export.families import open_checkpoint
from ldm_export.runtime.backends import auto
from ldm_export.verify.loops import add_loop
from tests.bundle_fixture import KINDS, GraphCache, shift_dynamically

TOKENS = 16
CAPTIONS = ("a red circle", "a blue square", "two green triangles on white", "grinning face with smiling eyes")


def perturb(module: torch.nn.Module, seed: int) -> None:
    """Move every weight off its initial value, so that a norm's scale or a bias that is ignored shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="session", autouse=True)
def auto_measures_nothing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The backend ``auto`` is ONNX Runtime, however fast OpenVINO is on this machine; nothing is kept in the home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto, "openvino_version", lambda: None)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Stable Diffusion in diffusers layout, fp32: latents 4 x 8 x 8, pictures 16 x 16, 16 tokens of width 32.

    Read-only: a test that changes a file works on a copy.
    """
    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS, 560)
    end = tokenizer.token_to_id(END)
    vae = AutoencoderKL.from_config(
        {
            "sample_size": 16,
            "block_out_channels": [16, 32],
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
            "norm_num_groups": 8,
        }
    )
    text_encoder = CLIPTextModel.from_config(
        {
            "vocab_size": end + 1,
            "bos_token_id": end - 1,
            "eos_token_id": end,
            "pad_token_id": end,
            "hidden_size": 32,
            "intermediate_size": 64,
            "projection_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": TOKENS,
        }
    )
    unet = UNet2DConditionModel.from_config(
        {
            "sample_size": 8,
            "block_out_channels": [16, 32],
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "cross_attention_dim": 32,
            "attention_head_dim": 4,
        }
    )
    for seed, module in enumerate((vae, text_encoder, unet)):
        perturb(module, seed)
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    save_checkpoint(
        folder,
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=lambda path: save_tokenizer(tokenizer, path, TOKENS),
        scheduler={
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": "epsilon",
            "timestep_spacing": "leading",
            "steps_offset": 1,
            "clip_sample": False,
            "set_alpha_to_one": False,
        },
        dtype=torch.float32,
    )
    return folder


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this run have in common."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def traced_once(shared_folder: Path) -> Iterator[None]:
    """From here to the end of the session, `export_bundle` traces each network once, whichever process asks for it."""
    graphs = GraphCache(shared_folder / "graphs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain, "export_graph", graphs.export_graph)
        yield


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, traced_once: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The bundle of `tiny_checkpoint`. Read-only: a test that changes a file works on a copy."""
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    bundle = chain.export_bundle(open_checkpoint(tiny_checkpoint), folder)
    yield folder
    assert Bundle.open(folder).manifest == bundle.manifest, "a test added a file to the bundle that all share"
    assert not (folder / "targets").exists(), "a test added a target to the bundle that all share"


VARIANTS = ("plain", "loop", "target", "loop and target")
"""What else a bundle may hold beside its graphs and plans."""


@pytest.fixture(scope="session")
def variants(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a name in `VARIANTS` to the tiny bundle with a loop of ddim-10, the target ort-cpu, or both.

    All read-only.
    """
    folder = tmp_path_factory.mktemp("variants")

    @cache
    def make(variant: str) -> Path:
        bundle = Bundle.open(shutil.copytree(tiny_bundle, folder / variant.replace(" ", "-")))
        if "loop" in variant:
            bundle = add_loop(bundle, "ddim-10")
        if "target" in variant:
            build_ort_cpu(bundle)
        return bundle.path

    return make


@pytest.fixture(scope="session")
def kinds(tiny_checkpoint: Path, traced_once: None, shared_folder: Path) -> Callable[[str], tuple[Path, Path]]:
    """A function from a name in `KINDS` to a checkpoint of that kind and its bundle, both read-only; all processes of
    this run have the same."""

    @cache
    def make(kind: str) -> tuple[Path, Path]:
        folder = shared_folder / "kinds" / kind
        checkpoint, bundle = folder / kind, folder / f"{kind}.bundle"
        lock = folder / "lock"  # of its own: a bundle's folder is locked while it is written
        lock.mkdir(parents=True, exist_ok=True)
        with locked(lock):
            if not bundle.is_dir():
                KINDS[kind](checkpoint, tiny_checkpoint)
                chain.export_bundle(open_checkpoint(checkpoint), bundle)
        return checkpoint, bundle

    return make


@pytest.fixture(scope="session")
def shifting(
    kinds: Callable[[str], tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """A function from a name in `SHIFTING` to a Stable Diffusion 3 that shifts so and its bundle, both read-only."""
    folder = tmp_path_factory.mktemp("shifting")

    @cache
    def make(name: str) -> tuple[Path, Path]:
        checkpoint = Path(shutil.copytree(kinds("sd3")[0], folder / name))
        shift_dynamically(checkpoint, name)
        return checkpoint, chain.export_bundle(open_checkpoint(checkpoint), folder / f"{name}.bundle").path

    return make
