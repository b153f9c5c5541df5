"""Positions of patches, as diffusers' ``PatchEmbed`` has them, so that they can be traced at any size."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def make_traceable(patches: Any) -> None:
    """Replace the positions of a ``PatchEmbed`` by equal ones that follow from the size of what it is given."""
    if patches.pos_embed_max_size:
        patches.cropped_pos_embed = partial(cropped_positions, patches)
    else:
        patches.forward = partial(_embedded, patches, PeriodicPositions(patches))


def cropped_positions(patches: Any, height: int, width: int) -> Tensor:
    """The middle of the table of positions, (1, rows * columns, C), as diffusers' ``PatchEmbed.cropped_pos_embed``.

    With ``(most - size) // 2`` written so that what is divided is positive: traced, a division of what may be negative
    rounds another way in ONNX than in Python.
    """
    most = patches.pos_embed_max_size
    rows, columns = height // patches.patch_size, width // patches.patch_size
    table = patches.pos_embed.reshape(1, most, most, -1)
    for axis, size in enumerate((rows, columns), 1):
        there = torch.arange(size) + most // 2 - (size + 1 - most % 2) // 2
        table = table.index_select(axis, torch.where(there < 0, most, there))  # beyond the table is an error
    positions: Tensor = table.flatten(1, 2)
    return positions


class PeriodicPositions:
    """Sine and cosine of rows and columns (1706.03762, section 3.5), stretched over the size that was trained.

    In float32; diffusers computes them in float64, which not every runtime has.
    """

    def __init__(self, patches: Any):
        quarter = patches.pos_embed.shape[-1] // 4
        frequencies = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
        self._frequencies = frequencies.float()
        self._span = patches.base_size / patches.interpolation_scale

    def __call__(self, rows: int, columns: int) -> Tensor:
        """Positions (1, rows * columns, C): first those of the column, then those of the row."""
        of_row, of_column = self._along(rows), self._along(columns)
        of_column = of_column[None].expand(rows, -1, -1)
        of_row = of_row[:, None].expand(-1, columns, -1)
        return torch.cat([of_column, of_row], dim=-1).flatten(0, 1)[None]

    def _along(self, count: int) -> Tensor:
        """Along one side, (count, C / 2)."""
        angles = (torch.arange(count, dtype=torch.float32) * (self._span / count))[:, None] * self._frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def _embedded(patches: Any, positions: PeriodicPositions, latents: Tensor) -> Tensor:
    rows, columns = latents.shape[-2] // patches.patch_size, latents.shape[-1] // patches.patch_size
    embedded: Tensor = patches.proj(latents).flatten(2).transpose(1, 2)
    return embedded + positions(rows, columns)


def unpatchified(tokens: Tensor, rows: int, columns: int, patch_size: int) -> Tensor:
    """A picture (B, C, rows * patch, columns * patch) of its patches (B, rows * columns, patch * patch * C)."""
    parts = tokens.reshape(-1, rows, columns, patch_size, patch_size, tokens.shape[-1] // patch_size**2)
    return parts.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class CrossAttention(nn.Module):
    """An attention processor of diffusers: as its ``AttnProcessor2_0``, with the mask broadcast over the heads.

    There the mask is repeated for every head, in a way that cannot be traced.
    """

    def forward(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from (B, L, C) to (B, M, W), under a bias (B, 1, M) that is added to the logits."""
        read = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            layer(states).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for layer, states in ((attention.to_q, hidden_states), (attention.to_k, read), (attention.to_v, read))
        )
        bias = None if attention_mask is None else attention_mask[:, None]
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, bias)
        projected: Tensor = attention.to_out[0](mixed.transpose(1, 2).flatten(2))
        return projected
