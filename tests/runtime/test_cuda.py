"""CUDA's calls: against NVIDIA's own bindings as far as these answer without a GPU, and what becomes of an error."""

from __future__ import annotations

import gc
import inspect
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from ldm_export.errors import BackendError
from ldm_export.runtime.backends import cuda
from tests.runtime.host_gpu import HostCuda

real = pytest.importorskip("cuda.bindings.runtime", reason="CUDA's bindings (extra rtx) are not installed")
without_a_gpu = pytest.mark.skipif(cuda.driver_is_there(), reason="NVIDIA's driver is installed")

CALLS: dict[str, tuple[Any, ...]] = {
    "cudaGetDeviceProperties": (0,),
    "cudaMalloc": (16,),
    "cudaFree": (0,),
    "cudaMemsetAsync": (0, 0, 0, 0),
    "cudaMemcpyAsync": (0, 0, 0, real.cudaMemcpyKind.cudaMemcpyHostToDevice, 0),
    "cudaStreamCreateWithFlags": (real.cudaStreamNonBlocking,),
    "cudaStreamSynchronize": (0,),
    "cudaStreamDestroy": (0,),
    "cudaStreamBeginCapture": (0, real.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal),
    "cudaStreamEndCapture": (0,),
    "cudaGraphInstantiate": (real.cudaGraph_t(0), 0),
    "cudaGraphDestroy": (real.cudaGraph_t(0),),
    "cudaGraphLaunch": (real.cudaGraphExec_t(0), 0),
    "cudaGraphExecDestroy": (real.cudaGraphExec_t(0),),
    "cudaEventCreate": (),
    "cudaEventRecord": (real.cudaEvent_t(0), 0),
    "cudaEventElapsedTime": (real.cudaEvent_t(0), real.cudaEvent_t(0)),
    "cudaEventDestroy": (real.cudaEvent_t(0),),
    "cudaGetDeviceCount": (),
    "cudaMemGetInfo": (),
}
"""Every call that is made, as it is made."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> HostCuda:
    host = HostCuda()
    monkeypatch.setattr(cuda, "cuda_runtime", lambda: host)
    return host


# --- the real bindings ----------------------------------------------------------------------------------------------


@without_a_gpu
@pytest.mark.parametrize("function", CALLS)
def test_every_call_reaches_cuda_and_says_that_the_driver_is_missing(function: str) -> None:
    with pytest.raises(
        BackendError, match=r"CUDA does not run here: NVIDIA's driver is missing, or older than CUDA \d"
    ):
        cuda.call(function, *CALLS[function])


def test_all_calls_are_among_these() -> None:
    called = set(re.findall(r'"(cuda[A-Z]\w+)"', inspect.getsource(cuda)))
    kinds = {name for name in called if name.startswith(("cudaError", "cudaMemcpyKind", "cudaMemcpyHost"))}
    copies = {name for name in called if name.startswith("cudaMemcpyDevice")}
    assert called - kinds - copies - {"cudaDriverGetVersion"} == set(CALLS)
    assert all(hasattr(real.cudaMemcpyKind, name) for name in copies)


@pytest.mark.parametrize("function", CALLS)
def test_the_stand_in_is_called_as_the_real_one(function: str) -> None:
    declared = (getattr(real, function).__doc__ or "").strip().splitlines()[0]
    names = re.findall(r"(\w+)(?:: \w+)?[,)]", declared.partition("(")[2])
    assert list(inspect.signature(getattr(HostCuda(), function)).parameters) == [
        {"hStream": "stream"}.get(name, name) for name in names
    ]


@without_a_gpu
def test_no_driver_is_found_without_loading_anything() -> None:
    code = (
        "import sys; from ldm_export.runtime.backends.cuda import driver_is_there; "
        "print(driver_is_there(), [name for name in sys.modules if name.startswith(('cuda', 'tensorrt'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False []\n"
    assert cuda.driver_version() is None


def test_bindings_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(BackendError, match=r"CUDA's Python bindings are not installed; .*'ldm_export\[rtx\]'"):
        cuda.cuda_runtime.__wrapped__()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("cudaErrorNoDevice", "no NVIDIA GPU can be seen. Check nvidia-smi"),
        ("cudaErrorMemoryAllocation", "the GPU's memory is full. Draw fewer or smaller pictures"),
        ("cudaErrorIllegalAddress", r"cudaFree failed: an illegal memory access was encountered \(cudaErrorIllegalAdd"),
    ],
)
def test_an_error_becomes_a_sentence(error: str, says: str) -> None:
    sentence = cuda.sentence_of(getattr(real.cudaError_t, error), "cudaFree")
    assert re.search(says, sentence)
    assert "backend" not in sentence  # refitting and doctor say it, too
    assert "\n" not in sentence


# --- what is held is given back -------------------------------------------------------------------------------------


def test_memory_keeps_what_it_is_given(gpu: HostCuda) -> None:
    buffer = cuda.Buffer((2, 3), np.float32, cuda.Stream())
    np.testing.assert_array_equal(buffer.downloaded(), np.zeros((2, 3)))
    array = np.arange(6, dtype=np.float32).reshape(3, 2).T  # not contiguous
    buffer.upload(array)
    np.testing.assert_array_equal(buffer.downloaded(), array)
    buffer.clear()
    assert not buffer.downloaded().any()


def test_everything_goes_back(gpu: HostCuda) -> None:
    stream = cuda.Stream()
    buffer, event = cuda.Buffer((4,), np.int64, stream), cuda.Event()
    graph = stream.capture(lambda: None)
    assert len(gpu.alive) == 4
    buffer.close()
    buffer.close()
    assert len(gpu.alive) == 3
    del event, graph, stream, buffer
    gc.collect()
    assert not gpu.alive


def test_memory_that_is_not_there(gpu: HostCuda) -> None:
    stream = cuda.Stream()
    with pytest.raises(BackendError, match="the GPU's memory is full"):
        cuda.Buffer((1 << 40,), np.float32, stream)
    assert list(gpu.alive.values()) == ["stream"]


def test_what_cannot_be_recorded_leaves_no_recording(gpu: HostCuda) -> None:
    stream = cuda.Stream()
    with pytest.raises(BackendError, match="cudaStreamSynchronize failed: operation not permitted when stream is capt"):
        stream.capture(stream.wait)
    assert gpu.recording is None
    assert list(gpu.alive.values()) == ["stream"]
    stream.wait()


def test_what_the_device_is(gpu: HostCuda) -> None:
    assert cuda.gpus() == [cuda.Gpu("the host", "8.9", gpu.memory_left)]
    assert cuda.driver_version() == "13.0"
