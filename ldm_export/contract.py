"""Names, dtypes and shapes of every graph: the one source for export, runtime and C++.

The names and meanings are those of optimum-onnx, so that its pipelines open a bundle as it stands. A dimension that is
a string is free; the same string is the same size within one graph. ``timestep`` is float32, since the samplers with
evenly spaced noise levels ask for timesteps between the integers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldm_export.errors import BundleError, InputError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: ``dtype`` is numpy's name, a string in ``shape`` is a free dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One graph of a bundle: where its file is, what it takes and what it gives."""

    path: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def name(self) -> str:
        """The folder that the graph is in, such as ``unet``; of a loop its file, such as ``loops/ddim-20``."""
        return self.path.removesuffix("/model.onnx").removesuffix(".onnx")


def _graph(name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> GraphSpec:
    return GraphSpec(f"{name}/model.onnx", tuple(inputs), tuple(outputs))


def unet_spec(config: Mapping[str, Any]) -> GraphSpec:
    """The denoiser, from the keys of its ``config.json``; inputs that the network does not have are left out."""
    inputs = [
        TensorSpec("sample", "float32", ("batch", config["in_channels"], "height", "width")),
        TensorSpec("timestep", "float32", ()),
    ]
    kinds = (*config["down_block_types"], *config["up_block_types"], config["mid_block_type"] or "")
    if any("CrossAttn" in kind for kind in kinds):
        width = config["cross_attention_dim"]
        width = width if isinstance(width, int) else width[0]
        inputs.append(TensorSpec("encoder_hidden_states", "float32", ("batch", "tokens", width)))
    if config["class_embed_type"] in ("identity", "projection"):
        features = config["projection_class_embeddings_input_dim"] or config["block_out_channels"][0] * 4
        inputs.append(TensorSpec("class_labels", "float32", ("batch", features)))
    elif config["class_embed_type"] or config["num_class_embeds"]:
        inputs.append(TensorSpec("class_labels", "int64", ("batch",)))
    if config["addition_embed_type"] == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        inputs.append(TensorSpec("text_embeds", "float32", ("batch", pooled)))
        inputs.append(TensorSpec("time_ids", "float32", ("batch", 6)))
    if config["time_cond_proj_dim"]:
        inputs.append(TensorSpec("timestep_cond", "float32", ("batch", config["time_cond_proj_dim"])))
    out = TensorSpec("out_sample", "float32", ("batch", config["out_channels"], "height", "width"))
    return _graph("unet", inputs, [out])


def takes_two_rows(unet: GraphSpec, model: Mapping[str, Any], guidance: float = math.inf) -> bool:
    """Whether each picture takes two rows of a call, with the prompt and without (guidance, 2207.12598).

    Parameters
    ----------
    model : the manifest's facts
    guidance : the scale; at 1 and below it is off
    """
    names = {tensor.name for tensor in unet.inputs}
    text_alone = "encoder_hidden_states" in names and "timestep_cond" not in names
    return guidance > 1 and text_alone and not model.get("guidance_folded")


def text_encoder_spec(config: Mapping[str, Any], name: str, *, length: int, all_states: bool) -> GraphSpec:
    """A CLIP text model of ``length`` tokens; ``all_states`` adds every layer's hidden states, which SDXL reads the
    last but one of."""
    width = config["hidden_size"]
    states = TensorSpec("last_hidden_state", "float32", ("batch", length, width))
    if config["with_projection"]:
        outputs = [TensorSpec("text_embeds", "float32", ("batch", config["projection_dim"])), states]
    else:
        outputs = [states, TensorSpec("pooler_output", "float32", ("batch", width))]
    if all_states:
        outputs += [
            TensorSpec(f"hidden_states.{i}", "float32", states.shape) for i in range(config["num_hidden_layers"] + 1)
        ]
    return _graph(name, [TensorSpec("input_ids", "int64", ("batch", length))], outputs)


def vae_decoder_spec(config: Mapping[str, Any]) -> GraphSpec:
    """Unscaled latents to a picture in about [-1, 1]."""
    latents = TensorSpec("latent_sample", "float32", ("batch", config["latent_channels"], "height", "width"))
    sample = TensorSpec("sample", "float32", ("batch", config["out_channels"], "image_height", "image_width"))
    return _graph("vae_decoder", [latents], [sample])


def vae_encoder_spec(config: Mapping[str, Any]) -> GraphSpec:
    """A picture in [-1, 1] to the mean and log-variance of its unscaled latents, on the channel axis."""
    sample = TensorSpec("sample", "float32", ("batch", config["in_channels"], "image_height", "image_width"))
    parameters = TensorSpec("latent_parameters", "float32", ("batch", 2 * config["latent_channels"], "height", "width"))
    return _graph("vae_encoder", [sample], [parameters])


def loop_spec(name: str, graphs: Mapping[str, GraphSpec], *, guided: bool, draws: int) -> GraphSpec:
    """A whole sampling loop as one graph, from the graphs that it is made of.

    ``noise`` is what the latents start from and ``step_noise[k]`` what the k-th row that adds noise adds, both N(0, I);
    ``draws`` is how many such rows the plan has. A ``guided`` loop calls the UNet with and without the prompt.
    """
    unet = {tensor.name: tensor for tensor in (*graphs["unet"].inputs, *graphs["unet"].outputs)}
    shape = ("batch", *unet["out_sample"].shape[1:])
    inputs = []
    if "encoder_hidden_states" in unet:
        ids = graphs["text_encoder"].inputs[0]
        inputs += [ids, *([TensorSpec("negative_input_ids", ids.dtype, ids.shape)] if guided else [])]
    if "class_labels" in unet:
        inputs.append(unet["class_labels"])
    inputs.append(TensorSpec("noise", "float32", shape))
    if draws:
        inputs.append(TensorSpec("step_noise", "float32", (draws, *shape)))
    if guided or "timestep_cond" in unet:
        inputs.append(TensorSpec("guidance_scale", "float32", ()))
    channels = graphs["vae_decoder"].outputs[0].shape[1]
    images = TensorSpec("images", "uint8", ("batch", "image_height", "image_width", channels))
    return GraphSpec(f"loops/{name}.onnx", tuple(inputs), (images, TensorSpec("latents", "float32", shape)))


STEP = "step"
"""The graph of what follows a call of the UNet; engines have it, bundles do not."""
REMEMBERED = 4
"""Values that go from row to row of a plan: the newest of the five that a row weighs is its own."""
ROW_FIELDS = ("timestep", "input_scale", "from_output", "from_sample", "clip", "keep", "direct", "noise")
"""Numbers of a plan's row (:class:`ldm_export.plan.table.Row`), beside its weights."""
WEIGHT_FIELDS = tuple(f"weight_{age}" for age in range(REMEMBERED + 1))
"""A row's weights, newest first."""
STEP_CELLS = (
    *(name for name in ROW_FIELDS if name not in ("input_scale", "noise")),
    *WEIGHT_FIELDS,
    "noise",
    "guidance_scale",
    "next_input_scale",
)
"""What a row of a plan is to ``step``, a number each. The timestep comes first, so that where the row lies is where the
UNet finds its timestep, too; a clip that is off is infinite."""


def step_spec(unet: GraphSpec) -> GraphSpec:
    """What follows a call of the UNet, guidance and one row of a plan, as a graph of its own.

    ``out_sample`` and the next ``sample`` have as many rows as the latents, or twice as many with guidance.
    """
    channels = unet.outputs[0].shape[1]

    def tensor(name: str, *leading: int | str) -> TensorSpec:
        return TensorSpec(name, "float32", (*leading, channels, "height", "width"))

    return _graph(
        STEP,
        [
            tensor("latents", "batch"),
            tensor("remembered", REMEMBERED, "batch"),
            tensor("out_sample", "rows"),
            tensor("noise", "batch"),
            TensorSpec("row", "float32", (len(STEP_CELLS),)),
        ],
        [
            tensor("next_latents", "batch"),
            tensor("next_remembered", REMEMBERED, "batch"),
            tensor("sample", "rows"),
        ],
    )


def check_inputs(graph: GraphSpec, arrays: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, int]:
    """Raise InputError unless ``arrays`` has exactly the graph's inputs, with their dtypes and shapes; gives the sizes
    of the free dimensions."""
    names = [tensor.name for tensor in graph.inputs]
    if set(arrays) != set(names):
        raise InputError(f"{graph.name} was given the inputs {sorted(arrays)}; it takes {sorted(names)}.")
    sizes: dict[str, int] = {}
    for tensor in graph.inputs:
        array = arrays[tensor.name]
        given = f"{graph.name} input {tensor.name!r} has shape {array.shape} and dtype {array.dtype}"
        allowed = f"({', '.join(map(str, tensor.shape))}) {tensor.dtype}"
        fits = array.dtype == tensor.dtype and array.ndim == len(tensor.shape)
        for size, dimension in zip(array.shape, tensor.shape, strict=False):
            expected = sizes.setdefault(dimension, size) if isinstance(dimension, str) else dimension
            fits = fits and size == expected
        if not fits:
            known = f" with {sizes}" if sizes else ""
            raise InputError(f"{given}; this bundle accepts {allowed}{known}. Give it an array of that kind.")
    return sizes


def check_outputs(graph: GraphSpec, arrays: Mapping[str, np.ndarray[Any, Any]], sizes: dict[str, int]) -> None:
    """Raise BundleError unless what a graph gave is of the dtypes and shapes that it says, which ONNX Runtime does not
    check; ``sizes`` are of the free dimensions of its inputs."""
    for tensor in graph.outputs:
        array = arrays[tensor.name]
        fits = array.dtype == tensor.dtype and array.ndim == len(tensor.shape)
        for size, dimension in zip(array.shape, tensor.shape, strict=False):
            fits = fits and size == (sizes.setdefault(dimension, size) if isinstance(dimension, str) else dimension)
        if not fits:
            raise BundleError(
                f"{graph.path} gave {tensor.name!r} of shape {array.shape} and dtype {array.dtype}; it says "
                f"{tensor.shape} {tensor.dtype}, with {sizes}. Export the bundle anew."
            )
