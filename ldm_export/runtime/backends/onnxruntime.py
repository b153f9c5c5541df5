"""ONNX Runtime, on the CPU or, where one of its providers for it works, on an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

from ldm_export.bundle import Bundle
from ldm_export.bundle.listed import GraphFiles, MappedFile
from ldm_export.bundle.targets.base import (
    ADAPTERS_ORT_CPU,
    ORT_CPU,
    Target,
    adapters_needs,
    files_in,
    needs_of,
    read_target,
)
from ldm_export.contract import GraphSpec, TensorSpec, check_inputs, check_outputs
from ldm_export.errors import BackendError, BundleError, LdmExportError, warn
from ldm_export.reading.documents import MalformedError
from ldm_export.runtime.backends import providers
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
from ldm_export.runtime.backends.hoisted import HoistedGraph, check_parts
from ldm_export.runtime.backends.providers import CPU, CUDA, PROVIDERS, RECORDS, Provider
from ldm_export.runtime.backends.running import Running
from ldm_export.runtime.backends.user_cache import cache_folder
from ldm_export.runtime.graph import Array, Graph

NUMPY_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
}
GRAPH_ID = "gpu_graph_id"
"""Key of a run's options: the number of the CUDA graph to record or to replay, -1 for none."""
_RECORDINGS = count(1)


