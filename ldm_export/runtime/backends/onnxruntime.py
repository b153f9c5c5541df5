"""ONNX Runtime, on the CPU or, where its CUDA provider works, on an NVIDIA GPU."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm_export.bundle import Bundle
from ldm_export.contract import GraphSpec, TensorSpec, check_inputs
from ldm_export.errors import BackendError, BundleError
from ldm_export.runtime.backends import Array, Graph
from ldm_export.runtime.backends.once import OnceGraph
from ldm_export.target import ORT_CPU, Target, needs_of, read_target

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
ONNX_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "int64": "tensor(int64)"}


class OnnxRuntimeBackend:
    """Loads graphs into ONNX Runtime sessions.

    Parameters
    ----------
    requested : ``cpu``; ``cuda``, which fails if CUDA cannot be used; or ``auto``, CUDA if the installed ONNX Runtime
        has it and else the CPU
    threads : for one operator; by default one a physical core that this process may use

    Attributes
    ----------
    name : what is used, such as ``onnxruntime 1.32.0 cpu``, and ``ort-cpu`` behind it where the bundle has that target
    """

    def __init__(self, bundle: Bundle, requested: str, threads: int | None):
        try:
            import onnxruntime
        except ImportError as error:
            raise BackendError(
                "ONNX Runtime is not installed; this backend needs it. Run: pip install 'ldm_export[cpu]' "
                "(or 'ldm_export[gpu]' for NVIDIA GPUs; never both)."
            ) from error
        self._library = onnxruntime
        self._bundle = bundle
        self._requested = requested
        self._options = onnxruntime.SessionOptions()
        self._options.log_severity_level = 3
        self._options.add_session_config_entry("session.set_denormal_as_zero", "1")
        self._options.intra_op_num_threads = threads or _allowed_threads()
        # Idle threads wait for more work spinning: those of one graph would slow the next graph's first steps.
        self._options.add_session_config_entry("session.force_spinning_stop", "1")
        available = onnxruntime.get_available_providers()
        if CUDA in available and requested != "cpu":
            onnxruntime.preload_dlls()  # CUDA and cuDNN from NVIDIA's Python packages, where those are installed
        if requested == "cuda" and CUDA not in available:
            raise BackendError(
                f"cuda was asked for; the installed ONNX Runtime {onnxruntime.__version__} has only "
                f"{', '.join(available)}. Install 'ldm_export[gpu]' in an environment without onnxruntime."
            )
        self._cuda = requested != "cpu" and CUDA in available
        self.name = f"onnxruntime {onnxruntime.__version__} {'cuda' if self._cuda else 'cpu'}"
        self._target = None if self._cuda else self._fitting_target()
        if self._target is not None:
            self.name += f" {ORT_CPU}"

    def _fitting_target(self) -> Target | None:
        found = read_target(self._bundle, ORT_CPU, needs_of(self._library.__version__))
        if isinstance(found, str):
            warnings.warn(
                f"targets/{ORT_CPU} of {self._bundle.path} is passed over, since {found}; the plain graphs run. "
                f"For its speed run: ldm-export build {self._bundle.path} --target cpu",
                stacklevel=5,
            )
        return found if isinstance(found, Target) else None

    def load(self, graph: str) -> Graph:
        """Open a session on one of the bundle's graphs.

        Raises
        ------
        BackendError
            If CUDA was asked for by name and ONNX Runtime fell back to the CPU.
        BundleError
            If ONNX Runtime refuses the graph.
        """
        spec = self._bundle.manifest.graphs[graph]
        if self._target is not None:
            return self._load_target(self._target, graph, spec)
        session = self._session(self._bundle.file(spec.path), spec.path)
        if self._cuda and CUDA not in session.get_providers():
            self._cuda = False
            if self._requested == "cuda":
                raise BackendError(
                    "cuda was asked for; ONNX Runtime has a CUDA provider that does not start here (driver, CUDA or "
                    "cuDNN missing). Install 'ldm_export[gpu]' and NVIDIA's driver, or use the backend cpu."
                )
            self.name = self.name.replace("cuda", "cpu")
            warnings.warn("ONNX Runtime's CUDA provider does not start here; the CPU is used instead.", stacklevel=3)
        _check_contract(session, spec)
        return OnnxRuntimeGraph(session, spec, on_gpu=self._cuda)

    def _load_target(self, target: Target, graph: str, spec: GraphSpec) -> Graph:
        found = target.graphs[graph]
        parts = {}
        for name, path in {"": found.path, **found.once}.items():
            session = self._session(target.file(path), path)
            parts[name] = OnnxRuntimeGraph(session, _spec_of(session, path), on_gpu=False)
        whole = parts.pop("")
        return OnceGraph(spec, whole, parts) if parts else OnnxRuntimeGraph(whole.session, spec, on_gpu=False)

    def _session(self, file: Path, path: str) -> Any:
        providers = [(CUDA, {"use_tf32": "0"}), CPU] if self._cuda else [CPU]
        fallback = {"enable_fallback": int(self._cuda)}  # it prints, and tries the same again
        try:
            return self._library.InferenceSession(file, self._options, providers, **fallback)
        except Exception as error:  # its exceptions have no common base class
            if self._options.use_per_session_threads and "global thread pool" in str(error):
                self._options.use_per_session_threads = False  # the application has one pool for all sessions
                return self._session(file, path)
            raise BundleError(f"ONNX Runtime refuses {path}: {error}. Export the bundle anew.") from error


def _allowed_threads() -> int:
    """The CPUs that this process is confined to (taskset, containers); 0, ONNX Runtime's own choice, if it is not."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return allowed if allowed < (os.cpu_count() or 1) else 0


