"""``auto``: engines that fit this GPU; else CUDA where ONNX Runtime has it; else the CPU, by the faster library.

Which of ONNX Runtime and OpenVINO that is depends on the network and the processor, so it is measured, once for a
bundle and a machine: both call the denoiser as for one picture, in turn, and the shortest call counts, since other load
only ever adds. After a call each to warm up, rounds go on for ``BUDGET_S``, at least one: a small model takes about a
second, a large one two calls each. Opening it in both comes on top.

The times are remembered in ``$XDG_CACHE_HOME/ldm_export`` (``~/.cache/ldm_export``), a file for each combination of
denoiser, processor, versions and threads. It may be deleted at any time; where it cannot be read or written, pictures
are drawn all the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from ldm_export.bundle import Bundle
from ldm_export.bundle.atomic import write_whole
from ldm_export.bundle.targets.cpu_level import processor
from ldm_export.bundle.targets.engines import FLAVOURS, engine_targets
from ldm_export.contract import TensorSpec
from ldm_export.errors import BackendError, LdmExportError, warn
from ldm_export.reading.documents import read_json
from ldm_export.runtime.backends.base import Backend, allowed_threads
from ldm_export.runtime.backends.cuda import driver_is_there
from ldm_export.runtime.backends.onnxruntime import OnnxRuntimeBackend
from ldm_export.runtime.backends.openvino import OpenVinoBackend
from ldm_export.runtime.backends.tensorrt import TensorRtBackend
from ldm_export.runtime.backends.user_cache import cache_folder
from ldm_export.runtime.graph import Array

SETTLE_S = 0.1
"""Pause between timings, s: idle worker threads of one backend spin, and would slow the next."""
BUDGET_S = 1.0
TURN_S = 0.05
"""How long one backend is called, at least once, before it is the other's turn, s."""
LARGE_BYTES = 1 << 30
"""Denoisers from this size are opened and timed one after the other, so that never two of them are in memory."""
CANDIDATES = ("onnxruntime", "openvino")
TOKENS = 77
"""How many a denoiser is measured with that reads states of another number."""
MOST_BYTES = 1 << 16
"""Largest file of remembered times that is read."""

_log = logging.getLogger(__name__)


def open_fastest(bundle: Bundle, threads: int | None) -> Backend:
    """Open the backend ``auto``; what is measured goes to the logger ``ldm_export`` (level INFO).

    Raises
    ------
    BackendError
        If neither library is installed.
    """
    engines = open_engines(bundle)
    if engines is not None:
        return engines
    found = openvino_version()
    try:
        cpu = OnnxRuntimeBackend(bundle, "auto", threads)
    except BackendError:
        if found is None:
            raise
        return OpenVinoBackend(bundle, threads)
    outside = any(path.endswith(".onnx_data") for path in bundle.manifest.files)
    if cpu.on_gpu or found is None or (outside and bundle.verified):  # OpenVINO takes no such weights from memory
        return cpu
    file = _cache_file(bundle, [cpu.name, found, threads or allowed_threads() or os.cpu_count()])
    times = remembered(file)
    if times is not None and times["onnxruntime"] <= times["openvino"]:
        return cpu
    try:
        openvino = OpenVinoBackend(bundle, threads)
        if times is None:
            times = measure(bundle, cpu, openvino)
            _remember(file, times)
    except LdmExportError:  # what OpenVINO cannot do, ONNX Runtime may; and what neither can, it says itself
        return cpu
    return cpu if times["onnxruntime"] <= times["openvino"] else openvino


def open_engines(bundle: Bundle) -> Backend | None:
    """The bundle's TensorRT engines, if there are any and they run here; warns where there are any and a driver, and
    they do not."""
    kinds = engine_targets(bundle)
    if not kinds or not driver_is_there():
        return None
    reasons = []
    for flavour, prefix in FLAVOURS.items():
        if any(kind.startswith(f"{prefix}-") for kind in kinds):
            try:
                return TensorRtBackend(bundle, flavour)
            except BackendError as error:
                reasons.append(str(error))
    warn(f"{' '.join(reasons)} Another backend is used.")
    return None


