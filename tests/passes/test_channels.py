"""What depends on a channel, and a UNet without some: shapes, diffusers, and cuts that lose nothing.

A cut is exact where what goes was of no use. Every space loses channels of its own choice, so a parameter that is
followed into the wrong space, or into a wrong order of two, gives another picture.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from ldm_reference.unet import UNet2DConditionModel
from torch import Tensor

from ldm_export.errors import InputError
from ldm_export.passes.channels import Channels, cut, narrower
from ldm_export.passes.importance import magnitude
from tests.passes.unets import (
    ATTENTIVE,
    CONVOLUTIONS,
    KINDS,
    SDXL,
    Kept,
    diffusers_output,
    diffusers_unet,
    inputs_of,
    make_useless,
    off_by,
    output_of,
    randn,
    random_unet,
)
from tests.passes.unets import TOLERANCE as AS_DIFFUSERS

ROUNDING = 1e-5
"""Of max |output|, float32, where the algebra says that nothing changes."""

LARGE: dict[str, dict[str, Any]] = {
    "stable diffusion 1.5": {"cross_attention_dim": 768},
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


def everything(channels: Channels) -> Kept:
    return {name: torch.arange(space.size) for name, space in channels.spaces.items()}


def chosen(channels: Channels, share: Fraction, seed: int = 0) -> Kept:
    """A random choice in every space. Groups of normalised streams stay or go two by two: where two streams of the same
    width are concatenated, these are the groups of the concatenation."""
    scores = {}
    for number, (name, space) in enumerate(channels.spaces.items()):
        scores[name] = randn(seed * 1000 + number, space.size)
        if space.whole:
            pairs = randn(seed * 1000 + number, space.blocks // 2)
            scores[name] = pairs.repeat_interleave(2 * space.size // space.blocks)
    return channels.kept(scores, share)


@torch.no_grad()
def make_copies(unet: UNet2DConditionModel, kept: Kept) -> None:
    """Write into the tokens that go what is written into those that stay: layer norm sees the same mean and variance.
    Half of them stay."""
    tensors = unet.state_dict()
    for space, stays in kept.items():
        if space.endswith(".tokens"):
            goes = torch.tensor(sorted({*range(2 * len(stays))} - {*stays.tolist()}))
            place = space.removesuffix(".tokens")
            for name, tensor in tensors.items():
                layer = name.removeprefix(place).rpartition(".")[0]
                if name.startswith(place) and layer.endswith((".proj_in", ".to_out.0", ".ff.net.2")):
                    tensor[goes] = tensor[stays]


@torch.no_grad()
def blur_time(unet: UNet2DConditionModel) -> None:
    """Let the time embedding listen to nothing, so that its fit is exact."""
    unet.time_embedding.linear_1.weight.zero_()


# --- what is followed -------------------------------------------------------------------------------------------------


def assert_axes_fit(unet: UNet2DConditionModel) -> None:
    channels = Channels(unet)
    assert channels.axes.keys() == unet.state_dict().keys()
    used = set()
    for name, tensor in unet.state_dict().items():
        axes = channels.axes[name]
        assert len(axes) == tensor.ndim or len(axes) == 2 < tensor.ndim, name  # places of a kernel are in no space
        for size, axis in zip(tensor.shape, axes, strict=False):
            assert not axis or sum(channels.spaces[space].size for space in axis) == size, name
            used.update(axis)
    assert used == channels.spaces.keys()
    assert {channels.axes["conv_in.weight"][1], channels.axes["conv_out.weight"][0]} == {()}
    for space in channels.spaces.values():
        assert space.size % space.blocks == 0


@pytest.mark.parametrize("kind", KINDS)
def test_axes_add_up_to_the_shape_of_every_parameter(kind: str) -> None:
    assert_axes_fit(random_unet(**KINDS[kind]))


@pytest.mark.parametrize("kind", LARGE)
def test_axes_of_networks_that_are_used(kind: str) -> None:
    with torch.device("meta"):
        assert_axes_fit(UNet2DConditionModel.from_config(LARGE[kind]))


@pytest.mark.parametrize("kind", ["timestep", "identity", "projection"])
def test_class_embeddings_that_are_no_table_are_refused(kind: str) -> None:
    unet = random_unet(**CONVOLUTIONS, class_embed_type=kind, projection_class_embeddings_input_dim=20)
    with pytest.raises(InputError) as refused:
        Channels(unet)
    assert str(refused.value) == (
        f"A UNet with class_embed_type '{kind}' cannot be narrowed; those with a table of classes or none can. Leave "
        "the pass out for this model."
    )


# --- cuts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_of_nothing_is_the_identity(kind: str) -> None:
    unet = random_unet(**KINDS[kind])
    channels = Channels(unet)
    for kept in (everything(channels), channels.kept(magnitude(unet, channels), Fraction(1))):
        student = cut(unet, kept, Fraction(1))
        assert student is not unet
        assert student.config == unet.config
        weights = student.state_dict()
        for name, tensor in unet.state_dict().items():
            assert torch.equal(weights[name], tensor), name
    assert not any(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("number", range(len(KINDS)), ids=KINDS)
def test_a_cut_network_opens_in_diffusers(tmp_path: Path, number: int) -> None:
    unet = random_unet(**[*KINDS.values()][number])
    share = Fraction((4, 6, 2)[number % 3], 8)
    if narrower(unet.config, share) is None:
        share = Fraction(1, 2)
    channels = Channels(unet)
    student = cut(unet, chosen(channels, share), share)
    inputs = inputs_of(student)
    given, expected = output_of(student, **inputs), diffusers_output(diffusers_unet(student, tmp_path), **inputs)
    assert off_by(given, expected) < AS_DIFFUSERS
    widths = [space.size for space in channels.spaces.values()]
    assert [len(kept) for kept in chosen(channels, share).values()] == [int(width * share) for width in widths]


EVEN: dict[str, dict[str, Any]] = {
    "convolutions": CONVOLUTIONS,
    "two-layers": {**CONVOLUTIONS, "layers_per_block": 2},
    "no-middle-block": {**CONVOLUTIONS, "mid_block_type": None},
    "scale-shift": {**CONVOLUTIONS, "resnet_time_scale_shift": "scale_shift"},
    "class-conditional": {**CONVOLUTIONS, "num_class_embeds": 10},
    "attentive": {**ATTENTIVE, "layers_per_block": 2},
    "one-head": {**ATTENTIVE, "attention_head_dim": 2},
}


@pytest.mark.parametrize(
    ("kind", "share"),
    [(kind, Fraction(1, 2)) for kind in EVEN]
    + [(kind, Fraction(groups, 8)) for kind in ("convolutions", "attentive") for groups in (2, 6)],
)
def test_channels_of_no_use_go_without_a_trace(kind: str, share: Fraction) -> None:
    """They have the least magnitude, and without them the output is the same, by diffusers' network too."""
    unet = random_unet(**{**EVEN[kind], "block_out_channels": [32, 32, 32]})
    channels = Channels(unet)
    kept = chosen(channels, share)
    before = output_of(unet, **inputs_of(unet))
    make_useless(unet, channels, kept)
    blur_time(unet)
    found = channels.kept(magnitude(unet, channels), share)
    assert all(torch.equal(found[space], kept[space]) for space in kept)
    expected = output_of(unet, **inputs_of(unet))
    assert off_by(expected, before) > 0.1  # it was of use before
    assert off_by(output_of(cut(unet, found, share), **inputs_of(unet)), expected) < ROUNDING
    other = {**kept, "conv_in": (kept["conv_in"] + 8) % 32}  # two groups on
    assert off_by(output_of(cut(unet, other, share), **inputs_of(unet)), expected) > 100 * ROUNDING


