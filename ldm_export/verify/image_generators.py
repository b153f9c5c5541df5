"""What draws pictures, a PyTorch checkpoint or a bundle, behind one interface: the variants that a bench compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ldm_export.bundle import Bundle
from ldm_export.checkpoint import LatentDiffusion
from ldm_export.contract import NONE
from ldm_export.errors import InputError
from ldm_export.families import family_of, open_checkpoint
from ldm_export.runtime import Pipeline
from ldm_export.runtime.request import checked_request
from ldm_export.runtime.results import Step, Timings
from ldm_export.verify.torch_reference import TorchReference

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class SamplingSettings:
    """How pictures are drawn: ``prompts`` of them, ``batch`` at a time; picture k has seed ``seed + k``.

    Attributes
    ----------
    size : height and width in pixels; None is the model's own
    calls : calls of the network in ``steps`` steps, which bundles can have fewer of; None is one a step
    """

    prompts: int = 200
    sampler: str = "ddim"
    steps: int = 50
    guidance: float = 4.0
    seed: int = 0
    batch: int = 8
    size: tuple[int, int] | None = None
    calls: int | None = None


@dataclass(frozen=True)
class Sample:
    """Pictures, and how they came about.

    Attributes
    ----------
    images : uint8 (B, H, W, C)
    trajectory : float32 (steps, B, C, h, w), the latents after each step
    timings : milliseconds by stage
    """

    images: Array
    trajectory: Array
    timings: Timings


class ImageGenerator(Protocol):
    """What a checkpoint and a bundle both can do.

    Attributes
    ----------
    condition : what a picture is asked for by: "text", "label" or None
    uses_guidance : whether the scale changes pictures
    defaults : sampler, steps and guidance of the model's own
    """

    name: str
    channels: int
    condition: str | None
    uses_guidance: bool
    defaults: SamplingSettings

    @property
    def size(self) -> int:
        """Pixels of a side, of models that draw squares."""

    def guided(self, guidance: float) -> bool:
        """Whether a picture with that scale takes two rows of the denoiser, with the prompt and without."""

    def given(
        self, conditions: Sequence[str | int], seeds: Sequence[int], settings: SamplingSettings
    ) -> dict[str, Any]:
        """Keyword arguments of ``Pipeline.generate`` for these pictures, as JSON can hold them."""

    def sample(self, conditions: Sequence[str | int], seeds: Sequence[int], settings: SamplingSettings) -> Sample:
        """Pictures with latents and timings."""

    def draw(self, conditions: Sequence[str | int], seeds: Sequence[int], settings: SamplingSettings) -> Array:
        """Pictures uint8 (B, H, W, C)."""

    def reconstruct(self, images: Array) -> Array:
        """Pictures uint8 (B, H, W, C) through the autoencoder and back."""


class TorchImageGenerator:
    """A checkpoint in PyTorch.

    Raises
    ------
    CheckpointError
        If the checkpoint cannot be exported either.
    InputError
        If the model is given more than text or a class number.
    """

    def __init__(self, checkpoint: LatentDiffusion):
        family = family_of(checkpoint)
        family.check()
        self.reference = TorchReference(checkpoint)
        own, roles = checkpoint.drawing, family.roles
        self.defaults = SamplingSettings(sampler=own.sampler, steps=own.steps, guidance=roles.guidance.scale)
        self.classes = family.facts["class_count"]
        self.condition = "text" if checkpoint.reads_text else "label" if self.classes else None
        self.guided, self.uses_guidance = roles.guidance.takes_two_rows, roles.guidance.kind != NONE
        encoder = next(graph.spec for graph in family.graphs if graph.spec.name == roles.vae_encoder)
        self.channels = int(encoder.inputs[0].shape[1])
        self.name = f"checkpoint {checkpoint.name}"
        self.adapters = [(str(merge.adapter.file), merge.scale) for merge in checkpoint.merges]
        self.embeddings = [(str(embedding.file), embedding.token) for embedding in checkpoint.embeddings]
        self.pixels = checkpoint.picture_size
        self._tokenizers = [tokenizer.open() for tokenizer in family.tokenizers.values()]

    @property
    def size(self) -> int:
        return _side(self.pixels)

    def given(
        self, conditions: Sequence[str | int], seeds: Sequence[int], settings: SamplingSettings
    ) -> dict[str, Any]:
        if settings.calls is not None:
            raise InputError(
                f"{settings.calls} calls were asked for of {self.name}, which calls its network in every step. "
                "Ask a bundle for them."
            )
        plan = {"sampler": settings.sampler, "steps": settings.steps}
        drawing = {"seeds": list(seeds), **plan, "guidance": settings.guidance, "size": settings.size or self.pixels}
        if self.condition == "text":
            prompts = list(map(str, conditions))
            drawing |= {
                "ids": [tokenizer(prompts).tolist() for tokenizer in self._tokenizers],
                "empty_ids": [tokenizer([""] * len(prompts)).tolist() for tokenizer in self._tokenizers],
                "guidance": settings.guidance if self.uses_guidance else 1.0,
            }
        elif self.condition == "label":
            labels = [int(label) for label in conditions]
            if max(labels) >= self.classes:
                raise InputError(f"class label {max(labels)} is none; this model has 0 to {self.classes - 1}.")
            drawing["labels"] = labels
        return drawing

    def sample(self, conditions: Sequence[str | int], seeds: Sequence[int], settings: SamplingSettings) -> Sample:
        drawn = self.reference.draw_as(self.given(conditions, seeds, settings))
        spent = Timings(
            text_ms=drawn.text_ms, denoiser_ms=drawn.denoiser_ms, loop_ms=drawn.loop_ms, decode_ms=drawn.decode_ms
        )
        return Sample(drawn.images, drawn.trajectory, spent)

    def draw(self, conditions: Sequence[str | int], seeds: Sequence[int], settings: SamplingSettings) -> Array:
        return self.sample(conditions, seeds, settings).images

    def reconstruct(self, images: Array) -> Array:
        return self.reference.reconstruct(images)

    def conditions(self, asked: Sequence[str | int]) -> dict[str, Tensor]:
        """What the denoiser reads for pictures of these, a row each, without guidance; of models that are asked for
        nothing, for as many."""
        given = self.given(asked, [0] * len(asked), self.defaults)
        ids = [np.asarray(rows, np.int64) for rows in given.get("ids", ())]
        labels = np.asarray(given["labels"], np.int64) if "labels" in given else None
        return self.reference.conditions(
            len(asked), guidance=self.defaults.guidance, size=self.pixels, ids=ids, labels=labels
        )


class BundleImageGenerator:
    """A bundle, without PyTorch; ``options`` are further ones of how the pipeline draws."""

    def __init__(self, bundle: Bundle, backend: str = "cpu", *, threads: int | None = None, **options: Any):
        self._pipeline, self._options = Pipeline(bundle, backend, threads=threads), options
        self.threads = threads
        model, graphs, roles = bundle.manifest.model, bundle.manifest.graphs, bundle.roles
        self.name = f"bundle {bundle.path.resolve().name}"
        self.defaults = SamplingSettings(
            sampler=model["default_sampler"],
            steps=model["default_steps"],
            guidance=roles.guidance.scale,
        )
        self.pixels = (model["height"], model["width"])
        self.classes = model.get("class_count")
        self.channels = int(graphs[roles.vae_encoder].inputs[0].shape[1])
        labelled = "class_labels" in roles.sources(graphs)
        self.condition = "text" if roles.text_encoders else "label" if labelled else None
        self.guided, self.uses_guidance = roles.guidance.takes_two_rows, roles.guidance.kind != NONE

    def load(self) -> None:
        """Open what drawing takes; raises what :meth:`ldm_export.runtime.Pipeline.load` raises."""
        self._pipeline.load()

    def check(self, conditions: Sequence[str | int], seeds: Sequence[int], settings: SamplingSettings) -> None:
        """Raise InputError if the bundle cannot draw these pictures so, and run nothing."""
        checked_request(self._pipeline.bundle, **self.given(conditions, seeds, settings))

    def close(self) -> None:
        """Give back its graphs; it cannot draw anymore."""
        self._pipeline.close()

    @property
    def requested_backend(self) -> str:
        return self._pipeline.requested_backend

    @property
    def backend(self) -> str:
        """What really runs the graphs."""
        return self._pipeline.backend

    @property
    def size(self) -> int:
        return _side(self.pixels)

    def given(
        self, conditions: Sequence[str | int], seeds: Sequence[int], settings: SamplingSettings
    ) -> dict[str, Any]:
        given = {"sampler": settings.sampler, "steps": settings.steps, "seed": list(seeds), **self._options}
        if self.condition == "text":
            given["prompts"] = list(map(str, conditions))
        elif self.condition == "label":
            given["class_labels"] = [int(label) for label in conditions]
        if self.condition == "text" or self.uses_guidance:
            given["guidance"] = settings.guidance
        if settings.size is not None:
            given["height"], given["width"] = settings.size
        if settings.calls is not None:
            given["calls"] = settings.calls
        return given

    def sample(self, conditions: Sequence[str | int], seeds: Sequence[int], settings: SamplingSettings) -> Sample:
        trajectory: list[Array] = []

        def keep(step: Step) -> None:
            trajectory.append(step.latents.copy())

        drawn = self._pipeline.generate(**self.given(conditions, seeds, settings), callback=keep)
        return Sample(drawn.images, np.stack(trajectory), drawn.timings)

    def draw(self, conditions: Sequence[str | int], seeds: Sequence[int], settings: SamplingSettings) -> Array:
        return self._pipeline.generate(**self.given(conditions, seeds, settings)).images

    def reconstruct(self, images: Array) -> Array:
        return self._pipeline.reconstruct(images)


def open_image_generator(target: str) -> ImageGenerator:
    """A bundle's folder, a checkpoint's folder, or a shipped checkpoint's name."""
    if (Path(target) / "manifest.json").is_file():
        return BundleImageGenerator(Bundle.open(target))
    return TorchImageGenerator(open_checkpoint(target))


def _side(size: tuple[int, int]) -> int:
    if size[0] != size[1]:
        raise InputError(f"The model draws {size[0]} x {size[1]}; only square pictures are evaluated.")
    return size[0]
