"""ONNX Runtime's providers for GPUs: what is set of each, and that one asked for by name is used or is an error."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from ldm_export.bundle import Bundle
from ldm_export.errors import BackendError
from ldm_export.runtime import Pipeline
from ldm_export.runtime.backends import cuda, open_backend
from ldm_export.runtime.backends.onnxruntime import OnnxRuntimeGraph
from ldm_export.runtime.backends.providers import CPU, PROVIDERS, Provider
from tests.arrays import arrays

CACHE = Path("/cache")
HALF = {"name": "half", "kept": True}
PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
without_a_gpu = pytest.mark.skipif(cuda.driver_is_there(), reason="NVIDIA's driver is installed")


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


def with_passes(bundle: Bundle, *passes: dict[str, Any]) -> Bundle:
    return replace(bundle, manifest=replace(bundle.manifest, passes=passes))


def test_what_is_set(bundle: Bundle) -> None:
    trt = "TensorrtExecutionProvider"
    kept = {"trt_engine_cache_enable": "1", "trt_timing_cache_enable": "1"}
    paths = dict.fromkeys(("trt_engine_cache_path", "trt_timing_cache_path"), f"/cache/{trt}")
    cuda_and_cpu = [("CUDAExecutionProvider", {"use_tf32": "0"}), CPU]
    assert PROVIDERS["cuda"].chain(bundle, CACHE) == cuda_and_cpu
    assert PROVIDERS["ort-tensorrt"].chain(bundle, CACHE) == [(trt, {**kept, **paths}), *cuda_and_cpu]
    assert PROVIDERS["ort-tensorrt"].options_for(bundle, None) == kept
    assert PROVIDERS["ort-tensorrt-rtx"].options_for(bundle, CACHE) == {
        "nv_runtime_cache_path": "/cache/NvTensorRTRTXExecutionProvider"
    }


def test_half_precision_is_the_bundles_choice(bundle: Bundle) -> None:
    half = [
        "trt_fp16_enable" in PROVIDERS["ort-tensorrt"].options_for(with_passes(bundle, *passes), None)
        for passes in ([], [HALF], [{**HALF, "kept": False}], [{"name": "distill-steps", "kept": True}])
    ]
    assert half == [False, True, False, False]


@pytest.mark.parametrize("name", ["cuda", "ort-tensorrt"])
def test_a_provider_that_this_onnxruntime_has_not(bundle: Bundle, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(BackendError, match=rf"{name} was asked for; .* has only {CPU}\. Install 'ldm_export\[gpu\]'"):
        open_backend(bundle, name, None)


@pytest.mark.parametrize("name", ["cuda", "ort-tensorrt"])
def test_a_provider_that_does_not_start(bundle: Bundle, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime names what it was built with; whether that starts shows in the session."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [PROVIDERS[name].name, CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    backend = open_backend(bundle, name, None)
    assert backend.name.endswith(name.removeprefix("ort-"))
    with pytest.warns(UserWarning, match="not in available provider names"), pytest.raises(BackendError) as raised:
        backend.load("unet")
    assert str(raised.value).startswith(f"{name} was asked for; ONNX Runtime has its provider, which does not start")


def test_a_plugin_that_is_not_installed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PLUGIN, None)
    with pytest.raises(BackendError, match=r"ort-tensorrt-rtx was .* Run: pip install onnxruntime-ep-nv-tensorrt-rtx$"):
        open_backend(bundle, "ort-tensorrt-rtx", None)


def test_a_plugin_that_onnxruntime_does_not_take(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "plugin.so").write_bytes(b"no library")
    stub = SimpleNamespace(get_ep_name=lambda: "NvX", get_library_path=lambda: str(tmp_path / "plugin.so"))
    monkeypatch.setitem(sys.modules, PLUGIN, stub)
    with pytest.raises(BackendError, match=r"does not take its plugin: .*plugin\.so.* Run: pip install") as raised:
        open_backend(bundle, "ort-tensorrt-rtx", None)
    assert "\n" not in str(raised.value)


@without_a_gpu
def test_the_real_plugin_without_a_driver(bundle: Bundle) -> None:
    pytest.importorskip(PLUGIN, reason=f"{PLUGIN} is not installed")
    with pytest.raises(BackendError, match=r"does not take its plugin: .*libcuda"):
        open_backend(bundle, "ort-tensorrt-rtx", None)


def test_arrays_that_stay_on_the_device(bundle: Bundle) -> None:
    """The binding, with the CPU for its device: what changes is read at each call, what is fixed once."""
    graph = open_backend(bundle, "cpu", 1).load("vae_decoder")
    session = onnxruntime.InferenceSession(bundle.file("vae_decoder/model.onnx"), providers=[CPU])
    inputs, outputs = arrays(graph.spec.inputs), arrays(graph.spec.outputs)
    bound = OnnxRuntimeGraph(session, graph.spec, Provider("none", install=""))._bind_on_device(
        inputs, outputs, fixed=(), device="cpu"
    )
    for seed in (1, 2):
        inputs["latent_sample"][...] = arrays(graph.spec.inputs, seed)["latent_sample"]
        bound()
        expected = session.run(["sample"], inputs)[0]
        np.testing.assert_array_equal(outputs["sample"], expected)


def test_a_provider_draws_what_the_cpu_draws(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ONNX Runtime's CPU provider in the place of CUDA's, all the way through the pipeline."""
    stand_in = Provider(CPU, install="", holds_arrays=False)
    monkeypatch.setitem(PROVIDERS, "cuda", stand_in)
    monkeypatch.setattr(Provider, "chain", lambda *_: [CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    expected, drawn = (Pipeline(bundle, name).generate("a red circle", steps=10) for name in ("cpu", "cuda"))
    assert drawn.backend.endswith(" cuda")
    np.testing.assert_allclose(drawn.latents, expected.latents, atol=1e-5)