class OnnxRuntimeBackend(Backend):
    """Loads graphs into ONNX Runtime sessions.

    Parameters
    ----------
    requested : ``cpu``; one of `PROVIDERS`, which fails if that cannot be used; or ``auto``, CUDA if the installed
        ONNX Runtime has it and else the CPU
    threads : for one operator; by default one a physical core that this process may use

    Attributes
    ----------
    name : what is used, such as ``onnxruntime 1.32.0 cpu``, and ``ort-cpu`` behind it where the bundle has that target
    on_gpu : whether that is a GPU's provider
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
        self._threads = threads or allowed_threads()
        self._own_threads = True
        self._running = Running()
        self._plugged: list[Any] = []
        self._provider = self._wanted_provider()
        self.name = f"onnxruntime {onnxruntime.__version__} {self._device}"
        self._target = None if self.on_gpu else self._fitting_target()
        if self._target is not None:
            self.name += f" {ORT_CPU}"

    @property
    def on_gpu(self) -> bool:
        return self._provider is not None

    @property
    def _device(self) -> str:
        asked = "cuda" if self._requested == "auto" else self._requested
        return asked.removeprefix("ort-") if self.on_gpu else "cpu"

    def _wanted_provider(self) -> Provider | None:
        """The provider to use, once it is there; ``auto`` takes CUDA or, without it, none."""
        if self._requested == "cpu":
            return None
        wanted, library = PROVIDERS.get(self._requested, CUDA), self._library
        available = library.get_available_providers()
        if wanted.plugin:
            self._plug_in(wanted)
        elif wanted.name in available:
            library.preload_dlls()  # CUDA and cuDNN from NVIDIA's Python packages, where those are installed
        elif self._requested == "auto":
            return None
        else:
            raise BackendError(
                f"{self._requested} was asked for; the installed ONNX Runtime {library.__version__} has only "
                f"{', '.join(available)}. {wanted.install}"
            )
        return wanted

    def _plug_in(self, wanted: Provider) -> None:
        try:
            self._plugged = wanted.devices(self._library)[:1]
        except ImportError as error:
            raise BackendError(f"{self._requested} was asked for and is not installed. {wanted.install}") from error
        except Exception as error:  # ONNX Runtime's have no common base class
            raise BackendError(
                f"{self._requested} was asked for; ONNX Runtime {self._library.__version__} does not take its plugin: "
                f"{one_line(error)}. {wanted.install}"
            ) from error
        if not self._plugged:
            raise BackendError(self._does_not_start())

    def _does_not_start(self) -> str:
        return (
            f"{self._requested} was asked for; ONNX Runtime has its provider, which does not start here (driver, CUDA, "
            "cuDNN or TensorRT missing). Install 'ldm_export[gpu]' and NVIDIA's driver, or use the backend cpu."
        )

    def _fitting_target(self) -> Target | None:
        found = read_target(self._bundle, ORT_CPU, needs_of(self._library.__version__))
        if isinstance(found, str):
            self._say_passed_over(found)
        return found if isinstance(found, Target) else None

    def _say_passed_over(self, why: str) -> None:
        warn(
            f"targets/{ORT_CPU} of {self._bundle.path} is passed over, since {why}; the plain graphs run. "
            f"For its speed run: ldm-export build {self._bundle.path} --target cpu"
        )

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
        if self._target is not None and graph in self._target.graphs:
            try:
                return self._load_target(self._target, graph, spec)
            except MalformedError as error:
                why = f"its {error}"
            except BundleError:
                why = f"ONNX Runtime refuses its {graph}, or it is another graph"
            self._target = None
            self.name = self.name.removesuffix(f" {ORT_CPU}")
            self._say_passed_over(why)
        session, mapped = self._session(self._bundle.graph_files(spec.path), spec.path)
        if self._provider is not None and self._provider.name not in session.get_providers():
            if self._requested != "auto":
                raise BackendError(self._does_not_start())
            self._provider = None
            self.name = self.name.replace("cuda", "cpu")
            warn("ONNX Runtime's CUDA provider does not start here; the CPU is used instead.")
        check_contract(spec, _signature(session.get_inputs()), _signature(session.get_outputs()))
        return OnnxRuntimeGraph(session, spec, self._provider, self._running, mapped)

    def load_adapted(self, graph: str) -> Graph:
        """Open a session on a graph with branches: of the bundle's target for this CPU, where it is used, or plain."""
        target = adapters_target(self._bundle, graph)
        spec = self._bundle.manifest.graphs[graph]
        if self._target is not None:
            fast = read_target(self._bundle, ADAPTERS_ORT_CPU, adapters_needs(target, self._library.__version__))
            why = fast if isinstance(fast, str) else "there is none of this graph"
            if isinstance(fast, Target) and graph in fast.graphs:
                try:
                    return self._load_target(fast, graph, spec)
                except MalformedError as error:
                    why = f"its {error}"
                except BundleError:
                    why = f"ONNX Runtime refuses its {graph}, or it is another graph"
            warn(
                f"targets/{ADAPTERS_ORT_CPU} of {self._bundle.path} is passed over, since {why}; the plain graph with "
                f"branches runs. For its speed run: ldm-export build {self._bundle.path} --target cpu"
            )
        try:
            return self._load_target(target, graph, spec)
        except MalformedError as error:
            raise BundleError(
                f"targets/{target.folder.name} of {self._bundle.path} is not sound: its {error}. Delete it, and run "
                "ldm-export lora with an adapter anew."
            ) from error

    def _load_target(self, target: Target, graph: str, spec: GraphSpec) -> Graph:
        found = target.graphs[graph]
        files = files_in(self._bundle, target)
        opened = {path: self._session(files.graph(path), path) for path in found.paths}
        spec = with_branches(spec, _signature(opened[found.path][0].get_inputs()))
        if not found.hoisted and not found.shallow:
            session, mapped = opened[found.path]
            check_contract(spec, _signature(session.get_inputs()), _signature(session.get_outputs()))
            return OnnxRuntimeGraph(session, spec, self._provider, self._running, mapped)
        graphs = {
            path: OnnxRuntimeGraph(session, _spec_of(session, path), None, self._running, mapped)
            for path, (session, mapped) in opened.items()
        }
        check_parts(spec, found, {path: one.spec for path, one in graphs.items()})
        parts = {name: graphs[path] for name, path in found.hoisted.items()}
        return HoistedGraph(spec, graphs[found.path], parts, graphs.get(found.shallow), found.deep_channels)

    def interrupt(self) -> None:
        """End what this backend runs and opens, from any thread; there it raises CancelledError, in milliseconds."""
        self._running.interrupt()

    def _options(self) -> Any:
        options = self._library.SessionOptions()
        options.log_severity_level = 3
        options.enable_mem_pattern = False  # a plan of the memory holds it twice, and gained no time
        options.intra_op_num_threads = self._threads
        options.use_per_session_threads = self._own_threads
        for key, value in {
            "session.set_denormal_as_zero": "1",
            "session.load_model_format": "ONNX",
            "session.qdq_matmulnbits_accuracy_level": "1",  # fp32, not int8
            # every session has threads of its own, which else wait spinning for more work while another session's run
            "session.force_spinning_stop": "1",
        }.items():
            options.add_session_config_entry(key, value)
        if self._provider is not None and self._plugged:
            options.add_provider_for_devices(self._plugged, self._provider.options_for(self._bundle, cache_folder()))
        return options

    def _session(self, files: GraphFiles, path: str) -> tuple[Any, Sequence[MappedFile]]:
        """A session, and the files that it has mapped."""
        providers: list[Any] | None = [CPU]
        if self._provider is not None:
            providers = None if self._plugged else self._provider.chain(self._bundle, cache_folder())
        fallback = {"enable_fallback": int(self.on_gpu)}  # it prints, and tries the same again
        try:
            options = self._options()
            if files.data:
                names, buffers = list(files.data), list(files.data.values())
                options.add_external_initializers_from_files_in_memory(names, buffers, list(map(len, buffers)))
            model = files.path if files.model is None else files.model
            make = partial(self._library.InferenceSession, model, options, providers, **fallback)
            session = self._running.opened(options, make)
            if not all(mapped.is_in_place() for mapped in files.mapped):
                raise BundleError(f"A file of {path} was replaced while it was opened. Open the bundle again.")
            return session, files.mapped
        except LdmExportError:
            raise
        except Exception as error:  # its exceptions have no common base class
            if self._own_threads and "global thread pool" in str(error):
                self._own_threads = False  # the application has one pool for all sessions
                return self._session(files, path)
            raise BundleError(f"ONNX Runtime refuses {path}: {error}. Export the bundle anew.") from error


