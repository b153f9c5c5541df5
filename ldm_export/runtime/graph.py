"""What a loaded graph is, whatever library runs it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import numpy.typing as npt

from ldm_export.contract import GraphSpec

Array = npt.NDArray[Any]


class Graph(Protocol):
    """A loaded graph. Arrays have the dtypes and shapes of its ``spec``."""

    spec: GraphSpec

    @property
    def can_skip(self) -> bool:
        """Whether ``every`` of `bind` may be more than 1."""
        ...

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once, into new arrays."""
        ...

    def bind(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], fixed: Collection[str] = (), every: int = 1
    ) -> Callable[[], None]:
        """A call that reads ``inputs`` and writes ``outputs`` where they are, as often as it is made.

        Parameters
        ----------
        fixed : inputs that hold the same from call to call, and may be read here once and for all
        every : the first and then every ``every``-th call are of the whole graph, those between of its outermost blocks
        """
        ...
