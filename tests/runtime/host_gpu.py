"""A GPU that is the host: CUDA's calls on the host's memory, and TensorRT's on ONNX Runtime.

It stands in for what a machine without a GPU lacks, so that what is written over those calls, which memory goes where
and when, is run, and compared with the pipeline's own pictures. Memory is handed out full of NaN; what is recorded runs
when it is launched, and nothing but engines may be recorded; what is not given back is counted.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from cuda.bindings import runtime as real

from ldm_export.bundle import Bundle
from ldm_export.bundle.targets.base import folder_of
from ldm_export.bundle.targets.engines import Engine, EngineTarget, ShapeRange, engine_kind, write_engine_target
from ldm_export.contract import STEP, TensorSpec, step_spec
from ldm_export.export.step import step_model
from ldm_export.runtime.backends import cuda, tensorrt
from ldm_export.runtime.backends.engine import Library

OK, BAD_VALUE = real.cudaError_t.cudaSuccess, real.cudaError_t.cudaErrorInvalidValue
CAPABILITY, VERSION = "8.9", "1.0"
Status = tuple[Any, ...]


MEMORY = 1 << 30
"""Bytes of the device."""


class HostCuda:
    """As far as `ldm_export.runtime.backends.cuda` calls ``cuda.bindings.runtime``; ``alive`` is all that is held."""

    cudaError_t, cudaMemcpyKind = real.cudaError_t, real.cudaMemcpyKind  # noqa: N815
    cudaStreamCaptureMode, cudaStreamNonBlocking = real.cudaStreamCaptureMode, real.cudaStreamNonBlocking  # noqa: N815

    def __init__(self) -> None:
        self.alive: dict[int, Any] = {}
        self.recording: list[Callable[[], None]] | None = None
        self._spoilt = False
        self.memory_left = MEMORY
        self._handles = itertools.count(1)

    def _hold(self, what: Any) -> int:
        handle = next(self._handles)
        self.alive[handle] = what
        return handle

    def _drop(self, handle: int) -> Status:
        return (OK,) if self.alive.pop(handle, None) is not None else (BAD_VALUE,)

    def _now(self) -> Any:
        """No work but an engine's may be recorded; else there is no recording."""
        self._spoilt = self.recording is not None
        return real.cudaError_t.cudaErrorStreamCaptureUnsupported if self._spoilt else OK

    def cudaGetDeviceCount(self) -> Status:  # noqa: N802
        return OK, 1

    def cudaGetDeviceProperties(self, device: int) -> Status:  # noqa: N802
        return OK, SimpleNamespace(name=b"the host\0\0", major=8, minor=9, totalGlobalMem=self.memory_left)

    def cudaMalloc(self, size: int) -> Status:  # noqa: N802
        if size > self.memory_left:
            return real.cudaError_t.cudaErrorMemoryAllocation, None
        self.memory_left -= size
        block = np.full(size + 256, 0xFF, np.uint8)
        address = -(-block.ctypes.data // 256) * 256
        self.alive[address] = block
        return self._now(), address

    def cudaFree(self, devPtr: int) -> Status:  # noqa: N802, N803
        self.memory_left += self.alive[devPtr].size - 256
        return self._drop(devPtr)

    def cudaMemGetInfo(self) -> Status:  # noqa: N802
        return self._now(), self.memory_left, MEMORY

    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: int) -> Status:  # noqa: N802, N803
        ctypes.memset(devPtr, value, count)
        return (self._now(),)

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: Any, stream: int) -> Status:  # noqa: N802
        ctypes.memmove(dst, src, count)
        return (self._now(),)

    def cudaStreamCreateWithFlags(self, flags: int) -> Status:  # noqa: N802
        return OK, self._hold("stream")

    def cudaStreamSynchronize(self, stream: int) -> Status:  # noqa: N802
        return (self._now(),)

    def cudaStreamDestroy(self, stream: int) -> Status:  # noqa: N802
        return self._drop(stream)

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> Status:  # noqa: N802
        self.recording, self._spoilt = [], False
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> Status:  # noqa: N802
        recorded, self.recording = self.recording, None
        if self._spoilt:
            return real.cudaError_t.cudaErrorStreamCaptureInvalidated, None
        return OK, self._hold(recorded)

    def cudaGraphInstantiate(self, graph: int, flags: int) -> Status:  # noqa: N802
        return OK, self._hold(self.alive[graph])

    def cudaGraphDestroy(self, graph: int) -> Status:  # noqa: N802
        return self._drop(graph)

    def cudaGraphLaunch(self, graphExec: int, stream: int) -> Status:  # noqa: N802, N803
        for work in self.alive[graphExec]:
            work()
        return (OK,)

    def cudaGraphExecDestroy(self, graphExec: int) -> Status:  # noqa: N802, N803
        return self._drop(graphExec)

    def cudaEventCreate(self) -> Status:  # noqa: N802
        return OK, self._hold("event")

    def cudaEventRecord(self, event: int, stream: int) -> Status:  # noqa: N802
        return (self._now(),)

    def cudaEventElapsedTime(self, start: int, end: int) -> Status:  # noqa: N802
        return OK, 1.5

    def cudaEventDestroy(self, event: int) -> Status:  # noqa: N802
        return self._drop(event)

    cudaDriverGetVersion = staticmethod(lambda: (OK, 13000))  # noqa: N815
    cudaRuntimeGetVersion = staticmethod(lambda: (OK, 13000))  # noqa: N815
    cudaGetErrorString = staticmethod(real.cudaGetErrorString)  # noqa: N815


