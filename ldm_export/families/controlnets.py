"""ControlNets (2302.05543) as graphs: copies of a denoiser's first half, which add to it what a picture says.

Each is a graph of its own, ``controlnet``, ``controlnet_2``, …, of diffusers' own class. Its outputs, the *residuals*,
are inputs of the denoiser: of a UNet one for each skip and one for the middle (`unet_control_graphs`), of a Stable
Diffusion 3 one for each of some of its blocks (`sd3_control_graphs`). A denoiser without any in use is given zeros of
one element for each free size, which cost it an addition each: less than a hundredth of its time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_export.bundle.roles import CONTROL_NAME
from ldm_export.checkpoint import LatentDiffusion
from ldm_export.checkpoint.added import AddedNetwork
from ldm_export.contract import RESIDUAL, GraphSpec, TensorSpec, graph_spec
from ldm_export.errors import CheckpointError, InputError
from ldm_export.families.base import GraphModule, ModelGraph
from ldm_export.families.libraries import from_diffusers
from ldm_export.families.patches import make_traceable

UNET_CONTROL = from_diffusers("ControlNetModel")
SD3_CONTROL = from_diffusers("SD3ControlNetModel")
Config = Mapping[str, Any]


def with_controls(checkpoint: LatentDiffusion, given: Sequence[tuple[str, Path]]) -> LatentDiffusion:
    """This checkpoint with ControlNets, each a name and a folder.

    Raises
    ------
    CheckpointError
        If a folder has no ControlNet for this kind of model.
    InputError
        If a name is none that can be asked for, or is given twice, or there are no ControlNets of this kind of model.
    """
    controls: dict[str, AddedNetwork] = {}
    for name, folder in given:
        if checkpoint.kind.control is None:
            raise InputError(
                f"{folder} was given as a ControlNet; a model with a {checkpoint.kind.denoiser} as {checkpoint.name} "
                "has cannot be exported with one. Leave it out."
            )
        if not CONTROL_NAME.fullmatch(name) or name in controls:
            what = "was given twice" if name in controls else "is no name of letters, digits, '.', '-' and '_'"
            raise InputError(f"The ControlNet name {name!r} {what}. Give NAME=FOLDER, such as canny={folder}.")
        controls[name] = AddedNetwork(folder, checkpoint.kind.control)
        controls[name].check()
    return replace(checkpoint, controls=controls)


def control_graph_names(checkpoint: LatentDiffusion) -> dict[str, str]:
    """The graph of each ControlNet of a checkpoint, by the name that it is asked for by."""
    return {
        name: "controlnet" if number == 1 else f"controlnet_{number}"
        for number, name in enumerate(checkpoint.controls, 1)
    }


def check_controls(checkpoint: LatentDiffusion, faults: Callable[[Config], list[str]]) -> None:
    """Raise CheckpointError for the first fault that a ControlNet's config has."""
    for name, control in checkpoint.controls.items():
        for fault in faults(control.config):
            raise CheckpointError(f"The ControlNet {name} ({control.folder}): {fault}")


def _graphs(
    checkpoint: LatentDiffusion,
    specs: Callable[[str, Config], GraphSpec],
    wrapped: Callable[[AddedNetwork, GraphSpec], GraphModule],
    **options: Any,
) -> list[ModelGraph]:
    made = []
    for name, graph in control_graph_names(checkpoint).items():
        control = checkpoint.controls[name]
        spec = specs(graph, control.config)
        made.append(ModelGraph(spec, partial(wrapped, control, spec), graph, control.config, **options))
    return made


# --- of a UNet -------------------------------------------------------------------------------------------------------


def unet_residuals(config: Config) -> tuple[TensorSpec, ...]:
    """What a ControlNet of this config, or for a UNet of it, gives: a tensor for each skip, and one for the middle."""
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    counts = [layers] * len(widths) if isinstance(layers, int) else layers
    levels = [(widths[0], 0)]
    for level, (width, count) in enumerate(zip(widths, counts, strict=True)):
        levels += [(width, level)] * count
        if level < len(widths) - 1:
            levels.append((width, level + 1))
    levels.append((widths[-1], len(widths) - 1))
    return tuple(
        TensorSpec(f"{RESIDUAL}{k}", "float32", ("batch", width, *(f"{side}_over_{1 << level}" for side in SIDES)))
        for k, (width, level) in enumerate(levels)
    )


SIDES = ("height", "width")


