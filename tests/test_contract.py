"""Names, dtypes and shapes: what each kind of network's graph takes, and arrays that do not fit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ldm_reference.layout import config_to_dict
from ldm_reference.unet import UNet2DConditionModel

from ldm_export.contract import GraphSpec, TensorSpec, check_inputs
from ldm_export.errors import InputError
from ldm_export.families.stable_diffusion import StableDiffusion
from tests.bundle_fixture import SMALL_UNET, TEXT_UNET

SAMPLE = TensorSpec("sample", "float32", ("batch", 4, "height", "width"))
TIMESTEP = TensorSpec("timestep", "float32", ("batch",))
TEXT = TensorSpec("encoder_hidden_states", "float32", ("batch", "tokens", 32))
XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}
UNETS: dict[str, tuple[dict[str, Any], list[TensorSpec]]] = {
    "unconditional": (SMALL_UNET, []),
    "text": ({**TEXT_UNET, "cross_attention_dim": 32}, [TEXT]),
    "classes": ({**SMALL_UNET, "num_class_embeds": 5}, [TensorSpec("class_labels", "int64", ("batch",))]),
    "class features": (
        {**SMALL_UNET, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 12},
        [TensorSpec("class_labels", "float32", ("batch", 12))],
    ),
    "guidance-distilled": (
        {**TEXT_UNET, "cross_attention_dim": 32, "time_cond_proj_dim": 10},
        [TEXT, TensorSpec("timestep_cond", "float32", ("batch", 10))],
    ),
    "inpainting": (
        {**SMALL_UNET, "in_channels": 9},
        [TensorSpec("image_latents", "float32", ("batch", 5, "height", "width"))],
    ),
    "SDXL's refiner": (
        {**TEXT_UNET, "cross_attention_dim": 32, **XL, "projection_class_embeddings_input_dim": 24 + 5 * 8},
        [TEXT, TensorSpec("text_embeds", "float32", ("batch", 24)), TensorSpec("time_ids", "float32", ("batch", 5))],
    ),
    "SDXL": (
        {**TEXT_UNET, "cross_attention_dim": 32, **XL},
        [TEXT, TensorSpec("text_embeds", "float32", ("batch", 24)), TensorSpec("time_ids", "float32", ("batch", 6))],
    ),
}


def unet_spec(config: dict[str, Any]) -> GraphSpec:
    """The denoiser of a checkpoint with this UNet, four channels of latents, and pooled text of 24 numbers."""
    encoder = {"projection_dim": 24}
    configs = {"unet": config, "vae": {"latent_channels": 4}, "text_encoder_2": encoder}
    own = {"text_encoders": ("text_encoder_2",), "controls": {}, "image_adapter": None}
    checkpoint: Any = SimpleNamespace(configs=configs, **own)
    return StableDiffusion(checkpoint).denoiser_spec


@pytest.mark.parametrize("kind", UNETS)
def test_a_unet_takes_what_its_config_says(kind: str) -> None:
    config, conditions = UNETS[kind]
    spec = unet_spec(config_to_dict(UNet2DConditionModel.from_config(config)))
    assert spec.path == "unet/model.onnx"
    assert list(spec.inputs) == [SAMPLE, TIMESTEP, *conditions]
    assert [tensor.name for tensor in spec.outputs] == ["out_sample"]


def fitting() -> dict[str, np.ndarray[Any, Any]]:
    return {
        "sample": np.zeros((2, 4, 8, 6), np.float32),
        "timestep": np.zeros(2, np.float32),
        "encoder_hidden_states": np.zeros((2, 7, 32), np.float32),
    }


TEXT_SPEC = unet_spec(config_to_dict(UNet2DConditionModel.from_config({**TEXT_UNET, "cross_attention_dim": 32})))


def test_arrays_that_fit() -> None:
    check_inputs(TEXT_SPEC, fitting())


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (
            "sample",
            np.zeros((2, 4, 8, 6)),
            r"shape \(2, 4, 8, 6\) and dtype float64.*\(batch, 4, height, width\) float32",
        ),
        ("sample", np.zeros((2, 3, 8, 6), np.float32), r"'sample' has shape \(2, 3, 8, 6\)"),
        ("sample", np.zeros((2, 4, 8), np.float32), r"'sample' has shape \(2, 4, 8\)"),
        ("timestep", np.zeros(1, np.float32), r"'timestep' has shape \(1,\)"),
        ("encoder_hidden_states", np.zeros((3, 7, 32), np.float32), r"shape \(3, 7, 32\).*'batch': 2"),
        ("class_labels", np.zeros(2, np.int64), r"given the inputs \['class_labels', .*; it takes \['encoder"),
    ],
)
def test_an_array_that_does_not_fit(name: str, array: np.ndarray[Any, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_inputs(TEXT_SPEC, {**fitting(), name: array})


def test_an_input_that_is_missing() -> None:
    arrays = fitting()
    del arrays["timestep"]
    with pytest.raises(InputError, match=r"it takes .*'timestep'"):
        check_inputs(TEXT_SPEC, arrays)
