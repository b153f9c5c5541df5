"""Names of parameters: those of diffusers and transformers as those of CompVis and OpenCLIP."""

from __future__ import annotations

import re

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_PARTS = {
    r"(encoder|decoder)\.conv_norm_out": r"\1.norm_out",
    r"(encoder|decoder)\.mid_block\.resnets\.0": r"\1.mid.block_1",
    r"(encoder|decoder)\.mid_block\.resnets\.1": r"\1.mid.block_2",
    r"(encoder|decoder)\.mid_block\.attentions\.0": r"\1.mid.attn_1",
    r"\.resnets\.(\d+)": r".block.\1",
    r"\.(down|up)samplers\.0": r".\1sample",
    r"conv_shortcut": "nin_shortcut",
    r"group_norm": "norm",
    r"to_([qkv])\.": r"\1.",
    r"to_out\.0": "proj_out",
}
TEXT_PARTS = {
    r"text_model\.embeddings\.token_embedding": "token_embedding",
    r"text_model\.embeddings\.position_embedding\.weight": "positional_embedding",
    r"text_model\.encoder\.layers": "transformer.resblocks",
    r"text_model\.final_layer_norm": "ln_final",
    r"text_projection\.weight": "text_projection",
    r"self_attn\.[qkv]_proj\.(\w+)": r"attn.in_proj_\1",
    r"self_attn": "attn",
    r"layer_norm": "ln_",
    r"mlp\.fc1": "mlp.c_fc",
    r"mlp\.fc2": "mlp.c_proj",
}


def unet_key(name: str, layers: int) -> str:
    """diffusers' name of a UNet parameter as CompVis'; ``layers`` is of residual blocks a resolution."""
    for ours, theirs in UNET_ENDS.items():
        if name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        kind, index, rest = match.groups()
        return f"middle_block.{2 * int(index) if kind == 'resnets' else 1}.{_resnet(rest)}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if match is None:
        return name
    side, level, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":  # "up" stands for 1 or 2: SingleFile.tensors sees which
        return f"output_blocks.{level * (layers + 1) + layers}.up.{rest}"
    place = 1 + level * (layers + 1) + index if side == "down" else level * (layers + 1) + index
    blocks = "input_blocks" if side == "down" else "output_blocks"
    return f"{blocks}.{place}.{0 if kind == 'resnets' else 1}.{_resnet(rest)}"


def _resnet(rest: str) -> str:
    part, _, end = rest.rpartition(".")
    return f"{RESNET[part]}.{end}" if part in RESNET else rest


def vae_key(name: str, levels: int) -> str:
    """diffusers' name of an autoencoder parameter as CompVis', which counts the decoder's levels from the outside."""
    name = re.sub(r"encoder\.down_blocks\.(\d+)", r"encoder.down.\1", name)
    name = re.sub(r"decoder\.up_blocks\.(\d+)", lambda match: f"decoder.up.{levels - 1 - int(match[1])}", name)
    for ours, theirs in VAE_PARTS.items():
        name = re.sub(ours, theirs, name)
    return name


def text_key(name: str) -> str:
    """transformers' name of a text encoder parameter as OpenCLIP's."""
    for ours, theirs in TEXT_PARTS.items():
        name = re.sub(ours, theirs, name)
    return name


SD3_ENDS = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
SD3_PARTS = {
    r"(attn2?)\.to_[qkv]\.": r"x_block.\1.qkv.",
    r"attn\.add_[qkv]_proj\.": "context_block.attn.qkv.",
    r"(attn2?)\.to_out\.0\.": r"x_block.\1.proj.",
    r"attn\.to_add_out\.": "context_block.attn.proj.",
    r"attn\.norm_added_([qk])\.": r"context_block.attn.ln_\1.",
    r"(attn2?)\.norm_([qk])\.": r"x_block.\1.ln_\2.",
    r"norm1\.linear\.": "x_block.adaLN_modulation.1.",
    r"norm1_context\.linear\.": "context_block.adaLN_modulation.1.",
    r"ff\.net\.0\.proj\.": "x_block.mlp.fc1.",
    r"ff\.net\.2\.": "x_block.mlp.fc2.",
    r"ff_context\.net\.0\.proj\.": "context_block.mlp.fc1.",
    r"ff_context\.net\.2\.": "context_block.mlp.fc2.",
}


def sd3_key(name: str) -> str:
    """diffusers' name of a parameter of Stable Diffusion 3's transformer as Stability AI's."""
    for ours, theirs in SD3_ENDS.items():
        if name == ours or name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", name)
    if match is None:
        return name
    for ours, theirs in SD3_PARTS.items():
        if re.match(ours, match[2]):
            return f"joint_blocks.{match[1]}.{re.sub(ours, theirs, match[2])}"
    return name
