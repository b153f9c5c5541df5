"""Opening checkpoints: what is loaded and when, and one test for each way in which a checkpoint can lie."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ldm_export.checkpoint import shipped_checkpoints
from ldm_export.errors import CheckpointError
from ldm_export.families import open_checkpoint

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
COMPONENTS = ("text_encoder", "unet", "vae")


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "tiny"))


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = {key: tensor.clone() for key, tensor in safetensors.torch.load_file(file).items()}
    change(tensors)
    safetensors.torch.save_file(tensors, file)


def weights(checkpoint: Path, component: str = "unet") -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in open_checkpoint(checkpoint).load(component).state_dict().items()}


def assert_same(given: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert given.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(given[key], tensor, rtol=0, atol=0)


# --- what opens -----------------------------------------------------------------------------------------------------


def test_open_says_what_is_there(tiny_checkpoint: Path) -> None:
    model = open_checkpoint(str(tiny_checkpoint))
    assert model.name == "tiny"
    assert model.components == COMPONENTS
    assert model.configs["unet"]["cross_attention_dim"] == 32
    assert model.configs["unet"]["mid_block_type"] == "UNetMidBlock2DCrossAttn"  # a default, filled in
    assert model.configs["vae"]["scaling_factor"] == 0.18215
    assert model.configs["text_encoder"]["with_projection"] is False
    assert model.scheduler["_class_name"] == "DDIMScheduler"
    assert [file.name for file in model.weight_files("unet")] == ["diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("component", COMPONENTS)
def test_load_gives_float32_in_evaluation_mode_without_gradients(tiny_checkpoint: Path, component: str) -> None:
    network = open_checkpoint(tiny_checkpoint).load(component)
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert {value.dtype for value in network.state_dict().values()} == {torch.float32}
    assert {value.device.type for value in network.state_dict().values()} == {"cpu"}
    file = next((tiny_checkpoint / component).glob("*.safetensors"))
    assert_same(network.state_dict(), safetensors.torch.load_file(file))


def test_loading_is_lazy(checkpoint: Path) -> None:
    """Configs need no weights, and a component needs no other."""
    for component in ("unet", "vae"):
        (checkpoint / component / "diffusion_pytorch_model.safetensors").unlink()
    model = open_checkpoint(checkpoint)
    assert set(model.configs) == set(COMPONENTS)
    assert model.load("text_encoder").state_dict()


def test_two_loads_share_nothing(tiny_checkpoint: Path) -> None:
    model = open_checkpoint(tiny_checkpoint)
    first, second = model.load("vae"), model.load("vae")
    with torch.no_grad():
        first.decoder.conv_in.weight.zero_()  # type: ignore[union-attr]
    assert second.decoder.conv_in.weight.abs().max() > 0  # type: ignore[union-attr]
    assert weights(tiny_checkpoint, "vae")["decoder.conv_in.weight"].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_variant_opens(checkpoint: Path, dtype: torch.dtype) -> None:
    full = weights(checkpoint)
    half = {key: tensor.to(dtype) for key, tensor in full.items()}
    (checkpoint / UNET_WEIGHTS).unlink()
    safetensors.torch.save_file(half, checkpoint / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert_same(weights(checkpoint), {key: tensor.float() for key, tensor in half.items()})


def test_full_precision_goes_before_a_variant(checkpoint: Path) -> None:
    full = weights(checkpoint)
    zeros = {key: torch.zeros_like(tensor, dtype=torch.float16) for key, tensor in full.items()}
    for variant in ("fp16", "non_ema"):
        safetensors.torch.save_file(zeros, checkpoint / "unet" / f"diffusion_pytorch_model.{variant}.safetensors")
    assert_same(weights(checkpoint), full)


SHARDS = {
    "plain": "diffusion_pytorch_model-{}-of-00003.safetensors",
    "variant": "diffusion_pytorch_model.fp16-{}-of-00003.safetensors",
    "variant, old place": "diffusion_pytorch_model-{}-of-00003.fp16.safetensors",
}


def shard(checkpoint: Path, pattern: str, tensors: dict[str, torch.Tensor]) -> list[Path]:
    files = [checkpoint / "unet" / pattern.format(f"{number:05d}") for number in (1, 2, 3)]
    for number, file in enumerate(files):
        safetensors.torch.save_file({key: tensors[key] for key in sorted(tensors)[number::3]}, file)
    (checkpoint / UNET_WEIGHTS).unlink(missing_ok=True)
    return files


@pytest.mark.parametrize("pattern", SHARDS.values(), ids=SHARDS)
def test_shards_open(checkpoint: Path, pattern: str) -> None:
    full = weights(checkpoint)
    files = shard(checkpoint, pattern, full)
    assert_same(weights(checkpoint), full)
    assert open_checkpoint(checkpoint).weight_files("unet") == tuple(files)


def test_full_precision_shards_go_before_those_of_a_variant(checkpoint: Path) -> None:
    full = weights(checkpoint)
    shard(checkpoint, SHARDS["plain"], full)
    shard(checkpoint, SHARDS["variant, old place"], {key: torch.zeros_like(tensor) for key, tensor in full.items()})
    assert_same(weights(checkpoint), full)


def test_sha256_follows_the_weights(checkpoint: Path) -> None:
    before = open_checkpoint(checkpoint).sha256("unet")
    assert len(before) == 64
    assert open_checkpoint(checkpoint).sha256("unet") == before
    edit_weights(checkpoint / UNET_WEIGHTS, lambda tensors: tensors["conv_in.bias"].add_(1))
    assert open_checkpoint(checkpoint).sha256("unet") != before


def test_without_a_text_encoder(checkpoint: Path) -> None:
    edit_json(checkpoint / "model_index.json", text_encoder=[None, None])
    assert open_checkpoint(checkpoint).components == ("unet", "vae")
    edit_json(checkpoint / "model_index.json", text_encoder=None)
    assert open_checkpoint(checkpoint).components == ("unet", "vae")


def test_shipped_checkpoints_open_by_name() -> None:
    for name, folder in shipped_checkpoints().items():
        assert open_checkpoint(name).path == folder


# --- what lies: (what is done to the folder, what the sentence says) --------------------------------------------------


def refusal(checkpoint: Path | str) -> str:
    """The message with which opening the checkpoint, or loading a component of it, is refused."""

    def open_and_load() -> None:
        model = open_checkpoint(checkpoint)
        for component in model.components:
            model.load(component)

    with pytest.raises(CheckpointError) as caught:
        open_and_load()
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def save_shards_but_one(folder: Path) -> None:
    shard(folder, SHARDS["plain"], weights(folder))[1].unlink()


LIES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no folder": (shutil.rmtree, ["There is no checkpoint", "diffusers layout"]),
    "no index": (lambda f: (f / "model_index.json").unlink(), ["has no model_index.json", "save_pretrained"]),
    "index not JSON": (lambda f: (f / "model_index.json").write_text("{"), ["model_index.json is not readable JSON"]),
    "index not text": (lambda f: (f / "model_index.json").write_bytes(b"\xff\xfe"), ["is not readable JSON"]),
    "index too deep": (lambda f: (f / "model_index.json").write_text("[" * 200_000), ["is not readable JSON"]),
    "index a list": (lambda f: (f / "model_index.json").write_text("[]"), ["holds a list; a JSON object is needed"]),
    "no unet in the index": (
        lambda f: edit_json(f / "model_index.json", unet=[None, None]),
        ["model_index.json names no unet"],
    ),
    "no vae in the index": (lambda f: edit_json(f / "model_index.json", vae=None), ["names no vae"]),
    "component a number": (
        lambda f: edit_json(f / "model_index.json", unet=5),
        ["says that the unet is 5; UNet2DConditionModel can be opened"],
    ),
    "component a list of lists": (
        lambda f: edit_json(f / "model_index.json", unet=[[], {}]),
        ["says that the unet is [[], {}]; UNet2DConditionModel can be opened"],
    ),
    "a ControlNet": (
        lambda f: edit_json(
            f / "model_index.json",
            _class_name="StableDiffusionControlNetPipeline",
            controlnet=["diffusers", "ControlNetModel"],
        ),
        ["is of a StableDiffusionControlNetPipeline with the part controlnet", "Save the model without it"],
    ),
    "component of another class": (
        lambda f: edit_json(f / "model_index.json", vae=["diffusers", "VQModel"]),
        ["says that the vae is ['diffusers', 'VQModel']; AutoencoderKL and AutoencoderTiny can be opened"],
    ),
    "text encoder of another class": (
        lambda f: edit_json(f / "model_index.json", text_encoder=["transformers", "T5EncoderModel"]),
        ["'T5EncoderModel'", "CLIPTextModel and CLIPTextModelWithProjection can be opened"],
    ),
    "no folder of a component": (lambda f: shutil.rmtree(f / "unet"), ["unet/config.json is missing"]),
    "no config": (lambda f: (f / "vae/config.json").unlink(), ["vae/config.json is missing"]),
    "config not JSON": (
        lambda f: (f / "unet/config.json").write_text("{,}"),
        ["unet/config.json is not readable JSON"],
    ),
    "quantized by its config": (
        lambda f: edit_json(f / "unet/config.json", quantization_config={"bits": 4}),
        ["unet/config.json has a quantization_config, so the weights are quantized"],
    ),
    "unknown value": (
        lambda f: edit_json(f / "unet/config.json", down_block_types=["CrossAttnDownBlock2D", "SkipDownBlock2D"]),
        ["unet/config.json", "'SkipDownBlock2D' is not supported", "AttnDownBlock2D"],
    ),
    "feature switched on": (
        lambda f: edit_json(f / "unet/config.json", time_embedding_type="fourier"),
        ["time_embedding_type = 'fourier' is not supported; only 'positional' is"],
    ),
    "value of another type": (
        lambda f: edit_json(f / "text_encoder/config.json", hidden_size="32"),
        ["text_encoder/config.json", "hidden_size = '32' must be int"],
    ),
    "ten million layers": (
        lambda f: edit_json(f / "unet/config.json", layers_per_block=10**7),
        ["unet/config.json", "layers; at most 2,000 are built"],
    ),
    "ten million transformer layers": (
        lambda f: edit_json(f / "unet/config.json", transformer_layers_per_block=10**7),
        ["unet/config.json", "layers; at most 2,000 are built"],
    ),
    "ten million layers of an autoencoder": (
        lambda f: edit_json(f / "vae/config.json", layers_per_block=10**7),
        ["vae/config.json", "layers; at most 2,000 are built"],
    ),
    "ten million layers of a text encoder": (
        lambda f: edit_json(f / "text_encoder/config.json", num_hidden_layers=10**7),
        ["text_encoder/config.json", "the network has 10,000,000 layers; at most 2,000 are built"],
    ),
    "a guidance embedding that is not a number": (
        lambda f: edit_json(f / "unet/config.json", time_cond_proj_dim=3),
        ["time_cond_proj_dim = 3 has a guidance embedding that is not a number; 1, or 4 and more, is needed"],
    ),
    "sample_size of three numbers": (
        lambda f: edit_json(f / "unet/config.json", sample_size=[8, 8, 8]),
        ["sample_size = (8, 8, 8) must be one number, or height and width"],
    ),
    "latents with a mean": (
        lambda f: edit_json(f / "vae/config.json", latents_mean=[0.1, 0, 0, 0]),
        ["latents_mean = (0.1, 0, 0, 0) is not supported", "Such a network cannot be exported"],
    ),
    "latents that are shifted": (
        lambda f: edit_json(f / "vae/config.json", shift_factor=0.0609),
        ["shift_factor = 0.0609 is not supported", "Such a network cannot be exported"],
    ),
    "padding that is masked": (
        lambda f: edit_json(f / "text_encoder/config.json", use_attention_mask=True),
        ["use_attention_mask = True is not supported", "Such a network cannot be exported"],
    ),
    "config a Git LFS pointer": (
        lambda f: (f / "unet/config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        ["unet/config.json is not readable JSON", "a pointer of Git LFS", "run `git lfs pull`"],
    ),
    "config a pipe": (
        lambda f: ((f / "unet/config.json").unlink(), os.mkfifo(f / "unet/config.json")),
        ["unet/config.json is not readable JSON (not a regular file)"],
    ),
    "size of a giant": (
        lambda f: edit_json(f / "text_encoder/config.json", vocab_size=1 << 62),
        ["text_encoder/config.json describes a network that cannot be built"],
    ),
    "no weights": (
        lambda f: (f / UNET_WEIGHTS).unlink(),
        ["unet has no weights; diffusion_pytorch_model.safetensors is needed"],
    ),
    "only a pickle": (
        lambda f: (f / UNET_WEIGHTS).rename(f / "unet/diffusion_pytorch_model.bin"),
        ["only as a pickle, which is never opened", "safe_serialization=True"],
    ),
    "weights truncated": (
        lambda f: (f / UNET_WEIGHTS).write_bytes((f / UNET_WEIGHTS).read_bytes()[:-100]),
        [UNET_WEIGHTS, "truncated or not a safetensors file"],
    ),
    "weights empty": (lambda f: (f / UNET_WEIGHTS).write_bytes(b""), ["truncated or not a safetensors file"]),
    "weights a pickle in disguise": (
        lambda f: torch.save({"conv_in.weight": torch.zeros(1)}, f / UNET_WEIGHTS),
        ["truncated or not a safetensors file"],
    ),
    "shard missing": (save_shards_but_one, ["unet: of the weights that config.json asks for", "missing (such as"]),
    "tensor missing": (
        lambda f: edit_weights(f / UNET_WEIGHTS, lambda tensors: tensors.pop("conv_in.bias")),
        ["1 missing (such as 'conv_in.bias'). Use a config.json and weights that were saved together, whole."],
    ),
    "tensor unknown": (
        lambda f: edit_weights(f / UNET_WEIGHTS, lambda tensors: tensors.update(control=torch.zeros(1))),
        ["1 unknown (such as 'control'). Use a config.json and weights that were saved together"],
    ),
    "tensor of another shape": (
        lambda f: edit_weights(f / UNET_WEIGHTS, lambda tensors: tensors.update({"conv_in.bias": torch.zeros(17)})),
        ["'conv_in.bias' has shape (17,); config.json asks for (16,)"],
    ),
    "tensor transposed": (
        lambda f: edit_weights(
            f / "text_encoder/model.safetensors",
            lambda tensors: tensors.update(
                {key: tensor.T.contiguous() for key, tensor in tensors.items() if key.endswith("fc1.weight")}
            ),
        ),
        ["fc1.weight' has shape (32, 64); config.json asks for (64, 32)"],
    ),
    "config of a wider network": (
        lambda f: edit_json(f / "unet/config.json", in_channels=9),
        ["'conv_in.weight' has shape (16, 4, 3, 3); config.json asks for (16, 9, 3, 3)"],
    ),
    "config of a deeper network": (
        lambda f: edit_json(f / "unet/config.json", layers_per_block=2),
        ["missing (such as 'down_blocks.0.attentions.1.norm.bias')"],
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_checkpoint_that_lies_is_refused(checkpoint: Path, lie: str) -> None:
    spoil, sentences = LIES[lie]
    spoil(checkpoint)
    message = refusal(checkpoint)
    for sentence in sentences:
        assert sentence in message


def test_a_pickle_is_refused_unopened(tmp_path: Path) -> None:
    for suffix in (".ckpt", ".bin", ".pt"):
        file = tmp_path / f"model{suffix}"
        file.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
        assert "is a pickle, which can run code when it is opened" in refusal(file)


def test_a_single_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "lora.safetensors")
    assert "has no UNet (model.diffusion_model.*)" in refusal(tmp_path / "lora.safetensors")
    (tmp_path / "notes.txt").write_text("none")
    assert "is truncated or not a safetensors file" in refusal(tmp_path / "notes.txt")


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    message = refusal("emoji65")
    assert "There is no checkpoint 'emoji65'" in message
    assert all(name in message for name in shipped_checkpoints())


def test_no_scheduler(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "scheduler")
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json is missing"):
        _ = open_checkpoint(checkpoint).scheduler


def test_a_component_that_the_checkpoint_lacks(tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"names no text_encoder_2; it has text_encoder, unet, vae\."):
        open_checkpoint(tiny_checkpoint).load("text_encoder_2")
