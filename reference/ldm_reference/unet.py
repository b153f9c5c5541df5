"""UNet2DConditionModel: the denoiser of latent diffusion (2006.11239, appendix B; 2112.10752, section 3.3).

One class covers Stable Diffusion 1.x and 2.x, SDXL (2307.01952: pooled text and picture-size embeddings, several
transformer layers a block), inpainting (9 input channels), LCM (2310.04378: guidance embedding), BK-SDM (2305.15798:
fewer layers, no middle block) and own shapes: unconditional, class-conditional, any number of latent channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_reference.blocks import (
    Attention,
    Downsample2D,
    ResnetBlock2D,
    TimestepEmbedding,
    Transformer2DModel,
    Upsample2D,
    timestep_embedding,
)
from ldm_reference.config import (
    ANY,
    ConfigError,
    check_choice,
    check_groups,
    check_layers,
    check_positive,
    config_from_dict,
    per_block,
)

INERT = {
    "center_input_sample": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": {"silu", "swish"},  # two names of one function
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
    # of block types and embeddings that are not supported here
    "resnet_skip_time_act": ANY,
    "resnet_out_scale_factor": ANY,
    "cross_attention_norm": ANY,
    "addition_embed_type_num_heads": ANY,
}
DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "AttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D", "AttnUpBlock2D")
MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)


@dataclass(frozen=True)
class UNetConfig:
    """Keys of diffusers' ``UNet2DConditionModel``.

    ``attention_head_dim`` is, as there, the *number* of heads of the cross-attention blocks and the channels a head of
    the ``Attn*`` blocks. ``transformer_layers_per_block`` may have a list for a block, a number a layer; the blocks on
    the way up then have ``reverse_transformer_layers_per_block``, in their order (SSD-1B, 2401.02677).
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    only_cross_attention: bool | tuple[bool, ...] = False
    mid_block_only_cross_attention: bool | None = None  # read by no middle block that is supported here
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    dropout: float = 0.0
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = None
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    upcast_attention: bool | None = False
    resnet_time_scale_shift: str = "default"
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    time_cond_proj_dim: int | None = None

    def __post_init__(self) -> None:
        blocks = len(self.block_out_channels)
        check_positive(
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            block_out_channels=self.block_out_channels,
            layers_per_block=self.layers_per_block,
            cross_attention_dim=self.cross_attention_dim,
            attention_head_dim=self.attention_head_dim,
            norm_num_groups=self.norm_num_groups,
        )
        if isinstance(self.sample_size, tuple) and len(self.sample_size) != 2:
            raise ConfigError(f"sample_size = {self.sample_size!r} must be one number, or height and width")
        if self.sample_size is not None:
            check_positive(sample_size=self.sample_size)
        for key, allowed in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            for name in per_block(key, tuple(getattr(self, key)), blocks):
                check_choice(key, name, allowed)
        for key in ("only_cross_attention", "layers_per_block", "cross_attention_dim", "attention_head_dim"):
            per_block(key, getattr(self, key), blocks)
        self._check_depths()
        check_choice("mid_block_type", self.mid_block_type, MID_BLOCKS)
        check_choice("resnet_time_scale_shift", self.resnet_time_scale_shift, ("default", "scale_shift"))
        check_choice("class_embed_type", self.class_embed_type, (None, "timestep", "identity", "projection"))
        check_choice("addition_embed_type", self.addition_embed_type, (None, "text_time"))
        check_groups(self.norm_num_groups, self.block_out_channels)
        if self.addition_embed_type == "text_time":
            check_positive(
                addition_time_embed_dim=self.addition_time_embed_dim,
                projection_class_embeddings_input_dim=self.projection_class_embeddings_input_dim,
            )
        if self.class_embed_type == "projection":
            check_positive(projection_class_embeddings_input_dim=self.projection_class_embeddings_input_dim)
        if self.time_cond_proj_dim is not None:
            check_positive(time_cond_proj_dim=self.time_cond_proj_dim)
            if self.time_cond_proj_dim in (2, 3):
                raise ConfigError(
                    f"time_cond_proj_dim = {self.time_cond_proj_dim} has a guidance embedding that is not a number; "
                    "1, or 4 and more, is needed"
                )

    def _check_depths(self) -> None:
        blocks = len(self.block_out_channels)
        layers = per_block("layers_per_block", self.layers_per_block, blocks)
        down = per_block("transformer_layers_per_block", self.transformer_layers_per_block, blocks)
        up = self.reverse_transformer_layers_per_block
        if up is None:
            if any(isinstance(depth, tuple) for depth in down):
                raise ConfigError(
                    f"transformer_layers_per_block = {down!r} differs between the layers of a block; "
                    "reverse_transformer_layers_per_block must then say those of the blocks on the way up"
                )
            up = down[::-1]
        up = per_block("reverse_transformer_layers_per_block", up, blocks)
        total = 0
        for depths, counts, extra in ((down, layers, 0), (up, layers[::-1], 1)):
            for depth, count in zip(depths, counts, strict=True):
                numbers = depth if isinstance(depth, tuple) else (depth,)
                if not all(type(number) is int and number >= 0 for number in numbers):
                    raise ConfigError(f"transformer_layers_per_block = {depth!r} must hold integers of at least 0")
                if isinstance(depth, tuple) and len(depth) < count + extra:
                    raise ConfigError(
                        f"transformer_layers_per_block = {depth!r} has {len(depth)} numbers for {count + extra} layers"
                    )
                total += (count + extra) * (1 + max(numbers))
        check_layers(total)

    def transformer_layers(self, level: int, *, up: bool = False) -> Sequence[int]:
        """Transformer layers of each layer of the block at ``level``, on the way down or up."""
        blocks = len(self.block_out_channels)
        layers = per_block("layers_per_block", self.layers_per_block, blocks)[level] + up
        depths = per_block("transformer_layers_per_block", self.transformer_layers_per_block, blocks)
        depth = depths[level]
        if up and self.reverse_transformer_layers_per_block is not None:
            depth = self.reverse_transformer_layers_per_block[blocks - 1 - level]
        return depth if isinstance(depth, tuple) else (depth,) * layers

    @property
    def has_cross_attention_mid(self) -> bool:
        return self.mid_block_type == "UNetMidBlock2DCrossAttn"

    @property
    def reads_text(self) -> bool:
        """Whether any block attends to ``encoder_hidden_states``."""
        kinds = (*self.down_block_types, *self.up_block_types, self.mid_block_type or "")
        return any("CrossAttn" in kind for kind in kinds)

    @property
    def has_class_labels(self) -> bool:
        return self.class_embed_type is not None or self.num_class_embeds is not None


