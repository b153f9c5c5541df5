"""Spaces of a UNet's channels, which belong together, and a UNet with fewer of them.

A *space* is a set of channels that every parameter which reads or writes it must lose together: a residual stream with
all that adds to it, the inside of a residual block, an attention's heads, the inside of a feed-forward. Each axis of
each parameter lies in a space, in several one after another (a concatenation with a skip connection, the two halves of
GEGLU), or in none (latents, prompts). Cutting a network is then one selection an axis (DepGraph, 2301.12900, written
out for this family of networks, since the result must be one that diffusers' config can say).

That config gives every level one width and the whole network one number of norm groups. So every space loses the same
share of its channels, and those of normalised streams go by whole groups: the statistics of the others stay as they
were. Heads go whole where that share of them is a whole number, else every head loses that share of its channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from ldm_reference.blocks import (
    GEGLU,
    Attention,
    BasicTransformerBlock,
    ResnetBlock2D,
    Transformer2DModel,
    timestep_embedding,
)
from ldm_reference.config import per_block
from ldm_reference.unet import Block, UNet2DConditionModel, UNetConfig
from torch import Tensor, nn

from ldm_export.errors import InputError

Axis = tuple[str, ...]
"""The spaces along one axis of a parameter, in order; none where it is never cut."""
FIXED: Axis = ()
NUM_TIMESTEPS = 1000
"""Timesteps on which the time embedding is fitted to its narrower input."""
RCOND = 1e-3
"""Least singular value, as a share of the largest, that a fit follows: slow sinusoids are nearly the same one, and
weights that tell them apart leave fp16."""


@dataclass(frozen=True)
class Space:
    """``size`` channels in ``blocks`` equal blocks; blocks go whole, or each loses the same share of its channels."""

    size: int
    blocks: int
    whole: bool


class Channels:
    """The spaces of a UNet and where its parameters lie in them.

    Attributes
    ----------
    spaces : by name
    axes : by parameter, its axes in order
    streams : by the name of a stage (``down_blocks.0``, ``mid_block``, ...), the space of what it gives
    heads : by the name of each cross-attention, the space of its heads

    Raises
    ------
    InputError
        If the UNet has a part that is not followed: a class embedding other than a table, a concatenation that is
        added as it is.
    """

    def __init__(self, unet: UNet2DConditionModel):
        self.spaces: dict[str, Space] = {}
        self.axes: dict[str, tuple[Axis, ...]] = {}
        self.streams: dict[str, str] = {}
        self.heads: dict[str, str] = {}
        self.config = unet.config
        self._groups = unet.config.norm_num_groups
        self._follow(unet)

    def _space(self, name: str, size: int, blocks: int = 1, *, whole: bool = False) -> Axis:
        self.spaces[name] = Space(size, blocks, whole)
        return (name,)

    def _stream(self, name: str, size: int) -> Axis:
        return self._space(name, size, self._groups, whole=True)

    def _layer(self, name: str, layer: nn.Module, reads: Axis, writes: Axis) -> None:
        self.axes[f"{name}.weight"] = (writes, reads)
        if layer.bias is not None:
            self.axes[f"{name}.bias"] = (writes,)

    def _norm(self, name: str, over: Axis) -> None:
        self.axes[f"{name}.weight"] = self.axes[f"{name}.bias"] = (over,)

    def _follow(self, unet: UNet2DConditionModel) -> None:
        config = unet.config
        time = self._time(unet)
        x = self._stream("conv_in", config.block_out_channels[0])
        self._layer("conv_in", unet.conv_in, FIXED, x)
        skips = [x]
        for number, down in enumerate(unet.down_blocks):
            assert isinstance(down, Block)
            name = f"down_blocks.{number}"
            for layer, resnet in enumerate(down.resnets):
                x = self._attend(name, down, layer, self._resnet(f"{name}.resnets.{layer}", resnet, x, time))
                skips.append(x)
            for layer, downsampler in enumerate(getattr(down, "downsamplers", ())):
                place = f"{name}.downsamplers.{layer}.conv"
                reads, x = x, self._stream(place, downsampler.conv.out_channels)
                self._layer(place, downsampler.conv, reads, x)
                skips.append(x)
            self.streams[name] = x[0]
        if unet.mid_block is not None:
            for layer, resnet in enumerate(unet.mid_block.resnets):
                if layer:
                    x = self._attend("mid_block", unet.mid_block, layer - 1, x)
                x = self._resnet(f"mid_block.resnets.{layer}", resnet, x, time)
            self.streams["mid_block"] = x[0]
        for number, up in enumerate(unet.up_blocks):
            assert isinstance(up, Block)
            name = f"up_blocks.{number}"
            for layer, resnet in enumerate(up.resnets):
                x = self._resnet(f"{name}.resnets.{layer}", resnet, (*x, *skips.pop()), time)
                x = self._attend(name, up, layer, x)
            for layer, upsampler in enumerate(getattr(up, "upsamplers", ())):
                place = f"{name}.upsamplers.{layer}.conv"
                reads, x = x, self._stream(place, upsampler.conv.out_channels)
                self._layer(place, upsampler.conv, reads, x)
            self.streams[name] = x[0]
        self._norm("conv_norm_out", x)
        self._layer("conv_out", unet.conv_out, x, FIXED)

    def _time(self, unet: UNet2DConditionModel) -> Axis:
        """The time embedding; what it reads, sinusoids of the first level's width, is fitted anew, not cut."""
        config = unet.config
        if config.class_embed_type is not None:
            raise InputError(
                f"A UNet with class_embed_type {config.class_embed_type!r} cannot be narrowed; those with a table of "
                "classes or none can. Leave the pass out for this model."
            )
        size = unet.time_embedding.linear_2.out_features
        time = self._space("time_embedding", size)
        for name in ("time_embedding", "add_embedding"):
            if (embedding := getattr(unet, name)) is not None:
                inside = self._space(f"{name}.inside", size)
                self._layer(f"{name}.linear_1", embedding.linear_1, FIXED, inside)
                self._layer(f"{name}.linear_2", embedding.linear_2, inside, time)
        if unet.time_embedding.cond_proj is not None:
            self.axes["time_embedding.cond_proj.weight"] = (FIXED, FIXED)
        if unet.class_embedding is not None:
            self.axes["class_embedding.weight"] = (FIXED, time)
        return time

    def _resnet(self, name: str, resnet: nn.Module, x: Axis, time: Axis) -> Axis:
        assert isinstance(resnet, ResnetBlock2D)
        width = resnet.conv2.out_channels
        inside = self._stream(f"{name}.inside", width)
        if resnet.conv_shortcut is not None:
            out = self._stream(name, width)
            self._layer(f"{name}.conv_shortcut", resnet.conv_shortcut, x, out)
        elif len(x) == 1:
            out = x
        else:
            raise InputError(f"{name} adds a concatenation to what it computes, which cannot be narrowed; leave it so.")
        self._norm(f"{name}.norm1", x)
        self._layer(f"{name}.conv1", resnet.conv1, x, inside)
        if resnet.time_emb_proj is not None:
            halves = inside * (1 + resnet.scale_shift)
            self._layer(f"{name}.time_emb_proj", resnet.time_emb_proj, time, halves)
        self._norm(f"{name}.norm2", inside)
        self._layer(f"{name}.conv2", resnet.conv2, inside, out)
        return out

    def _attend(self, block: str, module: nn.Module, layer: int, x: Axis) -> Axis:
        """What follows a residual block adds to the stream that it reads."""
        attentions = getattr(module, "attentions", ())
        if layer < len(attentions):
            name, attention = f"{block}.attentions.{layer}", attentions[layer]
            if isinstance(attention, Transformer2DModel):
                self._transformer(name, attention, x)
            else:
                self._norm(f"{name}.group_norm", x)
                self._attention(name, attention, x, x)
        return x

    def _transformer(self, name: str, module: Transformer2DModel, x: Axis) -> None:
        tokens = self._space(f"{name}.tokens", module.norm.num_channels)
        self._norm(f"{name}.norm", x)
        self._layer(f"{name}.proj_in", module.proj_in, x, tokens)
        for number, block in enumerate(module.transformer_blocks):
            assert isinstance(block, BasicTransformerBlock)
            place = f"{name}.transformer_blocks.{number}"
            for norm in ("norm1", "norm2", "norm3"):
                self._norm(f"{place}.{norm}", tokens)
            own = FIXED if block.only_cross_attention else tokens
            self._attention(f"{place}.attn1", block.attn1, tokens, own)
            self._attention(f"{place}.attn2", block.attn2, tokens, FIXED)
            self.heads[f"{place}.attn2"] = f"{place}.attn2.heads"
            geglu, out = block.ff.net[0], block.ff.net[2]
            assert isinstance(geglu, GEGLU)
            assert isinstance(out, nn.Linear)
            inside = self._space(f"{place}.ff", out.in_features)
            self._layer(f"{place}.ff.net.0.proj", geglu.proj, tokens, inside * 2)
            self._layer(f"{place}.ff.net.2", out, inside, tokens)
        self._layer(f"{name}.proj_out", module.proj_out, tokens, x)

    def _attention(self, name: str, module: Attention, x: Axis, context: Axis) -> None:
        heads = self._space(f"{name}.heads", module.to_q.out_features, module.heads)
        self._layer(f"{name}.to_q", module.to_q, x, heads)
        self._layer(f"{name}.to_k", module.to_k, context, heads)
        self._layer(f"{name}.to_v", module.to_v, context, heads)
        self._layer(f"{name}.to_out.0", module.to_out[0], heads, x)

    def kept(self, scores: Mapping[str, Tensor], share: Fraction) -> dict[str, Tensor]:
        """The channels of every space with the highest scores (size,), in order: ``share`` of them."""
        return {name: _best(space, scores[name], share) for name, space in self.spaces.items()}


