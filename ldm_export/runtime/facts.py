"""What a bundle must say of itself to be generated with, held when it is opened; the C++ runtime holds the same.

Numbers and texts of ``model`` in the manifest. A size is a whole number from 1 to 2**20 (`LARGEST_SIZE`):

    height, width, latent_channels, pixels_per_latent, default_steps     sizes
    default_sampler                         small letters and digits in words with - between, at most 100 characters
    class_count                             absent, null, or a size
    largest_size                            absent, or a size: pixels that a picture is high and wide at most
    strength_rounds_up                      absent, true or false: whether from an image a part of a step counts as one
    patch_size                              absent, or a size: latents a side of one of the denoiser's tokens, of which
                                            the latents' sizes are multiples

What each graph takes and gives, by its role (:class:`ldm_export.contract.Roles`). ``B``, ``h``, ``w``, ``H`` and ``W``
are free sizes, all of another name in one graph; all else is fixed and at least 1. ``C`` is ``latent_channels``; no
other tensor may be an input, and outputs may be more. float32 where nothing else is said:

    denoiser        sample (B, C, h, w), timestep (B); out_sample (B, C, h, w); further inputs are its conditions, each
                    of the type of its source, and residuals, if there are controls, (B, ...) with one fixed size
    control         sample (B, C, h, w), timestep (B), control_image (B, 3, H, W) or control_latents (B, C, h, w), any
                    condition of the denoiser's under its name; its outputs are the denoiser's residuals
    image_encoder   pixels (B, 3, S, S), has_picture (B); image_tokens (B, T, W)
    conditioner     inputs are sources, each of that source's type; outputs begin with B
    text_encoder    input_ids int64 (B, L), L being its ``length``; of its outputs those that are read begin with B
    vae_decoder     latent_sample (B, C, h, w); sample (B, K, H, W), K being 1 or 3
    vae_encoder     sample (B, K, H, W); latent_parameters (B, 2 C, h, w), mean and log-variance, or latent_sample
                    (B, C, h, w)
    denoiser        with guidance of three_rows also image_latents (B, C, h, w), under any name
    loops/*         noise, latents (B, C, h, w); images uint8 (B, H, W, K); of these as far as it takes them: step_noise
                    (rows, B, C, h, w), rows being those of its plan that add noise; guidance_scale (); input_ids and
                    negative_input_ids as the text encoder's, with _2, _3 … for further ones; has_negative_prompt (B);
                    class_labels as its source

A source's type is that of `ldm_export.contract.REQUEST_SOURCES`, or of the output that it names. A type fits where the
dtypes and ranks are the same and every size that both fix; a size that is free in the source is free in the input.

Known when graphs run: a tokenizer's ``model_max_length`` is L; decoded pictures are ``pixels_per_latent`` times as high
and as wide as their latents, and encoded ones that much smaller.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ldm_export.bundle import Bundle
from ldm_export.bundle.manifest import is_loop
from ldm_export.bundle.roles import LARGEST_SIZE
from ldm_export.contract import (
    REQUEST_SOURCES,
    THREE_ROWS,
    GraphSpec,
    Roles,
    TensorSpec,
    labels_of,
    loop_suffixes,
    residuals_of,
)
from ldm_export.errors import BundleError
from ldm_export.reading.documents import MalformedError

if TYPE_CHECKING:
    from ldm_export.runtime.tokenizer import Tokenizer

TOKENIZER_KINDS = ("clip", "tokenizers")
"""Kinds of tokenizers that are read (`ldm_export.runtime.tokenizer.READERS`)."""
SIZES = ("height", "width", "latent_channels", "pixels_per_latent", "default_steps")
PICTURE_CHANNELS = (1, 3)
LONGEST_NAME = 100

Shape = Sequence[int | str | tuple[int, ...]]
"""What a shape must be: a fixed size, one of several, or the name of a free one."""


def check_drawable(bundle: Bundle) -> None:
    """Raise BundleError unless the bundle says the facts, and has the graphs, that the module's docstring lists."""
    roles = bundle.roles
    try:
        check_model(bundle.manifest.model)
        check_graphs(bundle.manifest.graphs, roles, bundle.manifest.model["latent_channels"])
    except MalformedError as error:
        raise BundleError(f"Bundle {bundle.path}: manifest.json has {error}. Export it anew.") from error


