"""Merged weights and pictures against diffusers' ``fuse_lora`` and PEFT, for every scheme of names and every kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from ldm_export.bundle import Bundle
from ldm_export.checkpoint.merging import layers_of
from ldm_export.checkpoint.weights import name_of_clip
from ldm_export.export import chain
from ldm_export.families import open_checkpoint
from ldm_export.runtime import Pipeline
from ldm_export.verify.metrics import psnr_db
from ldm_export.verify.parity import compare_with_checkpoint
from tests.adapters.peft_files import (
    CONFIGS,
    PIPELINES,
    SCALE,
    Tensors,
    as_diffusers,
    as_kohya,
    components,
    fused,
    lora_factors,
    modules_of,
    peft_adapter,
    pipeline_of,
    randomised,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:::peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]

Kinds = Callable[[str], tuple[Path, Path]]


@pytest.fixture
def folder_of(kinds: Kinds, tiny_checkpoint: Path) -> Callable[[str], Path]:
    return lambda kind: tiny_checkpoint if kind == "sd" else kinds(kind)[0]


def assert_same_weights(ours: torch.nn.Module, theirs: torch.nn.Module, bare: torch.nn.Module) -> int:
    """Compare all weights to 1e-6 of the largest; gives how many are not the bare network's."""
    judge, plain, own = theirs.state_dict(), bare.state_dict(), ours.state_dict()
    if "text_model.embeddings.token_embedding.weight" in own:
        judge = {str(name_of_clip(key)): value for key, value in judge.items() if name_of_clip(key)}
    changed = 0
    for name, tensor in own.items():
        error = (tensor - judge[name]).abs().max() / judge[name].abs().max()
        assert error < 1e-6, (name, float(error))
        changed += not torch.equal(tensor, plain[name])
    return changed


def assert_merged(kind: str, folder: Path, files: list[tuple[Path, float]], expected: dict[str, int]) -> Any:
    """Compare every network of ours with diffusers'; ``expected`` is how many weights have changed."""
    pipe, bare = fused(kind, folder, *files), open_checkpoint(folder)
    ours = open_checkpoint(folder, adapters=files)
    assert not any(merge.adapter.unmatched for merge in ours.merges)
    changed = {
        name: assert_same_weights(ours.load(name), getattr(pipe, name), bare.load(name)) for name in components(kind)
    }
    assert changed == {**dict.fromkeys(components(kind), 0), **expected}
    for name in components(kind):
        assert (ours.sha256(name) != bare.sha256(name)) == bool(changed[name])
    return pipe


def as_old_diffusers(factors: dict[str, Tensors]) -> Tensors:
    """Names of the time when attention processors held the factors, of attention alone."""
    found = {}
    for key, value in factors["unet"].items():
        module, _, end = key.partition(".lora_")
        start, _, last = module.removesuffix(".0").rpartition(".")
        if ".attn" in module and last in ("to_q", "to_k", "to_v", "to_out"):
            half = "down" if end.startswith("A") else "up"
            found[f"unet.{start}.processor.{last}_lora.{half}.weight"] = value
    for key, value in factors.get("text_encoder", {}).items():
        name = key.replace(".lora_A.", ".lora_linear_layer.down.").replace(".lora_B.", ".lora_linear_layer.up.")
        found[f"text_encoder.{name}"] = value
    return found


LAYER = "transformer_blocks_0"
SGM = {
    "sd": {
        "conv_in": "input_blocks_0_0",
        "down_blocks_0_resnets_0_conv1": "input_blocks_1_0_in_layers_2",
        "down_blocks_0_resnets_0_time_emb_proj": "input_blocks_1_0_emb_layers_1",
        "down_blocks_0_attentions_0_proj_in": "input_blocks_1_1_proj_in",
        f"down_blocks_0_attentions_0_{LAYER}_attn1_to_q": f"input_blocks_1_1_{LAYER}_attn1_to_q",
        "down_blocks_0_downsamplers_0_conv": "input_blocks_2_0_op",
        "down_blocks_1_resnets_0_conv_shortcut": "input_blocks_3_0_skip_connection",
        f"mid_block_attentions_0_{LAYER}_attn2_to_v": f"middle_block_1_{LAYER}_attn2_to_v",
        "mid_block_resnets_1_conv1": "middle_block_2_in_layers_2",
        "up_blocks_0_resnets_1_conv1": "output_blocks_1_0_in_layers_2",
        f"up_blocks_1_attentions_1_{LAYER}_attn1_to_k": f"output_blocks_3_1_{LAYER}_attn1_to_k",
    },
    "sdxl": {
        "conv_in": "input_blocks_0_0",
        "down_blocks_0_resnets_0_conv1": "input_blocks_1_0_in_layers_2",
        f"down_blocks_0_attentions_0_{LAYER}_attn1_to_q": f"input_blocks_1_1_{LAYER}_attn1_to_q",
        "up_blocks_0_resnets_1_conv_shortcut": "output_blocks_1_0_skip_connection",
        f"up_blocks_0_attentions_1_{LAYER}_ff_net_0_proj": f"output_blocks_1_1_{LAYER}_ff_net_0_proj",
    },
}
"""Flat names of the UNets, of one layer a block, in diffusers' and in CompVis' layout, written by hand."""


