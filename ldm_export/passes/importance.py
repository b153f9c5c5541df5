"""How much a UNet needs each of its channels.

Magnitude: the squared weights that read or write a channel, each parameter's against its own mean (2301.12900, eq. 6).

Taylor: how far the output moves without the channel, to first order in its weights w, over inputs of all timesteps,

    E_r[(sum_w w d(r . out)/dw)^2],    r ~ N(0, I),

which is |J w|^2, the second-order term of the squared difference that pruning minimises, J being the Jacobian of the
output. (2305.10924, section 4.2, takes the first-order term of the diffusion loss instead; that is nearly zero where a
model is trained, and not defined by the data for one that was distilled.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from ldm_reference.unet import UNet2DConditionModel
from torch import Tensor

from ldm_export.passes.channels import Channels
from ldm_export.passes.teacher import Conditions, predict

Sums = dict[str, Tensor]


def magnitude(unet: UNet2DConditionModel, channels: Channels) -> Sums:
    """(size,) a space."""
    squares = {name: weight.detach().square() for name, weight in unet.state_dict().items()}
    return _summed(channels, {name: square / square.mean().clamp(min=1e-30) for name, square in squares.items()})


def taylor(
    unet: UNet2DConditionModel,
    channels: Channels,
    inputs: Sequence[tuple[Tensor, Tensor, Conditions]],
    generator: torch.Generator,
    progress: Callable[[int, int], None],
) -> Sums:
    """(size,) a space, over calls of noisy latents (B, C, h, w), timesteps (B,) and the conditions, (B, ...) each."""
    scores = {name: torch.zeros(space.size) for name, space in channels.spaces.items()}
    weights = dict(unet.named_parameters())
    unet.requires_grad_(True)
    for number, (x, timesteps, conditions) in enumerate(inputs):
        out = predict(unet, x, timesteps, conditions)
        direction = torch.randn(out.shape, generator=generator)
        gradients = torch.autograd.grad((out * direction).sum(), list(weights.values()), allow_unused=True)
        moved = {
            name: weight.detach() * gradient
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
            if gradient is not None
        }
        for name, share in _summed(channels, moved).items():
            scores[name] += share.square()
        progress(number + 1, len(inputs))
    unet.requires_grad_(False)
    return scores


def _summed(channels: Channels, values: Mapping[str, Tensor]) -> Sums:
    """Over everything that reads or writes a channel."""
    sums = {name: torch.zeros(space.size) for name, space in channels.spaces.items()}
    for parameter, value in values.items():
        for number, axis in enumerate(channels.axes[parameter]):
            if not axis:
                continue
            along = value.movedim(number, 0).reshape(value.shape[number], -1).sum(dim=1)
            sizes = [channels.spaces[name].size for name in axis]
            for name, part in zip(axis, torch.split(along, sizes), strict=True):
                sums[name] += part
    return sums
