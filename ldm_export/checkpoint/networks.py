"""Networks of ``ldm_reference``, those that are trained here, as components of a checkpoint."""

from __future__ import annotations

from typing import Any

from ldm_reference.autoencoder import AutoencoderKL
from ldm_reference.layout import config_to_dict
from ldm_reference.text_encoder import CLIPTextModel
from ldm_reference.tiny_autoencoder import AutoencoderTiny
from ldm_reference.unet import UNet2DConditionModel
from torch import nn

from ldm_export.checkpoint.kind import Component
from ldm_export.checkpoint.weights import OF_TRANSFORMERS, name_of_clip, name_of_diffusers

Autoencoder = AutoencoderKL | AutoencoderTiny
Network = Autoencoder | UNet2DConditionModel | CLIPTextModel


def own(*classes: type[Any]) -> Component:
    """A component that is one of these classes; keys of its config that diffusers reads past are read past."""
    by_name = {cls.__name__: cls for cls in classes}

    def build(name: str, config: dict[str, Any]) -> nn.Module:
        network: nn.Module = by_name[name].from_config(config, strict=False)
        return network

    return Component(tuple(by_name), build, config_to_dict, name_of=name_of_diffusers)


def _clip_text_model(name: str, config: dict[str, Any]) -> nn.Module:
    """Build a text encoder of CLIP's kind; its class alone tells one with a projection from one without."""
    return CLIPTextModel.from_config({**config, "architectures": [name]}, strict=False)


def _clip_config(network: CLIPTextModel) -> dict[str, Any]:
    return {**config_to_dict(network), "with_projection": network.config.with_projection}


class ShiftedAutoencoder(AutoencoderKL):
    """An autoencoder whose latents are shifted by ``shift_factor`` before they are scaled; it does neither itself."""

    shift_factor: float = 0.0


def _shifted_autoencoder(name: str, config: dict[str, Any]) -> nn.Module:
    network = ShiftedAutoencoder.from_config({**config, "shift_factor": None}, strict=False)
    assert isinstance(network, ShiftedAutoencoder)
    network.shift_factor = float(config.get("shift_factor") or 0.0)
    return network


def _shifted_config(network: ShiftedAutoencoder) -> dict[str, Any]:
    return {**config_to_dict(network), "_class_name": AutoencoderKL.__name__, "shift_factor": network.shift_factor}


AUTOENCODER = own(AutoencoderKL, AutoencoderTiny)
SHIFTED_AUTOENCODER = Component(("AutoencoderKL",), _shifted_autoencoder, _shifted_config, name_of=name_of_diffusers)
"""An autoencoder that may have a ``shift_factor``."""
CLIP_TEXT_ENCODER = Component(
    ("CLIPTextModel", "CLIPTextModelWithProjection"), _clip_text_model, _clip_config, OF_TRANSFORMERS, name_of_clip
)
UNET = own(UNet2DConditionModel)
