"""The blocks that the autoencoder and the UNet share.

Shapes: images and latents (B, C, H, W); tokens (B, N, C); time embedding (B, T). Every block is residual:
y = x + f(x), with group normalisation before each convolution (pre-norm).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(timesteps: Tensor, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0) -> Tensor:
    """Sinusoidal features of a timestep (Vaswani et al., 1706.03762, section 3.5): (B,) -> (B, dim), float32.

    Frequencies 10000^(-i / (dim/2 - freq_shift)); ``flip_sin_to_cos`` puts the cosines first.
    """
    half = dim // 2
    exponent = -math.log(10000) / (half - freq_shift) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[:, None] * torch.exp(exponent)[None, :]
    parts = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat(parts, dim=-1), (0, dim % 2))


class TimestepEmbedding(nn.Module):
    """Two-layer perceptron over a sinusoidal embedding; ``condition`` is the guidance embedding of LCM (2310.04378)."""

    def __init__(self, in_dim: int, dim: int, cond_dim: int | None = None):
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.cond_proj = nn.Linear(cond_dim, in_dim, bias=False) if cond_dim else None
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.cond_proj is not None and condition is not None:
            x = x + self.cond_proj(condition)
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock2D(nn.Module):
    """Two 3x3 convolutions; the time embedding is added between them, or scales and shifts the second norm."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        temb_channels: int | None,
        groups: int,
        eps: float,
        dropout: float = 0.0,
        scale_shift: bool = False,
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_channels, out_channels * (1 + scale_shift)) if temb_channels else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is None or temb is None:
            h = self.norm2(h)
        else:
            temb = self.time_emb_proj(F.silu(temb))[:, :, None, None]
            if self.scale_shift:
                scale, shift = temb.chunk(2, dim=1)
                h = self.norm2(h) * (1 + scale) + shift
            else:
                h = self.norm2(h + temb)
        h = self.conv2(self.dropout(F.silu(h)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class Downsample2D(nn.Module):
    """Stride-2 convolution. ``padding`` 0 pads right and bottom by one, as the encoder of Stable Diffusion does."""

    def __init__(self, channels: int, padding: int = 1):
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample2D(nn.Module):
    """Nearest-neighbour doubling, or resize to ``size`` (height, width), then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0) if size is None else F.interpolate(x, size=size)
        return self.conv(x)


class Attention(nn.Module):
    """Multi-head attention, softmax(q k^T / sqrt(d)) v, of ``x`` (B, N, C) to ``context`` (B, M, C') or to itself.

    With ``groups`` it is the spatial self-attention of autoencoders: input (B, C, H, W), group norm first, residual.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        context_dim: int | None = None,
        bias: bool = False,
        groups: int | None = None,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.heads = heads
        self.group_norm = nn.GroupNorm(groups, channels, eps) if groups else None
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(context_dim or channels, channels, bias=bias)
        self.to_v = nn.Linear(context_dim or channels, channels, bias=bias)
        self.to_out = nn.ModuleList(
            [nn.Linear(channels, channels), nn.Identity()]
        )  # the identity keeps the key to_out.0

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if self.group_norm is not None:
            tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, N, C)
            return x + self._attend(tokens, tokens).transpose(1, 2).reshape(x.shape)
        return self._attend(x, x if context is None else context)

    def _attend(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, N, C) -> (B, heads, N, d)
            for projected in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """a * gelu(b), both halves of one projection (Shazeer, 2002.05202, eq. 6)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, hidden * 2)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int, dropout: float = 0.0):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(dim, dim * 4), nn.Dropout(dropout), nn.Linear(dim * 4, dim)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the prompt, feed-forward; layer norm before each."""

    def __init__(self, dim: int, heads: int, context_dim: int, *, only_cross_attention: bool, dropout: float):
        super().__init__()
        self.only_cross_attention = only_cross_attention
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads, context_dim=context_dim if only_cross_attention else None)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, context_dim=context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim, dropout)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x), context if self.only_cross_attention else None)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nn.Module):
    """Transformer blocks over the positions of a feature map, between two 1x1 (or linear) projections."""

    def __init__(
        self,
        channels: int,
        heads: int,
        layers: int,
        *,
        context_dim: int,
        groups: int,
        linear_projection: bool,
        only_cross_attention: bool,
        dropout: float,
    ):
        super().__init__()
        self.linear_projection = linear_projection
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                channels, heads, context_dim, only_cross_attention=only_cross_attention, dropout=dropout
            )
            for _ in range(layers)
        )
        self.proj_out = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm(x)
        if self.linear_projection:
            h = self.proj_in(h.flatten(2).transpose(1, 2))  # (B, C, H, W) -> (B, N, C)
        else:
            h = self.proj_in(h).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            h = block(h, context)
        if self.linear_projection:
            return x + self.proj_out(h).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))
