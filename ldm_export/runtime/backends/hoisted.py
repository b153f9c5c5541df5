"""A graph with its invariants hoisted out of the sampling loop: what depends on the prompt alone runs once a picture,
what depends on the timestep alone once for each timestep."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import cycle

import numpy as np

from ldm_export.bundle.targets.base import TargetGraph
from ldm_export.contract import GraphSpec, TensorSpec, check_inputs
from ldm_export.errors import BundleError
from ldm_export.runtime.graph import Array, Graph

DEEP = "deep"
MOST_RESULTS = 1024
"""Values of an input of one number a row (timesteps) whose results are kept."""


class HoistedGraph:
    """Several graphs that behave as one of ``spec``.

    Parameters
    ----------
    rest : takes the graph's own inputs, as far as it still needs them, and the outputs of ``parts``
    parts : {input: graph that depends on that input alone}
    shallow : the outermost blocks alone (DeepCache), which take the output ``deep`` of ``rest``
    deep_channels : C of the tensor ``deep`` (B, C, h, w), whose B, h and w are those of the input ``sample``
    """

    def __init__(
        self,
        spec: GraphSpec,
        rest: Graph,
        parts: Mapping[str, Graph],
        shallow: Graph | None = None,
        deep_channels: int = 0,
    ):
        self.spec = spec
        self._rest, self._parts, self._shallow, self._deep_channels = rest, parts, shallow, deep_channels
        self._known: dict[str, OrderedDict[bytes, dict[str, Array]]] = {name: OrderedDict() for name in parts}

    @property
    def can_skip(self) -> bool:
        """Whether calls can be bound of which only some are of the whole."""
        return self._shallow is not None

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        check_inputs(self.spec, inputs)
        given = dict(inputs)
        for name in self._parts:
            given |= self._results(name, inputs[name])
        results = self._rest.run(_taken(given, self._rest))
        return {tensor.name: results[tensor.name] for tensor in self.spec.outputs}

    def bind(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], fixed: Collection[str] = (), every: int = 1
    ) -> Callable[[], None]:
        """Bind as any graph does; the first and then every ``every``-th call are of the whole graph, those between of
        ``shallow``."""
        check_inputs(self.spec, inputs)
        held = {name: self._results(name, inputs[name]) for name in self._parts}
        given = {**inputs, **{key: value for part in held.values() for key, value in part.items()}}
        if every == 1 or self._shallow is None:
            calls = [self._rest.bind(_taken(given, self._rest), outputs)]
        else:
            batch, _, *sizes = inputs["sample"].shape
            deep = {DEEP: np.empty((batch, self._deep_channels, *sizes), np.float32)}
            whole = self._rest.bind(_taken(given, self._rest), {**outputs, **deep})
            outermost = self._shallow.bind(_taken({**given, **deep}, self._shallow), outputs)
            calls = [whole, *[outermost] * (every - 1)]
        changing = [name for name in self._parts if name not in fixed]
        turns = cycle(calls)

        def bound() -> None:
            for name in changing:
                for key, value in self._results(name, inputs[name]).items():
                    np.copyto(held[name][key], value)  # where it is bound
            next(turns)()

        return bound

    def _results(self, name: str, value: Array) -> dict[str, Array]:
        """What the part that depends on an input gives for a value, in arrays of the caller's; where each row is one
        number, such as its timestep, what it gave for that number is remembered."""
        if value.ndim != 1:
            return self._parts[name].run({name: value})
        rows = [self._row(name, value[number : number + 1]) for number in range(len(value))]
        return {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}

    def _row(self, name: str, value: Array) -> dict[str, Array]:
        known, key = self._known[name], value.tobytes()
        if key not in known:
            known[key] = self._parts[name].run({name: value})
            if len(known) > MOST_RESULTS:
                known.popitem(last=False)
        return known[key]


def check_parts(spec: GraphSpec, target: TargetGraph, parts: Mapping[str, GraphSpec]) -> None:
    """Raise BundleError unless the graphs of a target, by path, are together one of ``spec``."""
    own = {tensor.name: tensor for tensor in spec.inputs}
    hoisted = {name: parts[path] for name, path in target.hoisted.items()}
    given = own | {tensor.name: tensor for part in hoisted.values() for tensor in part.outputs}
    made = {tensor.name: tensor for tensor in spec.outputs}
    fits = all([tensor.name for tensor in part.inputs] == [name] for name, part in hoisted.items())
    fits = fits and hoisted.keys() <= own.keys() and _alike(parts[target.path].inputs, given)
    outputs = {tensor.name: tensor for tensor in parts[target.path].outputs}
    fits = fits and bool(target.shallow) == (DEEP in outputs) and bool(target.shallow) == (target.deep_channels != 0)
    if fits and target.shallow:
        deep = outputs.pop(DEEP)
        shallow = parts[target.shallow]
        fits = deep.shape[1:2] == (target.deep_channels,) and _alike(shallow.inputs, given | {DEEP: deep})
        fits = fits and [tensor.name for tensor in shallow.outputs] == list(made) and _alike(shallow.outputs, made)
    if not fits or list(outputs) != list(made) or not _alike(tuple(outputs.values()), made):
        raise BundleError(f"{target.path} and what belongs to it are not {spec.path}. Build the target anew.")


def _alike(taken: Sequence[TensorSpec], given: Mapping[str, TensorSpec]) -> bool:
    """Whether there is a tensor of the same type, rank and fixed sizes for each that is taken."""
    return all(
        (there := given.get(tensor.name)) is not None
        and there.dtype == tensor.dtype
        and len(there.shape) == len(tensor.shape)
        and all(
            a == b for a, b in zip(there.shape, tensor.shape, strict=True) if isinstance(a, int) and isinstance(b, int)
        )
        for tensor in taken
    )


def _taken(given: Mapping[str, Array], graph: Graph) -> dict[str, Array]:
    return {tensor.name: given[tensor.name] for tensor in graph.spec.inputs}
