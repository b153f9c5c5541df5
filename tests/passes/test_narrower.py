"""Which narrower networks there are, and their time embedding, fitted anew to sinusoids of fewer frequencies."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from ldm_reference.blocks import timestep_embedding
from ldm_reference.config import ConfigError, config_from_dict
from ldm_reference.layout import config_to_dict
from ldm_reference.unet import DOWN_BLOCKS, MID_BLOCKS, UP_BLOCKS, UNet2DConditionModel, UNetConfig

from ldm_export.families import open_checkpoint
from ldm_export.passes.channels import Channels, cut, narrower, nearest_share
from tests.passes.unets import (
    CONVOLUTIONS,
    TOLERANCE,
    diffusers_output,
    inputs_of,
    make_useless,
    off_by,
    output_of,
    randn,
    random_unet,
)

SETTINGS = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)

# --- shares -----------------------------------------------------------------------------------------------------------


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Of every kind that a UNet here can be, with widths and heads that do or do not go together."""
    levels, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4, 6]))
    widths = [groups * draw(st.sampled_from([1, 2, 3, 4])) for _ in range(levels)]

    def each(values: Any) -> Any:
        return st.lists(values, min_size=levels, max_size=levels)

    heads = [draw(st.sampled_from([n for n in range(1, width + 1) if width % n == 0])) for width in widths]
    return {
        "block_out_channels": widths,
        "down_block_types": draw(each(st.sampled_from(DOWN_BLOCKS))),
        "mid_block_type": draw(st.sampled_from(MID_BLOCKS)),
        "up_block_types": draw(each(st.sampled_from(UP_BLOCKS))),
        "layers_per_block": 1,
        "norm_num_groups": groups,
        "cross_attention_dim": 5,
        "attention_head_dim": draw(st.sampled_from([heads, heads, heads[0]])),
        "freq_shift": draw(st.sampled_from([0, 1])),
        "time_cond_proj_dim": draw(st.sampled_from([None, 6])),
    }


def computes(config: UNetConfig) -> bool:
    """Whether there is such a network, and numbers come out of its sinusoids."""
    try:
        with torch.device("meta"):
            UNet2DConditionModel(config)
        features = timestep_embedding(torch.ones(1), config.block_out_channels[0], freq_shift=config.freq_shift)
    except (ConfigError, ZeroDivisionError):
        return False
    return bool(features.numel() > 1 and features.isfinite().all())


UNEVEN = {
    "block_out_channels": [16, 32],
    "down_block_types": ["AttnDownBlock2D"] * 2,
    "mid_block_type": None,
    "up_block_types": ["AttnUpBlock2D"] * 2,
    "norm_num_groups": 8,
    "attention_head_dim": [4, 16],
}
"""Half as wide, the last block on the way up has 8 channels and heads of 16."""
THIN = {
    "block_out_channels": [4],
    "down_block_types": ["DownBlock2D"],
    "mid_block_type": None,
    "up_block_types": ["UpBlock2D"],
    "norm_num_groups": 4,
    "freq_shift": 1,
}
"""Half as wide, it has one frequency, whose exponent is divided by 0."""


@SETTINGS
@given(configs(), st.floats(0.05, 1.0))
@example(UNEVEN, 0.5)
@example(THIN, 0.5)
@example({**THIN, "freq_shift": 0}, 0.25)
def test_the_nearest_share_is_one_that_a_network_can_have(values: dict[str, Any], wanted: float) -> None:
    config = config_from_dict(UNetConfig, values, {})
    assume(computes(config))
    groups = config.norm_num_groups
    shares = [Fraction(k, groups) for k in range(1, groups + 1)]
    possible = [share for share in shares if (narrow := narrower(config, share)) is not None and computes(narrow)]
    assert possible == [share for share in shares if narrower(config, share) is not None]
    found = nearest_share(config, wanted)
    assert found in possible
    assert all(abs(found - wanted) <= abs(other - wanted) for other in possible)


