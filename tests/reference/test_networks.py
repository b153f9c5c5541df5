"""The networks against diffusers' and transformers': same keys, same shapes, same numbers, in both directions.

Every model of the judge is random, at reduced width, saved by the judge and opened by the checkpoint reader.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch
import transformers
from ldm_reference import autoencoder, tiny_autoencoder, unet
from ldm_reference.autoencoder import AutoencoderKL
from ldm_reference.config import ANY, ConfigError
from ldm_reference.layout import save_component
from ldm_reference.text_encoder import CLIPTextModel
from ldm_reference.unet import UNet2DConditionModel
from torch import Tensor, nn

from ldm_export.families import open_checkpoint

TOLERANCE = 1e-5
"""Allowed max |ours - theirs| / max |theirs|, float32."""

INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def perturb(module: nn.Module) -> None:
    """Move every weight off its initial value, so that a norm's scale or a bias that is ignored shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def random_module(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    module = make()
    perturb(module)
    return module.eval()


def opened(folder: Path, component: str) -> Any:
    """The component of a checkpoint that has, on disk, no other."""
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    return open_checkpoint(folder).load(component)


def relative_error(given: Tensor, expected: Tensor) -> float:
    assert given.shape == expected.shape
    assert given.dtype == expected.dtype
    return float((given - expected).abs().max() / expected.abs().max())


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Key -> shape; ``text_model.`` left out, which transformers has from 5.0 on only below a projection."""
    return {key.removeprefix("text_model."): tuple(value.shape) for key, value in module.state_dict().items()}


# --- UNet -----------------------------------------------------------------------------------------------------------

UNET = {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}
FOUR_LEVELS = {
    "block_out_channels": (16, 32, 32, 32),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "layers_per_block": 2,
}
UNCONDITIONAL = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
}
SDXL_EMBEDDING = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}
UNETS: dict[str, dict[str, Any]] = {
    "sd-1": FOUR_LEVELS,
    "sd-2": {
        **FOUR_LEVELS,
        "use_linear_projection": True,
        "attention_head_dim": (2, 4, 8, 8),
        "upcast_attention": True,
    },
    "sdxl": {
        **SDXL_EMBEDDING,
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 3),
        "attention_head_dim": (2, 4, 8),
        "use_linear_projection": True,
    },
    "sdxl-refiner": {
        **FOUR_LEVELS,
        **SDXL_EMBEDDING,
        "projection_class_embeddings_input_dim": 20 + 5 * 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": 2,
        "use_linear_projection": True,
    },
    "sd-x4-upscaler": {
        **FOUR_LEVELS,
        "in_channels": 7,
        "num_class_embeds": 1000,
        "only_cross_attention": (True, True, True, False),
        "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
        "up_block_types": (*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
        "use_linear_projection": True,
    },
    "ssd-1b": {
        **SDXL_EMBEDDING,
        "layers_per_block": 2,
        "mid_block_type": None,
        "transformer_layers_per_block": (1, (2, 2), (3, 1)),
        "reverse_transformer_layers_per_block": ((3, 1, 2), (2, 1, 1), 1),
        "use_linear_projection": True,
    },
    "vega": {  # with a middle block, and longer lists than there are layers
        **SDXL_EMBEDDING,
        "transformer_layers_per_block": (0, (1, 2), (2,)),
        "reverse_transformer_layers_per_block": ((2, 2, 1), (1, 1), 0),
        "use_linear_projection": True,
    },
    "only-cross-attention": {"only_cross_attention": True},
    "inpainting": {"in_channels": 9},
    "lcm": {"time_cond_proj_dim": 12},
    "bk-sdm-base": {**FOUR_LEVELS, "layers_per_block": 1},
    "bk-sdm-small": {**FOUR_LEVELS, "layers_per_block": 1, "mid_block_type": None},
    "bk-sdm-tiny": {
        "mid_block_type": None,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    },
    "layers-per-block": {"layers_per_block": (1, 2, 3), "attention_head_dim": (2, 4, 8)},
    "unconditional": {**UNCONDITIONAL, "layers_per_block": 2},
    "unconditional-head-dims": {**UNCONDITIONAL, "attention_head_dim": (4, 8, 16)},
    "unconditional-scale-shift": {**UNCONDITIONAL, "resnet_time_scale_shift": "scale_shift"},
    "class-conditional": {**UNCONDITIONAL, "num_class_embeds": 10},
    "class-timestep": {**UNCONDITIONAL, "class_embed_type": "timestep"},
    "class-identity": {**UNCONDITIONAL, "class_embed_type": "identity"},
    "class-projection": {
        **UNCONDITIONAL,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 20,
    },
    "class-and-text": {"num_class_embeds": 10},
    "scale-shift": {"resnet_time_scale_shift": "scale_shift"},
    "latents-16": {"in_channels": 16, "out_channels": 16},
    "latents-3": {"in_channels": 3, "out_channels": 3, "sample_size": 16},
    "variance": {"in_channels": 4, "out_channels": 8},
    "sinusoids": {"flip_sin_to_cos": False, "freq_shift": 1},
    "norm": {"norm_num_groups": 4, "norm_eps": 1e-3},
    "one-level": {
        "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    },
}
SIZES = [(8, 8), (12, 20), (11, 14), (16, 9)]


def unet_inputs(config: Mapping[str, Any], batch: int) -> dict[str, Tensor]:
    """What a config asks for beside the sample and the timestep, by our names."""
    inputs = {"encoder_hidden_states": randn(batch, 7, config["cross_attention_dim"])}
    if config.get("addition_embed_type"):
        sizes = (config["projection_class_embeddings_input_dim"] - 20) // config["addition_time_embed_dim"]
        inputs["text_embeds"] = randn(batch, 20)
        inputs["time_ids"] = torch.tensor([[512.0, 640.0, 0.0, 8.0, 512.0, 768.0][:sizes]] * batch)
    if config.get("time_cond_proj_dim"):
        inputs["timestep_cond"] = randn(batch, config["time_cond_proj_dim"])
    if config.get("class_embed_type") in ("identity", "projection"):
        width = config.get("projection_class_embeddings_input_dim", config["block_out_channels"][0] * 4)
        inputs["class_labels"] = randn(batch, width)
    elif config.get("class_embed_type") or config.get("num_class_embeds"):
        inputs["class_labels"] = torch.arange(batch) + 3
    return inputs


def unet_errors(ours: Any, theirs: Any, config: Mapping[str, Any]) -> list[float]:
    errors = []
    attends_alone = (
        "AttnUpBlock2D" in theirs.config.up_block_types
    )  # which, in diffusers, wants sizes that halve evenly
    for batch, (height, width) in enumerate(SIZES[:2] if attends_alone else SIZES, start=1):
        inputs = unet_inputs(config, batch)
        sample = randn(batch, theirs.config.in_channels, height, width)
        timestep = torch.linspace(3, 999, batch).long()
        context = inputs.pop("encoder_hidden_states")
        conditions = {key: inputs[key] for key in ("text_embeds", "time_ids") if key in inputs}
        others = {key: value for key, value in inputs.items() if key not in conditions}
        with torch.no_grad():
            expected = theirs(sample, timestep, context, added_cond_kwargs=conditions, **others).sample
            given = ours(sample, timestep, context if ours.config.reads_text else None, **inputs)
        errors.append(relative_error(given, expected))
    return errors


@pytest.mark.parametrize("name", UNETS)
def test_unet_saved_by_diffusers(tmp_path: Path, name: str) -> None:
    config = {**UNET, **UNETS[name]}
    theirs = random_module(lambda: diffusers.UNet2DConditionModel(**config))
    theirs.save_pretrained(tmp_path / "unet")
    ours = opened(tmp_path, "unet")
    assert shapes(ours) == shapes(theirs)
    assert max(unet_errors(ours, theirs, config)) < TOLERANCE


@pytest.mark.parametrize("name", UNETS)
def test_unet_opens_in_diffusers(tmp_path: Path, name: str) -> None:
    config = {**UNET, **UNETS[name]}
    ours = random_module(lambda: UNet2DConditionModel.from_config(config))
    save_component(ours, tmp_path)
    theirs, info = diffusers.UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert_loaded(info)
    assert max(unet_errors(ours, theirs.eval(), config)) < TOLERANCE


def test_unet_comparison_notices_a_changed_weight(tmp_path: Path) -> None:
    theirs = random_module(lambda: diffusers.UNet2DConditionModel(**UNET))
    theirs.save_pretrained(tmp_path / "unet")
    ours = opened(tmp_path, "unet")
    ours.up_blocks[1].attentions[0].transformer_blocks[0].attn2.to_k.weight.mul_(1.01)
    assert max(unet_errors(ours, theirs, UNET)) > TOLERANCE


# --- autoencoder ----------------------------------------------------------------------------------------------------


def vae_config(*widths: int, **changes: Any) -> dict[str, Any]:
    blocks = len(widths)
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
        "norm_num_groups": 8,
        **changes,
    }


VAES = {
    "factor-8": vae_config(16, 32, 32, 32, layers_per_block=2),
    "factor-4": vae_config(16, 32, 32),
    "factor-2": vae_config(16, 32),
    "factor-1": vae_config(16),
    "latents-16": vae_config(16, 32, latent_channels=16, scaling_factor=1.5305),
    "no-quant-conv": vae_config(16, 32, use_quant_conv=False, use_post_quant_conv=False),
    "no-mid-attention": vae_config(16, 32, mid_block_add_attention=False),
    "grey": vae_config(16, 32, in_channels=1, out_channels=1, latent_channels=3),
}


def vae_errors(ours: Any, theirs: Any) -> list[float]:
    errors = []
    for batch, (height, width) in enumerate([(4, 4), (3, 5)], start=1):
        factor = ours.config.factor
        pictures = randn(batch, ours.config.in_channels, height * factor, width * factor)
        latents = randn(batch, ours.config.latent_channels, height, width)
        with torch.no_grad():
            errors += [
                relative_error(ours.encode(pictures), theirs.encode(pictures).latent_dist.parameters),
                relative_error(ours.decode(latents), theirs.decode(latents).sample),
            ]
    return errors


@pytest.mark.parametrize("name", VAES)
def test_vae_saved_by_diffusers(tmp_path: Path, name: str) -> None:
    theirs = random_module(lambda: diffusers.AutoencoderKL(**VAES[name]))
    theirs.save_pretrained(tmp_path / "vae")
    ours = opened(tmp_path, "vae")
    assert shapes(ours) == shapes(theirs)
    assert ours.config.scaling_factor == theirs.config.scaling_factor
    assert ours.config.factor == 2 ** (len(theirs.config.block_out_channels) - 1)
    assert max(vae_errors(ours, theirs)) < TOLERANCE


@pytest.mark.parametrize("name", VAES)
def test_vae_opens_in_diffusers(tmp_path: Path, name: str) -> None:
    ours = random_module(lambda: AutoencoderKL.from_config(VAES[name]))
    save_component(ours, tmp_path)
    theirs, info = diffusers.AutoencoderKL.from_pretrained(tmp_path, output_loading_info=True)
    assert_loaded(info)
    assert max(vae_errors(ours, theirs.eval())) < TOLERANCE


def test_vae_of_odd_picture_size(tmp_path: Path) -> None:
    theirs = random_module(lambda: diffusers.AutoencoderKL(**VAES["factor-4"]))
    theirs.save_pretrained(tmp_path / "vae")
    pictures = randn(1, 3, 21, 14)
    with torch.no_grad():
        given, expected = opened(tmp_path, "vae").encode(pictures), theirs.encode(pictures).latent_dist.parameters
    assert relative_error(given, expected) < TOLERANCE


def test_vae_with_the_attention_names_of_old_diffusers(tmp_path: Path) -> None:
    theirs = random_module(lambda: diffusers.AutoencoderKL(**VAES["factor-8"]))
    theirs.save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for key, tensor in safetensors.torch.load_file(file).items():
        for new, name in old.items():
            if f".attentions.0.{new}." in key:
                key = key.replace(new, name)
                tensor = tensor[..., None, None] if key.endswith("weight") else tensor  # then a 1x1 convolution
        tensors[key] = tensor
    assert sum("query" in key for key in tensors) == 4
    safetensors.torch.save_file(tensors, file)
    assert max(vae_errors(opened(tmp_path, "vae"), theirs)) < TOLERANCE


# --- text encoder ---------------------------------------------------------------------------------------------------

TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "projection_dim": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "bos_token_id": 98,
    "eos_token_id": 99,
    "pad_token_id": 99,
}
TEXTS: dict[str, dict[str, Any]] = {
    "quick-gelu": {"hidden_act": "quick_gelu"},
    "gelu": {"hidden_act": "gelu"},
    "legacy-end": {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1},
    "end-below-the-highest": {"eos_token_id": 57, "pad_token_id": 0},
    "norm": {"layer_norm_eps": 1e-3},
}
PLAIN, PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"


def token_ids(end: int) -> Tensor:
    """Three texts of different lengths, one that fills the row, padded with the end token."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 56, (3, 12), generator=generator)
    for row, length in enumerate((4, 9, 11)):
        ids[row, length:] = 99 if end == 2 else end
    return ids


