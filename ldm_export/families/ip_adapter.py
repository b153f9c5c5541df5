"""IP-Adapters (2308.06721): a picture as a further prompt, which a UNet attends to beside the text.

    image_encoder   pixels in [0, 1], whether there is a picture -> image_tokens (B, T, width)
    each cross-attention of the UNet:  softmax(q k') v + scale softmax(q k_ip') v_ip               (eq. 5)

The plain one projects the encoder's pooled embedding to four tokens, "plus" its last but one states to sixteen by
attention. Where there is no picture, the embedding is zeros, or the states are of a picture of zeros, as in diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ldm_reference.blocks import Attention
from torch import Tensor, nn

from ldm_export.checkpoint import LatentDiffusion
from ldm_export.checkpoint.added import AddedNetwork
from ldm_export.checkpoint.image_adapter import ImageAdapter
from ldm_export.contract import TensorSpec, graph_spec
from ldm_export.errors import CheckpointError, InputError
from ldm_export.families.base import GraphModule, ModelGraph
from ldm_export.families.libraries import from_transformers, library_class

GRAPH = "image_encoder"
TOKENS, SCALE = "ip_tokens", "ip_scale"
"""The UNet's inputs for it."""
PLAIN_TOKENS = 4
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of CLIP's pictures, by channel (2103.00020)."""


def _name(name: str) -> str | None:
    return None if name.endswith("position_ids") else name


ENCODER = replace(from_transformers("CLIPVisionModelWithProjection"), name_of=_name)


def with_image_adapter(checkpoint: LatentDiffusion, file: Path, encoder: Path | None) -> LatentDiffusion:
    """This checkpoint with an IP-Adapter; its encoder is beside the file, or the checkpoint's, where none is named.

    Raises
    ------
    CheckpointError
        If either cannot be used.
    InputError
        If there are no IP-Adapters of this kind of model.
    """
    if checkpoint.kind.control is None or checkpoint.kind.denoiser != "unet":
        raise InputError(
            f"{file} was given as an IP-Adapter; a model with a {checkpoint.kind.denoiser} as {checkpoint.name} has "
            "cannot be exported with one. Leave it out."
        )
    places = [encoder] if encoder is not None else [file.parent / GRAPH, checkpoint.path / GRAPH]
    folder = next((place for place in places if (place / "config.json").is_file()), None)
    if folder is None:
        raise CheckpointError(
            f"There is no image encoder in {' or '.join(map(str, places))}; an IP-Adapter reads pictures by the one "
            "that it was trained with. Name its folder with --image-encoder."
        )
    found = ImageAdapter(file, AddedNetwork(folder, ENCODER))
    found.encoder.check()
    found.tensors  # noqa: B018 - refuses what is none
    return replace(checkpoint, image_adapter=found)


def image_adapter_faults(unet: nn.Module, adapter: ImageAdapter) -> list[str]:
    """What is wrong with an IP-Adapter for a UNet, whose weights do not matter."""
    shapes = [tuple(one.shape) for pair in _pairs(adapter) for one in pair]
    weights = unet.state_dict()
    own = [tuple(weights[f"{name}.to_k.weight"].shape) for name in cross_attentions(unet) for _ in range(2)]
    if shapes != own:
        return [
            f"it has {len(shapes) // 2} pairs of weights, the first {shapes[0]}, and the UNet {len(own) // 2} "
            f"cross-attentions, the first {own[0] if own else 'none'}. Use one that was trained for this model."
        ]
    projection, config = adapter.tensors["image_proj"], adapter.encoder.config
    plain = "proj.weight" in projection
    if not plain and "latents" not in projection:
        return ["it is neither plain nor plus, but such as those of faces, which read other things. Use another."]
    read = projection["proj.weight" if plain else "proj_in.weight"].shape[-1]
    given = config["projection_dim"] if plain else config["hidden_size"]
    if read != given:
        return [
            f"it reads embeddings {read} wide, and the image encoder {adapter.encoder.folder} gives {given}. "
            "Name the one that it was trained with: --image-encoder FOLDER."
        ]
    return []


def _pairs(adapter: ImageAdapter) -> list[tuple[Tensor, Tensor]]:
    """Weights of keys and values of each cross-attention, in order."""
    found = adapter.tensors["ip_adapter"]
    numbers = sorted({int(name.split(".")[0]) for name in found if name.split(".")[0].isdigit()})
    names = {f"{number}.{kind}.weight" for number in numbers for kind in ("to_k_ip", "to_v_ip")}
    if names != found.keys():
        raise CheckpointError(
            f"{adapter.file} has {', '.join(sorted(names ^ found.keys()))[:200]}, or lacks it; of each cross-attention "
            "there are to_k_ip and to_v_ip. Give the file of an IP-Adapter."
        )
    return [(found[f"{number}.to_k_ip.weight"], found[f"{number}.to_v_ip.weight"]) for number in numbers]