def check_model(model: Mapping[str, Any]) -> None:
    """Raise MalformedError unless the manifest's ``model`` has what generating needs, each of its type and range."""

    def is_size(key: str) -> bool:
        value: Any = model.get(key)
        return type(value) is int and 1 <= value <= LARGEST_SIZE

    sampler = model.get("default_sampler")
    sound = {key: is_size(key) for key in SIZES}
    sound["default_sampler"] = (
        isinstance(sampler, str)
        and len(sampler) <= LONGEST_NAME
        and re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", sampler) is not None
    )
    sound["class_count"] = model.get("class_count") is None or is_size("class_count")
    sound["patch_size"] = "patch_size" not in model or (is_size("patch_size") and size_step(model) <= LARGEST_SIZE)
    sound["largest_size"] = "largest_size" not in model or is_size("largest_size")
    sound["strength_rounds_up"] = type(model.get("strength_rounds_up", False)) is bool
    for key, fits in sound.items():
        if not fits:
            raise MalformedError(f"model.{key} = {repr(model.get(key))[:60]}, which is none that can be generated with")


def size_step(model: Mapping[str, Any]) -> int:
    """Pixels that a picture's height and width must be multiples of, from the manifest's ``model``."""
    return int(model["pixels_per_latent"] * model.get("patch_size", 1))


def check_length(tokenizer: Tokenizer, encoder: GraphSpec) -> None:
    """Raise BundleError unless a tokenizer gives as many ids as its text encoder reads."""
    length = encoder.inputs[0].shape[1]
    if tokenizer.model_max_length != length:
        raise tokenizer.files.bad(
            tokenizer.length_file, f"gives {tokenizer.model_max_length} tokens, and {encoder.path} reads {length}"
        )


def check_pictures(pixels: tuple[int, ...], latents: tuple[int, ...], factor: int, graph: GraphSpec) -> None:
    """Raise BundleError unless pictures and their latents, both (B, C, h, w), have sizes that belong together."""
    expected = latents[0], latents[2] * factor, latents[3] * factor
    if len(pixels) != 4 or (pixels[0], *pixels[2:]) != expected:
        raise BundleError(
            f"{graph.path} has pictures of shape {pixels} for latents of shape {latents}; manifest.json says "
            f"model.pixels_per_latent = {factor}. Export the bundle anew."
        )


class _Role:
    """One graph, and the names that its free sizes have."""

    def __init__(self, graph: GraphSpec) -> None:
        self._graph = graph
        self._sides = (
            {tensor.name: tensor for tensor in graph.inputs},
            {tensor.name: tensor for tensor in graph.outputs},
        )
        self._names: dict[str, str] = {}

    def takes(self, name: str) -> bool:
        return name in self._sides[0]

    def gives(self, name: str) -> bool:
        return name in self._sides[1]

    def inputs(self) -> Sequence[TensorSpec]:
        return self._graph.inputs

    def input(self, name: str, dtype: str, *shape: int | str | tuple[int, ...]) -> tuple[int | str, ...]:
        """Shape of an input, which must be there and as it is said; a name that begins with ? is any fixed size."""
        return self._tensor(0, name, dtype, shape)

    def output(self, name: str, dtype: str, *shape: int | str | tuple[int, ...]) -> tuple[int | str, ...]:
        """Shape of an output, as `input`."""
        return self._tensor(1, name, dtype, shape)

    def no_more_inputs(self, *known: str) -> None:
        if unknown := self._sides[0].keys() - set(known):
            raise MalformedError(
                f"the graph {self._graph.name} with the input {min(unknown)!r}, which this runtime does not know"
            )

    def _tensor(self, side: int, name: str, dtype: str, shape: Shape) -> tuple[int | str, ...]:
        tensor = self._sides[side].get(name)
        if tensor is None or tensor.dtype != dtype or len(tensor.shape) != len(shape):
            raise self._unlike(tensor, name, dtype, shape)
        for given, wanted in zip(tensor.shape, shape, strict=True):
            if not self._fits(given, wanted):
                raise self._unlike(tensor, name, dtype, shape)
        return tensor.shape

    def _fits(self, given: int | str, wanted: int | str | tuple[int, ...]) -> bool:
        if isinstance(wanted, tuple):
            return given in wanted
        if isinstance(wanted, int):
            return given == wanted
        if wanted.startswith("?"):
            return isinstance(given, int) and given >= 1
        if not isinstance(given, str):
            return False
        known = self._names.setdefault(wanted, given) == given
        return known and list(self._names.values()).count(given) == 1

    def _unlike(self, tensor: TensorSpec | None, name: str, dtype: str, shape: Shape) -> MalformedError:
        there = "no such tensor" if tensor is None else f"{tensor.dtype} {tensor.shape}"
        return MalformedError(
            f"the graph {self._graph.name} with {there[:200]} for {name!r}; {dtype} {tuple(shape)} is needed"
        )