@pytest.mark.parametrize("kind", PIPELINES)
def test_names_of_diffusers(kind: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder, file = folder_of(kind), tmp_path / "style.safetensors"
    factors = lora_factors(kind, folder)
    save_file(as_diffusers(factors), file)
    assert_merged(kind, folder, [(file, SCALE)], {name: modules_of(own) for name, own in factors.items()})


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_old_names_of_diffusers(kind: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder, file = folder_of(kind), tmp_path / "style.safetensors"
    factors = lora_factors(kind, folder)
    tensors = as_old_diffusers(factors)
    save_file(tensors, file)
    unet = sum(key.startswith("unet.") for key in tensors) // 2
    expected = {"unet": unet, "text_encoder": modules_of(factors["text_encoder"])}
    assert_merged(kind, folder, [(file, SCALE)], expected)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_names_of_kohya(kind: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder, file = folder_of(kind), tmp_path / "style.safetensors"
    factors = lora_factors(kind, folder)
    save_file(as_kohya(factors, kind), file)
    assert_merged(kind, folder, [(file, SCALE)], {name: modules_of(own) for name, own in factors.items()})


@pytest.mark.parametrize("kind", SGM)
def test_names_of_compvis(kind: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder, file, names = folder_of(kind), tmp_path / "style.safetensors", SGM[kind]
    named = {
        f"lora_unet_{names[name]}.{end}": value
        for key, value in as_kohya({"unet": lora_factors(kind, folder)["unet"]}, kind).items()
        for name, _, end in [key.removeprefix("lora_unet_").partition(".")]
        if name in names
    }
    assert len(named) == 3 * len(names)
    save_file(named, file)
    assert_merged(kind, folder, [(file, SCALE)], {"unet": len(names)})


def test_upsamplers_in_names_of_compvis(tiny_checkpoint: Path) -> None:
    """Written by hand: diffusers takes one for an attention where its block has none."""
    model = open_checkpoint(tiny_checkpoint)
    layers = layers_of("unet", model.load("unet"), model.configs["unet"])
    assert "output_blocks.1.1.conv" in layers["up_blocks.0.upsamplers.0.conv"].other_names


def test_alphas_in_the_metadata_of_diffusers(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder, pipe = folder_of("sd"), pipeline_of("sd", folder_of("sd"))
    options: Any = {"target_modules": ["to_q", "to_k"], "rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"to_k": 9}}
    pipe.unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, **options))
    randomised(pipe.unet)
    layers = get_peft_model_state_dict(pipe.unet)
    pipe.save_lora_weights(
        tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict()
    )
    file = tmp_path / "pytorch_lora_weights.safetensors"
    assert_merged("sd", folder, [(file, SCALE)], {"unet": modules_of(layers)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_several(dtype: torch.dtype, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder, files = folder_of("sd"), [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    factors = lora_factors("sd", folder)
    for file, tensors in zip(files, (as_diffusers(factors), as_kohya(factors, "sd")), strict=True):
        save_file({key: value.to(dtype) for key, value in tensors.items()}, file)
        exact = {key: value.to(dtype).float() for key, value in tensors.items()}
        save_file(exact, file.with_name(f"exact-{file.name}"))
    ours = open_checkpoint(folder, adapters=[(files[0], 0.5), (files[1], -0.25)])
    exactly = [(file.with_name(f"exact-{file.name}"), scale) for file, scale in zip(files, (0.5, -0.25), strict=True)]
    pipe, bare = fused("sd", folder, *exactly), open_checkpoint(folder)
    assert assert_same_weights(ours.load("unet"), pipe.unet, bare.load("unet")) == modules_of(factors["unet"])


@pytest.mark.parametrize("kind", CONFIGS)
def test_kinds_of_peft(kind: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folder_of("sd")
    judge = peft_adapter(CONFIGS[kind](), folder, tmp_path, SCALE)
    ours = open_checkpoint(folder, adapters=[(tmp_path, SCALE)])
    assert ours.merges[0].adapter.unmatched == ()
    changed = assert_same_weights(ours.load("unet"), judge, open_checkpoint(folder).load("unet"))
    assert changed == len(ours.merges[0].adapter.layers["unet"]) > 2


@pytest.mark.parametrize("kind", ["loha", "loha, Tucker", "lokr", "dora"])
def test_kinds_in_names_of_kohya(kind: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """The factors that PEFT has, as LyCORIS names them, with an alpha for each layer."""
    folder = folder_of("sd")
    judge = peft_adapter(CONFIGS[kind](), folder, tmp_path / "peft", 1.0)
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    tensors: Tensors = {}
    for key, value in load_file(tmp_path / "peft/adapter_model.safetensors").items():
        module, mark, end = key.removeprefix("base_model.model.").replace(".lora_", ".|lora_").partition(".|")
        if not mark:
            module, _, end = module.rpartition(".")
        name = f"lora_unet_{module.replace('.', '_')}"
        end = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}.get(end, end)
        if "magnitude" in end:
            end, value = "dora_scale", value.reshape(-1, *(1,) * (value.ndim - 1 or 1))  # (out, 1) or (out, 1, 1, 1)
        tensors[f"{name}.{end}"] = value
        tensors[f"{name}.alpha"] = torch.tensor(float(config.get("alpha", config.get("lora_alpha"))))
    if kind == "lokr":  # whose alpha LyCORIS leaves out of account where both factors are whole
        whole = [key.removesuffix("_w1") for key in tensors if key.endswith("lokr_w1") and f"{key[:-1]}2" in tensors]
        for key in whole:
            tensors[f"{key}_w2"] = tensors[f"{key}_w2"] * config["alpha"] / config["r"]
    save_file(tensors, tmp_path / "style.safetensors")
    ours = open_checkpoint(folder, adapters=[(tmp_path / "style.safetensors", 1.0)])
    assert ours.merges[0].adapter.unmatched == ()
    assert assert_same_weights(ours.load("unet"), judge, open_checkpoint(folder).load("unet")) > 2


@pytest.mark.parametrize("kind", PIPELINES)
def test_pictures_are_those_of_diffusers(kind: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder, file = folder_of(kind), tmp_path / "style.safetensors"
    save_file(as_diffusers(lora_factors(kind, folder)), file)
    ours = open_checkpoint(folder, adapters=[(file, SCALE)])
    bundle = chain.export_bundle(ours, tmp_path / "bundle")
    wish: dict[str, Any] = {"guidance_scale": 4.0, "num_inference_steps": 4, "height": 16, "width": 16}
    pipe = fused(kind, folder, (file, SCALE))
    pipe.check_inputs = lambda *_, **__: None  # it wants multiples of 8, whatever the autoencoder
    pixels = pipe("a red circle", generator=torch.Generator("cpu").manual_seed(5), output_type="np", **wish).images
    options: dict[str, Any] = {"guidance": 4.0, "steps": 4, "seed": 5, "height": 16, "width": 16}
    made = Pipeline.open(bundle.path, backend="cpu").generate("a red circle", **options).images
    assert psnr_db(made[0], (pixels[0] * 255).round().astype(np.uint8)) > 80
    source = Bundle.open(bundle.path).manifest.source
    assert source["adapters"] == [{"name": file.name, "sha256": ours.merges[0].adapter.sha256, "scale": SCALE}]
    bare = open_checkpoint(folder)
    assert all(source["sha256"][name] != bare.sha256(name) for name in components(kind))
    assert source["sha256"]["vae"] == bare.sha256("vae")
    assert all(record.passed for record in compare_with_checkpoint(bundle, ours, lambda _: None))
    failed = {record.graph for record in compare_with_checkpoint(bundle, bare, lambda _: None) if not record.passed}
    assert failed == {*components(kind)}
