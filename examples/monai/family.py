"""Latent diffusion models of MONAI in two dimensions: ``DiffusionModelUNet`` and ``AutoencoderKL``.

`save` writes ``my_model`` from networks that were trained. Pictures are as MONAI's, from 0 to 1, and a bundle's from -1
to 1. A class is read as MONAI's tutorials on guidance have it: its number as the one value of the context, -1 for none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm_export.checkpoint import LatentDiffusion
from ldm_export.checkpoint.kind import CheckpointKind, Component, PipelineClass
from ldm_export.contract import NONE, REQUEST_SOURCES, TWO_ROWS, Guidance, Roles, TensorSpec, graph_spec
from ldm_export.errors import CheckpointError
from ldm_export.families.base import CONDITIONER, GraphModule, ModelGraph, common_facts, conditioner_graph
from ldm_export.families.libraries import without_weights

NETWORKS = {network.__name__: network for network in (DiffusionModelUNet, AutoencoderKL)}
SCHEDULES = {"linear_beta": "linear", "scaled_linear_beta": "scaled_linear"}


def save(
    folder: Path,
    unet: tuple[DiffusionModelUNet, Mapping[str, Any]],
    autoencoder: tuple[AutoencoderKL, Mapping[str, Any]],
    scheduler: Mapping[str, Any],
    sample_size: int,
    scale_factor: float,
    class_count: int | None = None,
) -> None:
    """Write a checkpoint: networks with the arguments that they were made with, and those of ``DDIMScheduler``."""
    index: dict[str, Any] = {"_class_name": "LatentDiffusionInferer", "scheduler": ["monai", "DDIMScheduler"]}
    for name, (network, arguments), own in (
        ("unet", unet, {"sample_size": sample_size, "class_count": class_count}),
        ("vae", autoencoder, {"scale_factor": scale_factor}),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps({**arguments, **own}))
        save_file(network.state_dict(), folder / name / "diffusion_pytorch_model.safetensors")
        index[name] = ["monai", type(network).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    if unknown := scheduler.keys() & {"steps_offset", "clip_sample_min", "clip_sample_max"}:
        raise ValueError(f"{min(unknown)} is not translated; write scheduler_config.json yourself")
    given = {"clip_sample": True, "set_alpha_to_one": True, "beta_start": 1e-4, "beta_end": 2e-2, **scheduler}
    config = {"_class_name": "DDIMScheduler", "timestep_spacing": "linspace", **given}
    config["beta_schedule"] = SCHEDULES[config.pop("schedule", "linear_beta")]
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))


def _build(name: str, config: dict[str, Any]) -> nn.Module:
    own = ("sample_size", "scale_factor", "class_count")  # no arguments of the network
    with without_weights():
        network: nn.Module = NETWORKS[name](**{key: value for key, value in config.items() if key not in own})
    network.config = config
    return network


def _component(name: str) -> Component:
    return Component((name,), _build, lambda network: dict(network.config))


KIND = CheckpointKind(
    components={"unet": _component("DiffusionModelUNet"), "vae": _component("AutoencoderKL")},
    denoiser="unet",
    optional_parts=(),
    pipelines={"LatentDiffusionInferer": PipelineClass()},
    saved_as=("LatentDiffusionInferer",),
    default_pipeline=lambda index: PipelineClass(),
    latent_size=lambda index, configs, release: (configs["unet"]["sample_size"],) * 2,
    pixels_per_latent=lambda configs: 1 << (len(configs["vae"]["channels"]) - 1),
)


class FAMILY:
    """A checkpoint of MONAI's networks; see `ldm_export.families.base.Family`."""

    kind = KIND
    notes, tokenizers = (), {}

    def __init__(self, checkpoint: LatentDiffusion):
        self._checkpoint, self._unet, self._vae = checkpoint, checkpoint.configs["unet"], checkpoint.configs["vae"]
        self._classes: int | None = self._unet["class_count"]

    def check(self) -> None:
        width = self._unet.get("cross_attention_dim") if self._unet.get("with_conditioning") else None
        if self._unet["spatial_dims"] != 2 or width != (1 if self._classes else None):
            raise CheckpointError(f"{self._checkpoint.path} has not two dimensions, or reads more than a class number.")
        assert self._checkpoint.drawing  # which refuses a scheduler that no sampler is

    @property
    def roles(self) -> Roles:
        guidance = Guidance(TWO_ROWS if self._classes else NONE, 3.0 if self._classes else 1.0)
        made = (CONDITIONER, {"context": f"{CONDITIONER}.context"}) if self._classes else (None, {})
        return Roles("unet", "vae_decoder", "vae_encoder", guidance, (), *made)

    @property
    def facts(self) -> Mapping[str, Any]:
        return {**common_facts(self._checkpoint, self._classes), "patch_size": self._multiple}

    @property
    def _multiple(self) -> int:
        """What latents' sizes are multiples of: each level of the UNet but the first halves them."""
        return 1 << (len(self._unet["channels"]) - 1)

    @property
    def graphs(self) -> Sequence[ModelGraph]:
        latents = ("batch", self._vae["latent_channels"], "height", "width")
        picture = TensorSpec("sample", "float32", ("batch", self._vae["in_channels"], "image_height", "image_width"))
        context = TensorSpec("context", "float32", ("batch", 1, 1))
        asked = [REQUEST_SOURCES[name][0] for name in ("class_labels", "is_negative")]
        inputs = [TensorSpec("sample", "float32", latents), TensorSpec("timestep", "float32", ("batch",))]
        inputs += [context] if self._classes else []
        parameters = TensorSpec("latent_parameters", "float32", ("batch", 2 * latents[1], *latents[2:]))
        load, factor = self._checkpoint.load, self._vae["scale_factor"]

        def graph(name: str, component: str, inputs: Sequence[TensorSpec], output: TensorSpec, call: Any) -> ModelGraph:
            spec = graph_spec(name, inputs, [output])
            module = lambda: GraphModule(load(component), call).eval()  # noqa: E731
            return ModelGraph(spec, module, component, patch_size=self._multiple)

        def encode(vae: Any, sample: Tensor) -> tuple[Tensor]:
            mean, deviation = vae.encode(sample / 2 + 0.5)
            return (torch.cat([mean * factor, 2 * deviation.log() + 2 * math.log(factor)], dim=1),)

        sample, out = TensorSpec("latent_sample", "float32", latents), TensorSpec("out_sample", "float32", latents)
        return [
            *([conditioner_graph(ClassNumber(), asked, [context], self._classes)] if self._classes else []),
            graph("unet", "unet", inputs, out, lambda unet, *given: (unet(*given),)),
            graph("vae_decoder", "vae", [sample], picture, lambda vae, latent: (vae.decode(latent / factor) * 2 - 1,)),
            graph("vae_encoder", "vae", [picture], parameters, encode),
        ]


class ClassNumber(nn.Module):
    """The context of a class, (B, 1, 1): its number, or -1 in the rows that guidance goes away from."""

    config: Mapping[str, Any] = {}

    def forward(self, class_labels: Tensor, is_negative: Tensor) -> tuple[Tensor]:
        return (torch.where(is_negative > 0.5, -1.0, class_labels.float())[:, None, None],)
