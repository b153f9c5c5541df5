"""What runs the graphs of a bundle. A backend imports its library when it is opened, not before."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import numpy.typing as npt

from ldm_export.bundle import Bundle
from ldm_export.contract import GraphSpec
from ldm_export.errors import InputError

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


class Backend(Protocol):
    """Where graphs run. ``name`` says what is really used, never only what was asked for."""

    name: str

    def load(self, graph: str) -> Graph: ...


def open_backend(bundle: Bundle, name: str, threads: int | None) -> Backend:
    """Open a backend by the name that users give: ``auto``, ``cpu`` or ``cuda``.

    Raises
    ------
    InputError
        For a name that is not one of :data:`BACKENDS`.
    BackendError
        If its library is not installed, or a device that was asked for by name cannot be used.
    """
    if name not in BACKENDS:
        raise InputError(f"There is no backend {name!r}; there are {', '.join(BACKENDS)}. Use one of those.")
    from ldm_export.runtime.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(bundle, name, threads)


BACKENDS = ("auto", "cpu", "cuda")
