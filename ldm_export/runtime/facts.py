"""What a bundle must say of itself to be generated with, held when it is opened; the C++ runtime holds the same.

Numbers and texts of ``model`` in the manifest. A size is a whole number from 1 to 2**20 (`LARGEST_SIZE`):

    height, width, latent_channels, pixels_per_latent, default_steps     sizes
    scaling_factor                          a number from 2**-20 to 2**20
    default_sampler                         small letters and digits in words with - between, at most 100 characters
    default_guidance                        absent, or a number from 0 to 2**20
    guidance_folded, zeros_for_empty_prompt absent, or true or false
    num_class_embeds                        absent, null, or a size

What each graph takes and gives, by its role. ``B``, ``h``, ``w``, ``H``, ``W`` and ``T`` are free sizes, all of another
name in one graph; all else is fixed and at least 1. ``C`` is ``latent_channels``; no other tensor may be an input, and
outputs may be more. float32 where nothing else is said:

    unet            sample (B, c, h, w), timestep (); out_sample (B, C, h, w). c is C, or another for models that are
                    opened and not generated with (inpainting)
                    where it reads text: encoder_hidden_states (B, T or L, S)
                    where it has classes: class_labels int64 (B), or (B, features)
                    both or neither, and only with text: text_embeds (B, P), time_ids (B, 6)
                    where it is told the guidance scale: timestep_cond (B, at least 4)
    vae_decoder     latent_sample (B, C, h, w); sample (B, K, H, W), K being 1 or 3
    vae_encoder     sample (B, K, H, W); latent_parameters (B, 2 C, h, w)
    text_encoder    where the UNet reads text: input_ids int64 (B, L), L from 2; without text_embeds of the UNet
                    last_hidden_state (B, L, S), no text_embeds, and no graph text_encoder_2; else
                    hidden_states.0 to hidden_states.n, n from 1, each (B, L, s), and in the last encoder text_embeds
                    (B, P); the sum of s over both encoders is S, and L is that of both
    loops/*         noise, latents (B, C, h, w); images uint8 (B, H, W, K); of these as far as it takes them: step_noise
                    (rows, B, C, h, w), rows being those of its plan that add noise; guidance_scale (); input_ids and
                    negative_input_ids as the text encoder's; class_labels as the UNet's

Known when graphs run: a tokenizer's ``model_max_length`` is L; decoded pictures are ``pixels_per_latent`` times as high
and as wide as their latents, and encoded ones that much smaller.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ldm_export.bundle import Bundle
from ldm_export.bundle.manifest import LARGEST_SIZE, is_loop
from ldm_export.contract import GraphSpec, TensorSpec
from ldm_export.errors import BundleError
from ldm_export.reading.documents import MalformedError

if TYPE_CHECKING:
    from ldm_export.runtime.tokenizer import Tokenizer

DRAWN_WITH = ("unet", "vae_decoder", "vae_encoder")
SIZES = ("height", "width", "latent_channels", "pixels_per_latent", "default_steps")
FLAGS = ("guidance_folded", "zeros_for_empty_prompt")
PICTURE_CHANNELS = (1, 3)
LONGEST_NAME = 100

Shape = Sequence[int | str | tuple[int, ...]]
"""What a shape must be: a fixed size, one of several, or the name of a free one."""


def check_drawable(bundle: Bundle) -> None:
    """Raise BundleError unless the bundle says the facts, and has the graphs, that the module's docstring lists."""
    graphs = bundle.manifest.graphs
    for name in DRAWN_WITH:
        if name not in graphs:
            raise BundleError(f"Bundle {bundle.path} has no graph {name}, so nothing can be drawn. Export it anew.")
    try:
        check_model(bundle.manifest.model)
        check_graphs(graphs, bundle.manifest.model["latent_channels"])
    except MalformedError as error:
        raise BundleError(f"Bundle {bundle.path}: manifest.json has {error}. Export it anew.") from error


def check_model(model: Mapping[str, Any]) -> None:
    """Raise MalformedError unless the manifest's ``model`` has what generating needs, each of its type and range."""

    def number(key: str, least: float) -> bool:
        value: Any = model.get(key)
        return type(value) in (int, float) and least <= value <= LARGEST_SIZE

    sampler, classes = model.get("default_sampler"), model.get("num_class_embeds")
    sound = {key: type(model.get(key)) is int and number(key, 1) for key in SIZES}
    sound["scaling_factor"] = number("scaling_factor", 1 / LARGEST_SIZE)
    sound["default_sampler"] = (
        isinstance(sampler, str)
        and len(sampler) <= LONGEST_NAME
        and re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", sampler) is not None
    )
    sound["default_guidance"] = "default_guidance" not in model or number("default_guidance", 0)
    sound |= {key: type(model.get(key, False)) is bool for key in FLAGS}
    sound["num_class_embeds"] = classes is None or (type(classes) is int and number("num_class_embeds", 1))
    for key, fits in sound.items():
        if not fits:
            raise MalformedError(f"model.{key} = {repr(model.get(key))[:60]}, which is none that can be generated with")


