"""The sampling loop on a bundle: prompt in, picture out.

    text encoder -> [ UNet -> guidance -> one row of the plan ] x rows -> VAE decoder

The plan says everything about the sampler (``ldm_export.plan``), so the loop knows none by name. Where its latents lie
is up to the backend (``ldm_export.runtime.sampling``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ldm_export.bundle import Bundle
from ldm_export.errors import CancelledError, InputError
from ldm_export.manifest import is_loop
from ldm_export.runtime.backends import Array, Backend, Graph, open_backend
from ldm_export.runtime.conditioning import PromptEncoder, fixed_inputs
from ldm_export.runtime.request import (
    Options,
    Request,
    check_drawable,
    check_size,
    checked_request,
    latents_image,
    picture_channels,
)
from ldm_export.runtime.sampling import Run
from ldm_export.runtime.whole import loop_inputs

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass
class Timings:
    """Wall-clock milliseconds of one generation, by stage.

    ``load_ms`` is what opening the graphs took, in a pipeline's first generation, and what engines need to be prepared
    for a size that is new to them; it is not part of the total. ``text_ms`` is the prompts, up to the first call of the
    UNet, with what of the UNet depends on them alone.
    ``unet_ms`` has one entry a network call; ``loop_ms`` is what the sampling loop spent outside the network.
    ``whole_ms`` is the one call of a loop graph, from the text encoder to the pictures; ``unet_ms`` then has no entry.
    """

    load_ms: float = 0.0
    text_ms: float = 0.0
    encode_ms: float = 0.0
    unet_ms: list[float] = field(default_factory=list)
    loop_ms: float = 0.0
    decode_ms: float = 0.0
    whole_ms: float = 0.0

    @property
    def total_ms(self) -> float:
        return self.text_ms + self.encode_ms + sum(self.unet_ms) + self.loop_ms + self.decode_ms + self.whole_ms


@dataclass(frozen=True)
class Step:
    """The state after one network call.

    Attributes
    ----------
    index, count : 0-based number of the call, and how many there are
    timestep : what the network was given
    latents : float32 (B, C, h, w), the live buffer: copy it to keep it
    """

    index: int
    count: int
    timestep: float
    latents: Array
    _decode: Callable[[Array], Array] = field(repr=False)

    def decode(self) -> Array:
        """The latents as pictures, uint8 (B, H, W, C): a preview, and after the last step the result."""
        return self._decode(self.latents)


@dataclass(frozen=True)
class Generation:
    """What :meth:`Pipeline.generate` gives.

    Attributes
    ----------
    images : uint8 (B, H, W, C), C being 3, or 1 for grey models
    latents : float32 (B, C, h, w), scaled by the model's ``scaling_factor`` as the UNet sees them
    seeds : one a picture
    timings : by stage
    backend : what ran the graphs
    """

    images: Array
    latents: Array
    seeds: tuple[int, ...]
    timings: Timings
    backend: str


class Pipeline:
    """An opened bundle. Use it from one thread at a time. ``backend`` is a name, or a backend that is open already.

    Attributes
    ----------
    bundle : the bundle
    requested_backend, backend : what was asked for, and what runs
    """

    def __init__(self, bundle: Bundle, backend: str | Backend = "auto", *, threads: int | None = None):
        check_drawable(bundle)
        self.bundle = bundle
        self._backend = open_backend(bundle, backend, threads) if isinstance(backend, str) else backend
        self.requested_backend = backend if isinstance(backend, str) else backend.name
        self._graphs: dict[str, Graph] = {}
        self._prompts: PromptEncoder | None = None
        self._closed = False

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, backend: str = "auto", verify: bool = False, threads: int | None = None
    ) -> Pipeline:
        """Open a bundle for drawing.

        Parameters
        ----------
        path : the bundle's folder
        backend : ``cpu`` (ONNX Runtime), ``openvino``, ``tensorrt-rtx`` and ``tensorrt`` (engines that were built),
            ``cuda``, ``ort-tensorrt``, ``ort-tensorrt-rtx`` (ONNX Runtime on a GPU), or ``auto``: engines that fit this
            GPU, else CUDA where ONNX Runtime has it; on a CPU with both libraries the one that is faster for this
            bundle, which is measured the first time, in a second or two network calls each, and remembered
            (:mod:`ldm_export.runtime.backends.auto`)
        verify : also check every file's hash
        threads : CPU threads for one operator; by default one a physical core

        Raises
        ------
        BundleError, BackendError, InputError
        """
        return cls(Bundle.open(path, verify=verify), backend, threads=threads)

    @property
    def backend(self) -> str:
        """What really runs the graphs, such as ``onnxruntime 1.32.0 cpu``."""
        return self._backend.name

    def generate(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        callback: Callable[[Step], object] | None = None,
        **options: Unpack[Options],
    ) -> Generation:
        """Draw one picture a prompt.

        Parameters
        ----------
        prompts : what to draw; for a model that reads no text, leave it out and give ``seed`` a list
        callback : called after each step; return ``False`` to cancel
        options : sampler, steps, guidance, negative_prompt, seed, height, width, image, strength, class_labels; see
            :class:`ldm_export.runtime.request.Options`

        Raises
        ------
        InputError
            For anything that this bundle cannot draw; the message says what it can.
        CancelledError
            If the callback returned ``False``.
        """
        request = checked_request(self.bundle, prompts, **options)
        timings = Timings()
        step: Step | None = None
        with closing(self._sample(request, timings)) as steps:
            for step in steps:
                if callback is not None and callback(step) is False:
                    raise CancelledError(f"Cancelled after step {step.index + 1} of {step.count}.")
        assert step is not None
        started = time.perf_counter()
        images = step.decode()
        timings.decode_ms = _since(started)
        return Generation(images, step.latents, request.seeds, timings, self.backend)

    def load(self) -> None:
        """Open what drawing from noise takes, which the first drawing else does.

        Raises
        ------
        BackendError, BundleError
            If a graph does not open, or the backend that was asked for does not start.
        """
        for name in ("unet", "vae_decoder"):
            self._graph(name)
        if self._prompts is None and "text_encoder" in self.bundle.manifest.graphs:
            self._prompts = PromptEncoder(self.bundle, self._backend)

    def close(self) -> None:
        """Give back the graphs and what the backend holds, such as a GPU's memory; the pipeline cannot draw anymore.

        A pipeline is a context manager that does so at its end.
        """
        self._closed = True
        self._graphs.clear()
        self._prompts = None
        self._backend.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self, prompts: str | Sequence[str] | None = None, **options: Unpack[Options]) -> Iterator[Step]:
        """The sampling loop of :meth:`generate`, pulled one step at a time: stop iterating to cancel.

        Raises
        ------
        InputError
            At the call, before the first step, for anything that this bundle cannot draw.
        """
        return self._sample(checked_request(self.bundle, prompts, **options), Timings())

    def reconstruct(self, images: Array) -> Array:
        """Pictures uint8 (B, H, W, C) through the autoencoder and back, by the mean of its latents.

        Raises
        ------
        InputError
            If their sides are no multiples of the model's pixels per latent, or their channels not the model's.
        """
        check_size(images.shape[1], images.shape[2], self.bundle.manifest.model["pixels_per_latent"])
        sample = latents_image(images, len(images), picture_channels(self.bundle))
        mean, _ = np.split(self._graph("vae_encoder").run({"sample": sample})["latent_parameters"], 2, axis=1)
        return self._decode(mean * np.float32(self.bundle.manifest.model["scaling_factor"]))

    def _graph(self, name: str) -> Graph:
        if self._closed:
            raise InputError("This pipeline was closed. Open the bundle again.")
        if name not in self._graphs:
            self._graphs[name] = self._backend.load(name)
        return self._graphs[name]

    def _sample(self, request: Request, timings: Timings) -> Generator[Step, None, None]:
        if request.loop is not None:
            yield self._at_once(request, request.loop, timings)
            return
        started = time.perf_counter()
        self.load()
        unet = self._graph("unet")
        if request.image is not None:
            self._graph("vae_encoder")
        timings.load_ms = _since(started)
        if request.deepcache > 1 and not getattr(unet, "can_skip", False):
            raise InputError(
                f"deepcache {request.deepcache} was asked for, and {self.backend} has no outermost blocks of this UNet "
                f"apart. Run: ldm-export build {self.bundle.path} --target cpu; if that says so, leave deepcache out."
            )

        shape = request.latents_shape(self.bundle)
        self._backend.check_shapes("vae_decoder", {"latent_sample": (request.batch, *shape)})  # it comes last

        started = time.perf_counter()
        conditions, guided = self._conditions(request, unet)
        timings.text_ms = _since(started)

        started = time.perf_counter()
        draw = request.noise(shape)
        trajectory = request.trajectory
        image_latents = None if request.image is None else self._encode(request.image, draw)
        timings.encode_ms = _since(started)

        started = time.perf_counter()
        latents = draw() * np.float32(trajectory.noise_scale)
        if image_latents is not None:
            latents += image_latents * np.float32(trajectory.image_scale)
        timings.loop_ms += _since(started)
        started = time.perf_counter()
        scale = request.guidance if guided else None
        run = Run(trajectory.rows, latents, conditions, scale, draw, request.deepcache)
        sampling = self._backend.sampling(unet, run)
        timings.load_ms += sampling.load_ms
        timings.text_ms += _since(started) - sampling.load_ms  # what depends on the prompt alone may be computed here
        try:
            for index, row in enumerate(trajectory.rows):
                started = time.perf_counter()
                timings.unet_ms.append(sampling.step())
                timings.loop_ms += _since(started) - timings.unet_ms[-1]
                yield Step(index, len(trajectory.rows), row.timestep, latents, self._decode)
        finally:
            sampling.close()

    def _at_once(self, request: Request, plan: str, timings: Timings) -> Step:
        """All of a drawing by the loop graph of a plan, in one call."""
        name = f"loops/{plan}"
        graphs = {*self.bundle.manifest.graphs, *self._backend.own_graphs}
        if name not in graphs:
            there = sorted(graph.removeprefix("loops/") for graph in graphs if is_loop(graph))
            sampler, _, steps = plan.rpartition("-")
            raise InputError(
                f"The whole loop {plan} was asked for at once; this bundle has {', '.join(there) or 'no loop'}. "
                f"Run: ldm-export plan {self.bundle.path} --sampler {sampler} --steps {steps} --loop"
            )
        started = time.perf_counter()
        loop = self._graph(name)
        timings.load_ms = _since(started)
        started = time.perf_counter()
        inputs = loop_inputs(self.bundle, loop.spec, request)
        timings.loop_ms = _since(started)
        started = time.perf_counter()
        results = loop.run(inputs)
        timings.whole_ms = _since(started)
        return Step(0, 1, request.trajectory.rows[-1].timestep, results["latents"], lambda _: results["images"])

    def _conditions(self, request: Request, unet: Graph) -> tuple[dict[str, Array], bool]:
        """The UNet's inputs beside latents and timestep, and whether each picture has two rows for guidance."""
        names = {tensor.name for tensor in unet.spec.inputs}
        guided = bool(request.prompts) and request.guidance > 1 and "timestep_cond" not in names
        conditions = fixed_inputs(
            unet.spec,
            request.batch * (1 + guided),
            height=request.height,
            width=request.width,
            guidance=request.guidance,
        )
        if request.class_labels is not None:
            conditions["class_labels"] = np.concatenate([request.class_labels] * (1 + guided))
        if request.prompts:
            assert self._prompts is not None
            encoded = self._prompts.encode(request.prompts)
            if guided:
                negative = self._prompts.encode(request.negative_prompts, negative=True)
                encoded = {name: np.concatenate([negative[name], encoded[name]]) for name in encoded}
            conditions |= encoded
        return conditions, guided

    def _encode(self, image: Array, draw: Callable[[], Array]) -> Array:
        """A picture's scaled latents, drawn from the encoder's distribution with the pictures' own noise."""
        parameters = self._graph("vae_encoder").run({"sample": image})["latent_parameters"]
        mean, logvar = np.split(parameters, 2, axis=1)
        latents: Array = mean.copy()
        if logvar.max() > -30.0:  # below, as AutoencoderTiny's is, the latents are certain, and take no noise
            deviation = np.exp(0.5 * np.clip(logvar, -30.0, 20.0).astype(np.float64))  # the same on every processor
            latents = mean + deviation.astype(np.float32) * draw()
        latents *= np.float32(self.bundle.manifest.model["scaling_factor"])
        return latents

    def _decode(self, latents: Array) -> Array:
        unscaled = latents / np.float32(self.bundle.manifest.model["scaling_factor"])
        sample = self._graph("vae_decoder").run({"latent_sample": unscaled})["sample"]
        pixels = np.clip(sample / 2 + 0.5, 0.0, 1.0) * 255
        images: Array = pixels.round().astype(np.uint8).transpose(0, 2, 3, 1)
        return images


def _since(started: float) -> float:
    return (time.perf_counter() - started) * 1000.0
