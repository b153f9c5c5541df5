"""One TensorRT engine in this process: either flavour, by the calls that both have.

    library = open_library("tensorrt_rtx")
    engine = Engine(library, serialised, spec, profile, stream)
    bound = engine.bound({"sample": (2, 4, 64, 64), ...})       device memory of these shapes, or that which is given
    bound.prepare()                                             once, for what will be launched often
    bound.launch()                                              any number of times, on the stream

CUDA graphs: ``tensorrt`` records what an engine puts on the stream, after a run that warms it up; ``tensorrt_rtx``
compiles kernels for the shapes it meets and does the recording itself. What it compiled is kept in a file, so that it
is compiled once for a machine.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_export.bundle.atomic import write_whole
from ldm_export.bundle.targets.engines import ShapeRange
from ldm_export.contract import GraphSpec
from ldm_export.errors import BackendError, InputError
from ldm_export.reading.documents import MalformedError, read_bytes
from ldm_export.runtime.backends.base import check_contract
from ldm_export.runtime.backends.cuda import Buffer, CapturedGraph, Stream

EXTRAS = {"tensorrt_rtx": "rtx", "tensorrt": "gpu"}
"""What to install for each flavour."""
CUDA_GRAPHS = True
MOST_CACHE_BYTES = 1 << 30

_log = logging.getLogger(__name__)
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Library:
    """A flavour of TensorRT that is installed.

    Attributes
    ----------
    flavour : the name that it is imported by
    module : it
    runtime : its ``Runtime``
    errors : what it has complained of last
    """

    flavour: str
    module: Any
    runtime: Any
    errors: list[str]

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @property
    def is_rtx(self) -> bool:
        return self.flavour == "tensorrt_rtx"

    def failed(self, doing: str) -> BackendError:
        """The error for a call that gave nothing, with the library's own words."""
        why = f": {self.errors[-1]}" if self.errors else ""
        return BackendError(f"{self.flavour} {self.version} could not {doing}{why}. Use the backend cpu.")


@cache
def open_library(flavour: str) -> Library:
    """Import a flavour; its log goes to the logger ``ldm_export``.

    Raises
    ------
    BackendError
        If it is not installed.
    """
    try:
        trt = importlib.import_module(flavour)
    except ImportError as error:
        raise BackendError(
            f"{flavour} is not installed; its engines need it. Run: pip install 'ldm_export[{EXTRAS[flavour]}]'"
        ) from error
    errors: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                errors[:] = [*errors[-9:], " ".join(message.split())]
            _log.debug("%s: %s", flavour, message)

    return Library(flavour, trt, trt.Runtime(Log()), errors)


