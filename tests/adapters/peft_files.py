"""Random adapters of every kind, made by PEFT, and diffusers' pipelines with them in: judges of what we make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from peft.utils import get_peft_model_state_dict
from torch import Tensor

Tensors = dict[str, Tensor]
LINEAR = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_in"]
CONVOLUTION = [*LINEAR, "conv1", "conv_in", "time_emb_proj", "downsamplers.0.conv", "conv_shortcut"]
TEXT = ["q_proj", "v_proj", "out_proj", "fc1"]
PIPELINES = {
    "sd": ("StableDiffusionPipeline", "unet", ("text_encoder",)),
    "sdxl": ("StableDiffusionXLPipeline", "unet", ("text_encoder", "text_encoder_2")),
    "sd3": ("StableDiffusion3Pipeline", "transformer", ("text_encoder", "text_encoder_2")),
}
SCALE = 0.7


def pipeline_of(kind: str, folder: Path) -> Any:
    absent = {"text_encoder_3": None, "tokenizer_3": None} if kind == "sd3" else {}
    pipe = getattr(diffusers, PIPELINES[kind][0]).from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def randomised(network: torch.nn.Module) -> None:
    """Fill every factor: those that training starts from change nothing."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in network.named_parameters():
        if any(word in name for word in ("lora_", "hada_", "lokr_")):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = 1 + 0.3 * noise.abs() if "magnitude" in name else 0.2 * noise


def lora_factors(kind: str, folder: Path, **options: Any) -> dict[str, Tensors]:
    """Random factors of PEFT's LoRA, by component and by PEFT's names in it."""
    pipe, found = pipeline_of(kind, folder), {}
    _, denoiser, encoders = PIPELINES[kind]
    for component in (denoiser, *encoders):
        network, targets = getattr(pipe, component), TEXT if component in encoders else CONVOLUTION
        network.add_adapter(peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **options))
        randomised(network)
        found[component] = {key: value.clone() for key, value in get_peft_model_state_dict(network).items()}
    return found


def fused(kind: str, folder: Path, *files: tuple[Path, float]) -> Any:
    """diffusers' pipeline with adapters fused, one after another, and its layers plain again."""
    pipe = pipeline_of(kind, folder)
    for file, scale in files:
        config = {"unet_config": pipe.unet.config} if kind == "sd" else {}  # which that of SDXL gives itself
        pipe.load_lora_weights(file.parent, weight_name=file.name, **config)
        pipe.fuse_lora(components=components(kind), lora_scale=scale)
        pipe.unload_lora_weights()
    return pipe


def components(kind: str) -> list[str]:
    return [PIPELINES[kind][1], *PIPELINES[kind][2]]


def modules_of(factors: Tensors) -> int:
    return len({key.partition(".lora_")[0] for key in factors})


def as_diffusers(factors: dict[str, Tensors]) -> Tensors:
    return {f"{component}.{key}": value for component, own in factors.items() for key, value in own.items()}


def as_kohya(factors: dict[str, Tensors], kind: str) -> Tensors:
    starts = {"unet": "lora_unet_", "text_encoder": "lora_te_" if kind == "sd" else "lora_te1_"}
    found: Tensors = {}
    for component, own in factors.items():
        for key, value in own.items():
            module, _, end = key.partition(".lora_")
            text = "" if component == "unet" or module.startswith("text_model.") else "text_model."
            name = starts.get(component, "lora_te2_") + (text + module).replace(".", "_")
            if "magnitude" in end:
                found[f"{name}.dora_scale"] = value
            else:
                found[f"{name}.lora_{'down' if end.startswith('A') else 'up'}.weight"] = value
            found[f"{name}.alpha"] = torch.tensor(2.0)
    return found


CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=CONVOLUTION, rank_pattern={"conv1": 2}),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR, use_rslora=True),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=CONVOLUTION, use_dora=True),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=CONVOLUTION),
    "loha, Tucker": lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=["conv1"], use_effective_conv2d=True),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=CONVOLUTION),
    "lokr, whole": lambda: peft.LoKrConfig(r=64, alpha=32, target_modules=LINEAR),
    "lokr, both apart": lambda: peft.LoKrConfig(r=1, alpha=3, target_modules=LINEAR, decompose_both=True),
    "lokr, Tucker": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=["conv1"], use_effective_conv2d=True),
}


def peft_adapter(config: Any, folder: Path, output: Path, scale: float) -> torch.nn.Module:
    """Save a random adapter of a UNet in PEFT's layout; gives PEFT's merged UNet."""
    model = peft.get_peft_model(diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"), config)
    randomised(model)
    model.save_pretrained(output)
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(scale)
    merged: torch.nn.Module = model.merge_and_unload()
    return merged
