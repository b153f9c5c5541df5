"""Opens a checkpoint of Stable Diffusion 3 or 3.5 in Stability AI's layout: one safetensors file with all networks.

Transformer, autoencoder, both text encoders of CLIP's kind and, where the file has it, T5. Configs are read off the
shapes. A file of the transformer and the autoencoder alone, as some are, has no text encoders and is refused. As in
diffusers, the smaller CLIP's projection is the identity, whatever the file has.

A file has no tokenizers: they are looked for beside it, in ``tokenizer/``, ``tokenizer_2/`` and ``tokenizer_3/``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ldm_export.checkpoint.key_maps import sd3_key
from ldm_export.checkpoint.single_file import UNET as TRANSFORMER
from ldm_export.checkpoint.single_file import VAE, Family, Shapes, SingleFile, part_count
from ldm_export.checkpoint.weights import opened
from ldm_export.errors import CheckpointError

BLOCKS = "joint_blocks"
PREFIXES = {
    "transformer": TRANSFORMER,
    "vae": VAE,
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
    "text_encoder_3": "text_encoders.t5xxl.transformer.",
}
HEAD_WIDTH = 64
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
UNREAD = re.compile(r"(.*\.)?(position_ids|logit_scale|text_projection(\.weight)?)|encoder\.embed_tokens\.weight")
"""Names in a text encoder that are read past, or that the network has under another name, too."""


class SingleFileSD3(SingleFile):
    """One file, by its header; tensors are read when a component is asked for."""

    def _family(self) -> Family:
        for name in ("vae", "text_encoder", "text_encoder_2"):
            if not self._has(name):
                raise CheckpointError(
                    f"{self.path} has no {PREFIXES[name]}*; a single-file checkpoint of Stable Diffusion 3 holds "
                    "transformer, autoencoder and text encoders. Use a whole checkpoint, or a diffusers folder."
                )
        return Family("StableDiffusion3Pipeline", PREFIXES, None, 0, 1.5305, sample_size=128)

    def _has(self, component: str) -> bool:
        return any(key.startswith(PREFIXES[component]) for key in self.shapes)

    @cached_property
    def index(self) -> dict[str, Any]:
        clip, tokenizer = ["transformers", "CLIPTextModelWithProjection"], ["transformers", "CLIPTokenizer"]
        index: dict[str, Any] = {
            "_class_name": self.family.pipeline,
            "scheduler": ["diffusers", SCHEDULER["_class_name"]],
            "transformer": ["diffusers", "SD3Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            **{"text_encoder": clip, "tokenizer": tokenizer, "text_encoder_2": clip, "tokenizer_2": tokenizer},
        }
        if self._has("text_encoder_3"):
            index |= {"text_encoder_3": ["transformers", "T5EncoderModel"]}
            index |= {"tokenizer_3": ["transformers", "T5TokenizerFast"]}
        return index

    @cached_property
    def scheduler(self) -> dict[str, Any]:
        return dict(SCHEDULER)

    def prefix(self, component: str) -> str:
        return PREFIXES[component]

    def _config(self, component: str, shapes: Shapes) -> dict[str, Any]:
        if component == "transformer":
            return _transformer_config(shapes)
        if component == "vae":
            return {**self._vae_config(shapes), "shift_factor": 0.0609}
        if component == "text_encoder_3":
            return _t5_config(shapes)
        vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
        return {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
            "num_hidden_layers": part_count(shapes, "text_model.encoder.layers"),
            "num_attention_heads": max(1, width // HEAD_WIDTH),
            "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
            "hidden_act": "quick_gelu" if component == "text_encoder" else "gelu",
            "eos_token_id": vocabulary - 1,
            "projection_dim": width if component == "text_encoder" else shapes["text_projection.weight"][0],
        }

    def tensors(self, component: str, names: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        if component == "vae":
            return super().tensors(component, names)
        prefix, found, used = PREFIXES[component], dict[str, Tensor](), set[str]()
        last = part_count({key.removeprefix(prefix): () for key in self.shapes}, BLOCKS) - 1
        with opened(self.path) as file:
            for name in names:
                key = prefix + (sd3_key(name) if component == "transformer" else name)
                used.add(key)
                if component == "text_encoder" and name == "text_projection.weight":
                    found[name] = torch.eye(names[name][0])
                elif key in self.shapes:
                    found[name] = _part(file.get_tensor(self._stored[key]), name, last)
        for key in self.shapes.keys() - used:
            if key.startswith(prefix) and not UNREAD.fullmatch(key.removeprefix(prefix)):
                found[key] = torch.empty(0)  # is reported as unknown
        return found


def _transformer_config(shapes: Shapes) -> dict[str, Any]:
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    layers = part_count(shapes, BLOCKS)
    normalised = f"{BLOCKS}.0.x_block.attn.ln_q.weight"
    head = shapes[normalised][0] if normalised in shapes else HEAD_WIDTH
    doubled = [layer for layer in range(layers) if f"{BLOCKS}.{layer}.x_block.attn2.qkv.weight" in shapes]
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "num_layers": layers,
        "attention_head_dim": head,
        "num_attention_heads": max(1, width // head),
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "caption_projection_dim": shapes["context_embedder.weight"][0],
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": math.isqrt(shapes["pos_embed"][1]),
        "qk_norm": "rms_norm" if normalised in shapes else None,
        "dual_attention_layers": doubled,
    }


def _t5_config(shapes: Shapes) -> dict[str, Any]:
    vocabulary, width = shapes["shared.weight"]
    buckets, heads = shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shapes["encoder.block.0.layer.0.SelfAttention.q.weight"][0] // heads,
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        "num_layers": part_count(shapes, "encoder.block"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
    }


def _part(tensor: Tensor, name: str, last: int) -> Tensor:
    """Cut out the joint projection that is meant; put scale and shift in diffusers' order where it has another."""
    if match := re.search(r"attn2?\.(?:to|add)_([qkv])(?:_proj)?\.", name):
        return tensor.chunk(3)["qkv".index(match[1])].contiguous()
    if name.startswith(("norm_out.linear.", f"transformer_blocks.{last}.norm1_context.linear.")):
        shift, scale = tensor.chunk(2)
        return torch.cat([scale, shift])
    return tensor
