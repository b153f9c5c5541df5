"""Which weight files are read, under which names, and what is said of those that cannot be used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm_export.errors import CheckpointError
from ldm_export.families import open_checkpoint

WHOLE = "diffusion_pytorch_model.safetensors"
Tensors = dict[str, Tensor]


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "tiny"))


def weights(checkpoint: Path, component: str = "unet") -> Tensors:
    return open_checkpoint(checkpoint).load(component).state_dict()


def refusal(checkpoint: Path, component: str = "unet") -> str:
    with pytest.raises(CheckpointError) as caught:
        weights(checkpoint, component)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def assert_same(given: Tensors, expected: Tensors) -> None:
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[key], tensor) for key, tensor in expected.items())


def shards(folder: Path, base: str, tensors: Tensors, count: int = 3, index: bool = True, extension: str = "") -> None:
    """Write tensors as shards, with an index or without, in place of a whole file."""
    names = [f"{base}{extension}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    parts = [{key: tensors[key] for key in sorted(tensors)[start::count]} for start in range(count)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name)
    if index:
        places = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": places})
        (folder / f"{base}.safetensors.index{extension}.json").write_text(text)


def zeros(tensors: Tensors) -> Tensors:
    return {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}


# --- which files: diffusers and transformers are the judges ---------------------------------------------------------


@pytest.mark.parametrize("stale", ["whole file", "finer shards", "variant", "transformers' name"])
def test_a_unet_is_what_its_index_names(checkpoint: Path, stale: str) -> None:
    full, folder = weights(checkpoint), checkpoint / "unet"
    (folder / WHOLE).unlink()
    if stale == "finer shards":
        shards(folder, "diffusion_pytorch_model", zeros(full), 5, index=False)
    shards(folder, "diffusion_pytorch_model", full)
    if stale == "whole file":
        save_file(zeros(full), folder / WHOLE)
    elif stale == "variant":
        shards(folder, "diffusion_pytorch_model", zeros(full), extension=".fp16")
        save_file(zeros(full), folder / "diffusion_pytorch_model.fp16.safetensors")
    elif stale == "transformers' name":
        save_file(zeros(full), folder / "model.safetensors")
    judge = diffusers.UNet2DConditionModel.from_pretrained(folder)
    assert torch.equal(judge.conv_in.weight, full["conv_in.weight"])
    assert_same(weights(checkpoint), full)


def test_a_text_encoder_is_its_whole_file_before_an_index(checkpoint: Path) -> None:
    full, folder = weights(checkpoint, "text_encoder"), checkpoint / "text_encoder"
    shards(folder, "model", zeros(full))
    judge = transformers.CLIPTextModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, full.get(key, full.get(f"text_model.{key}"))) for key, tensor in judge.items())
    assert_same(weights(checkpoint, "text_encoder"), full)
    (folder / "model.safetensors").unlink()
    assert_same(weights(checkpoint, "text_encoder"), zeros(full))


@pytest.mark.parametrize("place", ["index.fp16", "none"])
def test_a_variant_alone_is_read(checkpoint: Path, place: str) -> None:
    full, folder = weights(checkpoint), checkpoint / "unet"
    (folder / WHOLE).unlink()
    shards(folder, "diffusion_pytorch_model", full, index=place != "none", extension=".fp16")
    assert_same(weights(checkpoint), full)


INDEXES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "not JSON": (lambda index: "{", "index.json cannot be used: not JSON"),
    "a list": (lambda index: [], "has no weight_map"),
    "no map": (lambda index: {"metadata": {}}, "has no weight_map"),
    "a map to numbers": (lambda index: {"weight_map": {"conv_in.bias": 3}}, "has no weight_map"),
    "an empty map": (lambda index: {"weight_map": {}}, "has no weight_map"),
    "outside": (
        lambda index: {"weight_map": {**index["weight_map"], "conv_in.bias": "../vae/" + WHOLE}},
        f"names the file '../vae/{WHOLE}'; a safetensors file beside it is needed",
    ),
    "a pickle": (
        lambda index: {"weight_map": {"conv_in.bias": "model.bin"}},
        "names the file 'model.bin'; a safetensors file beside it is needed",
    ),
    "a shard that is not there": (
        lambda index: {"weight_map": {**index["weight_map"], "conv_in.bias": "other.safetensors"}},
        "names the file other.safetensors, which is not there. Download the missing file.",
    ),
    "a weight elsewhere": (
        lambda index: {"weight_map": {**index["weight_map"], "more": max(index["weight_map"].values())}},
        "has no 'more', which the index of the shards says is in it",
    ),
}


@pytest.mark.parametrize("lie", INDEXES)
def test_an_index_that_lies(checkpoint: Path, lie: str) -> None:
    folder = checkpoint / "unet"
    shards(folder, "diffusion_pytorch_model", weights(checkpoint))
    index = folder / f"{WHOLE}.index.json"
    change, sentence = INDEXES[lie]
    changed = change(json.loads(index.read_text()))
    index.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    assert sentence in refusal(checkpoint)


def test_shards_of_two_models_without_an_index(checkpoint: Path) -> None:
    full, folder = weights(checkpoint), checkpoint / "unet"
    (folder / WHOLE).unlink()
    for count in (2, 3):
        shards(folder, "diffusion_pytorch_model", full, count, index=False)
    assert "has shards of several models" in refusal(checkpoint)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "a pointer of Git LFS, not the file"),
        (b"<!doctype html><html></html>", "It is a web page, not the file itself"),
        (b"GGUF\x03\x00\x00\x00", "It is a GGUF file, whose weights are quantized"),
        (b"PK\x03\x04rest", "It is a pickle, which is never opened"),
        (b"", "download it again"),
    ],
)
def test_a_file_that_is_something_else(checkpoint: Path, content: bytes, sentence: str) -> None:
    (checkpoint / "unet" / WHOLE).write_bytes(content)
    message = refusal(checkpoint)
    assert "is truncated or not a safetensors file" in message
    assert sentence in message


# --- names ----------------------------------------------------------------------------------------------------------


def changed(checkpoint: Path, change: Callable[[Tensors], Tensors], component: str = "unet") -> None:
    file = checkpoint / component / ("model.safetensors" if component == "text_encoder" else WHOLE)
    save_file({key: tensor.clone().contiguous() for key, tensor in change(load_file(file)).items()}, file)


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: f"_orig_mod.module.{key}",
        lambda key: key.replace("down_blocks.0.", "down_blocks.0._orig_mod."),
        lambda key: key.replace("mid_block.", "mid_block._checkpoint_wrapped_module."),
    ],
)
@pytest.mark.parametrize("component", ["unet", "text_encoder", "vae"])
def test_names_of_wrapped_modules(checkpoint: Path, component: str, rename: Callable[[str], str]) -> None:
    full = weights(checkpoint, component)
    changed(checkpoint, lambda tensors: {rename(key): tensor for key, tensor in tensors.items()}, component)
    assert_same(weights(checkpoint, component), full)


def test_a_weight_that_is_there_twice(checkpoint: Path) -> None:
    changed(checkpoint, lambda tensors: {**tensors, "module.conv_in.bias": torch.ones(16)})
    assert "has the weight 'conv_in.bias' twice" in refusal(checkpoint)


def test_parts_that_the_text_encoder_does_not_have(checkpoint: Path) -> None:
    full = weights(checkpoint, "text_encoder")
    more = ["logit_scale", "text_projection.weight", "visual_projection.weight", "vision_model.embeddings.class"]
    more += ["text_model.embeddings.position_ids"]
    changed(checkpoint, lambda tensors: tensors | {name: torch.zeros(3) for name in more}, "text_encoder")
    file = checkpoint / "text_encoder" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({"model_type": "clip", "text_config": config, "vision_config": {"hidden_size": 8}}))
    assert_same(weights(checkpoint, "text_encoder"), full)


def lora(tensors: Tensors) -> Tensors:
    key = next(key for key in tensors if key.endswith("to_q.weight"))
    given = dict(tensors)
    base = given.pop(key)
    stem = key.removesuffix(".weight")
    return given | {f"{stem}.base_layer.weight": base, f"{stem}.lora_A.default_0.weight": torch.ones(2, base.shape[1])}


FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], list[str]]] = {
    "a LoRA": (lora, ["has the weights of a LoRA", "call fuse_lora() and unload_lora_weights(), and save it"]),
    "int8": (
        lambda tensors: tensors | {"conv_in.weight": tensors["conv_in.weight"].to(torch.int8)},
        ["has quantized weights ('conv_in.weight' is int8)", "Use the model before it was quantized"],
    ),
    "fp8": (
        lambda tensors: tensors | {"conv_in.weight": tensors["conv_in.weight"].to(torch.float8_e4m3fn)},
        ["has quantized weights ('conv_in.weight' is float8_e4m3fn)"],
    ),
    "bitsandbytes": (
        lambda tensors: tensors | {"conv_in.weight.absmax": torch.ones(2)},
        ["has quantized weights ('conv_in.weight.absmax' is float32)"],
    ),
    "NaN": (
        lambda tensors: tensors | {"conv_in.bias": torch.full((16,), torch.nan)},
        ["'conv_in.bias' holds NaN or infinity"],
    ),
    "infinity": (
        lambda tensors: tensors | {"conv_in.bias": torch.full((16,), -torch.inf, dtype=torch.float16)},
        ["'conv_in.bias' holds NaN or infinity"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_cannot_be_used(checkpoint: Path, fault: str) -> None:
    change, sentences = FAULTS[fault]
    changed(checkpoint, change)
    message = refusal(checkpoint)
    for sentence in sentences:
        assert sentence in message
    assert "download" not in message.lower() or "NaN" in message
