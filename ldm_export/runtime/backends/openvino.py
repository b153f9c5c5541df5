"""OpenVINO on the CPU, from the bundle's plain graphs.

A graph whose sizes are fixed is compiled with its shape arithmetic folded away. That makes a denoiser's call a quarter
faster and takes about a second, so it is done for what is bound, which runs often, and not for what is run once.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ldm_export.bundle import Bundle
from ldm_export.bundle.listed import GraphFiles
from ldm_export.bundle.targets.base import files_in
from ldm_export.contract import GraphSpec, check_inputs, check_outputs
from ldm_export.errors import BackendError, BundleError
from ldm_export.runtime.backends.base import (
    Backend,
    Signature,
    adapters_target,
    allowed_threads,
    check_contract,
    foreign_errors,
    one_line,
    with_branches,
)
from ldm_export.runtime.graph import Array

CONFIG: dict[str, Any] = {
    "PERFORMANCE_HINT": "LATENCY",
    "INFERENCE_PRECISION_HINT": "f32",  # else bf16 where the processor has it, and another picture
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # else what meets int8 weights is quantized too
    "CPU_DENORMALS_OPTIMIZATION": True,
    "ENABLE_CPU_PINNING": False,  # a pinned thread waits for its core while another is idle
}
KEPT_BYTES = 1 << 30
"""How much weight the copies of a graph that are compiled for different sizes may have together; one is always kept."""


class OpenVinoBackend(Backend):
    """Reads graphs into OpenVINO.

    Parameters
    ----------
    threads : for one operator; by default one a physical core that this process may use

    Attributes
    ----------
    name : what is used, such as ``openvino 2026.4.1 cpu``
    """

    def __init__(self, bundle: Bundle, threads: int | None):
        openvino = _import_openvino()
        self._bundle = bundle
        self._library = openvino
        self._core = openvino.Core()
        self._config = {**CONFIG, "INFERENCE_NUM_THREADS": threads or allowed_threads()}
        self.name = f"openvino {openvino.__version__.partition('-')[0]} cpu"

    def load(self, graph: str) -> OpenVinoGraph:
        """Read one of the bundle's graphs, and compile it unless it is the denoiser, whose sizes come when it is bound.

        Raises
        ------
        BundleError
            If OpenVINO refuses the graph.
        """
        spec = self._bundle.manifest.graphs[graph]
        size_bytes = sum(
            entry.size_bytes for path, entry in self._bundle.manifest.files.items() if path.startswith(f"{spec.name}/")
        )
        loaded, inputs, outputs = self._read(self._bundle.graph_files(spec.path), graph, spec, size_bytes)
        check_contract(spec, inputs, outputs)
        return loaded

    def load_adapted(self, graph: str) -> OpenVinoGraph:
        target = adapters_target(self._bundle, graph)
        path, spec = target.graphs[graph].path, self._bundle.manifest.graphs[graph]
        size_bytes = sum(entry.size_bytes for name, entry in target.files.items() if name.startswith(path))
        loaded, inputs, outputs = self._read(files_in(self._bundle, target).graph(path), graph, spec, size_bytes)
        loaded.spec = with_branches(spec, inputs)
        check_contract(loaded.spec, inputs, outputs)
        return loaded

    def _read(
        self, files: GraphFiles, graph: str, spec: GraphSpec, size_bytes: int
    ) -> tuple[OpenVinoGraph, Signature, Signature]:
        """A graph, and what it takes and gives."""
        verified = self._bundle.verified
        if files.data and verified:
            raise BackendError(
                f"{spec.path} keeps weights in files of their own, which OpenVINO takes from the disk alone, where "
                "they could be others by now. Use the backend cpu, or open the bundle without verify."
            )
        try:
            model = self._core.read_model(files.model if verified else files.path)
            loaded = OpenVinoGraph(self, model, spec, kept=max(1, KEPT_BYTES // max(1, size_bytes)))
            if graph != self._bundle.roles.denoiser:
                loaded.compiled()
        except Exception as error:  # its exceptions have no common base class
            raise BundleError(
                f"OpenVINO refuses {spec.path}: {one_line(error)}. Use the backend cpu, or export the bundle anew."
            ) from error
        return loaded, _signature(model.inputs), _signature(model.outputs)

    def compile(self, model: Any) -> Any:
        return self._core.compile_model(model, "CPU", self._config)

    def shared_tensor(self, array: Array) -> Any:
        assert array.flags.c_contiguous
        return self._library.Tensor(array, shared_memory=True)


class OpenVinoGraph:
    """One graph, compiled for any size when it is run and for given sizes when it is bound, the ``kept`` latest."""

    can_skip = False

    def __init__(self, backend: OpenVinoBackend, model: Any, spec: GraphSpec, *, kept: int):
        self._backend = backend
        self._model = model
        self._any_size: Any = None
        self._sized: OrderedDict[tuple[tuple[int, ...], ...], Any] = OrderedDict()
        self._kept = kept
        self.spec = spec

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        sizes = check_inputs(self.spec, inputs)
        with foreign_errors("OpenVINO", self.spec.name):
            request = self.compiled().create_infer_request()
            request.infer(dict(inputs), share_inputs=True)
            results = {tensor.name: request.get_tensor(tensor.name).data.copy() for tensor in self.spec.outputs}
        check_outputs(self.spec, results, sizes)
        return results

    def bind(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], fixed: Collection[str] = (), every: int = 1
    ) -> Callable[[], None]:
        assert every == 1
        check_inputs(self.spec, inputs)
        with foreign_errors("OpenVINO", self.spec.name):
            request = self.compiled_for({name: array.shape for name, array in inputs.items()}).create_infer_request()
            for name, array in (*inputs.items(), *outputs.items()):
                request.set_tensor(name, self._backend.shared_tensor(array))

        def call(_arrays: object = (dict(inputs), dict(outputs))) -> None:  # the request holds only their addresses
            with foreign_errors("OpenVINO", self.spec.name):
                request.infer()

        return call

    def compiled(self) -> Any:
        if self._any_size is None:
            self._any_size = self._backend.compile(self._model)
        return self._any_size

    def compiled_for(self, shapes: Mapping[str, tuple[int, ...]]) -> Any:
        key = tuple(shapes[tensor.name] for tensor in self.spec.inputs)
        if key not in self._sized:
            model = self._model.clone()  # shares the weights
            model.reshape({name: list(shape) for name, shape in shapes.items()})
            while len(self._sized) >= self._kept:
                self._sized.popitem(last=False)
            self._sized[key] = self._backend.compile(model)
        self._sized.move_to_end(key)
        return self._sized[key]


def _import_openvino() -> Any:
    """Import the library, but not the module by which it reports every import to its makers; it does without."""
    telemetry = "openvino_telemetry"
    hidden = telemetry not in sys.modules
    if hidden:
        sys.modules[telemetry] = None  # type: ignore[assignment]
    try:
        import openvino
    except ImportError as error:
        raise BackendError(
            "OpenVINO is not installed; the backend openvino needs it. Run: pip install 'ldm_export[openvino]'"
        ) from error
    finally:
        if hidden:
            del sys.modules[telemetry]
    return openvino


def _signature(ports: Any) -> Signature:
    """The inputs or outputs of a model; -1 is a size that is free."""
    return {
        port.any_name: (
            port.element_type.to_dtype().name,
            [size.get_length() if size.is_static else -1 for size in port.partial_shape],
        )
        for port in ports
    }
