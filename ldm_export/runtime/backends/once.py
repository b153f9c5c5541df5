"""A graph whose unchanging parts run apart: what depends on the prompt once a picture, on the timestep once at all."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping

import numpy as np

from ldm_export.contract import GraphSpec, check_inputs
from ldm_export.runtime.backends import Array, Graph

REMEMBERED = 1024
"""Values of one scalar input (timesteps) whose results are kept."""


class OnceGraph:
    """Behaves as one graph of ``spec``.

    Parameters
    ----------
    rest : takes the graph's own inputs, as far as it still needs them, and what ``parts`` give
    parts : by the one input that each depends on
    """

    def __init__(self, spec: GraphSpec, rest: Graph, parts: Mapping[str, Graph]):
        self.spec = spec
        self._rest, self._parts = rest, parts
        self._takes = {tensor.name for tensor in rest.spec.inputs}
        self._known: dict[str, OrderedDict[bytes, dict[str, Array]]] = {name: OrderedDict() for name in parts}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        check_inputs(self.spec, inputs)
        given = {name: array for name, array in inputs.items() if name in self._takes}
        for name in self._parts:
            given |= self._results(name, inputs[name])
        return self._rest.run(given)

    def bind(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], fixed: Collection[str] = ()
    ) -> Callable[[], None]:
        check_inputs(self.spec, inputs)
        given = {name: array for name, array in inputs.items() if name in self._takes}
        held = {
            name: {key: value.copy() for key, value in self._results(name, inputs[name]).items()}
            for name in self._parts
        }
        call = self._rest.bind(
            {**given, **{key: value for part in held.values() for key, value in part.items()}}, outputs
        )
        changing = [name for name in self._parts if name not in fixed]

        def bound() -> None:
            for name in changing:
                for key, value in self._results(name, inputs[name]).items():
                    np.copyto(held[name][key], value)
            call()

        return bound

    def _results(self, name: str, value: Array) -> dict[str, Array]:
        """What the part that depends on an input gives for a value; of scalars it is remembered."""
        if value.ndim:
            return self._parts[name].run({name: value})
        known, key = self._known[name], value.tobytes()
        if key not in known:
            known[key] = self._parts[name].run({name: value})
            if len(known) > REMEMBERED:
                known.popitem(last=False)
        return known[key]
