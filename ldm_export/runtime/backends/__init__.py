"""What runs the graphs of a bundle. A backend imports its library when it is opened, not before."""

from __future__ import annotations

from ldm_export.bundle import Bundle
from ldm_export.errors import InputError
from ldm_export.runtime.backends.base import Backend


def open_backend(bundle: Bundle, name: str, threads: int | None) -> Backend:
    """Open a backend by the name that users give, one of :data:`BACKENDS`.

    Raises
    ------
    InputError
        For a name that is not one of :data:`BACKENDS`.
    BackendError
        If its library is not installed, or a device that was asked for by name cannot be used.
    """
    if name not in BACKENDS:
        raise InputError(f"There is no backend {name!r}; there are {', '.join(BACKENDS)}. Use one of those.")
    if name == "auto":
        from ldm_export.runtime.backends.auto import open_fastest

        return open_fastest(bundle, threads)
    if name in ENGINES:
        from ldm_export.runtime.backends.tensorrt import TensorRtBackend

        return TensorRtBackend(bundle, ENGINES[name])
    if name == "openvino":
        from ldm_export.runtime.backends.openvino import OpenVinoBackend

        return OpenVinoBackend(bundle, threads)
    from ldm_export.runtime.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(bundle, name, threads)


ENGINES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
"""Backends that run engines, with the library that each needs."""
BACKENDS = ("auto", "cpu", "openvino", *ENGINES, "cuda", "ort-tensorrt", "ort-tensorrt-rtx")
"""The best there is; ONNX Runtime and OpenVINO on the CPU; TensorRT engines that were built; ONNX Runtime on an NVIDIA
GPU through CUDA, or through TensorRT, which builds engines as it opens a graph."""
