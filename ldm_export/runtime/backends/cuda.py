"""The few parts of CUDA that running engines takes, over NVIDIA's own bindings (``cuda.bindings.runtime``).

What is allocated is an object that gives it back when it is closed or goes away. Every status code becomes one
sentence. The device is CUDA's first; ``CUDA_VISIBLE_DEVICES`` chooses which that is.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_export.errors import BackendError

Array = npt.NDArray[Any]

REMEDIES = {
    "cudaErrorInsufficientDriver": "NVIDIA's driver is missing, or older than CUDA {runtime} needs. Install or update "
    "the driver",
    "cudaErrorNoDevice": "no NVIDIA GPU can be seen. Check nvidia-smi and CUDA_VISIBLE_DEVICES",
    "cudaErrorMemoryAllocation": "the GPU's memory is full. Draw fewer or smaller pictures, or end other programs",
}
"""What is wrong and what to do, of the errors that a user can meet and mend."""


@dataclass(frozen=True)
class Gpu:
    """A device that CUDA sees.

    Attributes
    ----------
    name : such as ``NVIDIA GeForce RTX 4090``
    compute_capability : such as ``8.9``
    memory_bytes : all of it
    """

    name: str
    compute_capability: str
    memory_bytes: int


@cache
def cuda_runtime() -> Any:
    """The module ``cuda.bindings.runtime``.

    Raises
    ------
    BackendError
        If it is not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise BackendError(
            "CUDA's Python bindings are not installed; engines need them. Run: pip install 'ldm_export[rtx]'"
        ) from error
    return runtime


def call(function: str, *arguments: Any) -> Any:
    """Call a function of CUDA's runtime; gives its one result, or None.

    Raises
    ------
    BackendError
        For any status but success.
    """
    runtime = cuda_runtime()
    status, *results = getattr(runtime, function)(*arguments)
    if status != runtime.cudaError_t.cudaSuccess:
        raise BackendError(sentence_of(status, function))
    return results[0] if len(results) == 1 else tuple(results) or None


def sentence_of(status: Any, function: str) -> str:
    """A status code as a sentence."""
    runtime = cuda_runtime()
    if status.name in REMEDIES:
        version = _version(runtime.cudaRuntimeGetVersion()[1])
        return f"CUDA does not run here: {REMEDIES[status.name].format(runtime=version)}."
    text = runtime.cudaGetErrorString(status)[1].decode()
    return f"CUDA's {function} failed: {text} ({status.name}). Start anew, and report it if it fails again."


def driver_is_there() -> bool:
    """Whether NVIDIA's driver is installed, found without importing or starting anything."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def driver_version() -> str | None:
    """The newest CUDA that the driver runs, such as ``13.0``; None without a driver."""
    return _version(call("cudaDriverGetVersion"))


def gpus() -> list[Gpu]:
    """The devices that CUDA sees, at least one.

    Raises
    ------
    BackendError
        If the bindings, the driver or a device is missing.
    """
    found = []
    for index in range(call("cudaGetDeviceCount")):
        facts = call("cudaGetDeviceProperties", index)
        name = facts.name.decode().rstrip("\0")
        found.append(Gpu(name, f"{facts.major}.{facts.minor}", int(facts.totalGlobalMem)))
    return found


def used_bytes() -> int:
    """What all programs together hold of the device's memory, this one's CUDA context included.

    Raises
    ------
    BackendError
        If the bindings, the driver or a device is missing.
    """
    free, total = call("cudaMemGetInfo")
    return int(total - free)


def _version(number: int) -> str | None:
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


class _Owned:
    """A handle of CUDA's, given back once: when it is closed, goes away, or the program ends."""

    def __init__(self, handle: Any, give_back: str):
        self.handle = handle
        self.close = weakref.finalize(self, getattr(cuda_runtime(), give_back), handle)


class Stream(_Owned):
    """Work that is done in order, while the host goes on."""

    def __init__(self) -> None:
        super().__init__(call("cudaStreamCreateWithFlags", cuda_runtime().cudaStreamNonBlocking), "cudaStreamDestroy")

    def wait(self) -> None:
        """Until all work so far is done."""
        call("cudaStreamSynchronize", self.handle)

    def capture(self, work: Callable[[], None]) -> CapturedGraph:
        """What ``work`` puts on this stream, recorded instead of done."""
        mode = cuda_runtime().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call("cudaStreamBeginCapture", self.handle, mode)
        try:
            work()
        except BaseException:
            cuda_runtime().cudaStreamEndCapture(self.handle)  # whatever it gives is of no use
            raise
        graph = call("cudaStreamEndCapture", self.handle)
        try:
            return CapturedGraph(self, call("cudaGraphInstantiate", graph, 0))
        finally:
            call("cudaGraphDestroy", graph)


class CapturedGraph(_Owned):
    """Recorded work, done again by one call."""

    def __init__(self, stream: Stream, handle: Any):
        super().__init__(handle, "cudaGraphExecDestroy")
        self._stream = stream

    def launch(self) -> None:
        call("cudaGraphLaunch", self.handle, self._stream.handle)


class Event(_Owned):
    """A mark in a stream's work."""

    def __init__(self) -> None:
        super().__init__(call("cudaEventCreate"), "cudaEventDestroy")

    def record(self, stream: Stream) -> None:
        call("cudaEventRecord", self.handle, stream.handle)

    def ms_since(self, earlier: Event) -> float:
        """Milliseconds between two marks that the work has passed."""
        return float(call("cudaEventElapsedTime", earlier.handle, self.handle))


class Buffer(_Owned):
    """Device memory of an array's shape and dtype, all zeros at first; ``address`` is where it starts."""

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike, stream: Stream):
        self.shape, self.dtype, self._stream = shape, np.dtype(dtype), stream
        self.size_bytes = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        super().__init__(call("cudaMalloc", max(self.size_bytes, 1)), "cudaFree")  # which waits for what uses it
        self.clear()

    @property
    def address(self) -> int:
        return int(self.handle)

    def upload(self, array: Array) -> None:
        """Copy an array here; it may be changed as soon as this returns."""
        assert (array.shape, array.dtype) == (self.shape, self.dtype)
        array = np.ascontiguousarray(array)
        self._copy(self.address, array.ctypes.data, "cudaMemcpyHostToDevice")

    def download(self, array: Array) -> None:
        """Wait for all work so far and copy what is here to an array."""
        assert (array.shape, array.dtype) == (self.shape, self.dtype)
        assert array.flags.c_contiguous
        self._copy(array.ctypes.data, self.address, "cudaMemcpyDeviceToHost")
        self._stream.wait()

    def downloaded(self) -> Array:
        """What is here, in a new array."""
        array = np.empty(self.shape, self.dtype)
        self.download(array)
        return array

    def clear(self) -> None:
        """Fill with zeros."""
        call("cudaMemsetAsync", self.address, 0, self.size_bytes, self._stream.handle)

    def copy(self, source: int) -> None:
        """Copy from an address on the device."""
        self._copy(self.address, source, "cudaMemcpyDeviceToDevice")

    def _copy(self, target: int, source: int, kind: str) -> None:
        direction = getattr(cuda_runtime().cudaMemcpyKind, kind)
        call("cudaMemcpyAsync", target, source, self.size_bytes, direction, self._stream.handle)
