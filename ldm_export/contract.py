"""What the graphs of a bundle are for, and their names, dtypes and shapes: the one source for export, runtime and C++.

A bundle's graphs fill *roles* (`Roles`), and a runtime knows nothing else of a model:

    text_encoder, any number    token ids (B, L) -> states
    image_encoder, or none      pixels (B, 3, S, S) in [0, 1], has_picture (B,) -> image_tokens (B, T, width)
    conditioner, or none        states, and what was asked for -> inputs of the denoiser
    denoiser                    sample (B, C, h, w), timestep (B,), conditions -> out_sample (B, C, h, w)
    control, any number         sample, timestep, a picture, conditions -> residuals of the denoiser
    vae_decoder, vae_encoder    latents as the sampler has them <-> pixels in [-1, 1]

A *control* (ControlNet, 2302.05543) takes the denoiser's own ``sample``, ``timestep`` and any of its conditions under
their names, and the picture that controls as ``control_image``, pixels in [0, 1] (B, 3, H, W), or as
``control_latents`` (B, C, h, w), what the VAE encoder makes of it. Its outputs are the residuals, inputs of the
denoiser (`residuals_of`), which are sums over the controls, each times its scale, or zeros of 1 for each free size.

A *source* says where an input comes from: ``<text encoder>.<output>``, ``<image encoder>.image_tokens``,
``conditioner.<output>``, or one of `REQUEST_SOURCES`. The conditioner's inputs are named by their sources; those of the
denoiser, which keep the names that its family has, are mapped to theirs by `Roles.conditions`.

A dimension that is a string is free; the same string is the same size within one graph. ``timestep`` is float32, since
the samplers with evenly spaced noise levels ask for timesteps between the integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

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


def graph_spec(name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> GraphSpec:
    """A graph in a folder of its own, ``<name>/model.onnx``."""
    return GraphSpec(f"{name}/model.onnx", tuple(inputs), tuple(outputs))


REQUEST_SOURCES: Mapping[str, tuple[TensorSpec, ...]] = {
    "height": (TensorSpec("height", "float32", ()),),
    "width": (TensorSpec("width", "float32", ()),),
    "guidance": (TensorSpec("guidance", "float32", ()),),
    "guidance_weight": (TensorSpec("guidance_weight", "float32", ()),),
    "has_prompt": (TensorSpec("has_prompt", "float32", ("batch",)),),
    "is_negative": (TensorSpec("is_negative", "float32", ("batch",)),),
    "class_labels": (
        TensorSpec("class_labels", "int64", ("batch",)),
        TensorSpec("class_labels", "float32", ("batch", "features")),
    ),
    "image_scale": (TensorSpec("image_scale", "float32", ("batch",)),),
    "image_latents": (TensorSpec("image_latents", "float32", ("batch", "channels", "height", "width")),),
}
"""What a request gives to graphs, of which kinds, by name: the picture's sizes in pixels; the guidance scale, and that
less 1; for each row 1 if a text was given and 0 if none was; 1 if the row is of the prediction without the prompt, else
0; classes, as numbers or as features; how much an IP-Adapter's picture counts, 0 without one; further channels that the
denoiser reads beside the sample: the latents of a picture that is edited, or before them, one channel more, a mask, 1
where the picture is drawn anew and its latents are of grey. Both are latents as the sampler has them."""
THREE_ROWS, TWO_ROWS, INPUT, NONE = "three_rows", "two_rows", "input", "none"
GUIDANCE_KINDS = (THREE_ROWS, TWO_ROWS, INPUT, NONE)
IMAGE_GUIDANCE = 1.5
"""Default scale of the guidance towards the picture that is edited, as diffusers' InstructPix2Pix pipelines have it."""


