"""What the tests of recipes share: small recipes, graph passes that do one thing, and a judge that takes no time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from ldm_export.bundle import Bundle
from ldm_export.errors import ExportError
from ldm_export.graph.base import GraphChange, Inputs, Purpose
from ldm_export.graph.integers import array
from ldm_export.recipe import Recipe, read_recipe, score
from ldm_export.runtime import Pipeline
from ldm_export.verify import quality
from ldm_export.verify.latency import Latency

PROMPTS = tuple(f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("circle", "square", "line"))
LOOSE = "frechet_ratio = 1e6\nretrieval_drop = 1.0"
"""A budget that random networks keep: only speed and bytes decide."""
DECODER = """
[[pass]]
name = "distill-decoder"
updates = 6
batch_size = 4
width = 4
blocks = [1, 0]
perceptual_weight = 0
"""
GUIDANCE = """
[[pass]]
name = "distill-guidance"
updates = 3
batch_size = 4
"""
WEIGHTS = """
[[pass]]
name = "quantize-weights"
smallest = 64
"""


def write_recipe(folder: Path, passes: str, *, budget: str = LOOSE, teacher: str = "steps = 2") -> Path:
    """A recipe, and its prompts beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    text = f'prompts = "prompts.txt"\n[teacher]\nlatents = 16\n{teacher}\n[budget]\npictures = 10\n{budget}\n{passes}'
    (folder / "recipe.toml").write_text(text)
    return folder / "recipe.toml"


def recipe_of(folder: Path, passes: str, **tables: str) -> Recipe:
    return read_recipe(write_recipe(folder, passes, **tables))


def plain(records: Any) -> Any:
    """As they are read again: lists for tuples."""
    return json.loads(json.dumps(records))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def without_manifest(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_of(folder).items() if name != "manifest.json"}


# --- a judge that takes no time -------------------------------------------------------------------------------------


def judge_cheaply(patch: pytest.MonkeyPatch) -> None:
    """Features are projected pixels; a millisecond is a megabyte that a picture's network calls read."""
    projection = np.random.default_rng(0).standard_normal((16 * 16 * 3, 16)) / 1000

    def features_of(images: np.ndarray[Any, Any], progress: object = None) -> np.ndarray[Any, Any]:
        return np.asarray(images.reshape(len(images), -1).astype(float) @ projection)

    def draw_with(pipeline: Pipeline, prompts: list[str] | None) -> Bundle:
        return pipeline.bundle

    def time_in_turn(sides: Mapping[str, Bundle], rounds: int) -> dict[str, Latency]:
        return {name: cost_of(bundle) for name, bundle in sides.items()}

    patch.setattr(quality, "features_of", features_of)
    patch.setattr(score, "draw_with", draw_with)
    patch.setattr(score, "time_in_turn", time_in_turn)


def cost_of(bundle: Bundle) -> Latency:
    model, files = bundle.manifest.model, bundle.manifest.files
    graphs = (bundle.roles.denoiser, "vae_decoder")
    denoiser_ms, decode_ms = (files[f"{graph}/model.onnx"].size_bytes / 1e6 for graph in graphs)
    calls = model["default_steps"] * (1 + bundle.roles.guidance.takes_two_rows())
    return Latency(calls * denoiser_ms + decode_ms, 0.0, denoiser_ms, decode_ms, model["default_steps"])


# --- graph passes that do one thing ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """Multiplies every kernel of a graph; ``allowed`` is the parity that it claims."""

    name: ClassVar[str] = "scale"
    purpose: ClassVar[Purpose] = "bytes"
    targets: ClassVar[tuple[str, ...]] = ("cpu",)
    tolerance: ClassVar[float] = 1e6

    factor: float = 5.0
    graphs: tuple[str, ...] = ("vae_decoder",)

    def apply(self, model: onnx.ModelProto, calibration: Sequence[Inputs]) -> GraphChange:
        for tensor in model.graph.initializer:
            if len(tensor.dims) == 4:
                changed = array(tensor) * np.float32(self.factor)
                tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
        return GraphChange(model, {"factor": self.factor})


@dataclass(frozen=True)
class ScaleStrictly(Scale):
    """The same, held to 1 %."""

    name: ClassVar[str] = "scale-strictly"
    tolerance: ClassVar[float] = 0.01


@dataclass(frozen=True)
class Change:
    """Does ``what`` to the decoder's graph."""

    name: ClassVar[str] = "change"
    purpose: ClassVar[Purpose] = "bytes"
    targets: ClassVar[tuple[str, ...]] = ("cpu",)
    tolerance: ClassVar[float] = 1e-4

    what: str = "nothing"
    graphs: tuple[str, ...] = ("vae_decoder",)

    def apply(self, model: onnx.ModelProto, calibration: Sequence[Inputs]) -> GraphChange:
        CHANGES[self.what](model)
        return GraphChange(model)


@dataclass(frozen=True)
class ChangeForSpeed(Change):
    name: ClassVar[str] = "change-for-speed"
    purpose: ClassVar[Purpose] = "speed"


def grow(model: onnx.ModelProto) -> None:
    model.doc_string = "x" * 1000


def refuse(model: onnx.ModelProto) -> None:
    raise ExportError("This graph has an operator that change does not know. Leave it out.")


def break_graph(model: onnx.ModelProto) -> None:
    model.graph.node[-1].input[0] = "nothing makes this"


def lose_numbers(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if len(tensor.dims) == 4:
            changed = np.full_like(array(tensor), np.nan)
            tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))


def use_unknown_operator(model: onnx.ModelProto) -> None:
    """What is valid ONNX, since the domain is not ONNX's, and what no runtime has."""
    node = model.graph.node[-1]
    node.op_type, node.domain = "Sharpen", "com.example"
    model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))


CHANGES: dict[str, Callable[[onnx.ModelProto], None]] = {
    "nothing": lambda model: None,
    "grow": grow,
    "refuse": refuse,
    "break": break_graph,
    "lose numbers": lose_numbers,
    "unknown operator": use_unknown_operator,
}
FAKE_PASSES = (Scale, ScaleStrictly, Change, ChangeForSpeed)


class Interrupt:
    """A progress callback that stops a run where ``what`` begins, at ``done``; and remembers what it was told."""

    def __init__(self, what: str = "never", done: int = 0):
        self.what, self.done = what, done
        self.told: list[tuple[str, int]] = []

    def __call__(self, what: str, done: int, of: int) -> None:
        self.told.append((what, done))
        if what.startswith(self.what) and done >= self.done:
            raise KeyboardInterrupt

    def heard(self, what: str) -> bool:
        return any(told.startswith(what) for told, _ in self.told)