def _signature(values: Any) -> Signature:
    """The inputs or outputs of a session."""
    return {value.name: (NUMPY_TYPES.get(value.type, value.type), value.shape) for value in values}


def _spec_of(session: Any, path: str) -> GraphSpec:
    """What a session says that it takes and gives."""
    sides = []
    for values in (session.get_inputs(), session.get_outputs()):
        named = (
            (value, [size if isinstance(size, int) else f"{value.name}.{k}" for k, size in enumerate(value.shape)])
            for value in values
        )
        sides.append(tuple(TensorSpec(value.name, NUMPY_TYPES[value.type], tuple(shape)) for value, shape in named))
    return GraphSpec(path, *sides)


class OnnxRuntimeGraph:
    """One session; see :class:`ldm_export.runtime.graph.Graph`. ``provider`` is a GPU's, or None on the CPU."""

    can_skip = False

    def __init__(
        self,
        session: Any,
        spec: GraphSpec,
        provider: Provider | None = None,
        running: Running | None = None,
        mapped: Sequence[MappedFile] = (),
    ):
        self.session = session
        self._running = running or Running()
        self._mapped = mapped
        self._provider = provider
        self._records = provider is not None and provider.name in RECORDS and providers.CUDA_GRAPHS
        self.spec = spec

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self._check_files()
        sizes = check_inputs(self.spec, inputs)
        names = [tensor.name for tensor in self.spec.outputs]
        with foreign_errors("ONNX Runtime", self.spec.name), self._running.run() as options:
            if self._records:  # these arrays lie elsewhere in each call
                options.add_run_config_entry(GRAPH_ID, "-1")
            results = dict(zip(names, self.session.run(names, dict(inputs), options), strict=True))
        check_outputs(self.spec, results, sizes)
        return results

    def bind(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], fixed: Collection[str] = (), every: int = 1
    ) -> Callable[[], None]:
        assert every == 1
        if self._provider is not None:
            if self._provider.holds_arrays:
                return self._bind_on_device(inputs, outputs, fixed)
            return lambda: self._copy_out(self.run(inputs), outputs)
        check_inputs(self.spec, inputs)
        binding = self.session.io_binding()
        for bind_tensor, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, array in arrays.items():
                assert array.flags.c_contiguous
                bind_tensor(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

        def call(_arrays: object = (dict(inputs), dict(outputs))) -> None:  # the binding holds only their addresses
            self._check_files()
            with foreign_errors("ONNX Runtime", self.spec.name), self._running.run() as options:
                self.session.run_with_iobinding(binding, options)

        return call

    def _bind_on_device(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], fixed: Collection[str], device: str = "cuda"
    ) -> Callable[[], None]:
        """Arrays lie on the device, to which only those that change are copied at a call."""
        check_inputs(self.spec, inputs)
        with foreign_errors("ONNX Runtime", self.spec.name):
            from onnxruntime import OrtValue

            binding = self.session.io_binding()
            given = {name: OrtValue.ortvalue_from_numpy(array, device, 0) for name, array in inputs.items()}
            made = {
                name: OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype.type, device, 0)
                for name, array in outputs.items()
            }
            for name, value in given.items():
                binding.bind_ortvalue_input(name, value)
            for name, value in made.items():
                binding.bind_ortvalue_output(name, value)
        changing = inputs.keys() - set(fixed)
        recording = str(next(_RECORDINGS))

        def call() -> None:
            self._check_files()
            with foreign_errors("ONNX Runtime", self.spec.name), self._running.run() as options:
                if self._records:
                    options.add_run_config_entry(GRAPH_ID, recording)
                for name in changing:
                    given[name].update_inplace(inputs[name])
                self.session.run_with_iobinding(binding, options)
                self._copy_out({name: value.numpy() for name, value in made.items()}, outputs)

        return call

    def _check_files(self) -> None:
        """Raise BundleError if weights that are mapped were overwritten: reading them may end the process."""
        for file in self._mapped:
            if file.is_changed():
                raise BundleError(f"{file.name} was changed while it was in use. Open the bundle again.")

    @staticmethod
    def _copy_out(results: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        for name, array in outputs.items():
            array[...] = results[name]
