"""What every backend is, and what all of them use."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from ldm_export.bundle.targets.base import ADAPTERS, Target, read_target
from ldm_export.contract import GraphSpec, TensorSpec, is_branch_input
from ldm_export.errors import BackendError, BundleError, InputError, LdmExportError
from ldm_export.runtime.graph import Graph
from ldm_export.runtime.sampling import HostSampling, Sampling, SamplingTask

if TYPE_CHECKING:
    from typing_extensions import Self

    from ldm_export.bundle import Bundle


class Backend:
    """Where graphs run.

    Attributes
    ----------
    name : what is really used, never only what was asked for
    own_graphs : names of graphs that can be loaded beside the bundle's
    """

    name: str
    own_graphs: Collection[str] = ()

    def __new__(cls, *_: Any, **__: Any) -> Self:
        made = super().__new__(cls)
        _open.add(made)
        return made

    def load(self, graph: str) -> Graph:
        """Load one of the bundle's graphs, by its name in the manifest."""
        raise NotImplementedError

    def load_adapted(self, graph: str) -> Graph:
        """Load a graph with branches for adapters, whose inputs are further ones of its ``spec``.

        Raises
        ------
        InputError
            If this backend has none, or the bundle was prepared for no adapter of this graph.
        """
        raise InputError(
            f"Adapters were given, and {self.name} takes none when it draws. Use the backend cpu (ONNX Runtime), or "
            "merge them: ldm-export export CHECKPOINT -o BUNDLE --lora ADAPTER.safetensors"
        )

    def check_shapes(self, graph: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise InputError if a loaded graph cannot take inputs of these shapes; most graphs take any."""

    def sampling(self, denoiser: Graph, run: SamplingTask) -> Sampling:
        """A loop over a loaded denoiser."""
        return HostSampling(denoiser, run)

    def interrupt(self) -> None:
        """End what another thread runs or loads, where the library can; it then raises there."""

    def close(self) -> None:
        """Give back what is held outside of Python; nothing can be loaded or run afterwards."""


_open: WeakSet[Backend] = WeakSet()


def interrupt_all() -> None:
    """Interrupt every backend of this process."""
    for backend in list(_open):
        backend.interrupt()


def allowed_threads() -> int:
    """The CPUs that this process is confined to (taskset, containers); 0, the library's own choice, if it is not."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return allowed if allowed < (os.cpu_count() or 1) else 0


Signature = Mapping[str, tuple[str, Sequence[object]]]
"""A loaded graph's inputs or outputs: name to dtype, in numpy's words where it has one, and shape."""


def check_contract(
    spec: GraphSpec, inputs: Signature, outputs: Signature, remedy: str = "Export the bundle anew."
) -> None:
    """Raise BundleError unless a loaded graph has the inputs and outputs that the manifest gives it."""
    for side, declared, there in (("inputs", spec.inputs, inputs), ("outputs", spec.outputs, outputs)):
        fits = there.keys() == {tensor.name for tensor in declared}
        for tensor in declared if fits else ():
            dtype, shape = there[tensor.name]
            fits = fits and dtype == tensor.dtype and len(shape) == len(tensor.shape)
            fits = fits and all(
                isinstance(size, str) or given == size for size, given in zip(tensor.shape, shape, strict=True)
            )
        if not fits:
            raise BundleError(f"{spec.path} has other {side} than manifest.json says: {dict(there)}. {remedy}")


def adapters_target(bundle: Bundle, graph: str) -> Target:
    """The bundle's target that has a graph with branches for adapters.

    Raises
    ------
    InputError
        If there is none, or it is not sound.
    """
    target = read_target(bundle, ADAPTERS, {})
    if isinstance(target, Target) and graph in target.graphs:
        return target
    why = f", since {target}" if isinstance(target, str) else ""
    raise InputError(
        f"{bundle.path} takes no adapters of {graph}{why}. Run: ldm-export lora {bundle.path} ADAPTER.safetensors -o "
        "ADAPTER.ldma"
    )


def with_branches(spec: GraphSpec, inputs: Signature) -> GraphSpec:
    """A graph's spec with those of a loaded graph's inputs that are of branches for adapters; their free sizes have
    names of their own."""
    branches = (
        TensorSpec(
            name,
            dtype,
            tuple(size if isinstance(size, int) and size >= 0 else f"{name}.{k}" for k, size in enumerate(shape)),
        )
        for name, (dtype, shape) in inputs.items()
        if is_branch_input(name)
    )
    return replace(spec, inputs=(*spec.inputs, *branches))


@contextmanager
def foreign_errors(library: str, graph: str) -> Iterator[None]:
    """Turn whatever a library raises while it runs a graph into one sentence."""
    try:
        yield
    except LdmExportError:
        raise
    except Exception as error:  # these libraries' exceptions have no common base class
        raise BackendError(f"{library} could not run {graph}: {one_line(error)}. Try a smaller size.") from error


def one_line(error: Exception) -> str:
    """An exception's text without line breaks, and without OpenVINO's own source lines."""
    return " ".join(" ".join(line for line in str(error).splitlines() if not line.startswith("Exception from")).split())