@dataclass(frozen=True)
class BlockShape:
    """What the blocks of one resolution have in common."""

    config: UNetConfig
    index: int

    def of(self, key: str) -> Any:
        return per_block(key, getattr(self.config, key), len(self.config.block_out_channels))[self.index]

    def resnet(self, in_channels: int, out_channels: int) -> ResnetBlock2D:
        config = self.config
        return ResnetBlock2D(
            in_channels,
            out_channels,
            temb_channels=config.block_out_channels[0] * 4,
            groups=config.norm_num_groups,
            eps=config.norm_eps,
            dropout=config.dropout,
            scale_shift=config.resnet_time_scale_shift == "scale_shift",
        )

    def transformer(self, channels: int, layers: int, *, only_cross_attention: bool) -> Transformer2DModel:
        config, heads = self.config, self.of("attention_head_dim")
        if channels % heads:
            raise ConfigError(
                f"attention_head_dim = {heads} (heads) does not divide the {channels} channels of a block"
            )
        return Transformer2DModel(
            channels,
            heads,
            layers,
            context_dim=self.of("cross_attention_dim"),
            groups=config.norm_num_groups,
            linear_projection=config.use_linear_projection,
            only_cross_attention=only_cross_attention,
            dropout=config.dropout,
        )

    def attention(self, kind: str, channels: int, head_dim: int, layers: int) -> nn.Module:
        """What follows a residual block: ``layers`` of cross-attention, or plain self-attention."""
        if "CrossAttn" in kind:
            return self.transformer(channels, layers, only_cross_attention=self.of("only_cross_attention"))
        config = self.config
        if channels % head_dim:
            raise ConfigError(f"attention_head_dim = {head_dim} does not divide the {channels} channels of a {kind}")
        return Attention(channels, channels // head_dim, bias=True, groups=config.norm_num_groups, eps=config.norm_eps)


class Block(nn.Module):
    """Residual blocks of one resolution, each with its attention. Keys: ``resnets``, ``attentions``."""

    def __init__(self, resnets: list[ResnetBlock2D], attentions: list[nn.Module]):
        super().__init__()
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)

    def attend(self, layer: int, x: Tensor, context: Tensor | None) -> Tensor:
        attentions = getattr(self, "attentions", ())
        return attentions[layer](x, context) if layer < len(attentions) else x


