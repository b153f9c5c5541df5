"""What draws pictures, a PyTorch checkpoint or a bundle, behind one interface: the sides that a bench compares."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ldm_export.bundle import Bundle
from ldm_export.checkpoint import LatentDiffusion
from ldm_export.errors import InputError
from ldm_export.export.chain import copy_tokenizer
from ldm_export.runtime import Pipeline, Tokenizer
from ldm_export.runtime.results import Step, Timings
from ldm_export.torch_reference import TorchReference

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn: ``prompts`` of them, ``batch`` at a time; picture k has seed ``seed + k``."""

    prompts: int = 200
    sampler: str = "ddim"
    steps: int = 50
    guidance: float = 4.0
    seed: int = 0
    batch: int = 8


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


class Painter(Protocol):
    """What both sides can do. ``condition`` is what a picture is asked for by: "text", "label" or None."""

    name: str
    channels: int
    condition: str | None

    @property
    def size(self) -> int:
        """Pixels of a side, of models that draw squares."""

    def given(self, conditions: Sequence[str | int], seeds: Sequence[int], settings: Settings) -> dict[str, Any]:
        """What one drawing is told, as JSON can hold it; :mod:`ldm_export.bench.child` draws by it too."""

    def sample(self, conditions: Sequence[str | int], seeds: Sequence[int], settings: Settings) -> Sample:
        """Pictures with latents and timings."""

    def draw(self, conditions: Sequence[str | int], seeds: Sequence[int], settings: Settings) -> Array:
        """Pictures uint8 (B, H, W, C)."""

    def reconstruct(self, images: Array) -> Array:
        """Pictures uint8 (B, H, W, C) through the autoencoder and back."""


class CheckpointPainter:
    """A checkpoint in PyTorch, with DDIM."""

    def __init__(self, checkpoint: LatentDiffusion):
        reads_text = "text_encoder" in checkpoint.components
        self._folded = checkpoint.drawing.folded
        self._reference = TorchReference(checkpoint, text=reads_text)
        configs = checkpoint.configs
        self.classes = configs["unet"]["num_class_embeds"]
        self.condition = "text" if reads_text else "label" if self.classes else None
        self.channels = int(configs["vae"]["in_channels"])
        self.name = f"checkpoint {checkpoint.name}"
        self.pixels = checkpoint.picture_size
        self._tokenizer = checkpoint_tokenizer(checkpoint) if reads_text else None

    @property
    def size(self) -> int:
        return _side(self.pixels)

    def given(self, conditions: Sequence[str | int], seeds: Sequence[int], settings: Settings) -> dict[str, Any]:
        if settings.sampler != "ddim":
            raise InputError(
                f"A checkpoint is drawn with ddim, not {settings.sampler!r}; export it and use the bundle."
            )
        drawing = {"seeds": list(seeds), "steps": settings.steps, "size": self.pixels}
        if self._tokenizer is None:
            labels = [int(label) for label in conditions] if self.condition else None
            if labels is not None and max(labels) >= self.classes:
                raise InputError(f"class label {max(labels)} is none; this model has 0 to {self.classes - 1}.")
            return {"labels": labels, **drawing}
        prompts = list(map(str, conditions))
        return {
            "input_ids": self._tokenizer(prompts).tolist(),
            "negative_ids": self._tokenizer([""] * len(prompts)).tolist(),
            "guidance": 1.0 if self._folded else settings.guidance,
            **drawing,
        }

    def sample(self, conditions: Sequence[str | int], seeds: Sequence[int], settings: Settings) -> Sample:
        drawn = self._reference.draw_as(self.given(conditions, seeds, settings))
        spent = drawn.timings_ms
        timings = Timings(
            text_ms=spent["text"], unet_ms=drawn.unet_ms, loop_ms=spent["loop"], decode_ms=spent["decode"]
        )
        return Sample(drawn.images, drawn.trajectory, timings)

    def draw(self, conditions: Sequence[str | int], seeds: Sequence[int], settings: Settings) -> Array:
        return self.sample(conditions, seeds, settings).images

    def reconstruct(self, images: Array) -> Array:
        return self._reference.reconstruct(images)


class BundlePainter:
    """A bundle, without PyTorch; ``options`` are further ones of how the pipeline draws."""

    def __init__(self, bundle: Bundle, backend: str = "cpu", **options: Any):
        self._pipeline, self._options = Pipeline(bundle, backend), options
        model, graphs = bundle.manifest.model, bundle.manifest.graphs
        self.name = f"bundle {bundle.path.resolve().name}"
        self.pixels = (model["height"], model["width"])
        self.classes = model.get("num_class_embeds")
        self.channels = int(graphs["vae_encoder"].inputs[0].shape[1])
        inputs = {tensor.name for tensor in graphs["unet"].inputs}
        self.condition = next(
            (kind for kind, name in (("text", "encoder_hidden_states"), ("label", "class_labels")) if name in inputs),
            None,
        )

    def load(self) -> None:
        """Open what drawing takes; raises what :meth:`ldm_export.runtime.Pipeline.load` raises."""
        self._pipeline.load()

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

    def given(self, conditions: Sequence[str | int], seeds: Sequence[int], settings: Settings) -> dict[str, Any]:
        told = {"sampler": settings.sampler, "steps": settings.steps, "seed": list(seeds), **self._options}
        if self.condition == "text":
            told |= {"prompts": list(map(str, conditions)), "guidance": settings.guidance}
        elif self.condition == "label":
            told["class_labels"] = [int(label) for label in conditions]
        return told

    def sample(self, conditions: Sequence[str | int], seeds: Sequence[int], settings: Settings) -> Sample:
        trajectory: list[Array] = []

        def keep(step: Step) -> None:
            trajectory.append(step.latents.copy())

        drawn = self._pipeline.generate(**self.given(conditions, seeds, settings), callback=keep)
        return Sample(drawn.images, np.stack(trajectory), drawn.timings)

    def draw(self, conditions: Sequence[str | int], seeds: Sequence[int], settings: Settings) -> Array:
        return self._pipeline.generate(**self.given(conditions, seeds, settings)).images

    def reconstruct(self, images: Array) -> Array:
        return self._pipeline.reconstruct(images)


def open_painter(target: str) -> Painter:
    """A bundle's folder, a checkpoint's folder, or a shipped checkpoint's name."""
    if (Path(target) / "manifest.json").is_file():
        return BundlePainter(Bundle.open(target))
    return CheckpointPainter(LatentDiffusion.open(target))


def checkpoint_tokenizer(checkpoint: LatentDiffusion) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        copy_tokenizer(checkpoint.tokenizer_folder("text_encoder"), Path(folder) / "tokenizer")
        return Tokenizer(Path(folder) / "tokenizer")


def _side(size: tuple[int, int]) -> int:
    if size[0] != size[1]:
        raise InputError(f"The model draws {size[0]} x {size[1]}; only square pictures are evaluated.")
    return size[0]
