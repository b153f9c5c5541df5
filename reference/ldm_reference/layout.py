"""Writes a model as a folder in diffusers layout, which ``StableDiffusionPipeline.from_pretrained`` opens.

model_index.json
vae/  unet/              config.json, diffusion_pytorch_model.safetensors
text_encoder/            config.json, model.safetensors
tokenizer/               CLIP's files
scheduler/               scheduler_config.json
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ldm_reference.autoencoder import AutoencoderKL
from ldm_reference.text_encoder import CLIPTextModel
from ldm_reference.tiny_autoencoder import AutoencoderTiny
from ldm_reference.unet import UNet2DConditionModel

Autoencoder = AutoencoderKL | AutoencoderTiny
Network = Autoencoder | UNet2DConditionModel | CLIPTextModel

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
TRANSFORMERS_WEIGHTS = "model.safetensors"


def config_to_dict(module: Network) -> dict[str, Any]:
    """The content of the component's ``config.json``."""
    values = dataclasses.asdict(module.config)
    if isinstance(module, CLIPTextModel):
        name = "CLIPTextModelWithProjection" if values.pop("with_projection") else "CLIPTextModel"
        # transformers would otherwise run the network in the dtype that the weights are saved in, unlike diffusers
        return {"architectures": [name], "dtype": "float32", "model_type": "clip_text_model", **values}
    return {"_class_name": type(module).__name__, **values}


def save_component(module: Network, folder: Path) -> None:
    """``config.json`` and the weights, in the module's dtype."""
    write_json(folder / "config.json", config_to_dict(module))
    weights = TRANSFORMERS_WEIGHTS if isinstance(module, CLIPTextModel) else DIFFUSERS_WEIGHTS
    tensors = {key: tensor.contiguous() for key, tensor in module.state_dict().items()}
    save_file(tensors, folder / weights, {"format": "pt"})


def save_checkpoint(
    folder: Path,
    *,
    vae: Autoencoder,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel | None,
    tokenizer: Callable[[Path], None] | None,
    scheduler: Mapping[str, Any],
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a whole model; ``model_index.json`` comes last, so that a folder which has it is complete.

    Parameters
    ----------
    tokenizer : writes CLIP's files into the folder that it is given
    scheduler : the content of ``scheduler_config.json``, with its ``_class_name``
    dtype : of the saved weights; the modules are converted in place
    """
    components: dict[str, nn.Module | None] = {"vae": vae, "unet": unet, "text_encoder": text_encoder}
    for name, module in components.items():
        if module is not None:
            save_component(module.to(dtype), folder / name)  # type: ignore[arg-type]
    if tokenizer is not None:
        tokenizer(folder / "tokenizer")
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    text_class = (
        "CLIPTextModelWithProjection" if text_encoder and text_encoder.config.with_projection else "CLIPTextModel"
    )
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", text_class] if text_encoder else [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"] if tokenizer else [None, None],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", type(vae).__name__],
    }
    write_json(folder / "model_index.json", index)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