class DownBlock(Block):
    def __init__(self, shape: BlockShape, kind: str, in_channels: int, out_channels: int, *, last: bool):
        layers = shape.of("layers_per_block")
        super().__init__(
            [shape.resnet(in_channels if i == 0 else out_channels, out_channels) for i in range(layers)],
            []
            if kind == "DownBlock2D"
            else [
                shape.attention(kind, out_channels, shape.of("attention_head_dim"), depth)
                for depth in shape.config.transformer_layers(shape.index)[:layers]
            ],
        )
        if not last:
            self.downsamplers = nn.ModuleList([Downsample2D(out_channels)])

    def forward(self, x: Tensor, temb: Tensor, context: Tensor | None) -> list[Tensor]:
        """The outputs of all layers, in order; the last one is the block's."""
        outputs = []
        for i, resnet in enumerate(self.resnets):
            x = self.attend(i, resnet(x, temb), context)
            outputs.append(x)
        for downsampler in getattr(self, "downsamplers", ()):
            outputs.append(downsampler(outputs[-1]))
        return outputs


class MidBlock(Block):
    def __init__(self, shape: BlockShape):
        config, channels = shape.config, shape.config.block_out_channels[-1]
        cross = config.has_cross_attention_mid
        super().__init__(
            [shape.resnet(channels, channels) for _ in range(1 + cross)],
            [shape.transformer(channels, config.transformer_layers(shape.index)[0], only_cross_attention=False)]
            if cross
            else [],
        )

    def forward(self, x: Tensor, temb: Tensor, context: Tensor | None) -> Tensor:
        x = self.resnets[0](x, temb)
        for i, resnet in enumerate(self.resnets[1:]):
            x = resnet(self.attend(i, x, context), temb)
        return x


class UpBlock(Block):
    def __init__(
        self,
        shape: BlockShape,
        kind: str,
        widths: tuple[int, int, int],  # of the block below, of this one, of the skip into the last layer
        head_dim: int,
        *,
        last: bool,
    ):
        below, channels, outer = widths
        layers = shape.of("layers_per_block") + 1
        super().__init__(
            [
                shape.resnet((below if i == 0 else channels) + (outer if i == layers - 1 else channels), channels)
                for i in range(layers)
            ],
            []
            if kind == "UpBlock2D"
            else [
                shape.attention(kind, channels, head_dim, depth)
                for depth in shape.config.transformer_layers(shape.index, up=True)[:layers]
            ],
        )
        if not last:
            self.upsamplers = nn.ModuleList([Upsample2D(channels)])

    def forward(self, x: Tensor, temb: Tensor, context: Tensor | None, skips: list[Tensor]) -> Tensor:
        """Consumes one skip a layer from the end of ``skips``; resizes to the skip that the next block will meet."""
        for i, resnet in enumerate(self.resnets):
            x = self.attend(i, resnet(torch.cat([x, skips.pop()], dim=1), temb), context)
        for upsampler in getattr(self, "upsamplers", ()):
            x = upsampler(x, (skips[-1].shape[2], skips[-1].shape[3]))
        return x