def _best(space: Space, scores: Tensor, share: Fraction) -> Tensor:
    blocks, each = space.blocks, space.size // space.blocks
    table = scores.reshape(blocks, each)
    if space.whole or (blocks > 1 and (blocks * share).denominator == 1):
        rows = table.sum(1).topk(int(blocks * share)).indices.sort().values
        columns = torch.arange(each).expand(len(rows), each)
    else:
        rows = torch.arange(blocks)
        columns = table.topk(int(each * share), dim=1).indices.sort(dim=1).values
    return (rows[:, None] * each + columns).flatten()


def narrower(config: UNetConfig, share: Fraction) -> UNetConfig | None:
    """The config with that share of the channels everywhere; None where there is none."""
    if share == 1:
        return config
    widths = [width * share for width in config.block_out_channels]
    if any(number.denominator != 1 for number in (*widths, config.norm_num_groups * share)):
        return None
    heads = list(per_block("attention_head_dim", config.attention_head_dim, len(widths)))
    measured = any(kind.startswith("Attn") for kind in (*config.down_block_types, *config.up_block_types))
    if measured and config.reads_text:
        return None  # one kind of block has that many channels a head, the other that many heads
    if config.reads_text:
        heads = [int(count * share) if (count * share).denominator == 1 else count for count in heads]
    if (measured or config.reads_text) and any(width % each for width, each in zip(widths, heads, strict=True)):
        return None
    if measured and any(width % each for width, each in zip(reversed(widths), heads, strict=True)):
        return None  # blocks on the way up read the list from its start, as diffusers' do
    if widths[0] // 2 <= config.freq_shift:
        return None  # no sinusoids
    return replace(
        config,
        block_out_channels=tuple(map(int, widths)),
        norm_num_groups=int(config.norm_num_groups * share),
        attention_head_dim=tuple(heads) if len(set(heads)) > 1 else heads[0],
    )