def unet_control_faults(unet: Config, latents: int, pixels_per_latent: int, config: Config) -> list[str]:
    """What is wrong with a ControlNet of this config beside a UNet of that."""
    for key, meaning in (
        ("block_out_channels", "channels of the blocks"),
        ("layers_per_block", "layers of the blocks"),
        ("cross_attention_dim", "width of the text's states"),
        ("addition_embed_type", "further embedding"),
        ("projection_class_embeddings_input_dim", "width of that embedding"),
    ):
        own, of_unet = (_plain(each.get(key)) for each in (config, unet))
        if own != of_unet:
            return [
                f"its {meaning} ({key}) are {own}, and the UNet's {of_unet}. Use one that was trained for this model."
            ]
    if config["in_channels"] != latents:
        return [f"it reads {config['in_channels']} channels of latents, and there are {latents}. Use another."]
    if config["conditioning_channels"] != 3:
        return [f"it reads pictures of {config['conditioning_channels']} channels; 3 (RGB) are read here. Use another."]
    factor = 1 << (len(config["conditioning_embedding_out_channels"]) - 1)
    if factor != pixels_per_latent:
        return [
            f"it makes pictures {factor} times smaller, and the autoencoder {pixels_per_latent} times. "
            "Use one that was trained for this model."
        ]
    if config["global_pool_conditions"]:
        return ["it pools what it makes of a picture (global_pool_conditions), which is not done here. Use another."]
    if config["class_embed_type"] or config["num_class_embeds"] or config["encoder_hid_dim"]:
        return ["it reads classes or other states, which no picture's request has for it. Use another."]
    return []


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def unet_control_graphs(checkpoint: LatentDiffusion, denoiser: GraphSpec) -> list[ModelGraph]:
    """Graphs of the ControlNets of a checkpoint with a UNet, whose graph is ``denoiser``."""
    shared = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids")
    inputs = [tensor for tensor in denoiser.inputs if tensor.name in shared]
    picture = TensorSpec("control_image", "float32", ("batch", 3, "image_height", "image_width"))

    def spec(name: str, config: Config) -> GraphSpec:
        return graph_spec(name, [*inputs, picture], unet_residuals(config))

    return _graphs(checkpoint, spec, _unet_control)


def _unet_control(control: AddedNetwork, spec: GraphSpec) -> GraphModule:
    names = [tensor.name for tensor in spec.inputs]

    def call(network: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, inputs, strict=True))
        added = {name: given[name] for name in ("text_embeds", "time_ids") if name in given}
        skips, middle = network(
            given["sample"],
            given["timestep"],
            encoder_hidden_states=given.get("encoder_hidden_states"),
            controlnet_cond=given["control_image"],
            added_cond_kwargs=added,
            return_dict=False,
        )
        return (*skips, middle)

    return GraphModule(control.load(), call).eval()


# --- of a Stable Diffusion 3 -----------------------------------------------------------------------------------------


def sd3_residuals(config: Config) -> tuple[TensorSpec, ...]:
    """What a ControlNet of this config gives: a tensor for each of its blocks."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return tuple(
        TensorSpec(f"{RESIDUAL}{k}", "float32", ("batch", "patches", width)) for k in range(config["num_layers"])
    )


def sd3_control_faults(transformer: Config, first: Config, config: Config) -> list[str]:
    """What is wrong with a ControlNet of this config beside a transformer of that and a ``first`` ControlNet."""
    for key, meaning in (
        ("num_attention_heads", "attention heads"),
        ("attention_head_dim", "channels of a head"),
        ("in_channels", "channels of latents"),
        ("patch_size", "latents of a patch's side"),
        ("pooled_projection_dim", "width of the pooled text"),
        ("joint_attention_dim", "width of the text's states"),
    ):
        if config[key] != transformer[key] and not (key == "joint_attention_dim" and config[key] is None):
            return [
                f"its {meaning} ({key}) are {config[key]}, and the transformer's {transformer[key]}. "
                "Use one that was trained for this model."
            ]
    if config["extra_conditioning_channels"]:
        return ["it reads a mask beside its picture (extra_conditioning_channels), which none has here. Use another."]
    if config["num_layers"] != first["num_layers"]:
        return [
            f"it has {config['num_layers']} layers, and the first ControlNet {first['num_layers']}; what they give is "
            "added up layer by layer. Export them apart."
        ]
    return []


def sd3_control_graphs(checkpoint: LatentDiffusion, denoiser: GraphSpec) -> list[ModelGraph]:
    """Graphs of the ControlNets of a Stable Diffusion 3, whose transformer's graph is ``denoiser``."""
    inputs = {tensor.name: tensor for tensor in denoiser.inputs}
    vae = checkpoint.configs["vae"]
    picture = TensorSpec("control_latents", "float32", inputs["sample"].shape)

    def spec(name: str, config: Config) -> GraphSpec:
        states = [] if config["joint_attention_dim"] is None else ["encoder_hidden_states"]
        names = ["sample", "timestep", *states, "pooled_projections"]
        return graph_spec(name, [*(inputs[one] for one in names), picture], sd3_residuals(config))

    shift = vae["shift_factor"] * vae["scaling_factor"]
    wrapped = partial(_sd3_control, checkpoint, shift)
    return _graphs(checkpoint, spec, wrapped, patch_size=checkpoint.configs["transformer"]["patch_size"])


def _sd3_control(checkpoint: LatentDiffusion, shift: float, control: AddedNetwork, spec: GraphSpec) -> GraphModule:
    network = control.load()
    if network.pos_embed is None:  # Stable Diffusion 3.5's own have the transformer's
        network.pos_embed = checkpoint.load("transformer").pos_embed
    make_traceable(network.pos_embed)
    # some were trained with no pooled text, and with latents that are not shifted: diffusers tells both by one key
    plain = bool(control.config["force_zeros_for_pooled_projection"])
    names = [tensor.name for tensor in spec.inputs]

    def call(network: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, inputs, strict=True))
        pooled, picture = given["pooled_projections"], given["control_latents"]
        (residuals,) = network(
            hidden_states=given["sample"],
            controlnet_cond=picture + shift if plain else picture,
            encoder_hidden_states=given.get("encoder_hidden_states"),
            pooled_projections=torch.zeros_like(pooled) if plain else pooled,
            timestep=given["timestep"],
            return_dict=False,
        )
        return tuple(residuals)

    return GraphModule(network, call).eval()