class HostEngine:
    """An ONNX graph as an ``ICudaEngine``, its ``IRuntimeConfig`` and its ``IRuntimeCache``."""

    def __init__(self, gpu: HostCuda, graph: bytes):
        self.gpu = gpu
        self.session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        self.io = {value.name: value for value in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.compiled, self.contexts, self.strategy = b"", 0, "static"

    @property
    def num_io_tensors(self) -> int:
        return len(self.io)

    def get_tensor_name(self, index: int) -> str:
        return list(self.io)[index]

    def get_tensor_location(self, name: str) -> str:
        return "device"

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in self.inputs else "out"

    def get_tensor_dtype(self, name: str) -> str:
        return {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(uint8)": "uint8"}[self.io[name].type]

    def get_tensor_shape(self, name: str) -> list[int]:
        return [size if isinstance(size, int) else -1 for size in self.io[name].shape]

    def create_execution_context(self, config: object) -> HostContext:
        assert (self.strategy if config is self else config) == "user managed"
        self.contexts += 1
        return HostContext(self)

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_config(self) -> HostEngine:
        return self

    def create_runtime_cache(self) -> HostEngine:
        return self

    def get_runtime_cache(self) -> HostEngine:
        return self

    def set_runtime_cache(self, cache: object) -> bool:
        return True

    def serialize(self) -> bytes:
        return b"host" + self.compiled

    def deserialize(self, blob: bytes) -> bool:
        if blob.startswith(b"host"):
            self.compiled = blob[4:]
        return blob.startswith(b"host")


class HostContext:
    """An ``IExecutionContext``."""

    def __init__(self, engine: HostEngine):
        self.engine = engine
        self.shapes = {name: tuple(engine.get_tensor_shape(name)) for name in engine.inputs}
        self.addresses: dict[str, int] = {}
        self.scratch = self.scratch_bytes = 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name, shape in self.shapes.items() if -1 in shape]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.shapes:
            return self.shapes[name]
        zeros = {name: np.zeros(shape, self.engine.get_tensor_dtype(name)) for name, shape in self.shapes.items()}
        (result,) = self.engine.session.run([name], zeros)
        return tuple(result.shape)

    def update_device_memory_size_for_shapes(self) -> int:
        assert not self.infer_shapes()
        self.scratch_bytes = sum(int(np.prod(shape)) for shape in self.shapes.values())
        return self.scratch_bytes

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0
        assert size >= self.scratch_bytes
        self.scratch = memory

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return memory % 256 == 0

    def execute_async_v3(self, stream_handle: int) -> bool:
        addresses = dict(self.addresses)
        if self.engine.gpu.recording is not None:
            self.engine.gpu.recording.append(lambda: self._execute(addresses))
        else:
            self._execute(addresses)
        return True

    def _execute(self, addresses: dict[str, int]) -> None:
        self.engine.compiled += b"." * (not self.engine.compiled)
        ctypes.memset(self.scratch, 0xFF, self.scratch_bytes)  # whoever reads it instead of what was computed sees NaN
        given = {name: self._array(addresses[name], name, shape).copy() for name, shape in self.shapes.items()}
        names = [name for name in self.engine.io if name not in self.shapes]
        for name, result in zip(names, self.engine.session.run(names, given), strict=True):
            self._array(addresses[name], name, result.shape)[...] = result

    def _array(self, address: int, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        dtype = np.dtype(self.engine.get_tensor_dtype(name))
        memory = (ctypes.c_char * (int(np.prod(shape)) * dtype.itemsize)).from_address(address)
        return np.frombuffer(memory, dtype).reshape(shape)


def host_library(gpu: HostCuda, flavour: str, opened: list[HostEngine]) -> Library:
    """A flavour of TensorRT whose engines are ONNX files."""

    def deserialize(serialised: np.ndarray[Any, Any]) -> HostEngine:
        opened.append(HostEngine(gpu, serialised.tobytes()))
        return opened[-1]

    module = SimpleNamespace(
        __version__=VERSION,
        nptype=np.dtype,
        TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
        TensorLocation=SimpleNamespace(DEVICE="device"),
        CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE=1, DISABLED=0),
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER=1),
        EngineValidity=SimpleNamespace(INVALID=2),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
    )
    runtime = SimpleNamespace(deserialize_cuda_engine=deserialize, get_engine_validity=lambda _: (0, 0))
    return Library(flavour, module, runtime, [])