def nearest_share(config: UNetConfig, wanted: float) -> Fraction:
    """The share of channels next to ``wanted`` that the config can say; 1 keeps all."""
    groups = config.norm_num_groups
    shares = [Fraction(kept, groups) for kept in range(1, groups + 1)]
    return min(
        (share for share in shares if narrower(config, share) is not None), key=lambda share: abs(share - wanted)
    )


@torch.no_grad()
def cut(unet: UNet2DConditionModel, kept: Mapping[str, Tensor], share: Fraction) -> UNet2DConditionModel:
    """The UNet of those channels alone, float32, without gradients."""
    channels = Channels(unet)
    config = narrower(unet.config, share)
    assert config is not None
    student = UNet2DConditionModel(config)
    weights = {
        name: _selected(channels, tensor, channels.axes[name], kept) for name, tensor in unet.state_dict().items()
    }
    if share != 1:
        weights |= _refitted_time(unet, student, weights)
    for name, attention in unet.named_modules():
        if isinstance(attention, Attention):
            weights[f"{name}.to_q.weight"] *= (_head_dim(student.get_submodule(name)) / _head_dim(attention)) ** 0.5
    student.load_state_dict(weights)
    return student.requires_grad_(False).eval()


def _head_dim(attention: nn.Module) -> int:
    """Width of a head, by whose root queries are divided; narrower heads have theirs scaled, so that sums stay."""
    assert isinstance(attention, Attention)
    return attention.to_q.out_features // attention.heads


def _selected(channels: Channels, tensor: Tensor, axes: Sequence[Axis], kept: Mapping[str, Tensor]) -> Tensor:
    for number, axis in enumerate(axes):
        offset, chosen = 0, []
        for name in axis:
            chosen.append(kept[name] + offset)
            offset += channels.spaces[name].size
        if chosen:
            tensor = tensor.index_select(number, torch.cat(chosen))
    return tensor.clone()


def _refitted_time(
    unet: UNet2DConditionModel, student: UNet2DConditionModel, weights: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The first layer of the time embedding for sinusoids of fewer frequencies: over all timesteps t, the W' with

    W' phi'(t) ~ W phi(t)    (least squares, truncated),    and for an embedded guidance scale    W' P' ~ W P.
    """

    def sinusoids(width: int) -> Tensor:
        return timestep_embedding(
            torch.arange(NUM_TIMESTEPS),
            width,
            flip_sin_to_cos=unet.config.flip_sin_to_cos,
            freq_shift=unet.config.freq_shift,
        ).double()

    def fit(given: Tensor, goal: Tensor) -> Tensor:
        solution: Tensor = torch.linalg.lstsq(given, goal, rcond=RCOND, driver="gelsd").solution
        return solution

    old = weights["time_embedding.linear_1.weight"].double()
    goal = sinusoids(unet.config.block_out_channels[0]) @ old.T
    new = fit(sinusoids(student.config.block_out_channels[0]), goal).T
    fitted = {"time_embedding.linear_1.weight": new.float()}
    if unet.time_embedding.cond_proj is not None:
        projected = old @ weights["time_embedding.cond_proj.weight"].double()
        fitted["time_embedding.cond_proj.weight"] = fit(new, projected).float()
    return fitted
