"""PatchDiscriminator: is a patch of a picture real or reconstructed (Isola et al., 1611.07004, section 3.2.2; used on
autoencoders by VQGAN, 2012.09841, eq. 6)? It is thrown away after training."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Three strided convolutions and a score at every position: (B, C, H, W) -> (B, 1, H/8 - 1, W/8 - 1)."""

    def __init__(self, channels: int, width: int = 32):
        super().__init__()
        widths = (channels, width, 2 * width, 4 * width)
        self.layers = nn.ModuleList(
            nn.Conv2d(before, after, 4, stride=2, padding=1) for before, after in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, after) for after in widths[2:])
        self.score = nn.Conv2d(widths[-1], 1, 4, padding=1)

    def forward(self, pictures: Tensor) -> Tensor:
        x = F.leaky_relu(self.layers[0](pictures), 0.2)
        for layer, norm in zip(list(self.layers)[1:], self.norms, strict=True):
            x = F.leaky_relu(norm(layer(x)), 0.2)
        return self.score(x)
