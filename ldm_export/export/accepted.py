"""What of a checkpoint an export refuses before anything is traced: networks that do not fit together or that the
runtime could not generate with. What it accepts but leaves out, `notes` names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm_export.checkpoint import LatentDiffusion
from ldm_export.checkpoint.pipelines import PIPELINES, class_name, left_out
from ldm_export.errors import BundleError, CheckpointError
from ldm_export.runtime.tokenizer import Tokenizer


def check_accepted(checkpoint: LatentDiffusion) -> None:
    """Raise CheckpointError unless a bundle of the checkpoint can generate as diffusers does, but for inpainting."""
    unet, vae = checkpoint.configs["unet"], checkpoint.configs["vae"]
    faults = [*_channels(unet, vae), *_texts(checkpoint)]
    if faults:
        raise CheckpointError(f"{checkpoint.path}: {faults[0]}")
    checkpoint.drawing  # noqa: B018 - refuses a scheduler that no sampler is


def notes(checkpoint: LatentDiffusion) -> list[str]:
    """What the bundle will not do, or do otherwise than its checkpoint's pipeline, one sentence each."""
    said, name = [], class_name(checkpoint.index)
    if parts := left_out(checkpoint.index):
        said.append(f"Left out: {', '.join(parts)}; a bundle has no such parts.")
    if name not in PIPELINES:
        like = "StableDiffusionXLPipeline" if "text_encoder_2" in checkpoint.components else "StableDiffusionPipeline"
        said.append(f"The checkpoint is of a {name}; the bundle generates as a {like} does.")
    channels, latents = checkpoint.configs["unet"]["in_channels"], checkpoint.configs["vae"]["latent_channels"]
    if channels != latents:
        said.append(
            f"The UNet takes {channels} channels (inpainting); the runtime generates from text and images only, so "
            "this bundle's graphs are for a loop of your own."
        )
    return said


def _channels(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> list[str]:
    latents = vae["latent_channels"]
    faults = []
    if unet["in_channels"] not in (latents, 2 * latents + 1):
        faults.append(
            f"the UNet takes {unet['in_channels']} channels and the autoencoder has {latents} of latents; the same "
            "number is needed. Models that are given an image beside the latents (InstructPix2Pix, depth, upscaling, "
            "Marigold) cannot be exported."
        )
    if unet["out_channels"] != latents:
        faults.append(
            f"the UNet gives {unet['out_channels']} channels and the autoencoder has {latents} of latents; the same "
            "number is needed. Models that predict a variance, too, cannot be exported."
        )
    for side in ("in_channels", "out_channels"):
        if vae[side] not in (1, 3) or vae["in_channels"] != vae["out_channels"]:
            faults.append(
                f"the autoencoder's pictures have {vae['in_channels']} channels in and {vae['out_channels']} out; "
                "1 (grey) or 3 (RGB), the same on both sides, can be written. Use another autoencoder."
            )
    return faults


def _texts(checkpoint: LatentDiffusion) -> list[str]:
    configs = checkpoint.configs
    unet = configs["unet"]
    encoders = {name: config for name, config in configs.items() if name.startswith("text_encoder")}
    kinds = (*unet["down_block_types"], *unet["up_block_types"], unet["mid_block_type"] or "")
    if not any("CrossAttn" in kind for kind in kinds):
        return ["the UNet reads no text, but there is a text encoder. Leave it out of model_index.json."] * bool(
            encoders
        )
    if not encoders:
        return [
            "the UNet reads the states of an encoder, and model_index.json names no text_encoder. Models that are told "
            "pictures in place of text cannot be exported."
        ]
    pooled = unet["addition_embed_type"] == "text_time"
    expected = ("text_encoder", "text_encoder_2") if pooled else ("text_encoder",)
    if tuple(encoders) != expected:
        return [
            f"it has {' and '.join(encoders)} for a UNet that reads {' and '.join(expected)}. SDXL's refiner and "
            "other combinations cannot be exported."
        ]
    for name, config in encoders.items():
        if config["with_projection"] != (name == "text_encoder_2"):
            needed = "CLIPTextModelWithProjection" if name == "text_encoder_2" else "CLIPTextModel"
            return [f"the {name} is not a {needed}, of which the UNet reads the states. Save it as one."]
    widths = unet["cross_attention_dim"]
    width = sum(config["hidden_size"] for config in encoders.values())
    if any(one != width for one in (widths if isinstance(widths, (list, tuple)) else (widths,))):
        return [
            f"the text encoding is {width} wide, and the UNet reads {widths} (cross_attention_dim). "
            "Use the text encoder that the UNet was trained with."
        ]
    if pooled:
        given = encoders["text_encoder_2"]["projection_dim"]
        read = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
        if given != read:
            return [
                f"the pooled text is {given} wide, and beside six sizes the UNet reads {read} "
                "(projection_class_embeddings_input_dim). SDXL's refiner, which is told five, cannot be exported."
            ]
    for name in encoders:
        token_count(checkpoint, name)
    return []


def token_count(checkpoint: LatentDiffusion, name: str) -> int:
    """Tokens of a prompt for a text encoder: its tokenizer's length, which its positions must hold.

    Raises
    ------
    CheckpointError
        If the tokenizer cannot be used, is longer than the encoder's positions or ends texts with an unknown id.
    """
    folder, config = checkpoint.tokenizer_folder(name), checkpoint.configs[name]
    tokenizer = open_tokenizer(folder)
    if tokenizer.model_max_length > config["max_position_embeddings"]:
        raise CheckpointError(
            f"{folder} gives {tokenizer.model_max_length} tokens; the {name} has {config['max_position_embeddings']} "
            "positions. Set model_max_length in its tokenizer_config.json to that number, if the model was trained so."
        )
    special = max(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if special >= config["vocab_size"]:
        raise CheckpointError(
            f"{folder} has special tokens with ids up to {special}; the {name} knows {config['vocab_size']} tokens. "
            "Use the tokenizer that was saved with the text encoder."
        )
    return tokenizer.model_max_length


def open_tokenizer(folder: Path) -> Tokenizer:
    """A checkpoint's tokenizer, its faults told of as the checkpoint's."""
    if not (folder / "tokenizer.json").is_file() and not all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    ):
        raise CheckpointError(
            f"{folder} has neither tokenizer.json nor vocab.json and merges.txt. Put the model's tokenizer there."
        )
    try:
        return Tokenizer(folder)
    except BundleError as error:
        said = str(error).removesuffix(" Export the bundle anew.")
        raise CheckpointError(f"{said} Use the tokenizer that was saved with the model.") from error