@dataclass(frozen=True)
class Guidance:
    """How pictures are guided towards the prompt (classifier-free guidance, 2207.12598).

    Attributes
    ----------
    kind : ``two_rows``, two predictions are combined, with the prompt and without; ``three_rows``, of a model that
        edits a picture, one with neither, one with the picture and one with both; ``input``, the denoiser is given the
        scale; ``none``, there is one prediction, as it is
    scale : the default; with ``none`` what was trained into the denoiser, 1 being nothing, which cannot be changed
    """

    kind: str
    scale: float

    def takes_two_rows(self, scale: float = math.inf) -> bool:
        """Whether each picture takes two rows of a call, without the prompt and with it; at a scale of 1 and below
        guidance is off."""
        return self.kind == TWO_ROWS and scale > 1

    def rows(self, scale: float = math.inf, image_scale: float = math.inf) -> int:
        """Rows of a call that each picture takes; three have ``image_scale``, below 1 of which both guidances are off,
        as in diffusers."""
        if self.kind == THREE_ROWS:
            return 3 if scale > 1 and image_scale >= 1 else 1
        return 1 + self.takes_two_rows(scale)


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder, with how texts become its token ids.

    Attributes
    ----------
    graph : its graph's name
    tokenizer : the folder of the tokenizer's files in the bundle
    kind : what reads those files: ``clip``, or ``tokenizers`` for a whole ``tokenizer.json``
    length : token ids of a text, with start, end and padding
    """

    graph: str
    tokenizer: str
    kind: str
    length: int


@dataclass(frozen=True)
class Roles:
    """Assignment of a bundle's graphs, by name, to roles, and what they are given.

    Attributes
    ----------
    text_encoders : in the order in which texts are read
    conditioner : None where the denoiser reads what text encoders and the request give as it is
    conditions : source of each input of the denoiser but ``sample``, ``timestep`` and the residuals
    controls : graph of each ControlNet, by the name that it is asked for by; its outputs are the residuals
    image_encoder : graph that makes tokens of an IP-Adapter's picture; None where there is none
    """

    denoiser: str
    vae_decoder: str
    vae_encoder: str
    guidance: Guidance
    text_encoders: tuple[TextEncoder, ...] = ()
    conditioner: str | None = None
    conditions: Mapping[str, str] = field(default_factory=dict)
    controls: Mapping[str, str] = field(default_factory=dict)
    image_encoder: str | None = None

    @property
    def graphs(self) -> tuple[str, ...]:
        """Names of the graphs, in the order in which they run."""
        encoders = [encoder.graph for encoder in self.text_encoders]
        conditioner = [] if self.conditioner is None else [self.conditioner]
        if self.image_encoder is not None:
            encoders.append(self.image_encoder)
        return (*encoders, *conditioner, *self.controls.values(), self.denoiser, self.vae_decoder, self.vae_encoder)

    def named(self, name: str) -> tuple[str, ...]:
        """The graphs that a role's name means, or the one graph of this name."""
        if name == "text_encoder":
            return tuple(encoder.graph for encoder in self.text_encoders)
        if name == "control":
            return tuple(self.controls.values())
        by_role = {"denoiser": self.denoiser, "vae_decoder": self.vae_decoder, "vae_encoder": self.vae_encoder}
        graph = by_role.get(name, self.conditioner if name == "conditioner" else name)
        return () if graph is None else (graph,)

    def sources(self, graphs: Mapping[str, GraphSpec]) -> frozenset[str]:
        """Every source that a denoising call reads, by way of the conditioner or not."""
        of_conditioner = () if self.conditioner is None else graphs[self.conditioner].inputs
        direct = (source for source in self.conditions.values() if not source.startswith("conditioner."))
        return frozenset((*direct, *(tensor.name for tensor in of_conditioner)))


RESIDUAL = "residual_"
"""What the names of residuals begin with, before their number."""


def residuals_of(denoiser: GraphSpec, roles: Roles) -> tuple[TensorSpec, ...]:
    """The denoiser's inputs that controls make."""
    known = ("sample", "timestep", *roles.conditions)
    return tuple(tensor for tensor in denoiser.inputs if roles.controls and tensor.name not in known)


def tokens_read(roles: Roles, graphs: Mapping[str, GraphSpec]) -> int:
    """Tokens of the states that the denoiser reads; 1 where it reads none."""
    for tensor in graphs[roles.denoiser].inputs:
        graph, _, output = roles.conditions.get(tensor.name, "").partition(".")
        if len(tensor.shape) > 1 and output:
            name = roles.conditioner if graph == "conditioner" else graph
            given = next(each for each in graphs[name or ""].outputs if each.name == output)
            if isinstance(tensor.shape[1], str) and isinstance(given.shape[1], int):
                return given.shape[1]
    return 1


Value = TypeVar("Value")
"""An array, or the name of one in a graph."""


def conditions_of(
    roles: Roles,
    graphs: Mapping[str, GraphSpec],
    sources: Mapping[str, Value],
    run: Callable[[str, Mapping[str, Value]], Mapping[str, Value]],
) -> dict[str, Value]:
    """The denoiser's inputs beside ``sample`` and ``timestep``, by way of the conditioner where there is one.

    Parameters
    ----------
    sources : what text encoders and the request give
    run : runs a graph, by its name, on inputs by theirs
    """
    known = dict(sources)
    if roles.conditioner is not None:
        given = {tensor.name: known[tensor.name] for tensor in graphs[roles.conditioner].inputs}
        known |= {f"conditioner.{name}": value for name, value in run(roles.conditioner, given).items()}
    return {name: known[source] for name, source in roles.conditions.items()}


