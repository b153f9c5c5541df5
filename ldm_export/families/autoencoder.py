"""Graphs of autoencoders, as the families have them: of the KL divergence, tiny ones, and DC-AE (2410.10733).

Shift and scale are inside: a graph's latents are those that the sampler has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from ldm_reference.tiny_autoencoder import AutoencoderTiny
from torch import Tensor

from ldm_export.contract import GraphSpec, TensorSpec, graph_spec
from ldm_export.families.base import GraphModule, Load, ModelGraph
from ldm_export.families.libraries import from_diffusers

DC_AUTOENCODER = from_diffusers("AutoencoderDC")
CERTAIN = (AutoencoderTiny.__name__, *DC_AUTOENCODER.classes)
"""Classes whose latents of a picture are certain, where others give a distribution."""


def autoencoder_graphs(load: Load, class_name: str, config: Mapping[str, Any]) -> list[ModelGraph]:
    """The decoder's and the encoder's graph of the component ``vae``, of that class and config."""
    inside = {**config, "scaling_factor": 1.0}  # the graphs' latents are shifted and scaled already
    if "shift_factor" in inside:
        inside["shift_factor"] = None
    certain = class_name in CERTAIN
    return [
        ModelGraph(_decoder_spec(config), partial(_decoder, load), "vae", inside),
        ModelGraph(_encoder_spec(config, certain), partial(_encoder, load, certain), "vae", inside),
    ]


def _shift_of(network: Any) -> float:
    """What is taken from an autoencoder's latents before they are scaled."""
    shift: float = getattr(network, "shift_factor", 0.0)
    return shift


def _decoder_spec(config: Mapping[str, Any]) -> GraphSpec:
    """Latents as the sampler has them to a picture in about [-1, 1]."""
    latents = TensorSpec("latent_sample", "float32", ("batch", config["latent_channels"], "height", "width"))
    channels = config.get("out_channels", config["in_channels"])
    sample = TensorSpec("sample", "float32", ("batch", channels, "image_height", "image_width"))
    return graph_spec("vae_decoder", [latents], [sample])


def _encoder_spec(config: Mapping[str, Any], certain: bool) -> GraphSpec:
    """A picture in [-1, 1] to its latents as the sampler has them: their mean and log-variance, on the channel axis, or
    themselves where they are ``certain``."""
    name, channels = ("latent_sample", 1) if certain else ("latent_parameters", 2)
    sample = TensorSpec("sample", "float32", ("batch", config["in_channels"], "image_height", "image_width"))
    shape = ("batch", channels * config["latent_channels"], "height", "width")
    return graph_spec("vae_encoder", [sample], [TensorSpec(name, "float32", shape)])


def _decoder(load: Load) -> GraphModule:
    def call(network: Any, latents: Tensor) -> tuple[Tensor, ...]:
        return (_tensor_of(network.decode(latents / network.config.scaling_factor + _shift_of(network))),)

    return GraphModule(load("vae"), call).eval()


def _tensor_of(result: Any) -> Tensor:
    """What an autoencoder gives: the tensor, or diffusers' record of one."""
    tensor: Tensor = result if isinstance(result, Tensor) else result[0]
    return tensor


def _encoder(load: Load, certain: bool) -> GraphModule:
    def call(network: Any, sample: Tensor) -> tuple[Tensor, ...]:
        factor = network.config.scaling_factor
        encoded = _tensor_of(network.encode(sample))
        if certain:
            channels = network.config.latent_channels
            return ((encoded[:, :channels] - _shift_of(network)) * factor,)
        mean, logvar = encoded.chunk(2, dim=1)
        logvar = logvar.clamp(-30.0, 20.0) + 2 * math.log(factor)
        return (torch.cat([(mean - _shift_of(network)) * factor, logvar], dim=1),)

    return GraphModule(load("vae"), call).eval()
