"""TensorRT engines of a bundle, for data-centre GPUs (``tensorrt``) and for RTX GPUs (``tensorrt_rtx``).

Which of a bundle's engine targets runs is decided without opening an engine: it must be of this release of the library
and for this GPU, and have every graph that drawing takes (``ldm_export.bundle.targets.engines``).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from ldm_export.bundle import Bundle
from ldm_export.bundle.manifest import LOOPS, is_loop
from ldm_export.bundle.targets.base import files_in
from ldm_export.bundle.targets.engines import FLAVOURS, EngineTarget, engine_targets, read_engine_target
from ldm_export.bundle.targets.engines import Engine as EngineEntry
from ldm_export.contract import STEP, GraphSpec, TensorSpec, check_inputs, step_spec
from ldm_export.errors import BackendError
from ldm_export.reading.documents import MalformedError
from ldm_export.reading.json_fields import MOST_FILE_BYTES
from ldm_export.runtime.backends.base import Backend, foreign_errors
from ldm_export.runtime.backends.cuda import Stream, gpus
from ldm_export.runtime.backends.device_loop import DeviceLoop, DeviceSampling
from ldm_export.runtime.backends.engine import BoundEngine, Engine, open_library
from ldm_export.runtime.backends.user_cache import cache_folder
from ldm_export.runtime.graph import Array, Graph
from ldm_export.runtime.sampling import Sampling, SamplingTask

PRECISIONS = ("fp16", "int8", "fp32")
"""Precisions of targets, the fastest first, in which those that fit are chosen."""
NO_WEIGHTS = "its engines have no weights"


def build_command(bundle: Bundle, flavour: str, compute_capability: str, precision: str = "fp32") -> str:
    """What to type for engines that run on such a device."""
    models = f" --sm {compute_capability.replace('.', '')}" if flavour == "tensorrt_rtx" else ""
    other = f" --precision {precision}" if precision != "fp32" else ""
    return f"ldm-export build {bundle.path} --target {FLAVOURS[flavour]}{models}{other}"


def remedy(bundle: Bundle, kind: str, why: str, flavour: str, compute_capability: str) -> str:
    """What to type where engines of a kind do not fit such a device."""
    if why == NO_WEIGHTS:
        return f"ldm-export refit {bundle.path} --target {kind}"
    precision = kind.rpartition("-")[2]
    return build_command(bundle, flavour, compute_capability, precision if precision in PRECISIONS else "fp32")


def engine_fits(
    bundle: Bundle, flavour: str, version: str | None, compute_capability: str | None
) -> dict[str, EngineTarget | str]:
    """The bundle's engine targets of a flavour by kind: those that fit, and of the others why they do not.

    Parameters
    ----------
    version, compute_capability : of the library and the device here; None checks none
    """
    found: dict[str, EngineTarget | str] = {}
    for kind in engine_targets(bundle):
        if not kind.startswith(f"{FLAVOURS[flavour]}-"):
            continue
        target = read_engine_target(bundle, kind, version=version, compute_capability=compute_capability)
        if isinstance(target, EngineTarget):
            drawn_with = [name for name, graph in bundle.manifest.graphs.items() if not is_loop(graph.path)]
            missing = [name for name in drawn_with if name not in target.engines]
            if missing:
                target = f"it has no engine of {' and '.join(missing)}"
            elif target.stripped:
                target = NO_WEIGHTS
        found[kind] = target or "it is gone"
    return found


def fitting_target(bundle: Bundle, flavour: str, version: str, compute_capability: str) -> EngineTarget:
    """The engines to run.

    Raises
    ------
    BackendError
        If none fit; it says why of each, and what to type.
    """
    found = engine_fits(bundle, flavour, version, compute_capability)
    fitting = [target for target in found.values() if isinstance(target, EngineTarget)]
    if fitting:
        return min(fitting, key=lambda target: PRECISIONS.index(target.precision))
    unfit = {kind: why for kind, why in found.items() if isinstance(why, str)}
    reasons = "; ".join(f"targets/{kind} does not fit: {why}" for kind, why in unfit.items())
    kind = min(unfit, key=lambda kind: unfit[kind] != NO_WEIGHTS, default="")  # refitting is quicker than building
    raise BackendError(
        f"{bundle.path} has no {flavour} engines for this GPU{f' ({reasons})' if reasons else ''}. "
        f"Run: {remedy(bundle, kind, unfit.get(kind, ''), flavour, compute_capability)}"
    )


class TensorRtBackend(Backend):
    """Opens engines of a bundle on the first GPU.

    Parameters
    ----------
    flavour : ``tensorrt_rtx`` or ``tensorrt``

    Attributes
    ----------
    name : what is used, such as ``tensorrt_rtx 1.7.1.116 rtx-sm89-fp16 NVIDIA GeForce RTX 4090``

    Raises
    ------
    BackendError
        If the library, CUDA's bindings, the driver or a GPU is missing, or no engines fit.
    """

    def __init__(self, bundle: Bundle, flavour: str):
        self._bundle = bundle
        self._library = open_library(flavour)
        try:
            self._gpu = gpus()[0]
        except BackendError as error:
            raise BackendError(f"{error} Or use the backend cpu.") from error
        capability = self._gpu.compute_capability
        self._target = fitting_target(bundle, flavour, self._library.version, capability)
        self._rebuild = build_command(bundle, flavour, capability, self._target.precision)
        self._stream = Stream()
        self._engines: dict[str, Engine] = {}
        self._idle: list[DeviceLoop] = []
        self.own_graphs = self._target.engines.keys()
        self.name = f"{flavour} {self._library.version} {self._target.kind} {self._gpu.name}"

    def load(self, graph: str) -> Graph:
        """Open the engine of a graph.

        Raises
        ------
        BackendError
            If the target has none, or it does not open.
        """
        spec = self._bundle.manifest.graphs.get(graph) or _spec_of(self._target.engines[graph], graph)
        return EngineGraph(self._engine(graph, spec), spec)

    def check_shapes(self, graph: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._engines[graph].check_shapes(shapes)

    def sampling(self, denoiser: Graph, run: SamplingTask) -> Sampling:
        """A loop on the device, where the target has an engine for its steps and nothing else happens between."""
        between = (run.kept, run.image_guidance, run.residuals)
        if STEP not in self._target.engines or any(each is not None for each in between):
            return super().sampling(denoiser, run)
        started = time.perf_counter()
        engines = self._engines[self._bundle.roles.denoiser], self._engine(STEP, step_spec(denoiser.spec))
        loop = next((idle for idle in self._idle if idle.fits(run)), None)
        if loop is not None:
            self._idle.remove(loop)
        else:
            self._stream.wait()  # engines must not go while they run
            self._idle.clear()  # their memory is needed before other memory is taken
            loop = DeviceLoop(*engines, self._stream, run)
        load_ms = (time.perf_counter() - started) * 1000.0
        return DeviceSampling(loop, run, load_ms, lambda: self._idle.append(loop))

    def close(self) -> None:
        """Give back the GPU's memory."""
        with suppress(BackendError):  # of what failed before
            self._stream.wait()
        self._idle.clear()
        self._engines.clear()

    def _engine(self, name: str, spec: GraphSpec) -> Engine:
        if name not in self._engines:
            if name not in self._target.engines:
                raise BackendError(
                    f"targets/{self._target.kind} of {self._bundle.path} has no engine of {name}. Run: "
                    f"{self._rebuild}{f' --loop {name[len(LOOPS) + 1 :]}' if is_loop(name) else ''}"
                )
            entry = self._target.engines[name]
            self._engines[name] = Engine(
                self._library,
                self._serialised(entry.path),
                GraphSpec(f"targets/{self._target.kind}/{entry.path}", spec.inputs, spec.outputs),
                entry.profile,
                self._stream,
                rebuild=self._rebuild,
                cache_file=self._cache_file(entry),
                repeated=name in (self._bundle.roles.denoiser, STEP),  # launched many times for a picture
            )
        return self._engines[name]

    def _serialised(self, path: str) -> Array:
        """An engine's bytes; of a bundle that is verified, the very ones whose hash was checked."""
        if not self._bundle.verified:
            return np.memmap(self._target.file(path), np.uint8, mode="r")
        try:
            return np.frombuffer(files_in(self._bundle, self._target).read(path, MOST_FILE_BYTES), np.uint8)
        except MalformedError as error:
            raise BackendError(f"targets/{self._target.kind} cannot be used, since its {error}.") from error

    def _cache_file(self, entry: EngineEntry) -> Path | None:
        """Where to keep what TensorRT-RTX compiles of an engine for this GPU; a bundle stays as it is."""
        folder = cache_folder()
        key = json.dumps([self._library.version, self._target.kind, self._gpu.name, entry.path, entry.source_hashes])
        return folder and folder / f"engine-{hashlib.sha256(key.encode()).hexdigest()[:32]}.cache"


