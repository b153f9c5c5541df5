"""CompVis' single-file layout: diffusers' own conversion of the same file is the judge."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers.loaders import single_file_utils as judge
from ldm_reference.autoencoder import AutoencoderKL
from ldm_reference.text_encoder import CLIPTextModel
from ldm_reference.tokenizer import save_tokenizer, train_tokenizer
from ldm_reference.unet import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm_export.checkpoint.key_maps import text_key, unet_key, vae_key
from ldm_export.checkpoint.single_file import FAMILIES, SingleFile
from ldm_export.cli.main import main
from ldm_export.errors import CheckpointError
from ldm_export.export.chain import export_bundle
from ldm_export.families import open_checkpoint
from ldm_export.plan import compile_plan
from ldm_export.runtime import Pipeline

CAPTIONS = ["a red square", "a blue bar", "the colour green"]
TEXT = {
    **{"vocab_size": 560, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "eos_token_id": 559},
    **{"num_attention_heads": 1, "max_position_embeddings": 12},
}
VAE = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 2,
}
UNET = {
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 2,
    "cross_attention_dim": 64,
}
LINEAR = {**UNET, "use_linear_projection": True, "attention_head_dim": 1}
XL = {
    **{**LINEAR, "cross_attention_dim": 128, "transformer_layers_per_block": [1, 2]},
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    **{"addition_embed_type": "text_time", "addition_time_embed_dim": 8},
    "projection_class_embeddings_input_dim": 40 + 6 * 8,
}
PROJECTED = {**TEXT, "hidden_act": "gelu", "projection_dim": 40, "architectures": ["CLIPTextModelWithProjection"]}
TINY: dict[str, dict[str, dict[str, Any]]] = {
    "sd1": {"unet": {**UNET, "attention_head_dim": 8}, "vae": VAE, "text_encoder": TEXT},
    "sd2": {"unet": LINEAR, "vae": VAE, "text_encoder": {**TEXT, "hidden_act": "gelu", "num_hidden_layers": 3}},
    "sdxl": {"unet": XL, "vae": VAE, "text_encoder": TEXT, "text_encoder_2": PROJECTED},
}
CLASSES = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}


def network(component: str, config: dict[str, Any]) -> nn.Module:
    torch.manual_seed(len(component))
    module = CLASSES.get(component, CLIPTextModel).from_config(config)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.is_meta:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return module.eval()


def compvis(component: str, family: str, state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """A network's weights in CompVis' layout."""
    prefix = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}.get(component)
    prefix = prefix or FAMILIES[family].text_encoders[component]
    written: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if component == "unet":
            key = unet_key(name, config["layers_per_block"])
            if ".up." in key:
                block = key.partition(".up.")[0]
                names = (unet_key(other, config["layers_per_block"]) for other in state)
                attends = any(other.startswith(f"{block}.1.") for other in names)
                key = key.replace(".up.", ".2." if attends else ".1.")
        elif component == "vae":
            key = vae_key(name, len(config["block_out_channels"]))
            tensor = tensor[:, :, None, None] if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", key) else tensor
        elif prefix.endswith(".model."):
            key = text_key(name)
            tensor = tensor.T.contiguous() if key == "text_projection" else tensor
            if "in_proj" in key:  # q, k, v in this order; state dicts have k, v, q
                parts = [state[name.replace(re.findall("[qkv]_proj", name)[0], f"{p}_proj")] for p in "qkv"]
                tensor = torch.cat(parts)
        else:
            key = name
        written[prefix + key] = tensor
    return written


def write(folder: Path, family: str, configs: dict[str, dict[str, Any]] | None = None) -> tuple[Path, dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    networks = {}
    for component, config in (configs or TINY[family]).items():
        networks[component] = network(component, config)
        tensors |= compvis(component, family, networks[component].state_dict(), config)
    tensors |= {
        "alphas_cumprod": torch.ones(3),
        "model_ema.decay": torch.ones(()),
        "first_stage_model.loss.x": torch.ones(1),
    }
    if family == "sd1":
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(12)[None]
    if family == "sd2":
        tensors |= {
            "cond_stage_model.model.logit_scale": torch.ones(()),
            "cond_stage_model.model.text_projection": torch.ones(64, 40),
        }
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
    for suffix in ("", "_2"):
        save_tokenizer(train_tokenizer(CAPTIONS, 560), folder / f"tokenizer{suffix}", 12)
    return folder / "model.safetensors", networks


@pytest.mark.parametrize("family", TINY)
def test_weights_are_those_that_diffusers_converts(tmp_path: Path, family: str) -> None:
    file, networks = write(tmp_path, family)
    model = open_checkpoint(file)
    assert model.components == tuple(sorted(TINY[family], key=["text_encoder", "text_encoder_2", "unet", "vae"].index))
    for component in model.components:
        given, whole = model.load(component).state_dict(), load_file(file)
        if component == "unet":
            expected = judge.convert_ldm_unet_checkpoint(whole, {**TINY[family]["unet"], "class_embed_type": None})
        elif component == "vae":
            expected = judge.convert_ldm_vae_checkpoint(whole, VAE)
        elif model.file is not None and (prefix := model.file.prefix(component)).endswith(".model."):
            text_model = SimpleNamespace(config=SimpleNamespace(hidden_size=64))
            if "text_projection" in prefix + "".join(given):  # diffusers takes its width for that of q, k and v
                whole = {key: tensor for key, tensor in whole.items() if key != prefix + "text_projection"}
            expected = judge.convert_open_clip_checkpoint(text_model, whole, prefix=prefix)
        else:
            assert model.file is not None
            expected = judge.convert_ldm_clip_checkpoint(whole, model.file.prefix(component))
        original = networks[component].state_dict()
        for key, tensor in given.items():
            assert torch.equal(tensor, original[key]), key
            if key == "text_projection.weight":
                continue
            assert torch.equal(tensor, expected[key].reshape(tensor.shape)), key
        if component in ("unet", "vae"):
            assert given.keys() == expected.keys()


@pytest.mark.parametrize("family", TINY)
def test_networks_compute_what_they_did(tmp_path: Path, family: str) -> None:
    file, networks = write(tmp_path, family)
    model = open_checkpoint(file)
    ids = torch.randint(0, 559, (2, 12))
    with torch.no_grad():
        for component in model.components:
            ours, original = model.load(component), networks[component]
            if component == "unet":
                width = TINY[family]["unet"]["cross_attention_dim"]
                extra = {"text_embeds": torch.randn(2, 40), "time_ids": torch.rand(2, 6)} if family == "sdxl" else {}
                inputs = torch.randn(2, 4, 8, 8), torch.tensor([7]), torch.randn(2, 5, width)
                assert torch.equal(ours(*inputs, **extra), original(*inputs, **extra))
            elif component == "vae":
                x = torch.randn(1, 3, 16, 16)
                assert torch.equal(ours.encode(x), original.encode(x))
            else:
                states = original(ids).hidden_states
                dropped = FAMILIES[family].dropped_layers  # the UNet was trained on an earlier layer's output
                assert torch.equal(ours(ids).hidden_states[-1], states[len(states) - 1 - dropped])


FULL: dict[str, dict[str, dict[str, Any]]] = {
    "sd1": {
        "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "text_encoder": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
    },
    "sd2": {
        "unet": {
            **{"sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20]},
            "use_linear_projection": True,
        },
        "text_encoder": {
            **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16},
            "hidden_act": "gelu",
        },
    },
    "sdxl": {
        "unet": {
            **{"sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20]},
            **{"use_linear_projection": True, "block_out_channels": [320, 640, 1280]},
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            **{"transformer_layers_per_block": [1, 2, 10], "addition_embed_type": "text_time"},
            **{"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816},
        },
        "text_encoder": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
        "text_encoder_2": {
            **{"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20},
            **{"projection_dim": 1280, "hidden_act": "gelu", "architectures": ["CLIPTextModelWithProjection"]},
        },
    },
}
FULL_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}


@pytest.mark.parametrize("family", FULL)
def test_configs_of_the_originals_are_read_off_their_shapes(family: str) -> None:
    """At full size, by names and shapes: nothing is allocated."""
    configs = {**FULL[family], "vae": {**FULL_VAE, "scaling_factor": FAMILIES[family].scaling_factor}}
    configs["vae"]["sample_size"] = configs["unet"]["sample_size"] * 8
    tensors: dict[str, Tensor] = {}
    known = {}
    with torch.device("meta"):
        for component, config in configs.items():
            stored = {**config, "num_hidden_layers": 24} if (family, component) == ("sd2", "text_encoder") else config
            known[component] = network(component, config).config  # type: ignore[union-attr]
            module = network(component, stored)
            tensors |= compvis(component, family, module.state_dict(), {"layers_per_block": 2, **config})
        file = SingleFile.__new__(SingleFile)
        file.path, file.metadata, file.is_base = Path("model.safetensors"), {}, False
        file.shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        file.family = file._family()
        assert file.family is FAMILIES[family]
        for component, config in known.items():
            values = {**file.config(component), "architectures": configs[component].get("architectures")}
            if not component.startswith("text_encoder"):
                values.pop("architectures")
            found = network(component, values).config  # type: ignore[union-attr]
            for field in dataclasses.fields(config):
                given, expected = getattr(found, field.name), getattr(config, field.name)
                if field.name in ("eos_token_id", "projection_dim") and not getattr(config, "with_projection", True):
                    continue
                assert given == expected, (component, field.name)


@pytest.mark.parametrize(
    ("family", "step", "metadata", "expected", "size"),
    [
        ("sd1", None, {}, "epsilon", 64),
        ("sd2", None, {}, "v_prediction", 96),
        ("sd2", 875000, {}, "epsilon", 64),
        ("sd2", 110000, {}, "v_prediction", 96),
        ("sd2", None, {"modelspec.prediction_type": "epsilon"}, "epsilon", 96),
        ("sdxl", None, {}, "epsilon", 128),
        ("sdxl", None, {"modelspec.prediction_type": "v"}, "v_prediction", 128),
        ("sd1", None, {"ss_v_parameterization": "True"}, "v_prediction", 64),
        ("sd2", None, {"ss_v_parameterization": "False"}, "epsilon", 96),
        ("sd2", None, {"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon", 96),
        ("sd2", None, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction", 96),
    ],
)
def test_what_the_unet_predicts(
    tmp_path: Path, family: str, step: int | None, metadata: dict[str, str], expected: str, size: int
) -> None:
    file, _ = write(tmp_path, family)
    tensors = load_file(file) | ({} if step is None else {"global_step": torch.tensor(step)})
    save_file(tensors, file, metadata)
    model = open_checkpoint(file)
    assert model.scheduler["prediction_type"] == expected
    assert model.configs["unet"]["sample_size"] == size


def marked(folder: Path, family: str = "sd1", metadata: dict[str, str] | None = None, **tensors: Tensor) -> Path:
    file, _ = write(folder, family)
    save_file(load_file(file) | tensors, file, metadata)
    return file


def test_marker_keys_say_what_the_unet_predicts(tmp_path: Path) -> None:
    none = torch.tensor([])
    scheduler = open_checkpoint(marked(tmp_path, v_pred=none)).scheduler
    assert (scheduler["prediction_type"], scheduler.get("rescale_betas_zero_snr")) == ("v_prediction", None)
    model = open_checkpoint(marked(tmp_path, v_pred=none, ztsnr=none))
    assert model.scheduler["prediction_type"] == "v_prediction"
    assert model.scheduler["rescale_betas_zero_snr"] is True
    assert compile_plan(model.scheduler, model.drawing.sampler, 10).rows[0].timestep == 999
    scheduler = open_checkpoint(marked(tmp_path), prediction_type="v_prediction").scheduler
    assert scheduler["prediction_type"] == "v_prediction"


@pytest.mark.parametrize(
    "metadata",
    [{"modelspec.prediction_type": "epsilon"}, {"ss_v_parameterization": "False"}, {"modelspec.prediction_type": "x0"}],
)
def test_a_file_that_contradicts_itself(tmp_path: Path, metadata: dict[str, str]) -> None:
    file = marked(tmp_path, metadata=metadata, v_pred=torch.tensor([]))
    with pytest.raises(CheckpointError, match="Say which it is with --prediction-type"):
        _ = open_checkpoint(file).scheduler
    assert open_checkpoint(file, prediction_type="epsilon").scheduler["prediction_type"] == "epsilon"


@pytest.mark.parametrize(
    "step", [torch.zeros(2), torch.zeros(1, 2), torch.tensor([875000]), torch.tensor(float("nan"))]
)
def test_a_global_step_of_any_shape(tmp_path: Path, step: Tensor) -> None:
    model = open_checkpoint(marked(tmp_path, "sd2", global_step=step))
    assert model.scheduler["prediction_type"] == ("epsilon" if step.tolist() == [875000] else "v_prediction")


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("edm_mean", "is preconditioned as in EDM"),
        ("edm_vpred.sigma_max", "is preconditioned as in EDM"),
        ("control_model.input_blocks.0.0.weight", "is a ControlNet"),
        ("lora_unet_down_blocks_0.lora_up.weight", "has the weights of a LoRA"),
        ("model.diffusion_model.input_blocks.1.1.proj_in.lora_A.weight", "has the weights of a LoRA"),
        ("model.diffusion_model.double_blocks.0.x", "has a transformer of Flux"),
        ("down_blocks.0.resnets.0.conv1.weight", "is one network in diffusers' layout"),
        ("conditioner.embedders.0.model.ln_final.weight", "is SDXL's refiner"),
        ("emb_params", "is a textual inversion"),
    ],
)
def test_files_of_other_kinds(tmp_path: Path, key: str, what: str) -> None:
    save_file({key: torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(f"other.safetensors {what}")):
        open_checkpoint(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: f"module.{key}",
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: key.replace("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),
    ],
)
def test_names_that_are_not_quite_the_usual(tmp_path: Path, rename: Callable[[str], str]) -> None:
    file, networks = write(tmp_path, "sd1")
    save_file({rename(key): tensor for key, tensor in load_file(file).items()}, file)
    for component in ("unet", "text_encoder"):
        loaded = open_checkpoint(file).load(component).state_dict()
        assert all(torch.equal(tensor, loaded[key]) for key, tensor in networks[component].state_dict().items())


def test_weights_that_are_there_twice(tmp_path: Path) -> None:
    file = marked(tmp_path, **{"module.first_stage_model.quant_conv.bias": torch.zeros(8)})
    with pytest.raises(CheckpointError, match="has the same weights twice"):
        open_checkpoint(file)


def test_an_unfinished_training(tmp_path: Path) -> None:
    file, _ = write(tmp_path, "sd1")
    key = "model.diffusion_model.out.2.bias"
    save_file(load_file(file) | {key: torch.full((4,), torch.nan)}, file)
    with pytest.raises(CheckpointError, match=r"'conv_out\.bias' holds NaN or infinity"):
        open_checkpoint(file).load("unet")


def test_layers_that_differ_within_a_block(tmp_path: Path) -> None:
    """As SSD-1B."""
    depths = {"transformer_layers_per_block": [1, [2, 1]], "reverse_transformer_layers_per_block": [[2, 1, 3], 1]}
    configs = {**TINY["sdxl"], "unet": {**XL, **depths, "mid_block_type": None}}
    file, networks = write(tmp_path, "sdxl", configs)
    loaded = open_checkpoint(file).load("unet").state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in networks["unet"].state_dict().items())


@pytest.mark.slow
def test_a_single_file_goes_through_the_chain(tmp_path: Path) -> None:
    file, _ = write(tmp_path, "sd2")
    bundle = export_bundle(open_checkpoint(file), tmp_path / "bundle")
    assert all(record["passed"] for record in bundle.manifest.parity)
    images = Pipeline(bundle, "cpu").generate("a red square", steps=10, height=16, width=16).images
    assert images.shape == (1, 16, 16, 3)
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "bundle"), "--against", str(file)])
    assert result.exit_code == 0, result.output


def test_an_adapter_is_merged_into_a_single_file(tmp_path: Path) -> None:
    file, _ = write(tmp_path, "sdxl")
    down, up, style = torch.randn(2, 64), torch.randn(64, 2), tmp_path / "style.safetensors"
    name = "lora_te2_text_model_encoder_layers_1_self_attn_v_proj"  # a third of a weight in OpenCLIP's layout
    save_file(
        {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}, style
    )
    bare, changed = open_checkpoint(file), open_checkpoint(file, adapters=[(style, 0.5)])
    weight = "text_model.encoder.layers.1.self_attn.v_proj.weight"
    plain, found = (model.load("text_encoder_2").state_dict() for model in (bare, changed))
    assert torch.allclose(found[weight], plain[weight] + 0.25 * up @ down, atol=1e-6)
    assert [name for name in plain if not torch.equal(plain[name], found[name])] == [weight]
    same = {name: bare.sha256(name) == changed.sha256(name) for name in bare.components}
    assert same == {"text_encoder": True, "text_encoder_2": False, "unet": True, "vae": True}


def damage(tensors: dict[str, Tensor], fault: str) -> dict[str, Tensor]:
    if fault.startswith("no "):
        prefix = {"no UNet": "model.diff", "no autoencoder": "first_stage", "no text": "cond_stage"}[fault]
        return {key: tensor for key, tensor in tensors.items() if not key.startswith(prefix)}
    key = "model.diffusion_model.middle_block.0.in_layers.0.weight"
    if fault == "unknown key":
        return {**tensors, "model.diffusion_model.control.weight": torch.ones(1)}
    if fault == "wrong shape":
        return {**tensors, key: torch.ones(3)}
    if fault == "missing key":
        return {name: tensor for name, tensor in tensors.items() if name != key}
    return {name: tensor for name, tensor in tensors.items() if "input_blocks.1.0.in_layers.2" not in name}


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("no UNet", "has no UNet (model.diffusion_model.*); a single-file checkpoint holds"),
        ("no autoencoder", "has no autoencoder (first_stage_model.*); a single-file checkpoint holds"),
        ("no text", "has no text encoder of Stable Diffusion 1.x, 2.x or SDXL"),
        ("unknown key", "1 unknown (such as 'model.diffusion_model.control.weight')"),
        ("wrong shape", "has shape (3,); config.json asks for (64,)"),
        ("missing key", "1 missing (such as 'mid_block.resnets.0.norm1.weight')"),
        ("no width", "it is not a whole unet in CompVis' layout"),
    ],
)
def test_a_file_that_is_not_whole(tmp_path: Path, fault: str, sentence: str) -> None:
    file, _ = write(tmp_path, "sd1")
    save_file(damage(load_file(file), fault if fault != "no width" else "width"), file)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(file).load("unet")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    file, _ = write(tmp_path, "sd1")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or not a safetensors file"):
        open_checkpoint(file)
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="is a pickle, which can run code when it is opened"):
        open_checkpoint(tmp_path / "model.ckpt")


def test_the_tokenizer_is_looked_for_beside_the_file(tmp_path: Path) -> None:
    file, _ = write(tmp_path, "sd1")
    (tmp_path / "tokenizer").rename(tmp_path / "elsewhere")
    with pytest.raises(
        CheckpointError, match=r"tokenizer has neither tokenizer\.json nor vocab\.json and merges\.txt\. Put"
    ):
        export_bundle(open_checkpoint(file), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    assert json.loads((tmp_path / "elsewhere" / "tokenizer_config.json").read_text())["model_max_length"] == 12