def test_groups_of_a_concatenation_that_change_are_not_exact() -> None:
    """The limit of what is promised: half the channels of a group of the skip's norm go, and its statistics change."""
    unet = random_unet(**CONVOLUTIONS, block_out_channels=[32, 32, 32])
    channels, share = Channels(unet), Fraction(1, 2)
    every_other = {
        name: torch.arange(space.size).reshape(8, -1)[::2].flatten() if space.whole else torch.arange(space.size // 2)
        for name, space in channels.spaces.items()
    }
    make_useless(unet, channels, every_other)
    blur_time(unet)
    expected = output_of(unet, **inputs_of(unet))
    assert off_by(output_of(cut(unet, every_other, share), **inputs_of(unet)), expected) > 100 * ROUNDING


TEXT: dict[str, dict[str, Any]] = {
    "heads-go": {"attention_head_dim": 4},
    "heads-narrow": {"attention_head_dim": 1},
    "some-heads-narrow": {"attention_head_dim": [1, 4, 1], "layers_per_block": 2},
    "linear-projection": {"use_linear_projection": True, "only_cross_attention": True},
    "sdxl": {**SDXL, "attention_head_dim": 2},
    "no-middle-block": {"mid_block_type": None, "time_cond_proj_dim": 12},
}


@pytest.mark.parametrize("kind", TEXT)
def test_a_text_model_loses_nothing_where_its_tokens_are_told_twice(kind: str) -> None:
    """Heads and feed-forwards that are of no use, and tokens whose other half says the same."""
    unet = random_unet(**{**TEXT[kind], "block_out_channels": [32, 32, 32]})
    channels, share = Channels(unet), Fraction(1, 2)
    kept = chosen(channels, share)
    make_useless(unet, channels, kept)
    make_copies(unet, kept)
    blur_time(unet)
    inputs = inputs_of(unet)
    expected = output_of(unet, **inputs)
    told_otherwise = {**inputs, "encoder_hidden_states": -inputs["encoder_hidden_states"]}
    assert off_by(output_of(unet, **told_otherwise), expected) > 0.01  # the prompt counts
    assert off_by(output_of(cut(unet, kept, share), **inputs), expected) < ROUNDING


@pytest.mark.parametrize("attention", ["attn1", "attn2"])
def test_heads_that_go_leave_the_others_as_they_were(attention: str) -> None:
    unet = random_unet()
    channels, share = Channels(unet), Fraction(1, 2)
    place = f"mid_block.attentions.0.transformer_blocks.0.{attention}"
    scores = {name: torch.ones(space.size) for name, space in channels.spaces.items()}
    scores[f"{place}.heads"] = torch.tensor([0.0, 2.0, 3.0, 1.0]).repeat_interleave(8)
    kept = channels.kept(scores, share)
    assert kept[f"{place}.heads"].tolist() == [*range(8, 24)]
    before, after = unet.get_submodule(place), cut(unet, kept, share).get_submodule(place)
    assert (before.heads, after.heads) == (4, 2)
    tokens = torch.zeros(2, 9, 32)
    tokens[..., kept["mid_block.attentions.0.tokens"]] = randn(1, 2, 9, 16)
    context = randn(2, 2, 7, 24)

    @torch.no_grad()
    def heads(layer: Any, x: Tensor) -> Tensor:
        told = context if attention == "attn2" else x
        projected = (layer.to_q(x), layer.to_k(told), layer.to_v(told))
        q, k, v = (y.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for y in projected)
        return (q @ k.transpose(2, 3) / 8**0.5).softmax(-1) @ v  # by hand

    narrow = tokens[..., kept["mid_block.attentions.0.tokens"]]
    torch.testing.assert_close(heads(after, narrow), heads(before, tokens)[:, 1:3], rtol=1e-5, atol=1e-6)
