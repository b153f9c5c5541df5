"""Names, formulas that no library here has, and what is refused of an adapter's file."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ldm_export.adapters import Layer, read_adapter
from ldm_export.adapters.factors import LORA, Factors, delta, merged
from ldm_export.adapters.names import split
from ldm_export.errors import InputError

NETWORKS = {
    "unet": {
        "down.attn1.to_q": Layer((6, 4)),
        "down.attn1.to_out.0": Layer((4, 6)),
        "conv_in": Layer((6, 4, 3, 3), ("input_blocks.0.0",)),
    },
    "text_encoder": {"text_model.layers.0.self_attn.q_proj": Layer((4, 4))},
    "text_encoder_2": {"text_model.layers.0.self_attn.q_proj": Layer((8, 8))},
}


def written(folder: Path, **tensors: Any) -> Path:
    """A file of tensors, whose names have ``__`` for a dot, random where a shape is given."""
    torch.manual_seed(0)
    file = folder / "style.safetensors"
    save_file(
        {
            name.replace("__", "."): torch.randn(value) if isinstance(value, tuple) else value
            for name, value in tensors.items()
        },
        file,
    )
    return file


def pair(name: str, out: int = 6, into: int = 4, rank: int = 2) -> dict[str, Any]:
    return {f"{name}__lora_A__weight": (rank, into), f"{name}__lora_B__weight": (out, rank)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unet.a.to_q.lora_A.weight", ("unet.a.to_q", "down")),
        ("base_model.model.a.to_q.lora_B.default.weight", ("base_model.model.a.to_q", "up")),
        ("unet.a.processor.to_q_lora.up.weight", ("unet.a.processor.to_q", "up")),
        ("text_encoder.a.q_proj.lora_linear_layer.down.weight", ("text_encoder.a.q_proj", "down")),
        ("unet.a.lora.down.weight", ("unet.a", "down")),
        ("lora_unet_a.lora_mid.weight", ("lora_unet_a", "mid")),
        ("lora_unet_a.alpha", ("lora_unet_a", "alpha")),
        ("lora_te_a.hada_w1_a", ("lora_te_a", "hada_w1_a")),
        ("lora_te_a.lokr_w2", ("lora_te_a", "lokr_w2")),
        ("a.lora_magnitude_vector.default.weight", ("a", "magnitude")),
        ("a.lora_magnitude_vector.weight", ("a", "magnitude")),
        ("a.weight", None),
        ("a.diff_b", None),
    ],
)
def test_names_are_split(name: str, expected: tuple[str, str] | None) -> None:
    assert split(name) == expected


def test_what_fits_nothing_is_listed(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        **pair("unet__down__attn1__to_q"),
        **pair("unet__up__attn1__to_q"),
        lora_unet_down_attn1_to_q__diff_b=(6,),
        lora_unet_input_blocks_0_0__lora_down__weight=(2, 4, 3, 3),
        lora_unet_input_blocks_0_0__lora_up__weight=(6, 2, 1, 1),
    )
    adapter = read_adapter(file, NETWORKS)
    assert {name: {*layers} for name, layers in adapter.layers.items()} == {"unet": {"down.attn1.to_q", "conv_in"}}
    assert adapter.unmatched == ("lora_unet_down_attn1_to_q.diff_b", "unet.up.attn1.to_q")


def test_a_rank_decomposed_convolution_is_three_convolutions(tmp_path: Path) -> None:
    """LyCORIS' LoCon with a middle, whose change is by definition the three convolutions, one after another."""
    torch.manual_seed(1)
    down, mid, up = torch.randn(2, 4, 1, 1), torch.randn(3, 2, 3, 3), torch.randn(6, 3, 1, 1)
    image = torch.randn(1, 4, 9, 9, dtype=torch.float64)
    expected = image
    for weight in (down, mid, up):
        expected = torch.nn.functional.conv2d(expected, weight.double())
    factors = Factors(LORA, {"down": down.numpy(), "mid": mid.numpy(), "up": up.numpy()})
    found = torch.nn.functional.conv2d(image, torch.from_numpy(delta(factors, (6, 4, 3, 3))))
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_magnitudes_of_inputs(tmp_path: Path) -> None:
    """DoRA's paper, eq. 5, has a magnitude for each column; LyCORIS' ``dora_scale`` is (1, in) then."""
    scale = torch.rand(1, 4) + 1
    file = written(tmp_path, **pair("lora_unet_down_attn1_to_q"), lora_unet_down_attn1_to_q__dora_scale=scale)
    factors = read_adapter(file, NETWORKS).layers["unet"]["down.attn1.to_q"]
    weight = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    changed = torch.from_numpy(weight).double() + 0.5 * torch.from_numpy(delta(factors, (6, 4)))
    expected = scale * changed / changed.norm(dim=0, keepdim=True)
    assert np.allclose(merged(weight, factors, 0.5), expected.numpy(), rtol=1e-12)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (pair("unet__up__to_q"), r"none of its 2 names \(such as 'unet.up.to_q.lora_A.weight'.* Use an adapter of"),
        ({"unet__down__attn1__to_q__lora_A__weight": (2, 4)}, "unet.down.attn1.to_q lacks up"),
        ({"lora_unet_conv_in__hada_w1_a": (6, 2)}, "lacks hada_w1_b and hada_w2_a and hada_w2_b"),
        (pair("unet__down__attn1__to_q", out=5), r"is a change of shape \(5, 4\); the model's weight has \(6, 4\)"),
        (
            {"unet__conv_in__lora_A__weight": (2, 4, 3, 3), "unet__conv_in__lora_B__weight": (6, 3, 1, 1)},
            r"has up of shape \(6, 3\) and down of \(2, 4, 3, 3\), whose ranks differ",
        ),
        (
            {**pair("unet__down__attn1__to_q"), "unet__down__attn1__to_q__lora_A__weight": torch.full((2, 4), np.nan)},
            "unet.down.attn1.to_q has NaN or infinity in down",
        ),
        (
            {**pair("unet__down__attn1__to_q"), "unet__down__attn1__to_q__alpha": torch.tensor(np.inf)},
            "has an alpha that is not one finite number",
        ),
        ({**pair("unet__down__attn1__to_q"), **pair("lora_unet_down_attn1_to_q")}, "of unet twice, the second time"),
        (
            {**pair("unet__down__attn1__to_q"), "unet__down__attn1__to_q__lokr_w1": (1, 1)},
            "has factors of lokr and l",
        ),
        ({**pair("unet__down__attn1__to_q"), "unet__down__attn1__to_q__dora_scale": (3, 1)}, "6 are needed"),
        (pair("text_model__layers__0__self_attn__q_proj"), "may be of text_encoder and text_encoder_2"),
        (pair("base_model__model__down__attn1__to_q"), "adapter_config.json, which has its alpha, is not beside it"),
        ({"unet__a__lora_A__weight": torch.zeros(2, 2, dtype=torch.int8)}, "is of I8; float32, float16 and bfloat16"),
    ],
)
def test_what_is_refused(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_adapter(written(tmp_path, **tensors), NETWORKS)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[]", "adapter_config.json is no JSON object"),
        ("{", "adapter_config.json not JSON"),
        ('{"peft_type": "BOFT", "r": 2}', "is of the kind 'BOFT'"),
        ('{"r": 0, "lora_alpha": 2}', "has r = 0"),
        ('{"r": 4, "lora_alpha": 2}', "has the rank 2; its config says 4"),
        ('{"r": 2, "lora_alpha": 2, "rank_pattern": {"(": 3}}', "which is no regular expression"),
        ('{"r": 2, "lora_alpha": 2, "use_dora": true}', "lacks lora_magnitude_vector"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, config: str, message: str) -> None:
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(InputError, match=message):
        read_adapter(written(tmp_path, **pair("base_model__model__down__attn1__to_q")), NETWORKS)


def test_a_pattern_of_ranks_counts(tmp_path: Path) -> None:
    config = {"r": 8, "lora_alpha": 3, "rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"to_q": 5}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = read_adapter(written(tmp_path, **pair("base_model__model__down__attn1__to_q")), NETWORKS)
    assert adapter.layers["unet"]["down.attn1.to_q"].scale == 2.5


def test_files_that_are_no_adapters(tmp_path: Path) -> None:
    pickled = tmp_path / "style.safetensors"
    pickled.write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "style.pt").write_bytes(pickle.dumps({"a": 1}))
    for path, message in (
        (tmp_path / "none.safetensors", "There is no adapter"),
        (tmp_path / "style.pt", "is a pickle, which can run code when it is opened"),
        (pickled, r"not a safetensors file .* It is a pickle, which is never opened"),
        (tmp_path, "is a folder without pytorch_lora_weights.safetensors"),
    ):
        with pytest.raises(InputError, match=message):
            read_adapter(path, NETWORKS)


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    file = written(tmp_path, **pair("unet__down__attn1__to_q"))
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(InputError, match="truncated or not a safetensors file"):
        read_adapter(file, NETWORKS)