def openvino_version() -> str | None:
    """The installed OpenVINO, found without importing it, which takes a second."""
    try:
        return version("openvino")
    except PackageNotFoundError:
        return None


def measure(bundle: Bundle, cpu: Backend, openvino: Backend) -> dict[str, float]:
    """The shortest call of the denoiser in each of :data:`CANDIDATES`, in milliseconds."""
    size_bytes = sum(
        entry.size_bytes
        for path, entry in bundle.manifest.files.items()
        if path.startswith(f"{bundle.roles.denoiser}/")
    )
    backends = list(zip(CANDIDATES, (cpu, openvino), strict=True))
    times: dict[str, float] = {}
    for group in [backends] if size_bytes < LARGE_BYTES else [[backend] for backend in backends]:
        times |= time_calls({name: _denoiser_call(bundle, backend) for name, backend in group})
    return times


def time_calls(calls: Mapping[str, Callable[[], None]]) -> dict[str, float]:
    """The shortest of each backend's calls, in milliseconds, timed in turn as the module's docstring says."""
    shortest = dict.fromkeys(calls, float("inf"))
    started = time.perf_counter()
    for call in calls.values():
        call()
    while True:
        for name, call in calls.items():
            time.sleep(SETTLE_S)
            ends = time.perf_counter() + TURN_S
            while True:
                called = time.perf_counter()
                call()
                now = time.perf_counter()
                shortest[name] = min(shortest[name], (now - called) * 1000.0)
                if now >= ends:
                    break
        if time.perf_counter() - started >= BUDGET_S:
            return shortest


def _denoiser_call(bundle: Bundle, backend: Backend) -> Callable[[], None]:
    """A call of the denoiser with noise, for one picture of the model's own size, with the rows of its guidance."""
    model, roles = bundle.manifest.model, bundle.roles
    denoiser = backend.load(roles.denoiser)
    sizes = {
        "batch": roles.guidance.rows(),
        "height": model["height"] // model["pixels_per_latent"],
        "width": model["width"] // model["pixels_per_latent"],
        "tokens": roles.text_encoders[0].length if roles.text_encoders else TOKENS,
    }
    generator = np.random.default_rng(0)

    def array(tensor: TensorSpec) -> Array:
        shape = [sizes.get(size, 1) if isinstance(size, str) else size for size in tensor.shape]
        if tensor.dtype.startswith("int"):  # class labels
            return np.zeros(shape, tensor.dtype)
        return np.asarray(generator.standard_normal(shape), tensor.dtype)

    inputs, outputs = (
        {tensor.name: array(tensor) for tensor in side} for side in (denoiser.spec.inputs, denoiser.spec.outputs)
    )
    return denoiser.bind(inputs, outputs, fixed=inputs.keys() - {"sample", "timestep"})


def _cache_file(bundle: Bundle, runs_on: list[object]) -> Path | None:
    """Where the times are remembered; None where there is no home."""
    denoiser = bundle.manifest.files[bundle.manifest.graphs[bundle.roles.denoiser].path].sha256
    digest = hashlib.sha256(json.dumps([denoiser, processor(), *runs_on]).encode()).hexdigest()
    folder = cache_folder()
    return None if folder is None else folder / f"denoiser-{digest[:32]}.json"


def remembered(file: Path | None) -> dict[str, float] | None:
    """The times in a file, or None if there are none, or none that make sense."""
    if file is None:
        return None
    try:
        found = read_json(file, MOST_BYTES)
        times = {name: found[name] for name in CANDIDATES}
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return times if all(type(value) is float and 0 < value < float("inf") for value in times.values()) else None


def _remember(file: Path | None, times: Mapping[str, float]) -> None:
    """Write the times, whole or not at all, and tell them."""
    until = "from now on"
    try:
        if file is None:
            raise OSError("there is no home folder")
        write_whole(file, json.dumps(times).encode())
    except OSError as error:
        until = f"this time, which cannot be remembered ({error})"
    spent = ", ".join(f"{name} {ms:.1f} ms" for name, ms in times.items())
    _log.info(
        "measured: %s a call of the denoiser; %s is used %s", spent, min(times, key=lambda name: times[name]), until
    )