@contextmanager
def host_gpu(flavour: str) -> Iterator[tuple[HostCuda, list[HostEngine]]]:
    """The host as a GPU with one flavour of TensorRT; gives it, and the engines that are opened."""
    gpu, opened = HostCuda(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "cuda_runtime", lambda: gpu)
        patch.setattr(tensorrt, "open_library", lambda name: host_library(gpu, name, opened))
        yield gpu, opened


def add_engines(bundle: Bundle, flavour: str, *, largest: int = 8, precision: str = "fp32", step: bool = True) -> Path:
    """Give a bundle engines of its graphs that `host_gpu` runs: ONNX files by another name; gives their folder.

    ``largest`` is the most rows that any of them takes.
    """
    kind = engine_kind(flavour, (CAPABILITY,), precision)
    folder = folder_of(bundle, kind)
    shutil.rmtree(folder, ignore_errors=True)
    graphs = dict(bundle.manifest.graphs)
    unet = graphs["unet"]
    models = {name: bundle.file(graph.path).read_bytes() for name, graph in graphs.items() if "loops" not in name}
    loops = [name for name in graphs if "loops" in name]
    if step:
        graphs[STEP], models[STEP] = step_spec(unet), step_model(unet).SerializeToString()
    for name in loops:
        model = onnx.load(str(bundle.file(graphs[name].path)))  # with its weights
        models[name] = model.SerializeToString()
    sizes = {"batch": largest, "rows": largest, "tokens": 77, "height": 64, "width": 64}
    sizes |= {"image_height": 128, "image_width": 128}

    def shape(tensor: TensorSpec, free: Callable[[str], int]) -> tuple[int, ...]:
        return tuple(free(size) if isinstance(size, str) else size for size in tensor.shape)

    engines = {}
    for name, model in models.items():
        path = folder / f"{name}.plan"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(model)
        inputs, outputs = (
            tuple(TensorSpec(tensor.name, tensor.dtype, shape(tensor, lambda _: -1)) for tensor in side)
            for side in (graphs[name].inputs, graphs[name].outputs)
        )
        profile = {
            tensor.name: ShapeRange(
                shape(tensor, lambda _: 1), shape(tensor, lambda _: 1), shape(tensor, sizes.__getitem__)
            )
            for tensor in graphs[name].inputs
            if any(isinstance(size, str) for size in tensor.shape)
        }
        source = unet.path if name == STEP else graphs[name].path
        source_hashes = {source: bundle.manifest.files[source].sha256}
        engines[name] = Engine(f"{name}.plan", source, source_hashes, inputs, outputs, profile, 0.0)
    write_engine_target(
        EngineTarget(
            folder, kind, flavour, VERSION, (CAPABILITY,), precision, False, False, False, engines=engines, report={}
        )
    )
    return folder
