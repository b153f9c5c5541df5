"""Stable Diffusion 3: what can be exported and what is refused, and what replaces diffusers' own so that it traces."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnxruntime
import pytest
import torch

from ldm_export.bundle import Bundle
from ldm_export.errors import CheckpointError, InputError
from ldm_export.export.ort_cpu import build_ort_cpu
from ldm_export.families import family_of, open_checkpoint
from ldm_export.families.patches import cropped_positions
from ldm_export.families.sd3 import T5_TOKENS, StableDiffusion3
from ldm_export.runtime import Pipeline
from tests.scheduler_configs import relative_error

Kinds = Callable[[str], tuple[Path, Path]]


@pytest.fixture
def checkpoint(kinds: Kinds, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(kinds("sd3")[0], tmp_path / "sd3"))


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_what_the_bundle_says(kinds: Kinds) -> None:
    bundle = Bundle.open(kinds("sd3")[1])
    assert (bundle.roles.denoiser, bundle.roles.conditioner) == ("transformer", "conditioner")
    assert bundle.manifest.model["prediction_type"] == "flow_prediction"
    assert (bundle.manifest.model["default_sampler"], bundle.manifest.model["patch_size"]) == ("euler", 2)
    states, pooled = bundle.manifest.graphs["conditioner"].outputs
    assert (states.shape, pooled.shape) == (("batch", 16 + T5_TOKENS, 96), ("batch", 48))
    vae = json.loads(bundle.read("vae_decoder/config.json"))
    assert (vae["scaling_factor"], vae["shift_factor"]) == (1.0, None)  # both are in the graph
    notes = family_of(open_checkpoint(kinds("sd3")[0])).notes
    assert notes == ["There is no third text encoder (T5): its states are zeros, as in diffusers without it."]


@pytest.mark.parametrize("most", [24, 25])
def test_positions_are_those_of_diffusers(most: int) -> None:
    patches = diffusers.models.embeddings.PatchEmbed(
        height=8, width=8, patch_size=2, in_channels=4, embed_dim=16, pos_embed_max_size=most
    )
    for rows in range(1, most + 1):
        for columns in (1, 2, 5, most - 1, most):
            expected = patches.cropped_pos_embed(2 * rows, 2 * columns)
            assert torch.equal(cropped_positions(patches, 2 * rows, 2 * columns), expected)


def test_its_target_generates_what_its_plain_graphs_do(kinds: Kinds, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(kinds("sd3")[1], tmp_path / "bundle"))
    build_ort_cpu(bundle)
    wish: dict[str, Any] = {"steps": 4, "seed": 3, "height": 12, "width": 20}
    plain = Pipeline.open(kinds("sd3")[1], backend="cpu").generate("a red circle", **wish)
    target = Pipeline.open(bundle.path, backend="cpu")
    assert "ort-cpu" in target.backend
    assert relative_error(target.generate("a red circle", **wish).latents, plain.latents) < 2e-5


def test_sizes_are_whole_patches(kinds: Kinds) -> None:
    pipeline = Pipeline.open(kinds("sd3")[1], backend="cpu")
    with pytest.raises(InputError, match=r"must be multiples of 4\. Use 16x16\."):
        pipeline.generate("a cat", steps=2, height=14, width=16)


def test_sizes_beyond_its_table_of_positions(kinds: Kinds) -> None:
    pipeline = Pipeline.open(kinds("sd3")[1], backend="cpu")
    assert pipeline.generate("a cat", steps=1, height=96, width=16).images.shape == (1, 96, 16, 3)
    with pytest.raises(InputError, match=r"100x100 does not fit; .* at most 96 pixels a side\. Use 96x96\."):
        pipeline.generate("a cat", steps=1, height=100, width=100)


def test_a_graph_fails_beyond_its_table_of_positions(kinds: Kinds) -> None:
    """Whoever runs it: cut off positions would be stretched over all tokens in silence."""
    bundle = Bundle.open(kinds("sd3")[1])
    session = onnxruntime.InferenceSession(bundle.file("transformer/model.onnx"), providers=["CPUExecutionProvider"])
    call = {
        "sample": np.zeros((1, 16, 50, 50), np.float32),
        "timestep": np.zeros(1, np.float32),
        "encoder_hidden_states": np.zeros((1, 5, 96), np.float32),
        "pooled_projections": np.zeros((1, 48), np.float32),
    }
    with pytest.raises(Exception, match="out of data bounds"):
        session.run(None, call)


def test_from_an_image_a_part_of_a_step_counts(kinds: Kinds) -> None:
    """diffusers' pipeline redoes 5 of 7 steps at a strength of 0.6, where those of Stable Diffusion redo 4."""
    image = torch.zeros(16, 16, 3, dtype=torch.uint8).numpy()
    for kind, redone in (("sd3", 5), ("sdxl", 4)):
        pipeline = Pipeline.open(kinds(kind)[1], backend="cpu")
        assert len([*pipeline.steps("a cat", steps=7, sampler="euler", image=image, strength=0.6)]) == redone


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: edit_json(folder / "model_index.json", text_encoder_3=["transformers", "T5EncoderModel"]),
            "text_encoder_3/config.json is missing; the checkpoint is incomplete",
        ),
        (
            lambda folder: edit_json(folder / "model_index.json", text_encoder_2=[None, None]),
            "it has text_encoder; text_encoder and text_encoder_2 are needed",
        ),
        (
            lambda folder: edit_json(folder / "model_index.json", text_encoder=["transformers", "CLIPTextModel"]),
            "both text encoders must be a CLIPTextModelWithProjection",
        ),
        (
            lambda folder: edit_json(folder / "vae/config.json", latent_channels=4),
            "takes 16 channels and gives 16, and",
        ),
        (
            lambda folder: edit_json(folder / "transformer/config.json", joint_attention_dim=32),
            "states 64 and pooled text 48 wide; the transformer reads 32",
        ),
        (
            lambda folder: edit_json(folder / "model_index.json", transformer=["diffusers", "FluxTransformer2DModel"]),
            "is .'diffusers', 'FluxTransformer2DModel'., of a StableDiffusion3Pipeline, which is of no family that is",
        ),
    ],
)
def test_what_cannot_be_exported(checkpoint: Path, change: Callable[[Path], None], message: str) -> None:
    change(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        family_of(open_checkpoint(checkpoint)).check()


def test_without_diffusers(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.import_module

    def absent(name: str, package: str | None = None) -> Any:
        if name == "diffusers":
            raise ImportError(name)
        return found(name, package)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(CheckpointError, match=r"not installed\. Run: pip install 'ldm_export\[families\]'"):
        _ = open_checkpoint(checkpoint).configs


def test_its_kind_is_told_by_the_transformer(kinds: Kinds) -> None:
    assert open_checkpoint(kinds("sd3")[0]).kind is StableDiffusion3.kind
    assert open_checkpoint(kinds("sdxl")[0]).kind is not StableDiffusion3.kind
