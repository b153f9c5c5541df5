"""What checkpoints of a family consist of: networks, and what diffusers' pipeline classes do besides calling them.

``model_index.json`` names the pipeline's class and the parts. What the file leaves out has the default of the class's
constructor, and some constructors overrule the scheduler's own config; a `CheckpointKind` has all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ldm_export.checkpoint.sampling_defaults import SamplingDefaults
from ldm_export.checkpoint.weights import OF_DIFFUSERS
from ldm_export.errors import CheckpointError
from ldm_export.plan import shifts_dynamically
from ldm_export.plan.scheduler_classes import FLOW_MATCHING

Index = Mapping[str, Any]
"""Content of ``model_index.json``."""
Configs = Mapping[str, Mapping[str, Any]]
"""Config of each network, by component."""


class UnknownFamilyError(CheckpointError):
    """A checkpoint is of no family that is known."""


@dataclass(frozen=True)
class Component:
    """A network of a checkpoint.

    Attributes
    ----------
    classes : names that ``model_index.json`` may have for its class
    build : called with one of them and the content of ``config.json``, gives the network, on the device at hand
    config : gives a network's config, defaults filled in
    weights : how the names of its weight files begin
    name_of : gives the network's name for a weight in a file, or None for what it does not read
    """

    classes: Collection[str]
    build: Callable[[str, dict[str, Any]], nn.Module]
    config: Callable[[Any], dict[str, Any]]
    weights: str = OF_DIFFUSERS
    name_of: Callable[[str], str | None] = str


@dataclass(frozen=True)
class PipelineClass:
    """What the constructor of a pipeline class fills in.

    Attributes
    ----------
    scheduler : keys of the scheduler's config that have this value whatever the file says
    options : keys of ``model_index.json`` that are no parts, with their defaults
    sample_size : of the denoiser's latents, where its config says none
    steps, guidance : what it draws with by default
    shifting : keys by which it shifts dynamically, with their values where neither file nor scheduler class has them
    """

    scheduler: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    sample_size: int = 64
    steps: int = SamplingDefaults.steps
    guidance: float = SamplingDefaults.guidance
    shifting: Mapping[str, Any] = field(default_factory=dict)


def pixels_by_levels(configs: Configs) -> int:
    """Pixels a latent of an autoencoder that halves its sizes between levels."""
    vae = configs["vae"]
    levels = vae["block_out_channels"] if "block_out_channels" in vae else vae["encoder_block_out_channels"]
    return 1 << (len(levels) - 1)


@dataclass(frozen=True)
class CheckpointKind:
    """What the checkpoints of a family consist of.

    Attributes
    ----------
    components : the networks, in the order in which they run
    denoiser : the component that tells the family; it and ``vae`` every checkpoint has
    optional_parts : parts without which the same picture is made of the same prompt, before it is checked or marked
    pipelines : classes that a bundle generates like
    saved_as : those of them that take a model without further parts
    default_pipeline : what a class that is not among them is taken for
    latent_size : gives the height and width of the latents that a pipeline makes by default, of ``model_index.json``,
        the networks' configs and the release of diffusers that wrote the denoiser's
    pixels_per_latent : gives the pixels of a picture's side for one of its latents', of the networks' configs
    old_class : of the denoiser in checkpoints that are older than its class, and that ``pipelines`` tell; or None
    control : what ControlNets of its denoiser are; None where there are none
    """

    components: Mapping[str, Component]
    denoiser: str
    optional_parts: Collection[str]
    pipelines: Mapping[str, PipelineClass]
    saved_as: Sequence[str]
    default_pipeline: Callable[[Index], PipelineClass]
    latent_size: Callable[[Index, Configs, Any], tuple[int, int]]
    pixels_per_latent: Callable[[Configs], int] = pixels_by_levels
    old_class: str | None = None
    control: Component | None = None

    @property
    def own_parts(self) -> set[str]:
        """Parts of a checkpoint that a bundle of it has."""
        tokenizers = {name.replace("text_encoder", "tokenizer") for name in self.components}
        return {*self.components, *tokenizers, "scheduler"}

    def patch_size(self, configs: Configs) -> int:
        """How many latents a side one of the denoiser's tokens has."""
        return int(configs[self.denoiser].get("patch_size") or 1)

    def fits(self, index: Index) -> bool:
        """Whether ``model_index.json`` names a denoiser of this kind."""
        given = index.get(self.denoiser)
        if not isinstance(given, list) or not given or given[-1] is None:
            return False
        if given[-1] == self.old_class:
            return class_name(index) in self.pipelines
        return given[-1] in self.components[self.denoiser].classes

    def pipeline(self, index: Index) -> PipelineClass:
        """What the checkpoint's pipeline class fills in."""
        return self.pipelines.get(class_name(index)) or self.default_pipeline(index)

    def option(self, index: Index, key: str) -> Any:
        """Value of a key of ``model_index.json`` that is no part."""
        value = index.get(key)
        return self.pipeline(index).options.get(key) if value is None else value

    def check_parts(self, file: Path, index: Index) -> None:
        """Raise CheckpointError unless the parts are those of this kind, and of classes that can be opened."""
        known = {*self.own_parts, *self.optional_parts}
        if others := [key for key in index if key not in known and names_part(index, key)]:
            raise CheckpointError(
                f"{file} is of a {class_name(index)} with the part {others[0]}, which no bundle can have; without it "
                f"other pictures are made. Save the model without it, as a {' or '.join(self.saved_as)}."
            )
        for name in (self.denoiser, "vae"):
            if index.get(name) in (None, [None, None]):
                raise CheckpointError(f"{file} names no {name}; a latent diffusion model has one.")
        for name, component in self.components.items():
            given = index.get(name)
            if given in (None, [None, None]):
                continue
            named = isinstance(given, list) and len(given) == 2 and isinstance(given[1], str)
            old = name == self.denoiser and self.fits(index)
            if not named or (given[1] not in component.classes and not old):
                raise CheckpointError(
                    f"{file} says that the {name} is {given!r}; {' and '.join(component.classes)} can be opened. "
                    "Choose another checkpoint."
                )

    def left_out(self, index: Index) -> list[str]:
        """Parts that the checkpoint has and a bundle of it will not have."""
        return sorted(key for key in self.optional_parts if names_part(index, key))

    def scheduler_as_used(self, index: Index, config: Mapping[str, Any]) -> dict[str, Any]:
        """A scheduler's config with the class that ``model_index.json`` names and what the constructor sets."""
        named = index.get("scheduler")
        own = named[1] if isinstance(named, list) and len(named) == 2 and named[1] is not None else None
        pipeline, used = self.pipeline(index), {**config, **({} if own is None else {"_class_name": own})}
        has_its_own = used.get("_class_name") in FLOW_MATCHING or not shifts_dynamically(used)
        return {**({} if has_its_own else pipeline.shifting), **used, **pipeline.scheduler}


