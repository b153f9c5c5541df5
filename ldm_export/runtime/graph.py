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

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once, into new arrays."""
        ...

    def bind(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], fixed: Collection[str] = ()
    ) -> Callable[[], None]:
        """A call that reads ``inputs`` and writes ``outputs`` where they lie, as often as it is made.

        What inputs ``fixed`` hold does not change from call to call, and may be read here once and for all.
        """
        ...
