"""Scores of channels against differences of the output that are computed by hand."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm_export.passes.channels import Channels, Space
from ldm_export.passes.importance import magnitude, taylor
from tests.passes.unets import inputs_of, make_useless, output_of, randn, random_unet

OUTPUTS = 5 * 40
"""Numbers that `Straight` gives for five rows."""


def calls_of(unet: Any, count: int = 1) -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    inputs = inputs_of(unet)
    x, timesteps = inputs.pop("sample"), inputs.pop("timestep")
    return [(x, timesteps, inputs)] * count


def score(unet: Any, channels: Any, calls: Any, seed: int = 0) -> dict[str, Tensor]:
    return taylor(unet, channels, calls, torch.Generator().manual_seed(seed), lambda done, of: None)


@pytest.fixture(scope="module")
def scored() -> SimpleNamespace:
    """A text model, a third of whose channels are of no use, and both scores."""
    unet = random_unet(num_class_embeds=10)
    channels = Channels(unet)
    kept = {
        name: torch.arange(space.size).reshape(space.blocks, -1)[1:].flatten()
        if space.whole or space.blocks > 1
        else torch.arange(space.size)[space.size // 3 :]
        for name, space in channels.spaces.items()
    }
    make_useless(unet, channels, kept)
    return SimpleNamespace(
        unet=unet,
        channels=channels,
        kept=kept,
        magnitude=magnitude(unet, channels),
        taylor=score(unet, channels, calls_of(unet, 3)),
    )


@pytest.mark.parametrize("kind", ["magnitude", "taylor"])
def test_channels_of_no_use_score_nothing_and_go_first(scored: SimpleNamespace, kind: str) -> None:
    scores = getattr(scored, kind)
    assert scores.keys() == scored.channels.spaces.keys()
    for name, space in scored.channels.spaces.items():
        assert scores[name].shape == (space.size,)
        assert torch.equal(scores[name].nonzero().flatten(), scored.kept[name]), name
    for name, stays in scored.channels.kept(scores, Fraction(1, 2)).items():
        assert {*stays.tolist()} <= {*scored.kept[name].tolist()}, name


def test_scoring_leaves_the_network_as_it_was(scored: SimpleNamespace) -> None:
    unet = random_unet()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    first, again, other = (score(unet, Channels(unet), calls_of(unet), seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in unet.parameters())


def test_magnitude_counts_each_parameter_against_its_own_mean() -> None:
    """A closed form: the feed-forward channel j is written by rows j and j + n of GEGLU and read by a column."""
    unet = random_unet()
    place = "down_blocks.0.attentions.0.transformer_blocks.0.ff"
    tensors = {name.removeprefix(place + ".net."): t for name, t in unet.state_dict().items() if place in name}
    share = {name: tensor.square() / tensor.square().mean() for name, tensor in tensors.items()}
    written = share["0.proj.weight"].sum(1) + share["0.proj.bias"]
    expected = written[:64] + written[64:] + share["2.weight"].sum(0)
    torch.testing.assert_close(magnitude(unet, Channels(unet))[place], expected, rtol=1e-4, atol=0)


FEED_FORWARD = "up_blocks.1.attentions.0.transformer_blocks.0.ff"
RESIDUAL = "up_blocks.1.resnets.0"


def places_of(space: str, channel: int) -> list[tuple[str, Any]]:
    """Where a channel is written and read, by hand."""
    if space == FEED_FORWARD:
        rows = [channel, channel + 128]
        return [
            (f"{space}.net.0.proj.weight", rows),
            (f"{space}.net.0.proj.bias", rows),
            (f"{space}.net.2.weight", (slice(None), channel)),
        ]
    names = ("conv1.weight", "conv1.bias", "time_emb_proj.weight", "time_emb_proj.bias", "norm2.weight", "norm2.bias")
    return [*((f"{RESIDUAL}.{name}", channel) for name in names), (f"{RESIDUAL}.conv2.weight", (slice(None), channel))]


@pytest.mark.parametrize("space", [FEED_FORWARD, f"{RESIDUAL}.inside"])
def test_taylor_is_the_derivative_by_the_size_of_a_channel(space: str) -> None:
    """For one direction r: (d/ds r . out)^2 where all the weights of a channel are times s, by central difference."""
    unet = random_unet().double()
    ((x, timesteps, told),) = calls_of(unet)
    call = (x.double(), timesteps, {name: value.double() for name, value in told.items()})
    scores = score(unet, Channels(unet), [call], seed=7)
    inputs = {"sample": call[0], "timestep": timesteps, **call[2]}
    direction = torch.randn(output_of(unet, **inputs).shape, generator=torch.Generator().manual_seed(7))
    for channel in (0, 9, 31):
        sides = []
        for size in (1 + 1e-4, 1 - 1e-4):
            weights = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
            for name, place in places_of(space, channel):
                weights[name][place] *= size
            out = torch.func.functional_call(unet, weights, (), inputs)
            sides.append(float((out * direction).sum()))
        assert float(scores[space][channel]) == pytest.approx(((sides[0] - sides[1]) / 2e-4) ** 2, rel=1e-3)


class Straight(nn.Module):
    """A network that is linear in every weight of its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 10), nn.Linear(10, 40)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x).square())
        return out


def test_taylor_is_the_squared_change_of_the_output_where_that_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over directions that are one output each, the squares of a change in each direction sum to the whole change's."""
    torch.manual_seed(0)
    net = Straight()
    channels = SimpleNamespace(
        spaces={"inside": Space(10, 1, False)},
        axes={
            "first.weight": ((), ()),
            "first.bias": ((),),
            "last.weight": ((), ("inside",)),
            "last.bias": ((),),
        },
    )
    x = randn(3, 5, 6)
    directions = iter(torch.eye(OUTPUTS).reshape(OUTPUTS, 5, -1))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda shape, generator: next(directions).reshape(shape))
        scores = score(net, channels, [(x, torch.zeros(5), {})] * OUTPUTS)["inside"]
    with torch.no_grad():
        whole = net(x, torch.zeros(5))
        changes = []
        for channel in range(10):
            kept = net.last.weight[:, channel].clone()
            net.last.weight[:, channel] = 0
            changes.append((net(x, torch.zeros(5)) - whole).square().sum())
            net.last.weight[:, channel] = kept
    torch.testing.assert_close(scores, torch.stack(changes), rtol=1e-4, atol=1e-7)