def kind_of(file: Path, index: Index, kinds: Sequence[CheckpointKind]) -> CheckpointKind:
    """The kind that the ``model_index.json`` in a file is of; the first where it names no denoiser, as its check says.

    Raises
    ------
    UnknownFamilyError
        If its denoiser is of a class that no kind has.
    """
    if (found := next((kind for kind in kinds if kind.fits(index)), None)) is not None:
        return found
    name = next((kind.denoiser for kind in kinds if _names_class(index, kind.denoiser)), None)
    if name is None:
        return kinds[0]
    known = [of for kind in kinds for of in kind.components[kind.denoiser].classes]
    raise UnknownFamilyError(
        f"{file} says that the {name} is {index[name]!r}, of a {class_name(index)}, which is of no family that is "
        f"known here; there are those of {', '.join(known[:-1])} and {known[-1]}. A family can be brought as a Python "
        "file: --family FILE, which docs/families.md describes."
    )


def _names_class(index: Index, key: str) -> bool:
    """Whether a key of ``model_index.json`` names a library and a class, as it should."""
    value = index.get(key)
    return isinstance(value, list) and len(value) == 2 and all(isinstance(item, str) for item in value)


def class_name(index: Index) -> str:
    """Name of the pipeline's class; of a class in a file of its own, which has a list there, the last item."""
    name = index.get("_class_name", "StableDiffusionPipeline")
    return str(name[-1]) if isinstance(name, list) and name else str(name)


def names_part(index: Index, key: str) -> bool:
    """Whether a key of ``model_index.json`` names a part, a library and a class."""
    value = index.get(key)
    return isinstance(value, list) and not key.startswith("_") and any(item is not None for item in value)