def _check_contract(session: Any, spec: GraphSpec) -> None:
    """Raise BundleError unless the session has the inputs and outputs that the manifest gives its graph."""
    for side, declared, found in (
        ("inputs", spec.inputs, session.get_inputs()),
        ("outputs", spec.outputs, session.get_outputs()),
    ):
        there = {value.name: (value.type, value.shape) for value in found}
        fits = there.keys() == {tensor.name for tensor in declared}
        for tensor in declared if fits else ():
            kind, shape = there[tensor.name]
            sizes = [given if isinstance(size, str) else size for size, given in zip(tensor.shape, shape, strict=False)]
            fits = fits and kind == ONNX_TYPES.get(tensor.dtype) and sizes == shape and len(shape) == len(tensor.shape)
        if not fits:
            raise BundleError(f"{spec.path} has other {side} than manifest.json says: {there}. Export the bundle anew.")


def _spec_of(session: Any, path: str) -> GraphSpec:
    """What a session says that it takes and gives."""
    dtypes = {kind: dtype for dtype, kind in ONNX_TYPES.items()}
    sides = []
    for values in (session.get_inputs(), session.get_outputs()):
        named = (
            (value, [size if isinstance(size, int) else f"{value.name}.{k}" for k, size in enumerate(value.shape)])
            for value in values
        )
        sides.append(tuple(TensorSpec(value.name, dtypes[value.type], tuple(shape)) for value, shape in named))
    return GraphSpec(path, *sides)


class OnnxRuntimeGraph:
    """One session; see :class:`ldm_export.runtime.backends.Graph`."""

    def __init__(self, session: Any, spec: GraphSpec, *, on_gpu: bool):
        self.session = session
        self._on_gpu = on_gpu
        self.spec = spec

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        check_inputs(self.spec, inputs)
        names = [tensor.name for tensor in self.spec.outputs]
        with self._foreign_errors():
            return dict(zip(names, self.session.run(names, dict(inputs)), strict=True))

    def bind(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], fixed: Collection[str] = ()
    ) -> Callable[[], None]:
        if self._on_gpu:  # there, binding an array copies it once, at the binding; what changes later is not seen
            return lambda: self._copy_out(self.run(inputs), outputs)
        check_inputs(self.spec, inputs)
        binding = self.session.io_binding()
        for bind_tensor, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, array in arrays.items():
                assert array.flags.c_contiguous
                bind_tensor(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

        def call(_arrays: object = (dict(inputs), dict(outputs))) -> None:  # the binding holds only their addresses
            with self._foreign_errors():
                self.session.run_with_iobinding(binding)

        return call

    @staticmethod
    def _copy_out(results: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        for name, array in outputs.items():
            array[...] = results[name]

    @contextmanager
    def _foreign_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # its exceptions have no common base class
            reason = " ".join(str(error).split())
            raise BackendError(f"ONNX Runtime could not run {self.spec.name}: {reason}. Try a smaller size.") from error