class UNet2DConditionModel(nn.Module):
    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        time_dim = widths[0] * 4
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], time_dim, config.time_cond_proj_dim)
        self.class_embedding = self._class_embedding(time_dim)
        self.add_embedding = (
            TimestepEmbedding(config.projection_class_embeddings_input_dim or 0, time_dim)
            if config.addition_embed_type
            else None
        )
        shapes = [BlockShape(config, i) for i in range(len(widths))]
        self.down_blocks = nn.ModuleList(
            DownBlock(shape, kind, widths[max(i - 1, 0)], widths[i], last=i == len(widths) - 1)
            for i, (shape, kind) in enumerate(zip(shapes, config.down_block_types, strict=True))
        )
        self.mid_block = MidBlock(shapes[-1]) if config.mid_block_type else None
        self.up_blocks = nn.ModuleList()
        for i, kind in enumerate(config.up_block_types):
            level = len(widths) - 1 - i
            self.up_blocks.append(
                UpBlock(
                    shapes[level],
                    kind,
                    (widths[min(level + 1, len(widths) - 1)], widths[level], widths[max(level - 1, 0)]),
                    shapes[i].of("attention_head_dim"),  # not reversed for AttnUpBlock2D: so it is in diffusers
                    last=level == 0,
                )
            )
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    @classmethod
    def from_config(cls, values: Mapping[str, Any], *, strict: bool = True) -> UNet2DConditionModel:
        return cls(config_from_dict(UNetConfig, values, INERT, strict=strict))

    def _class_embedding(self, time_dim: int) -> nn.Module | None:
        config = self.config
        if config.class_embed_type == "timestep":
            return TimestepEmbedding(config.block_out_channels[0], time_dim)
        if config.class_embed_type == "projection":
            return TimestepEmbedding(config.projection_class_embeddings_input_dim or 0, time_dim)
        if config.class_embed_type == "identity":
            return nn.Identity()
        return nn.Embedding(config.num_class_embeds, time_dim) if config.num_class_embeds else None

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        class_labels: Tensor | None = None,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        residuals: Sequence[Tensor] = (),
    ) -> Tensor:
        """Predict epsilon, v or x0, as trained.

        Parameters
        ----------
        sample : (B, in_channels, h, w)
        timestep : (1,) or (B,), any number type
        encoder_hidden_states : (B, L, cross_attention_dim), if the model reads text
        class_labels : (B,) int64, or (B, D) for ``class_embed_type`` identity and projection
        text_embeds, time_ids : (B, P) pooled text and (B, 6) sizes and crop of SDXL
        timestep_cond : (B, time_cond_proj_dim), the guidance embedding of LCM
        residuals : what a ControlNet (2302.05543) adds to each skip, in order, and to the middle block's output

        Returns
        -------
        (B, out_channels, h, w)
        """
        temb = self._time_embedding(sample, timestep, class_labels, text_embeds, time_ids, timestep_cond)
        x = self.conv_in(sample)
        skips = [x]
        for down in self.down_blocks:
            skips += down(skips[-1], temb, encoder_hidden_states)
        x = skips[-1] if self.mid_block is None else self.mid_block(skips[-1], temb, encoder_hidden_states)
        if residuals:
            skips = [skip + residual for skip, residual in zip(skips, residuals[:-1], strict=True)]
            x = x + residuals[-1]
        for up in self.up_blocks:
            x = up(x, temb, encoder_hidden_states, skips)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def _time_embedding(
        self,
        sample: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None,
        text_embeds: Tensor | None,
        time_ids: Tensor | None,
        timestep_cond: Tensor | None,
    ) -> Tensor:
        config = self.config

        def sinusoids(values: Tensor, dim: int) -> Tensor:
            features = timestep_embedding(
                values, dim, flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
            )
            return features.to(sample.dtype)

        width = config.block_out_channels[0]
        temb = self.time_embedding(sinusoids(timestep.expand(sample.shape[0]), width), timestep_cond)
        if self.class_embedding is not None:
            if class_labels is None:
                raise ValueError("this UNet is class-conditional: class_labels (B,) is needed")
            labels = sinusoids(class_labels, width) if config.class_embed_type == "timestep" else class_labels
            temb = temb + self.class_embedding(labels)
        if self.add_embedding is not None:
            if text_embeds is None or time_ids is None:
                raise ValueError("this UNet is SDXL's kind: text_embeds (B, P) and time_ids (B, 6) are needed")
            sizes = sinusoids(time_ids.flatten(), config.addition_time_embed_dim or 0)
            temb = temb + self.add_embedding(torch.cat([text_embeds, sizes.reshape(text_embeds.shape[0], -1)], dim=-1))
        return temb