def check_graphs(graphs: Mapping[str, GraphSpec], roles: Roles, channels: int) -> None:
    """Raise MalformedError unless each graph takes and gives what its role does; ``channels`` are of the latents."""
    denoiser = _Role(graphs[roles.denoiser])
    denoiser.input("sample", "float32", "B", channels, "h", "w")
    denoiser.input("timestep", "float32", "B")
    denoiser.output("out_sample", "float32", "B", channels, "h", "w")
    residuals = residuals_of(graphs[roles.denoiser], roles)
    denoiser.no_more_inputs("sample", "timestep", *roles.conditions, *(tensor.name for tensor in residuals))
    _check_controls(graphs, roles, channels)
    if roles.guidance.kind == THREE_ROWS:
        beside = [name for name, source in roles.conditions.items() if source == "image_latents"]
        for name in beside:
            denoiser.input(name, "float32", "B", channels, "h", "w")
        if not beside:
            raise MalformedError("guidance of three rows, and a denoiser that reads no image_latents")
    decoder = _Role(graphs[roles.vae_decoder])
    decoder.input("latent_sample", "float32", "B", channels, "h", "w")
    picture = int(decoder.output("sample", "float32", "B", PICTURE_CHANNELS, "H", "W")[1])
    decoder.no_more_inputs("latent_sample")
    encoder = _Role(graphs[roles.vae_encoder])
    encoder.input("sample", "float32", "B", picture, "H", "W")
    if encoder.gives("latent_sample"):
        encoder.output("latent_sample", "float32", "B", channels, "h", "w")
    else:
        encoder.output("latent_parameters", "float32", "B", 2 * channels, "h", "w")
    encoder.no_more_inputs("sample")
    for entry in roles.text_encoders:
        text = _Role(graphs[entry.graph])
        if entry.kind not in TOKENIZER_KINDS:
            kinds = " and ".join(TOKENIZER_KINDS)
            raise MalformedError(f"a tokenizer of the kind {entry.kind[:60]!r} for {entry.graph}; {kinds} can be read")
        text.input("input_ids", "int64", "B", entry.length)
        text.no_more_inputs("input_ids")
    if roles.image_encoder is not None:
        image = _Role(graphs[roles.image_encoder])
        size = image.input("pixels", "float32", "B", 3, "?size", "?size")[2:]
        if size[0] != size[1] or graphs[roles.image_encoder].inputs[0].name != "pixels":
            raise MalformedError(f"the graph {roles.image_encoder} with pixels {size}, which are no square")
        image.input("has_picture", "float32", "B")
        image.output("image_tokens", "float32", "B", "?tokens", "?width")
        image.no_more_inputs("pixels", "has_picture")
    _check_sources(graphs, roles)
    for name, graph in graphs.items():
        if is_loop(name):
            _check_loop(_Role(graph), graphs, roles, channels, picture)


def _check_controls(graphs: Mapping[str, GraphSpec], roles: Roles, channels: int) -> None:
    """Raise MalformedError unless every control makes of the denoiser's inputs and a picture all of its residuals."""
    denoiser = graphs[roles.denoiser]
    residuals = residuals_of(denoiser, roles)
    conditions = {tensor.name: (tensor,) for tensor in denoiser.inputs if tensor.name in roles.conditions}
    for tensor in residuals:
        fixed = [size for size in tensor.shape if isinstance(size, int)]
        if tensor.dtype != "float32" or len(fixed) != 1 or fixed[0] < 1 or isinstance(tensor.shape[0], int):
            raise MalformedError(f"the residual {tensor.name!r} {str(tensor.shape)[:200]}, which no zeros stand in for")
    for graph in (graphs[name] for name in roles.controls.values()):
        control = _Role(graph)
        control.input("sample", "float32", "B", channels, "h", "w")
        control.input("timestep", "float32", "B")
        pixels = not control.takes("control_latents")
        if pixels:
            control.input("control_image", "float32", "B", 3, "H", "W")
        else:
            control.input("control_latents", "float32", "B", channels, "h", "w")
        for tensor in graph.inputs:
            if tensor.name not in ("sample", "timestep", "control_image" if pixels else "control_latents"):
                _check_source(graph, tensor, tensor.name, conditions)
        if tuple(graph.outputs) != residuals:
            raise MalformedError(f"the graph {graph.name}, which does not give the residuals that the denoiser takes")


