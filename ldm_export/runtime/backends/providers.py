"""ONNX Runtime's execution providers for NVIDIA GPUs, by the names that users give backends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from ldm_export.bundle import Bundle

CPU = "CPUExecutionProvider"
RECORDS = {"CUDAExecutionProvider"}
"""Providers that can record a call as a CUDA graph."""
CUDA_GRAPHS = False
"""Whether sessions that are opened from now on record bound calls, and replay them. Off, but in benchmarks: all
operators of a graph must then run on the GPU, and a recording holds memory for each new set of arrays."""


@dataclass(frozen=True)
class Provider:
    """One provider.

    Attributes
    ----------
    name : ONNX Runtime's
    options : that are always set
    cache_options : that name the folder where what it compiles is kept
    half_option : that lets it compute in fp16, for bundles that are in fp16
    behind : the provider, but for the CPU's, that runs what it does not take
    plugin : the package that brings it, where ONNX Runtime itself does not
    holds_arrays : whether ONNX Runtime can keep arrays on its device
    install : what to do where it is missing
    """

    name: str
    install: str
    options: Mapping[str, str] = field(default_factory=dict)
    cache_options: tuple[str, ...] = ()
    half_option: str = ""
    behind: Provider | None = None
    plugin: str = ""
    holds_arrays: bool = True

    def options_for(self, bundle: Bundle, cache: Path | None) -> dict[str, str]:
        """Everything to set for a bundle; ``cache`` is the user's folder for what is compiled, if there is one."""
        half = any(record.get("name") == "half" and record.get("kept", True) for record in bundle.manifest.passes)
        given = dict(self.options)
        if CUDA_GRAPHS and self.name in RECORDS:
            given["enable_cuda_graph"] = "1"
        if self.half_option and half:
            given[self.half_option] = "1"
        if cache is not None:
            given |= dict.fromkeys(self.cache_options, str(cache / self.name))
        return given

    def chain(self, bundle: Bundle, cache: Path | None) -> list[Any]:
        """The providers of a session, with what is set of each, in the order in which they take operators."""
        behind = [CPU] if self.behind is None else self.behind.chain(bundle, cache)
        return [(self.name, self.options_for(bundle, cache)), *behind]

    def devices(self, library: Any) -> list[Any]:
        """Where a plugin can run, once ONNX Runtime knows it.

        Raises
        ------
        ImportError
            If the plugin is not installed.
        """
        plugin = import_module(self.plugin)
        name = plugin.get_ep_name()
        if not any(device.ep_name == name for device in library.get_ep_devices()):
            library.register_execution_provider_library(name, plugin.get_library_path())
        return [device for device in library.get_ep_devices() if device.ep_name == name]


CUDA = Provider(
    "CUDAExecutionProvider",
    options={"use_tf32": "0"},
    install="Install 'ldm_export[gpu]' in an environment without onnxruntime.",
)
PROVIDERS = {
    "cuda": CUDA,
    "ort-tensorrt": Provider(
        "TensorrtExecutionProvider",
        options={"trt_engine_cache_enable": "1", "trt_timing_cache_enable": "1"},
        cache_options=("trt_engine_cache_path", "trt_timing_cache_path"),
        half_option="trt_fp16_enable",
        behind=CUDA,
        install="Install 'ldm_export[gpu]' in an environment without onnxruntime.",
    ),
    "ort-tensorrt-rtx": Provider(
        "NvTensorRTRTXExecutionProvider",
        cache_options=("nv_runtime_cache_path",),
        plugin="onnxruntime_ep_nv_tensorrt_rtx",
        holds_arrays=False,
        install="Run: pip install onnxruntime-ep-nv-tensorrt-rtx",
    ),
}
