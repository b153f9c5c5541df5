"""The inputs of every graph over whole drawings: what quantization is calibrated on, and compared with PyTorch on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ldm_export.bundle import Bundle
from ldm_export.contract import GraphSpec
from ldm_export.graph.base import Inputs
from ldm_export.runtime import Pipeline
from ldm_export.runtime.backends import open_backend
from ldm_export.runtime.backends.base import Backend
from ldm_export.runtime.graph import Array, Graph

CALIBRATION_PICTURES = 8


class RecordingGraph:
    """A graph that keeps a copy of every call's inputs."""

    can_skip = False

    def __init__(self, graph: Graph, calls: list[Inputs]):
        self._graph, self._calls = graph, calls
        self.spec: GraphSpec = graph.spec

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self._calls.append({name: array.copy() for name, array in inputs.items()})
        return self._graph.run(inputs)

    def bind(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], fixed: Collection[str] = (), every: int = 1
    ) -> Callable[[], None]:
        call = self._graph.bind(inputs, outputs, fixed, every)

        def recorded() -> None:
            self._calls.append({name: array.copy() for name, array in inputs.items()})
            call()

        return recorded


class RecordingBackend(Backend):
    """A backend whose graphs keep what they are given, by name."""

    def __init__(self, backend: Backend):
        self._backend, self.name = backend, backend.name
        self.calls: dict[str, list[Inputs]] = {}

    def load(self, graph: str) -> Graph:
        return RecordingGraph(self._backend.load(graph), self.calls.setdefault(graph, []))


def calibration_conditions(conditions: Sequence[str | int]) -> list[str | int]:
    """What calibration pictures are drawn of: a few of all prompts or classes."""
    chosen = np.random.default_rng(1).permutation(len(conditions))[:CALIBRATION_PICTURES]
    return [conditions[number] for number in chosen]


def calibration_calls(bundle: Bundle, conditions: Sequence[str | int]) -> dict[str, list[Inputs]]:
    """What every graph is given while these are drawn, over their whole trajectories, and encoded again."""
    backend = RecordingBackend(open_backend(bundle, "cpu", None))
    pipeline = Pipeline(bundle, backend)
    for seed in range(CALIBRATION_PICTURES):
        condition = conditions[seed % len(conditions)] if conditions else None
        given: dict[str, Any] = {"seed": [seed]}
        if isinstance(condition, str):
            given["prompts"] = [condition]
        elif condition is not None:
            given["class_labels"] = [condition]
        pipeline.reconstruct(pipeline.generate(**given).images)
    return backend.calls