class Engine:
    """A deserialised engine.

    Parameters
    ----------
    serialised : the engine, uint8
    spec : what its graph takes and gives; ``spec.path`` is what errors call it
    profile : the shapes that its inputs with free sizes may have
    stream : where it runs
    rebuild : the command that builds it anew, or for other shapes
    cache_file : where what was compiled for this device is kept
    repeated : whether it is launched often with the same shapes

    Raises
    ------
    BackendError
        If the library refuses it, or it is not what its target says.
    """

    def __init__(
        self,
        library: Library,
        serialised: Array,
        spec: GraphSpec,
        profile: Mapping[str, ShapeRange],
        stream: Stream,
        *,
        rebuild: str,
        cache_file: Path | None = None,
        repeated: bool = False,
    ):
        self.spec, self.profile, self.stream = spec, profile, stream
        self.library, self._rebuild, self._repeated = library, rebuild, repeated
        check_validity(library, serialised, spec.path, rebuild)
        self._engine = library.runtime.deserialize_cuda_engine(serialised)
        if self._engine is None:
            raise library.failed(f"open {spec.path}")
        self._check_contract()
        self._cache_file, self._cached = cache_file, b""
        self._config = self._runtime_config() if library.is_rtx else None

    @property
    def records(self) -> bool:
        """Whether launches are recorded here, and not by the library."""
        return CUDA_GRAPHS and self._repeated and not self.library.is_rtx

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise InputError unless the engine was built for inputs of these shapes."""
        check_profile(self.spec, self.profile, shapes, self._rebuild)

    def bound(self, shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, Buffer] | None = None) -> BoundEngine:
        """The engine with inputs of these shapes.

        Parameters
        ----------
        given : device memory for some of the inputs and outputs; the rest is allocated

        Raises
        ------
        InputError
            For shapes that it was not built for.
        BackendError
            If the device has no memory for them.
        """
        self.check_shapes(shapes)
        return BoundEngine(self, self._context(), shapes, given or {})

    def remember(self) -> None:
        """Write what was compiled for this device to the cache, if that is new; pictures are drawn without it, too."""
        if self._config is None or self._cache_file is None:
            return
        made = bytes(self._config.get_runtime_cache().serialize())
        if made == self._cached:
            return
        try:
            write_whole(self._cache_file, made)
            self._cached = made
        except OSError as error:
            _log.info("what was compiled for this GPU is compiled anew each time: %s", error)

    def _runtime_config(self) -> Any:
        trt, config = self.library.module, self._engine.create_runtime_config()
        strategy = trt.CudaGraphStrategy
        config.cuda_graph_strategy = (
            strategy.WHOLE_GRAPH_CAPTURE if CUDA_GRAPHS and self._repeated else strategy.DISABLED
        )
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        # else it runs with slower kernels, compiles better ones meanwhile, and may change to them within a picture
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        cache = config.create_runtime_cache()
        if self._cache_file is not None:
            with suppress(OSError, MalformedError):
                self._cached = read_bytes(self._cache_file, MOST_CACHE_BYTES)
            if self._cached and not cache.deserialize(self._cached):  # of another GPU, driver or release
                self._cached = b""
        config.set_runtime_cache(cache)
        return config

    def _context(self) -> Any:
        """A context without memory: `BoundEngine` gives it what its shapes take, not what the largest would."""
        user_managed = self.library.module.ExecutionContextAllocationStrategy.USER_MANAGED
        made = self._engine.create_execution_context(self._config or user_managed)
        if made is None:
            raise self.library.failed(f"make room for {self.spec.path} on the GPU")
        return made

    def _check_contract(self) -> None:
        trt, engine = self.library.module, self._engine
        inputs: dict[str, tuple[str, list[int]]] = {}
        outputs: dict[str, tuple[str, list[int]]] = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise BackendError(f"{self.spec.path} wants {name!r} on the host. Run: {self._rebuild}")
            dtype = np.dtype(trt.nptype(engine.get_tensor_dtype(name))).name
            side = inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else outputs
            side[name] = dtype, list(engine.get_tensor_shape(name))
        check_contract(self.spec, inputs, outputs, remedy=f"Run: {self._rebuild}")


class BoundEngine:
    """An engine with shapes and memory, which goes with it; ``buffers`` are its inputs and outputs by name."""

    def __init__(
        self, engine: Engine, context: Any, shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, Buffer]
    ):
        self.engine, self.shapes, self._context = engine, dict(shapes), context
        self._recorded: CapturedGraph | None = None
        name = engine.spec.path
        for tensor in engine.profile:  # the others have one shape
            if not context.set_input_shape(tensor, shapes[tensor]):
                raise engine.library.failed(f"take {tensor!r} of shape {shapes[tensor]} in {name}")
        if unknown := context.infer_shapes():
            raise engine.library.failed(f"tell the shapes of {', '.join(unknown)} of {name}")
        self._scratch = Buffer((context.update_device_memory_size_for_shapes(),), np.uint8, engine.stream)
        context.set_device_memory(self._scratch.address, self._scratch.size_bytes)
        self.buffers = dict(given)
        for spec in (*engine.spec.inputs, *engine.spec.outputs):
            if spec.name not in self.buffers:
                shape = tuple(context.get_tensor_shape(spec.name))
                self.buffers[spec.name] = Buffer(shape, spec.dtype, engine.stream)
            if not context.set_tensor_address(spec.name, self.buffers[spec.name].address):
                raise engine.library.failed(f"use its memory for {spec.name!r} of {name}")

    def prepare(self) -> None:
        """Run once, so that nothing is left to be compiled, and record what a run is."""
        self._enqueue()
        self.engine.stream.wait()
        if self.engine.records:
            self._recorded = self.engine.stream.capture(self._enqueue)
        self.engine.remember()

    def launch(self) -> None:
        """Put a run on the stream."""
        if self._recorded is None:
            self._enqueue()
        else:
            self._recorded.launch()

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(int(self.engine.stream.handle)):
            raise self.engine.library.failed(f"run {self.engine.spec.path}")


def check_validity(library: Library, serialised: Array, name: str, rebuild: str) -> None:
    """Raise BackendError where TensorRT-RTX knows that an engine cannot run here, in its own words."""
    if not library.is_rtx:
        return
    trt = library.module
    library.errors.clear()
    validity, bits = library.runtime.get_engine_validity(serialised)
    if validity != trt.EngineValidity.INVALID:
        return
    known = trt.EngineInvalidityDiagnostics.__members__.items()
    reasons = [word.replace("_", " ").lower() for word, bit in known if int(bits) & int(bit)] or library.errors[-1:]
    raise BackendError(
        f"{library.flavour} {library.version} cannot run {name} here ({', '.join(reasons) or 'it does not say why'}). "
        f"Update NVIDIA's driver, or run: {rebuild}"
    )


def check_profile(
    spec: GraphSpec, profile: Mapping[str, ShapeRange], shapes: Mapping[str, tuple[int, ...]], rebuild: str
) -> None:
    """Raise InputError unless an engine was built for these shapes."""
    for name, shape in shapes.items():
        limits = profile.get(name)
        if limits is None:
            continue
        fits = len(shape) == len(limits.min) and all(
            low <= size <= high for low, size, high in zip(limits.min, shape, limits.max, strict=True)
        )
        if not fits:
            raise InputError(
                f"{spec.path} would be given {name!r} of shape {shape}; it was built for {limits.min} to {limits.max}. "
                f"Ask for pictures of such a size and number, use another backend, or run, with a larger --batch or "
                f"--size: {rebuild}"
            )