class EngineGraph:
    """One engine with arrays of the host; see :class:`ldm_export.runtime.graph.Graph`."""

    can_skip = False

    def __init__(self, engine: Engine, spec: GraphSpec):
        self.spec, self._engine = spec, engine
        self._bound: BoundEngine | None = None

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        check_inputs(self.spec, inputs)
        shapes = {name: array.shape for name, array in inputs.items()}
        with foreign_errors(self._engine.library.flavour, self.spec.name):
            bound, known = self._bound, True
            if bound is None or bound.shapes != shapes:
                bound, known = self._bind_anew(shapes), False
            for name, array in inputs.items():
                bound.buffers[name].upload(array)
            bound.launch()
            results = {tensor.name: bound.buffers[tensor.name].downloaded() for tensor in self.spec.outputs}
            if not known:
                self._engine.remember()
        return results

    def bind(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], fixed: Collection[str] = (), every: int = 1
    ) -> Callable[[], None]:
        assert every == 1
        check_inputs(self.spec, inputs)
        with foreign_errors(self._engine.library.flavour, self.spec.name):
            bound = self._engine.bound({name: array.shape for name, array in inputs.items()})
            bound.prepare()
            for name in fixed:
                bound.buffers[name].upload(inputs[name])
        changing = inputs.keys() - set(fixed)

        def call() -> None:
            with foreign_errors(self._engine.library.flavour, self.spec.name):
                for name in changing:
                    bound.buffers[name].upload(inputs[name])
                bound.launch()
                for name, array in outputs.items():
                    bound.buffers[name].download(array)

        return call

    def _bind_anew(self, shapes: Mapping[str, tuple[int, ...]]) -> BoundEngine:
        self._engine.check_shapes(shapes)
        self._engine.stream.wait()
        self._bound = None  # its memory is needed before other memory is taken
        self._bound = self._engine.bound(shapes)
        return self._bound


def _spec_of(entry: EngineEntry, graph: str) -> GraphSpec:
    """What an engine says of a loop that the bundle has no graph of; each free size is one of its own."""

    def free(tensor: TensorSpec) -> TensorSpec:
        sizes = (f"{tensor.name}.{k}" if size == -1 else size for k, size in enumerate(tensor.shape))
        return TensorSpec(tensor.name, tensor.dtype, tuple(sizes))

    return GraphSpec(f"{graph}.onnx", tuple(map(free, entry.inputs)), tuple(map(free, entry.outputs)))
