"""What Stable Diffusion's UNets read beside latents and timestep, as a module: joined states, sizes, guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm_export.plan.guidance import guidance_frequencies

SIZES, SIZES_AND_SCORE = 6, 5
"""Numbers of ``time_ids``: sizes and crop corner of SDXL; of its refiner the original size, the corner and a score."""
SCORE, NEGATIVE_SCORE = 6.0, 2.5
"""The aesthetic scores that diffusers gives SDXL's refiner, for the prompt and for the negative prompt."""


class Conditioner(nn.Module):
    """What the UNet reads beside latents and timestep, of text encoders' states and of what was asked for.

    Parameters
    ----------
    states : sources of the states that are joined to ``encoder_hidden_states``; with them ``time_ids`` are made
    pooled : source of the pooled text, where both are zeros for no prompt; else nothing is
    sizes : how many ``time_ids`` there are, `SIZES` or `SIZES_AND_SCORE`
    guidance : width of ``timestep_cond``, 0 for none
    """

    frequencies: Tensor

    def __init__(self, states: Sequence[str], pooled: str, sizes: int, guidance: int):
        super().__init__()
        self.config = {"states": states, "pooled": pooled, "sizes": sizes, "guidance": guidance}
        self._states, self._pooled, self._sizes, self._guidance = tuple(states), pooled, sizes, guidance
        asked = [*(["height", "width"] if states else []), *(["is_negative"] if sizes == SIZES_AND_SCORE else [])]
        asked += ["guidance_weight"] if guidance else []
        asked += ["has_prompt"] if pooled or not states else []  # which also says how many rows there are
        self.sources = (*self._states, *([pooled] if pooled else []), *asked)
        self.outputs = (*(["encoder_hidden_states"] if states else []), *(["text_embeds"] if pooled else []))
        self.outputs += (*(["time_ids"] if states else []), *(["timestep_cond"] if guidance else []))
        if guidance:
            self.register_buffer("frequencies", torch.from_numpy(guidance_frequencies(guidance)))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.sources, tensors, strict=True))
        made, rows = {}, tensors[0].shape[0] if self._states else given["has_prompt"].shape[0]
        if self._states:  # SDXL reads the input of the last layer of both encoders (2307.01952, section 2.1)
            made["encoder_hidden_states"] = torch.cat([given[name] for name in self._states], dim=-1)
            made["time_ids"] = self._time_ids(given, rows)
        if self._pooled:
            prompted = given["has_prompt"] > 0.5
            made["text_embeds"] = torch.where(prompted[:, None], given[self._pooled], 0.0)
            made["encoder_hidden_states"] = torch.where(prompted[:, None, None], made["encoder_hidden_states"], 0.0)
        if self._guidance:
            angles = given["guidance_weight"].double() * self.frequencies
            waves = torch.cat([angles.sin(), angles.cos(), *([angles.new_zeros(1)] if self._guidance % 2 else [])])
            made["timestep_cond"] = waves.float().expand(rows, -1)
        return tuple(made[name] for name in self.outputs)

    def _time_ids(self, given: Mapping[str, Tensor], rows: Any) -> Tensor:
        """Original size, crop corner, and target size (2307.01952, section 2.2), or the refiner's score: (rows, n)."""
        height, width = given["height"], given["width"]
        corner = torch.zeros_like(height)
        if self._sizes == SIZES:
            return torch.stack([height, width, corner, corner, height, width]).expand(rows, -1)
        sizes = torch.stack([height, width, corner, corner]).expand(rows, -1)
        score = torch.where(given["is_negative"] > 0.5, NEGATIVE_SCORE, SCORE)
        return torch.cat([sizes, score[:, None]], dim=1)