def text_errors(ours: Any, theirs: Any) -> list[float]:
    ids = token_ids(theirs.config.eos_token_id)
    with torch.no_grad():
        expected, given = theirs(ids, output_hidden_states=True), ours(ids)
    pooled = expected.text_embeds if ours.config.with_projection else expected.pooler_output
    assert len(given.hidden_states) == len(expected.hidden_states)
    pairs = zip(given.hidden_states[:-1], expected.hidden_states[:-1], strict=True)
    return [
        relative_error(given.last_hidden_state, expected.last_hidden_state),
        relative_error(given.pooled, pooled),
        *(relative_error(state, other) for state, other in pairs),
    ]


@pytest.mark.parametrize("architecture", [PLAIN, PROJECTED])
@pytest.mark.parametrize("name", TEXTS)
def test_text_encoder_saved_by_transformers(tmp_path: Path, name: str, architecture: str) -> None:
    config = transformers.CLIPTextConfig(**{**TEXT, **TEXTS[name]})
    theirs = random_module(lambda: getattr(transformers, architecture)(config))
    component = "text_encoder_2" if architecture == PROJECTED else "text_encoder"
    theirs.save_pretrained(tmp_path / component)
    ours = opened(tmp_path, component)
    assert ours.config.with_projection == (architecture == PROJECTED)
    assert shapes(ours) == shapes(theirs)
    assert max(text_errors(ours, theirs)) < TOLERANCE


