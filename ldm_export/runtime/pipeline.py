"""The sampling loop on a bundle: prompt in, picture out.

    text encoders -> conditioner -> [ denoiser -> guidance -> one row of the plan ] x rows -> VAE decoder

The plan says everything about the sampler (``ldm_export.plan``), so the loop knows none by name. Where its latents lie
is up to the backend (``ldm_export.runtime.sampling``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING

import numpy as np

from ldm_export.bundle import Bundle
from ldm_export.bundle.branches import branch_arrays
from ldm_export.bundle.manifest import is_loop
from ldm_export.bundle.plans import check_plans
from ldm_export.errors import BackendError, CancelledError, InputError, LdmExportError, NumericalError
from ldm_export.runtime.adapters import changes
from ldm_export.runtime.backends import ENGINES, open_backend
from ldm_export.runtime.backends.base import Backend
from ldm_export.runtime.conditioning import Conditioning
from ldm_export.runtime.control import Residuals, loaded_control, no_residuals
from ldm_export.runtime.facts import check_drawable, check_pictures
from ldm_export.runtime.graph import Array, Graph
from ldm_export.runtime.inpainting import blended
from ldm_export.runtime.loop_inputs import run_loop
from ldm_export.runtime.options import Options
from ldm_export.runtime.prompts import joined_conditions
from ldm_export.runtime.request import Request, check_size, checked_request, latents_image, picture_channels
from ldm_export.runtime.results import Generation, Step, Timings, pixels_of
from ldm_export.runtime.sampling import GuidedDenoiser, Sampling, SamplingTask
from ldm_export.runtime.start import REMEDY, PictureEncoder, start_of
from ldm_export.runtime.values import flag, shown, whole_number

if TYPE_CHECKING:
    from typing_extensions import Unpack

MOST_THREADS = 1024


class Pipeline:
    """An opened bundle. Use it from one thread at a time, but for `interrupt`. ``backend`` is a name, or a backend that
    is open already.

    Attributes
    ----------
    bundle : the bundle
    requested_backend, backend : what was asked for, and what runs
    """

    def __init__(self, bundle: Bundle, backend: str | Backend = "auto", *, threads: int | None = None):
        check_drawable(bundle)
        if not isinstance(backend, (str, Backend)):
            raise InputError(f"backend is {shown(backend)}; give the name of one, such as 'auto' or 'cpu'.")
        threads = None if threads is None else whole_number("threads", threads, 1, MOST_THREADS)
        if threads is not None and (isinstance(backend, Backend) or backend in ENGINES):
            raise InputError("threads was given, and this backend has been opened or runs on a GPU. Leave it out.")
        self.bundle, self._roles = bundle, bundle.roles
        self._interrupted = False
        self._backend = open_backend(bundle, backend, threads) if isinstance(backend, str) else backend
        self.requested_backend = backend if isinstance(backend, str) else backend.name
        self._graphs: dict[tuple[str, bool], Graph] = {}
        self._conditioning: Conditioning | None = None
        self._closed = False
        if bundle.verified:  # what changes on the disk from now on is not used; a loop is checked when it is opened
            self.load()
            with suppress(BackendError):  # engines may lack it
                self._graph(bundle.roles.vae_encoder)
            check_plans(bundle)

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
        if not isinstance(path, (str, os.PathLike)) or "\0" in os.fspath(path):
            raise InputError(f"path is {shown(path)}; give the folder of a bundle.")
        return cls(Bundle.open(path, verify=flag("verify", verify)), backend, threads=threads)

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
        options : sampler, steps, guidance, negative_prompt, seed, height, width, image, mask, strength, image_guidance,
            controls, class_labels; see :class:`ldm_export.runtime.options.Options`

        Raises
        ------
        InputError
            For anything that this bundle cannot draw; the message says what it can.
        NumericalError
            If latents or pixels are no finite numbers.
        CancelledError
            If the callback returned ``False``, or `interrupt` was called.
        """
        request = self._request(prompts, options)
        if callback is not None and not callable(callback):
            raise InputError(f"callback is {shown(callback)}; give a function of one step.")
        timings = Timings()
        step: Step | None = None
        with closing(self._sample(request, timings)) as steps:
            for step in steps:
                if callback is not None and callback(step) is False:
                    raise CancelledError(f"Cancelled after step {step.index + 1} of {step.count}.")
        assert step is not None
        started = time.perf_counter()
        with self._interruptible():
            images = step.decode()
        timings.decode_ms = _since(started)
        return Generation(images, step.latents, request.seeds, timings, self.backend)

    def interrupt(self) -> None:
        """End what this pipeline runs in another thread, which then raises CancelledError; may be called from any.

        ONNX Runtime stops within a graph, in milliseconds, and so does its opening of one. OpenVINO and TensorRT end
        the call that they are in, one step of the loop at most. Where nothing runs, nothing happens.
        """
        self._interrupted = True
        self._backend.interrupt()

    def load(self) -> None:
        """Open what drawing from noise takes, which the first drawing else does.

        Raises
        ------
        BackendError, BundleError
            If a graph does not open, or the backend that was asked for does not start.
        """
        for name in (self._roles.denoiser, self._roles.vae_decoder):
            self._graph(name)
        if self._conditioning is None:
            self._conditioning = Conditioning(self.bundle, self._backend)

    def close(self) -> None:
        """Give back the graphs and what the backend holds, such as a GPU's memory; the pipeline cannot draw anymore.

        A pipeline is a context manager that does so at its end.
        """
        self._closed = True
        self._graphs.clear()
        self._conditioning = None
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
        return self._sample(self._request(prompts, options), Timings())

    def denoiser(
        self, prompts: str | Sequence[str] | None = None, **options: Unpack[Options]
    ) -> tuple[GuidedDenoiser, Array]:
        """The denoiser of some pictures, for who samples otherwise than by a plan.

        Returns
        -------
        The denoiser, under the pictures' conditions and with their guidance; and N(0, I) by their seeds, float32
        (B, C, h, w), which a plan would begin with.

        Raises
        ------
        InputError
            For anything that this bundle cannot draw; from an image there is none.
        """
        request = self._request(prompts, options)
        if request.image is not None:
            raise InputError("An image was given; a denoiser of one's own starts from noise. Leave the image out.")
        self.load()
        assert self._conditioning is not None
        if request.controls:
            raise InputError("A control was given; a denoiser of one's own has none. Leave it out.")
        each = self._roles.guidance.rows(request.guidance)
        noise = request.noise(request.latents_shape(self.bundle))()
        graph, branches = self._denoiser(request, each)
        conditions, scale = self._conditioning(request, each) | branches, request.guidance if each > 1 else None
        conditions |= no_residuals(self.bundle, request.batch * each)
        return GuidedDenoiser(graph, noise.shape, conditions, scale, request.deepcache), noise

    def decode(self, latents: Array) -> Array:
        """Pictures uint8 (B, H, W, C) of latents, float32 (B, C, h, w), as the sampler has them at its end."""
        with self._interruptible():
            return self._decode(latents)

    def reconstruct(self, images: Array) -> Array:
        """Pictures uint8 (B, H, W, C) through the autoencoder and back, by the mean of its latents.

        Raises
        ------
        InputError
            If their sides are no multiples of the model's pixels per latent, or their channels not the model's.
        NumericalError
            If what the autoencoder gives are no finite numbers.
        CancelledError
            If `interrupt` was called.
        """
        sample = latents_image(images, None, picture_channels(self.bundle))
        check_size(sample.shape[2], sample.shape[3], self.bundle.manifest.model["pixels_per_latent"])
        self._interrupted = False
        with self._interruptible():
            return self._decode(self._encoder().distribution(sample)[0])

    def _request(self, prompts: str | Sequence[str] | None, options: Options) -> Request:
        """The checked request; with it a new generation begins, so earlier interruptions are forgotten."""
        if unknown := options.keys() - Options.__annotations__.keys():
            raise InputError(f"There is no option {min(unknown)!r}; there are {', '.join(Options.__annotations__)}.")
        request = checked_request(self.bundle, prompts, **options)
        self._interrupted = False
        return request

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Raise CancelledError in place of whatever an interruption made a library raise, or of going on."""
        try:
            yield
        except LdmExportError as error:
            if not self._interrupted:
                raise
            raise CancelledError("Interrupted.") from error
        if self._interrupted:
            raise CancelledError("Interrupted.")

    def _graph(self, name: str, *, adapted: bool = False) -> Graph:
        if self._closed:
            raise InputError("This pipeline was closed. Open the bundle again.")
        key = name, adapted
        if key not in self._graphs:
            self._graphs[key] = self._backend.load_adapted(name) if adapted else self._backend.load(name)
        return self._graphs[key]

    def _denoiser(self, request: Request, rows: int) -> tuple[Graph, dict[str, Array]]:
        """The denoiser's graph for a request of so many rows a picture, and what its branches are given where adapters
        change it."""
        name = self._roles.denoiser
        if not changes(request.mixtures, name):
            return self._graph(name), {}
        graph = self._graph(name, adapted=True)
        return graph, branch_arrays(graph.spec, name, request.mixtures * rows)

    def _sample(self, request: Request, timings: Timings) -> Generator[Step, None, None]:
        if request.loop is not None:
            with self._interruptible():
                step = self._run_loop_graph(request, request.loop, timings)
            self._check_latents(step, request)
            yield step
            return
        with self._interruptible():
            sampling, latents = self._begin(request, timings)
        rows, decode = request.trajectory.rows, self._decoder(request)
        try:
            for index, row in enumerate(rows):
                started = time.perf_counter()
                with self._interruptible():
                    timings.denoiser_ms.append(sampling.step())
                timings.loop_ms += _since(started) - timings.denoiser_ms[-1]
                step = Step(index, len(rows), row.timestep, latents, decode)
                self._check_latents(step, request)
                yield step
        finally:
            sampling.close()

    def _begin(self, request: Request, timings: Timings) -> tuple[Sampling, Array]:
        """The loop of a request, about to make its first step, and the latents that it will change."""
        started = time.perf_counter()
        self.load()
        each = self._roles.guidance.rows(request.guidance, request.image_guidance or 0.0)
        denoiser, branches = self._denoiser(request, each)
        encoder = None if request.image is None else self._encoder()
        timings.load_ms = _since(started)
        if request.deepcache > 1 and not denoiser.can_skip:
            raise InputError(
                f"deepcache {request.deepcache} was asked for, and {self.backend} has no outermost blocks of this "
                f"denoiser apart. Run: ldm-export build {self.bundle.path} --target cpu; if that says so, leave "
                "deepcache out."
            )

        shape = request.latents_shape(self.bundle)
        self._backend.check_shapes(self._roles.vae_decoder, {"latent_sample": (request.batch, *shape)})  # it comes last

        started = time.perf_counter()
        draw = request.noise(shape)
        start = start_of(request, encoder, draw)
        timings.encode_ms = 0.0 if encoder is None else encoder.spent_ms
        timings.loop_ms += _since(started) - timings.encode_ms

        started = time.perf_counter()
        assert self._conditioning is not None
        conditions = self._conditioning(request, each, start.beside) | branches
        conditions |= no_residuals(self.bundle, request.batch * each)
        self._check_tokens(denoiser, conditions, request)
        residuals = self._residuals(request, conditions, request.batch * each)
        timings.text_ms = _since(started)

        started = time.perf_counter()
        run = SamplingTask(
            request.trajectory.rows,
            start.latents,
            conditions,
            request.guidance if each > 1 else None,
            draw,
            request.deepcache,
            start.kept,
            request.image_guidance if each > 2 else None,
            residuals,
        )
        sampling = self._backend.sampling(denoiser, run)
        timings.load_ms += sampling.load_ms
        timings.text_ms += _since(started) - sampling.load_ms  # what depends on the prompt alone may be computed here
        return sampling, start.latents

    def _residuals(self, request: Request, conditions: Mapping[str, Array], rows: int) -> Residuals | None:
        """What the controls of a request add to its denoiser; None where there are none."""
        if not request.controls:
            return None
        loaded = [
            loaded_control(
                control,
                self._graph(control.graph),
                conditions,
                rows,
                lambda image: self._encoder().distribution(image)[0],
            )
            for control in request.controls
        ]
        return Residuals(loaded, len(request.trajectory.rows))

    def _check_tokens(self, denoiser: Graph, conditions: Mapping[str, Array], request: Request) -> None:
        """Raise InputError if prompts of several chunks have more tokens than the opened denoiser takes."""
        if not request.reading.chunks:
            return
        joined = joined_conditions(self._roles, {self._roles.denoiser: denoiser.spec})
        for name, array in ((name, conditions[name]) for name in joined):
            try:
                self._backend.check_shapes(self._roles.denoiser, {name: array.shape})
            except InputError as error:
                raise InputError(
                    f"The prompts in chunks have {array.shape[1]} tokens; {self.backend} was built for another number. "
                    "Use the backend cpu, or leave long_prompts out."
                ) from error

    def _check_latents(self, step: Step, request: Request) -> None:
        """Raise NumericalError unless all latents are finite numbers."""
        if np.isfinite(step.latents).all():
            return
        own = self._roles.guidance.scale
        lower = f"Lower the guidance, which is {request.guidance:g} (the bundle's own is {own:g})"
        raise NumericalError(
            f"After step {step.index + 1} of {step.count} the latents are no finite numbers, so there is no picture. "
            + (f"{lower}." if request.guidance > max(own, 1.0) else REMEDY)
        )

    def _run_loop_graph(self, request: Request, plan: str, timings: Timings) -> Step:
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
        return run_loop(self.bundle, loop, request, timings)

    def _encoder(self) -> PictureEncoder:
        return PictureEncoder(self._graph(self._roles.vae_encoder), self.bundle.manifest.model["pixels_per_latent"])

    def _decoder(self, request: Request) -> Callable[[Array], Array]:
        """What makes pictures of latents, with those pixels of a request's image that it keeps."""
        image, mask = request.image, request.mask
        if not request.keep_pixels or image is None or mask is None:
            return self._decode
        own = pixels_of(image)
        return lambda latents: blended(self._decode(latents), own, mask)

    def _decode(self, latents: Array) -> Array:
        sample = self._graph(self._roles.vae_decoder).run({"latent_sample": latents})["sample"]
        factor = self.bundle.manifest.model["pixels_per_latent"]
        check_pictures(sample.shape, latents.shape, factor, self.bundle.manifest.graphs[self._roles.vae_decoder])
        if not np.isfinite(sample).all():
            raise NumericalError(f"The VAE decoder gives pixels that are no finite numbers. {REMEDY}")
        return pixels_of(sample)


def _since(started: float) -> float:
    return (time.perf_counter() - started) * 1000.0