def image_adapter_inputs(adapter: ImageAdapter | None, width: int) -> tuple[TensorSpec, ...]:
    """What a UNet that reads text of this width is given for an IP-Adapter; nothing without one."""
    if adapter is None:
        return ()
    return (
        TensorSpec(TOKENS, "float32", ("batch", _token_count(adapter), width)),
        TensorSpec(SCALE, "float32", ("batch",)),
    )


def _token_count(adapter: ImageAdapter) -> int:
    latents = adapter.tensors["image_proj"].get("latents")
    return PLAIN_TOKENS if latents is None else int(latents.shape[1])


def image_encoder_graph(adapter: ImageAdapter, width: int) -> ModelGraph:
    """The graph of an IP-Adapter's image encoder, with what makes tokens of this width."""
    size = adapter.encoder.config["image_size"]
    inputs = [
        TensorSpec("pixels", "float32", ("batch", 3, size, size)),
        TensorSpec("has_picture", "float32", ("batch",)),
    ]
    tokens = TensorSpec("image_tokens", "float32", ("batch", _token_count(adapter), width))
    return ModelGraph(graph_spec(GRAPH, inputs, [tokens]), partial(_image_encoder, adapter), GRAPH)


class TokenEncoder(nn.Module):
    """An image encoder and what makes tokens of its embeddings."""

    def __init__(self, vision: Any, projection: nn.Module, config: Mapping[str, Any]):
        super().__init__()
        self.vision, self.projection, self.config = vision, projection, config
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("deviation", torch.tensor(DEVIATION)[:, None, None])

    mean: Tensor
    deviation: Tensor

    def forward(self, pixels: Tensor, has_picture: Tensor) -> Tensor:
        there = has_picture[:, None]
        pixels = (pixels - self.mean) / self.deviation
        if self.config["plain"]:
            read = self.vision(pixels).image_embeds * there
        else:
            read = self.vision(pixels * there[..., None, None], output_hidden_states=True).hidden_states[-2]
        tokens: Tensor = self.projection(read)
        return tokens


def _image_encoder(adapter: ImageAdapter) -> GraphModule:
    weights = adapter.tensors["image_proj"]
    convert = library_class("diffusers.loaders.unet", "UNet2DConditionLoadersMixin")
    try:
        projection = convert._convert_ip_adapter_image_proj_to_diffusers(None, dict(weights), low_cpu_mem_usage=False)
    except Exception as error:  # whatever a library makes of weights that it cannot use
        why = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{adapter.file} is an IP-Adapter that cannot be used ({why}). Use another.") from error
    config = {**adapter.encoder.config, "plain": "proj.weight" in weights}
    network = TokenEncoder(adapter.encoder.load(), projection.requires_grad_(False), config)
    return GraphModule(network, lambda network, pixels, has_picture: (network(pixels, has_picture),)).eval()


@dataclass
class Prompt:
    """What all cross-attentions of a UNet read in a call, set before it: tokens (B, T, width) and scale (B,)."""

    tokens: Tensor | None = None
    scale: Tensor | None = None


class AdaptedAttention(nn.Module):
    """Cross-attention to the text and, by keys and values of its own, to a picture's tokens."""

    def __init__(self, attention: Attention, prompt: Prompt, keys: Tensor, values: Tensor):
        super().__init__()
        self.heads, self.to_q, self.to_k = attention.heads, attention.to_q, attention.to_k
        self.to_v, self.to_out = attention.to_v, attention.to_out
        self.to_k_ip, self.to_v_ip = _linear(keys), _linear(values)
        self._prompt = prompt

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        tokens, scale = self._prompt.tokens, self._prompt.scale
        assert tokens is not None
        assert scale is not None
        q, k, v, k_ip, v_ip = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, N, C) -> (B, heads, N, d)
            for projected in (
                self.to_q(x),
                self.to_k(context),
                self.to_v(context),
                self.to_k_ip(tokens),
                self.to_v_ip(tokens),
            )
        )
        out = F.scaled_dot_product_attention(q, k, v)
        out = out + scale[:, None, None, None] * F.scaled_dot_product_attention(q, k_ip, v_ip)
        made: Tensor = self.to_out[0](out.transpose(1, 2).flatten(2))
        return made


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def cross_attentions(unet: nn.Module) -> list[str]:
    """Names of a UNet's cross-attentions in the order of diffusers' attention processors: down, up, middle."""
    names = [name for name, module in unet.named_modules() if name.endswith("attn2") and isinstance(module, Attention)]
    return sorted(names, key=lambda name: ("down_blocks", "up_blocks", "mid_block").index(name.split(".")[0]))


def adapt(unet: Any, adapter: ImageAdapter) -> Prompt:
    """Make a UNet attend to what the prompt that is returned holds, in place."""
    prompt = Prompt()
    for name, (keys, values) in zip(cross_attentions(unet), _pairs(adapter), strict=True):
        block, _, last = name.rpartition(".")
        setattr(unet.get_submodule(block), last, AdaptedAttention(unet.get_submodule(name), prompt, keys, values))
    return prompt