def _check_sources(graphs: Mapping[str, GraphSpec], roles: Roles) -> None:
    """Raise MalformedError unless whatever denoiser and conditioner read is there, and of the type that they read."""
    known = dict(REQUEST_SOURCES)
    for entry in roles.text_encoders:
        known |= {f"{entry.graph}.{tensor.name}": (tensor,) for tensor in graphs[entry.graph].outputs}
    if roles.image_encoder is not None:
        outputs = graphs[roles.image_encoder].outputs
        known |= {f"{roles.image_encoder}.{tensor.name}": (tensor,) for tensor in outputs}
    denoiser = {tensor.name: tensor for tensor in graphs[roles.denoiser].inputs}
    if missing := sorted({"sample", "timestep"} & roles.conditions.keys() | roles.conditions.keys() - denoiser.keys()):
        raise MalformedError(f"a condition {missing[0]!r}, which is none of the graph {roles.denoiser}")
    if roles.conditioner is not None:
        graph = graphs[roles.conditioner]
        for tensor in graph.inputs:
            _check_source(graph, tensor, tensor.name, known)
        known |= {f"conditioner.{tensor.name}": (tensor,) for tensor in graph.outputs}
    for name, source in roles.conditions.items():
        _check_source(graphs[roles.denoiser], denoiser[name], source, known)


def _check_source(graph: GraphSpec, tensor: TensorSpec, source: str, known: Mapping[str, Sequence[TensorSpec]]) -> None:
    if source not in known:
        raise MalformedError(f"the graph {graph.name} that reads {source[:60]!r}, which nothing gives")
    if not any(_fits(tensor, given) for given in known[source]):
        there = f"{tensor.dtype} {tensor.shape}"
        given = " or ".join(f"{one.dtype} {one.shape}" for one in known[source])
        raise MalformedError(
            f"the graph {graph.name} with {there[:200]} for {tensor.name!r}, which is given {source}, {given[:200]}"
        )


def _fits(tensor: TensorSpec, given: TensorSpec) -> bool:
    """Whether an input can be given a source; each row is of a picture, so the first size is free in both."""
    if tensor.dtype != given.dtype or len(tensor.shape) != len(given.shape):
        return False
    if tensor.shape and not (isinstance(tensor.shape[0], str) and isinstance(given.shape[0], str)):
        return False
    of_request = given.name in REQUEST_SOURCES and given in REQUEST_SOURCES[given.name]
    return all(
        isinstance(size, str) or size == there or (of_request and isinstance(there, str))
        for size, there in zip(tensor.shape[1:], given.shape[1:], strict=True)
    )


def _check_loop(loop: _Role, graphs: Mapping[str, GraphSpec], roles: Roles, channels: int, picture: int) -> None:
    loop.input("noise", "float32", "B", channels, "h", "w")
    loop.output("latents", "float32", "B", channels, "h", "w")
    loop.output("images", "uint8", "B", "H", "W", picture)
    if loop.takes("step_noise"):
        loop.input("step_noise", "float32", "?rows", "B", channels, "h", "w")
    if loop.takes("guidance_scale"):
        loop.input("guidance_scale", "float32")
    if loop.takes("has_negative_prompt"):
        loop.input("has_negative_prompt", "float32", "B")
    known = ["noise", "step_noise", "guidance_scale", "has_negative_prompt", "class_labels"]
    for entry, suffix in zip(roles.text_encoders, loop_suffixes(roles), strict=True):
        for name in (f"input_ids{suffix}", f"negative_input_ids{suffix}"):
            known.append(name)
            if loop.takes(name):
                loop.input(name, "int64", "B", entry.length)
        if not loop.takes(f"input_ids{suffix}"):
            raise MalformedError("a loop that reads no prompt, as the denoiser does")
    if loop.takes("class_labels") != ("class_labels" in roles.sources(graphs)):
        raise MalformedError("a loop that reads other than the denoiser does")
    if loop.takes("class_labels"):
        labels = labels_of(graphs, roles)
        loop.input("class_labels", labels.dtype, "B", *labels.shape[1:])
    loop.no_more_inputs(*known)
