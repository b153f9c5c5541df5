"""Pictures and network inputs that a recipe needs and that the teacher, as a bundle, makes itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm_export.bench.quality import BundlePainter, Progress, Settings
from ldm_export.bundle import Bundle
from ldm_export.contract import GraphSpec
from ldm_export.graph.base import Inputs
from ldm_export.runtime import Pipeline
from ldm_export.runtime.backends import Array, Backend, Graph, open_backend

GALLERY_SEED, REFERENCE_SEED = 10_000_000, 20_000_000
"""Of the first picture of each set; what is judged is drawn with seeds from 0 on."""
CALIBRATION_PICTURES = 8
PNG = "{number:05d}.png"
MADE = "made.json"
"""Beside the pictures: what drew them, and how."""


def draw_gallery(
    bundle: Bundle, told: Sequence[str | int], count: int, folder: Path, progress: Progress
) -> tuple[Path, Path]:
    """Two folders of pictures with captions or classes, in the layout of training data: ``count`` each, of different
    conditions (as far as there are enough) and seeds. What the same bundle has drawn there is not drawn again."""
    painter = BundlePainter(bundle)
    model = bundle.manifest.model
    settings = Settings(
        sampler=model["default_sampler"], steps=model["default_steps"], guidance=model["default_guidance"]
    )
    order = np.random.default_rng(0).permutation(max(len(told), 1))
    made = json.dumps([bundle.manifest.source.get("sha256"), asdict(settings), count, list(told)])
    folders = []
    for name, first_seed, skip in (("gallery", GALLERY_SEED, 0), ("reference", REFERENCE_SEED, count)):
        path = folder / name
        folders.append(path)
        if (path / "metadata.jsonl").is_file() and (path / MADE).is_file() and (path / MADE).read_text() == made:
            continue
        path.mkdir(parents=True, exist_ok=True)
        (path / "metadata.jsonl").unlink(missing_ok=True)
        (path / MADE).write_text(made)
        lines: list[dict[str, Any]] = []
        for start in range(0, count, settings.batch):
            progress(f"teacher draws the {name}", start, count)
            numbers = range(start, min(start + settings.batch, count))
            chosen = [told[order[(skip + k) % len(told)]] if told else "" for k in numbers]
            images = painter.draw(chosen, [first_seed + k for k in numbers], settings)
            for number, condition, image in zip(numbers, chosen, images, strict=True):
                file = PNG.format(number=number)
                Image.fromarray(image.squeeze()).save(path / file)
                says = {} if not told else {"text" if isinstance(condition, str) else "label": condition}
                lines.append({"file_name": file, **says})
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (path / "metadata.jsonl").write_text(text, encoding="utf-8")  # last: a folder that has it is complete
    return folders[0], folders[1]


class RecordingGraph:
    """A graph that keeps a copy of every call's inputs."""

    def __init__(self, graph: Graph, calls: list[Inputs]):
        self._graph, self._calls = graph, calls
        self.spec: GraphSpec = graph.spec

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self._calls.append({name: array.copy() for name, array in inputs.items()})
        return self._graph.run(inputs)

    def bind(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], fixed: Collection[str] = ()
    ) -> Callable[[], None]:
        call = self._graph.bind(inputs, outputs, fixed)

        def recorded() -> None:
            self._calls.append({name: array.copy() for name, array in inputs.items()})
            call()

        return recorded


class RecordingBackend:
    """A backend whose graphs keep what they are given, by name."""

    def __init__(self, backend: Backend):
        self._backend, self.name = backend, backend.name
        self.calls: dict[str, list[Inputs]] = {}

    def load(self, graph: str) -> Graph:
        return RecordingGraph(self._backend.load(graph), self.calls.setdefault(graph, []))


def calibration_conditions(told: Sequence[str | int]) -> list[str | int]:
    """What calibration pictures are drawn of: a few of all prompts or classes."""
    chosen = np.random.default_rng(1).permutation(len(told))[:CALIBRATION_PICTURES]
    return [told[number] for number in chosen]


def calibration_calls(bundle: Bundle, told: Sequence[str | int]) -> dict[str, list[Inputs]]:
    """What every graph is given while these are drawn, over their whole trajectories, and encoded again."""
    backend = RecordingBackend(open_backend(bundle, "cpu", None))
    pipeline = Pipeline(bundle, backend)
    for seed in range(CALIBRATION_PICTURES):
        condition = told[seed % len(told)] if told else None
        given: dict[str, Any] = {"seed": [seed]}
        if isinstance(condition, str):
            given["prompts"] = [condition]
        elif condition is not None:
            given["class_labels"] = [condition]
        pipeline.reconstruct(pipeline.generate(**given).images)
    return backend.calls
