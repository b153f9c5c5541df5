"""What an adaptation learns from: latents of pictures and what the denoiser reads for them, made once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ldm_reference.autoencoder import sample_posterior
from ldm_reference.fit import Rows
from ldm_reference.noise import Noise
from torch import Tensor

from ldm_export.adapt.pictures import Shown, read_images
from ldm_export.verify.image_generators import TorchImageGenerator

CHUNK = 8
"""Pictures, or prompts, that are encoded at a time."""


@dataclass(frozen=True)
class Pictures:
    """Encoded pictures.

    Attributes
    ----------
    moments : (N, 2 C, h, w), mean and log-variance of their latents, as the sampler has those
    conditions : what the denoiser reads beside latents and timestep, (P, ...) each, of everything that is shown
    owner : (N,), the row of ``conditions`` that each picture is of
    """

    moments: Tensor
    conditions: dict[str, Tensor]
    owner: Tensor

    def rows(self, chosen: Tensor) -> dict[str, Tensor]:
        return {name: rows[self.owner[chosen]] for name, rows in self.conditions.items()}


def encoded(generator: TorchImageGenerator, shown: Sequence[Shown]) -> Pictures:
    """Encode pictures and what they show."""
    asked = list(dict.fromkeys(each.asked for each in shown))
    parts = [generator.conditions(part) for part in _chunks([0 if each is None else each for each in asked])]
    conditions = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    moments = []
    for part in _chunks(list(shown)):
        images = read_images(part, generator.pixels, generator.channels)
        moments.append(generator.reference.latent_parameters(images))
    return Pictures(torch.cat(moments), conditions, torch.tensor([asked.index(each.asked) for each in shown]))


def _chunks(values: list[Any]) -> Iterator[list[Any]]:
    return (values[start : start + CHUNK] for start in range(0, len(values), CHUNK))


def shuffled(count: int, batch: int, step: int, seed: int) -> Tensor:
    """The ``step``-th batch of an endless walk over ``range(count)``, shuffled anew in every round; (batch,) int64.

    A pure function of its arguments. A batch may be larger than a round.
    """
    places = np.arange(step * batch, (step + 1) * batch)
    orders = {
        turn: torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + turn))
        for turn in np.unique(places // count).tolist()
    }
    return torch.stack([orders[place // count][place % count] for place in places.tolist()])


def rows_at(
    step: int, pictures: Pictures, prior: Pictures | None, noise: Noise, batch_size: int, prior_weight: float, seed: int
) -> Rows:
    """The batch of a step: rows of pictures and, where there are any, of class pictures in turn.

    The mean of its weighted errors is that of the pictures plus ``prior_weight`` times that of the class pictures.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_000_007 + step)
    sides = [(pictures, 1.0)] if prior is None else [(pictures, 2.0), (prior, 2.0 * prior_weight)]
    batches = []
    for number, (side, weight) in enumerate(sides):
        chosen = shuffled(len(side.moments), batch_size, step, seed * 2 + number)
        moments = side.moments[chosen]
        shape = (batch_size, moments.shape[1] // 2, *moments.shape[2:])
        batches.append(
            {
                "latents": sample_posterior(moments, torch.randn(shape, generator=generator)),
                "noise": torch.randn(shape, generator=generator),
                "timesteps": noise.draw_timesteps(batch_size, generator),
                "weights": torch.full((batch_size,), weight),
                **side.rows(chosen),
            }
        )
    return {name: torch.stack([each[name] for each in batches], dim=1).flatten(0, 1) for name in batches[0]}