@pytest.mark.parametrize("architecture", [PLAIN, PROJECTED])
@pytest.mark.parametrize("name", TEXTS)
def test_text_encoder_opens_in_transformers(tmp_path: Path, name: str, architecture: str) -> None:
    values = {**TEXT, **TEXTS[name], "architectures": [architecture]}
    ours = random_module(lambda: CLIPTextModel.from_config(values))
    save_component(ours, tmp_path)
    theirs, info = getattr(transformers, architecture).from_pretrained(tmp_path, output_loading_info=True)
    assert_loaded(info)
    assert max(text_errors(ours, theirs.eval())) < TOLERANCE


def test_text_encoder_with_the_keys_of_old_transformers(tmp_path: Path) -> None:
    """Before 5.0 every key began with ``text_model.``; before 4.31 the positions 0, 1, 2, … were saved as well."""
    theirs = random_module(lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)))
    theirs.save_pretrained(tmp_path / "text_encoder")
    file = tmp_path / "text_encoder" / "model.safetensors"
    tensors = {
        f"text_model.{key.removeprefix('text_model.')}": tensor
        for key, tensor in safetensors.torch.load_file(file).items()
    }
    tensors["text_model.embeddings.position_ids"] = torch.arange(12)[None]
    safetensors.torch.save_file(tensors, file)
    assert max(text_errors(opened(tmp_path, "text_encoder"), theirs)) < TOLERANCE