def check_length(tokenizer: Tokenizer, encoder: GraphSpec) -> None:
    """Raise BundleError unless a tokenizer gives as many ids as its text encoder reads."""
    length = encoder.inputs[0].shape[1]
    if tokenizer.model_max_length != length:
        raise tokenizer.files.bad(
            "tokenizer_config.json",
            f"has model_max_length {tokenizer.model_max_length}, and {encoder.path} reads {length} tokens",
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

    def shape(self, name: str) -> tuple[int | str, ...]:
        """Shape of an input, or nothing."""
        return self._sides[0][name].shape if self.takes(name) else ()

    def count(self, prefix: str) -> int:
        """Outputs whose names begin so."""
        return sum(name.startswith(prefix) for name in self._sides[1])

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


def check_graphs(graphs: Mapping[str, GraphSpec], channels: int) -> None:
    """Raise MalformedError unless each graph takes and gives what its role does; ``channels`` are of the latents."""
    unet = _check_unet(_Role(graphs["unet"]), channels)
    decoder = _Role(graphs["vae_decoder"])
    decoder.input("latent_sample", "float32", "B", channels, "h", "w")
    picture = int(decoder.output("sample", "float32", "B", PICTURE_CHANNELS, "H", "W")[1])
    decoder.no_more_inputs("latent_sample")
    encoder = _Role(graphs["vae_encoder"])
    encoder.input("sample", "float32", "B", picture, "H", "W")
    encoder.output("latent_parameters", "float32", "B", 2 * channels, "h", "w")
    encoder.no_more_inputs("sample")
    length = _check_text_encoders(graphs, unet) if unet.takes("encoder_hidden_states") else 0
    for name, graph in graphs.items():
        if is_loop(name):
            _check_loop(_Role(graph), unet, channels, picture, length)


def _check_unet(unet: _Role, channels: int) -> _Role:
    unet.input("sample", "float32", "B", "?channels", "h", "w")
    unet.input("timestep", "float32")
    unet.output("out_sample", "float32", "B", channels, "h", "w")
    if unet.takes("class_labels"):
        _check_labels(unet)
    if unet.takes("text_embeds") or unet.takes("time_ids"):
        unet.input("text_embeds", "float32", "B", "?width")
        unet.input("time_ids", "float32", "B", 6)
        if not unet.takes("encoder_hidden_states"):
            raise MalformedError("the graph unet with text_embeds and without encoder_hidden_states")
    if unet.takes("timestep_cond") and int(unet.input("timestep_cond", "float32", "B", "?size")[1]) < 4:
        raise MalformedError("the graph unet with a timestep_cond of less than 4 numbers")
    known = ("sample", "timestep", "encoder_hidden_states", "class_labels", "text_embeds", "time_ids", "timestep_cond")
    unet.no_more_inputs(*known)
    return unet


def _check_labels(role: _Role) -> None:
    if len(role.shape("class_labels")) == 1:
        role.input("class_labels", "int64", "B")
    else:
        role.input("class_labels", "float32", "B", "?features")


def _check_text_encoders(graphs: Mapping[str, GraphSpec], unet: _Role) -> int:
    """Check the text encoders against what the UNet reads; gives how many tokens they read."""
    names = [name for name in ("text_encoder", "text_encoder_2") if name in graphs]
    if names[:1] != ["text_encoder"]:
        raise MalformedError("no graph text_encoder, and a UNet that reads text")
    encoders = [_Role(graphs[name]) for name in names]
    length = int(encoders[0].input("input_ids", "int64", "B", "?length")[1])
    if length < 2:
        raise MalformedError("a text encoder of less than 2 tokens")
    for encoder in encoders:
        encoder.input("input_ids", "int64", "B", length)
        encoder.no_more_inputs("input_ids")
    pooled = unet.takes("text_embeds")
    if encoders[-1].gives("text_embeds") != pooled or (len(encoders) > 1 and not pooled):
        raise MalformedError("text encoders that give text_embeds where the UNet takes none, or the other way round")
    if pooled:
        widths = [_width_of_states(encoder, length) for encoder in encoders]
        embeds = unet.input("text_embeds", "float32", "B", "?width")[1]
        encoders[-1].output("text_embeds", "float32", "B", int(embeds))
    else:
        widths = [int(encoders[0].output("last_hidden_state", "float32", "B", length, "?width")[2])]
    fixed = unet.shape("encoder_hidden_states")[1:2] == (length,)
    unet.input("encoder_hidden_states", "float32", "B", length if fixed else "T", sum(widths))
    return length


def _width_of_states(encoder: _Role, length: int) -> int:
    """Width of the hidden states of every layer, of which there must be at least two."""
    widths, layer = set(), 0
    while layer < 2 or encoder.gives(f"hidden_states.{layer}"):
        widths.add(int(encoder.output(f"hidden_states.{layer}", "float32", "B", length, "?width")[2]))
        layer += 1
    if encoder.count("hidden_states.") != layer or len(widths) > 1:
        raise MalformedError("a text encoder whose hidden states are not numbered from 0, or of several widths")
    return widths.pop()


def _check_loop(loop: _Role, unet: _Role, channels: int, picture: int, length: int) -> None:
    loop.input("noise", "float32", "B", channels, "h", "w")
    loop.output("latents", "float32", "B", channels, "h", "w")
    loop.output("images", "uint8", "B", "H", "W", picture)
    if loop.takes("step_noise"):
        loop.input("step_noise", "float32", "?rows", "B", channels, "h", "w")
    if loop.takes("guidance_scale"):
        loop.input("guidance_scale", "float32")
    for name in ("input_ids", "negative_input_ids"):
        if loop.takes(name):
            loop.input(name, "int64", "B", length)
    if loop.takes("input_ids") != unet.takes("encoder_hidden_states") or (
        loop.takes("class_labels") != unet.takes("class_labels")
    ):
        raise MalformedError("a loop that reads other than the UNet does")
    if loop.takes("class_labels"):
        _check_labels(loop)
    known = ("noise", "step_noise", "guidance_scale", "input_ids", "negative_input_ids", "class_labels")
    loop.no_more_inputs(*known)