def loop_spec(name: str, graphs: Mapping[str, GraphSpec], roles: Roles, *, draws: int) -> GraphSpec:
    """A whole sampling loop as one graph, from the graphs that it is made of.

    ``noise`` is what the latents start from and ``step_noise[k]`` what the k-th row that adds noise adds, both N(0, I);
    ``draws`` is how many such rows the plan has. Where guidance takes two rows, the denoiser is called with and without
    the prompt, and ``has_negative_prompt`` is 1 for each picture that a negative text was given for, else 0. A second
    text encoder's ids are ``input_ids_2``.
    """
    denoiser, sources = graphs[roles.denoiser], roles.sources(graphs)
    guided = roles.guidance.takes_two_rows()
    shape = ("batch", *denoiser.outputs[0].shape[1:])
    inputs = []
    for encoder, suffix in zip(roles.text_encoders, loop_suffixes(roles), strict=True):
        ids = graphs[encoder.graph].inputs[0]
        names = ("input_ids", "negative_input_ids") if guided else ("input_ids",)
        inputs += [TensorSpec(f"{name}{suffix}", ids.dtype, ids.shape) for name in names]
    if guided and "has_prompt" in sources:
        inputs.append(TensorSpec("has_negative_prompt", "float32", ("batch",)))
    if "class_labels" in sources:
        inputs.append(labels_of(graphs, roles))
    inputs.append(TensorSpec("noise", "float32", shape))
    if draws:
        inputs.append(TensorSpec("step_noise", "float32", (draws, *shape)))
    if guided or not sources.isdisjoint(("guidance", "guidance_weight")):
        inputs.append(TensorSpec("guidance_scale", "float32", ()))
    channels = graphs[roles.vae_decoder].outputs[0].shape[1]
    images = TensorSpec("images", "uint8", ("batch", "image_height", "image_width", channels))
    return GraphSpec(f"loops/{name}.onnx", tuple(inputs), (images, TensorSpec("latents", "float32", shape)))


def loop_suffixes(roles: Roles) -> list[str]:
    """What the names of a loop's token ids end in, for each text encoder: nothing, ``_2``, ``_3``, …"""
    return ["", *(f"_{number}" for number in range(2, len(roles.text_encoders) + 1))][: len(roles.text_encoders)]


def labels_of(graphs: Mapping[str, GraphSpec], roles: Roles) -> TensorSpec:
    """The input that class labels go to, under the name ``class_labels``."""
    denoiser = {tensor.name: tensor for tensor in graphs[roles.denoiser].inputs}
    inputs = [denoiser[name] for name, source in roles.conditions.items() if source == "class_labels"]
    if roles.conditioner is not None:
        inputs += [tensor for tensor in graphs[roles.conditioner].inputs if tensor.name == "class_labels"]
    return TensorSpec("class_labels", inputs[0].dtype, inputs[0].shape)


BRANCH = ("down", "up", "scale", "gain")
"""Inputs of a layer's branch, in a graph that takes adapters (:mod:`ldm_export.graph.branches`); the first two are in
all."""


def branch_input(layer: str, role: str) -> str:
    """Name of an input of a layer's branch, one of `BRANCH`."""
    return f"lora.{layer}.{role}"


def is_branch_input(name: str) -> bool:
    """Whether an input of a graph is one of a branch."""
    return name.startswith("lora.") and name.rpartition(".")[2] in BRANCH


def branch_layers(graph: GraphSpec) -> list[str]:
    """The layers of a graph that have a branch."""
    end = f".{BRANCH[0]}"
    names = (tensor.name for tensor in graph.inputs if is_branch_input(tensor.name))
    return [name.removeprefix("lora.").removesuffix(end) for name in names if name.endswith(end)]


STEP = "step"
"""The graph of what follows a call of the denoiser; engines have it, bundles do not."""
REMEMBERED = 4
"""Values that go from row to row of a plan: the newest of the five that a row weighs is its own."""
ROW_FIELDS = ("timestep", "input_scale", "from_output", "from_sample", "clip", "keep", "direct", "noise")
"""Numbers of a plan's row (:class:`ldm_export.plan.table.Row`), beside its weights."""
WEIGHT_FIELDS = tuple(f"weight_{age}" for age in range(REMEMBERED + 1))
"""A row's weights, newest first."""
STEP_CELLS = (
    *(name for name in ROW_FIELDS if name not in ("timestep", "input_scale", "noise")),
    *WEIGHT_FIELDS,
    "noise",
    "guidance_scale",
    "next_input_scale",
    "next_timestep",
)
"""What a row of a plan is to ``step``, a number each; a clip that is off is infinite."""


def step_spec(denoiser: GraphSpec) -> GraphSpec:
    """What follows a call of the denoiser, guidance and one row of a plan, as a graph of its own.

    ``out_sample`` and the next ``sample`` and ``timestep`` have as many rows as the latents, or twice as many with
    guidance.
    """
    channels = denoiser.outputs[0].shape[1]

    def tensor(name: str, *leading: int | str) -> TensorSpec:
        return TensorSpec(name, "float32", (*leading, channels, "height", "width"))

    return graph_spec(
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
            TensorSpec("timestep", "float32", ("rows",)),
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