@settings(SETTINGS, max_examples=12)
@given(configs(), st.floats(0.05, 1.0))
def test_a_narrower_network_computes_what_diffusers_computes(values: dict[str, Any], wanted: float) -> None:
    assume(computes(config_from_dict(UNetConfig, values, {})))
    unet = random_unet(**values)
    share = nearest_share(unet.config, wanted)
    channels = Channels(unet)
    scores = {name: randn(1, space.size) for name, space in channels.spaces.items()}
    student = cut(unet, channels.kept(scores, share), share)
    assert student.config == narrower(unet.config, share)
    assert [int(width * share) for width in unet.config.block_out_channels] == [*student.config.block_out_channels]
    theirs = diffusers.UNet2DConditionModel.from_config(config_to_dict(student)).eval()
    theirs.load_state_dict(student.state_dict())
    inputs = inputs_of(student)
    assert off_by(output_of(student, **inputs), diffusers_output(theirs, **inputs)) < TOLERANCE


# --- the time embedding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "flipped", "lcm"])
@pytest.mark.parametrize(("width", "share"), [(128, Fraction(3, 4)), (128, Fraction(1, 2)), (320, Fraction(7, 8))])
def test_the_time_embedding_is_near_at_all_timesteps(width: int, share: Fraction, kind: str) -> None:
    """A smooth embedding, as training makes it: off by at most 6 % of its deviation, by its weights in fp16 as well,
    which is what is saved."""
    changes = {"plain": {}, "flipped": {"flip_sin_to_cos": False}, "lcm": {"time_cond_proj_dim": 16}}[kind]
    narrow = {**CONVOLUTIONS, "block_out_channels": [width, 32, 32]}
    unet = random_unet(**narrow, **changes, norm_num_groups=32 if width == 320 else 8)
    channels = Channels(unet)
    flip = unet.config.flip_sin_to_cos
    wide = timestep_embedding(torch.arange(1000), width, flip_sin_to_cos=flip)
    smooth = torch.stack([torch.cos(torch.arange(1000) * k * torch.pi / 1000) for k in range(8)], dim=1)
    taught = torch.linalg.lstsq(wide.double(), (smooth @ randn(0, 8, width * 4)).double(), rcond=1e-2, driver="gelsd")
    unet.time_embedding.linear_1.weight.copy_(taught.solution.T)
    kept = {name: torch.arange(int(space.size * share)) for name, space in channels.spaces.items()}
    student = cut(unet, kept, share)
    rows = kept["time_embedding.inside"]
    goal = (wide @ unet.time_embedding.linear_1.weight.T)[:, rows]
    given = timestep_embedding(torch.arange(1000), int(width * share), flip_sin_to_cos=flip)
    for weight in (student.time_embedding.linear_1.weight, student.time_embedding.linear_1.weight.half().float()):
        off = (given @ weight.T - goal).square().mean(dim=1).sqrt()
        assert off.max() < 0.06 * goal.std()
    if kind == "lcm":  # and what it is told of the guidance scale
        told = [net.time_embedding.linear_1.weight @ net.time_embedding.cond_proj.weight for net in (student, unet)]
        assert (told[0] - told[1][rows]).norm() < 0.6 * told[1][rows].norm()


def test_a_time_embedding_of_frequencies_that_stay_is_the_same() -> None:
    """Of 8 frequencies every other is among the 4 that are left."""
    unet = random_unet(**CONVOLUTIONS, block_out_channels=[16, 16, 16])
    unet.time_embedding.linear_1.weight[:, 1::2] = 0
    channels, share = Channels(unet), Fraction(1, 2)
    kept = {name: torch.arange(space.size // 2) for name, space in channels.spaces.items()}
    make_useless(unet, channels, kept)
    student, inputs = cut(unet, kept, share), inputs_of(unet, batch=16)
    assert off_by(output_of(student, **inputs), output_of(unet, **inputs)) < 1e-4
    still = {**inputs, "timestep": torch.zeros_like(inputs["timestep"])}
    assert off_by(output_of(unet, **still), output_of(unet, **inputs)) > 1e-2  # time counts


def test_trained_weights_are_fitted_with_weights_that_fp16_has() -> None:
    unet: Any = open_checkpoint("emoji64").load("unet")
    share = nearest_share(unet.config, 0.75)
    assert share == Fraction(3, 4)
    kept = {name: torch.arange(int(space.size * share)) for name, space in Channels(unet).spaces.items()}
    weight = cut(unet, kept, share).time_embedding.linear_1.weight
    assert weight.abs().max() < 32