def test_shorter_texts(tmp_path: Path) -> None:
    theirs = random_module(lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)))
    theirs.save_pretrained(tmp_path / "text_encoder")
    ids = torch.tensor([[98, 5, 99]])
    with torch.no_grad():
        given, expected = opened(tmp_path, "text_encoder")(ids), theirs(ids)
    assert relative_error(given.pooled, expected.pooler_output) < TOLERANCE


def assert_loaded(info: Mapping[str, Any]) -> None:
    """What ``from_pretrained`` says of a model that it filled from the file, wholly and with nothing left over."""
    assert {key: list(value) for key, value in info.items() if value} == {}


# --- the models that people have, key for key, at full size -----------------------------------------------------------

DOWN = ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]
UP = ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]
UNET_1_5 = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": DOWN,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": UP,
}
UNET_2_1 = {
    **UNET_1_5,
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "use_linear_projection": True,
    "upcast_attention": True,
}
UNET_XL = {
    **UNET_1_5,
    "_diffusers_version": "0.19.0.dev0",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "attention_type": "default",
    "block_out_channels": [320, 640, 1280],
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2048,
    "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}
VAE_1_5 = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
VAE_XL = {
    **VAE_1_5,
    "_diffusers_version": "0.20.0.dev0",
    "_name_or_path": "../sdxl-vae/",
    "force_upcast": True,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
TEXT_1_5 = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
TEXT_2_1 = {
    **TEXT_1_5,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
    "transformers_version": "4.25.0.dev0",
}
TEXT_XL_2 = {
    **TEXT_1_5,
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
    "torch_dtype": "float16",
    "transformers_version": "4.32.0.dev0",
}
FULL_SIZE: dict[str, tuple[str, dict[str, Any], int]] = {  # name -> class, config.json of the hub, parameters
    "sd-1.5 unet": ("UNet2DConditionModel", UNET_1_5, 859_520_964),
    "sd-2.1 unet": ("UNet2DConditionModel", UNET_2_1, 865_910_724),
    "sdxl unet": ("UNet2DConditionModel", UNET_XL, 2_567_463_684),
    "sd-1.5 vae": ("AutoencoderKL", VAE_1_5, 83_653_863),
    "sdxl vae": ("AutoencoderKL", VAE_XL, 83_653_863),
    "sd-1.5 text encoder": ("CLIPTextModel", TEXT_1_5, 123_060_480),
    "sd-2.1 text encoder": ("CLIPTextModel", TEXT_2_1, 340_387_840),
    "sdxl text encoder 2": ("CLIPTextModelWithProjection", TEXT_XL_2, 694_659_840),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_key_for_key(name: str) -> None:
    judge, config, parameters = FULL_SIZE[name]
    classes = {"UNet2DConditionModel": UNet2DConditionModel, "AutoencoderKL": AutoencoderKL}
    with torch.device("meta"):
        ours = classes.get(judge, CLIPTextModel).from_config(config)  # type: ignore[attr-defined]
        if hasattr(diffusers, judge):
            theirs = getattr(diffusers, judge).from_config(config)
        else:
            theirs = getattr(transformers, judge)(transformers.CLIPTextConfig(**config))
    assert shapes(ours) == shapes(theirs)
    assert sum(parameter.numel() for parameter in ours.parameters()) == parameters


@pytest.mark.parametrize(
    ("judge", "config", "inert"),
    [
        ("UNet2DConditionModel", unet.UNetConfig, unet.INERT),
        ("AutoencoderKL", autoencoder.AutoencoderConfig, autoencoder.INERT),
        ("AutoencoderTiny", tiny_autoencoder.TinyAutoencoderConfig, tiny_autoencoder.INERT),
    ],
)
def test_every_key_of_diffusers_is_read_or_refused_away_from_its_default(
    judge: str, config: Any, inert: dict[str, Any]
) -> None:
    signature = inspect.signature(inspect.unwrap(getattr(diffusers, judge).__init__)).parameters
    theirs = {key: given.default for key, given in signature.items() if key != "self"}
    ours = {field.name: field.default for field in dataclasses.fields(config)}
    assert theirs.keys() == (ours.keys() | inert.keys()) - {"block_out_channels"} | theirs.keys() & {
        "block_out_channels"
    }
    for key, default in theirs.items():
        default = tuple(default) if isinstance(default, list) else default
        if key in ours:
            assert ours[key] == default, key
        elif inert[key] is not ANY:
            assert default in (inert[key] if isinstance(inert[key], set) else {inert[key]}), key


@pytest.mark.parametrize(
    ("cls", "changes", "sentence"),
    [
        (UNet2DConditionModel, {"act_fn": "gelu"}, "act_fn = 'gelu' is not supported; only 'silu' or 'swish' is"),
        (UNet2DConditionModel, {"down_block_types": ["ResnetDownsampleBlock2D"] * 4}, "'ResnetDownsampleBlock2D'"),
        (UNet2DConditionModel, {"attention_head_dim": [5, 10]}, "attention_head_dim has 2 values"),
        (UNet2DConditionModel, {"attention_head_dim": 7}, "attention_head_dim = 7 (heads) does not divide the 320"),
        (UNet2DConditionModel, {"block_out_channels": 320}, "block_out_channels = 320 must be a list"),
        (UNet2DConditionModel, {"cross_attention_dim": "768"}, "cross_attention_dim = '768' must be int or a list"),
        (UNet2DConditionModel, {"encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim_type"),
        (
            UNet2DConditionModel,
            {"transformer_layers_per_block": [1, [1, 2], 1, 1]},
            "reverse_transformer_layers_per_block must then say those",
        ),
        (
            UNet2DConditionModel,
            {
                "transformer_layers_per_block": [1, [1], 1, 1],
                "reverse_transformer_layers_per_block": [1, 1, 1, 1],
            },
            "transformer_layers_per_block = (1,) has 1 numbers for 2 layers",
        ),
        (UNet2DConditionModel, {"transformer_layers_per_block": -1}, "must hold integers of at least 0"),
        (UNet2DConditionModel, {"norm_num_groups": 48}, "norm_num_groups = 48 does not divide"),
        (AutoencoderKL, {"up_block_types": ["AttnUpDecoderBlock2D"] * 4}, "'AttnUpDecoderBlock2D'"),
        (AutoencoderKL, {"block_out_channels": [128]}, "4 block types"),
        (AutoencoderKL, {"scaling_factor": 0}, "scaling_factor = 0 must be above 0"),
        (AutoencoderKL, {"scaling_factor": "a"}, "scaling_factor = 'a' must be float"),
        (CLIPTextModel, {"hidden_act": "relu"}, "hidden_act = 'relu'"),
        (CLIPTextModel, {"num_attention_heads": 7}, "num_attention_heads = 7 does not divide"),
        (CLIPTextModel, {"model_type": "t5"}, "model_type = 't5' is not supported"),
        (CLIPTextModel, {"hidden_size": None}, "hidden_size = None must be int"),
    ],
)
def test_a_config_of_another_network_is_refused(cls: Any, changes: dict[str, Any], sentence: str) -> None:
    config = {UNet2DConditionModel: UNET_1_5, AutoencoderKL: VAE_1_5, CLIPTextModel: TEXT_1_5}[cls]
    with torch.device("meta"), pytest.raises(ConfigError) as caught:
        cls.from_config({**config, **changes})
    assert sentence in str(caught.value)


# --- whole pipelines ------------------------------------------------------------------------------------------------


def test_stable_diffusion_pipeline_opens_and_runs(tiny_checkpoint: Path) -> None:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny_checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    pictures = pipeline(["a red circle", "a cat"], num_inference_steps=2, generator=generator, output_type="np").images
    assert pictures.shape == (2, 16, 16, 3)
    model = open_checkpoint(tiny_checkpoint)
    assert max(unet_errors(model.load("unet"), pipeline.unet, {"cross_attention_dim": 32})) < TOLERANCE
    assert max(vae_errors(model.load("vae"), pipeline.vae)) < TOLERANCE
    ids = pipeline.tokenizer(["a red circle"], padding="max_length", return_tensors="pt").input_ids
    assert ids.shape == (1, 16)
    with torch.no_grad():
        given, expected = model.load("text_encoder")(ids), pipeline.text_encoder(ids)
    assert relative_error(given.last_hidden_state, expected.last_hidden_state) < TOLERANCE
    assert relative_error(given.pooled, expected.pooler_output) < TOLERANCE


def test_pipeline_of_two_text_encoders_saved_by_diffusers(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """A whole SDXL as ``save_pretrained`` writes it, opened component by component."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tiny_checkpoint / "tokenizer")
    text = transformers.CLIPTextConfig(**TEXT)
    unet = {**UNET, **UNETS["sdxl"], "cross_attention_dim": 64}
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=random_module(lambda: diffusers.AutoencoderKL(**VAES["factor-2"])),
        text_encoder=random_module(lambda: transformers.CLIPTextModel(text)),
        text_encoder_2=random_module(lambda: transformers.CLIPTextModelWithProjection(text)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=random_module(lambda: diffusers.UNet2DConditionModel(**unet)),
        scheduler=diffusers.EulerDiscreteScheduler(),
    )
    pipeline.save_pretrained(tmp_path)
    model = open_checkpoint(tmp_path)
    assert model.components == ("text_encoder", "text_encoder_2", "unet", "vae")
    assert [model.configs[name]["with_projection"] for name in ("text_encoder", "text_encoder_2")] == [False, True]
    assert model.scheduler["_class_name"] == "EulerDiscreteScheduler"
    assert max(unet_errors(model.load("unet"), pipeline.unet, unet)) < TOLERANCE
    assert max(vae_errors(model.load("vae"), pipeline.vae)) < TOLERANCE
    assert max(text_errors(model.load("text_encoder"), pipeline.text_encoder)) < TOLERANCE
    assert max(text_errors(model.load("text_encoder_2"), pipeline.text_encoder_2)) < TOLERANCE
