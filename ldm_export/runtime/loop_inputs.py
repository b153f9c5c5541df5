"""What a loop graph, the whole of a drawing in one call, is given to draw what a request asks for."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from ldm_export.bundle import Bundle
from ldm_export.contract import GraphSpec, loop_suffixes
from ldm_export.errors import BundleError
from ldm_export.runtime.facts import check_pictures
from ldm_export.runtime.graph import Array, Graph
from ldm_export.runtime.request import Request
from ldm_export.runtime.results import Step, Timings
from ldm_export.runtime.tokenizer import tokenizer_of


def loop_inputs(bundle: Bundle, loop: GraphSpec, request: Request) -> dict[str, Array]:
    """The inputs of a loop graph of a bundle, by name (``ldm_export.contract.loop_spec``).

    The noise is drawn in the order in which a loop of single steps draws it, so that the picture is the same.
    """
    takes = {tensor.name: tensor for tensor in loop.inputs}
    draw = request.noise(request.latents_shape(bundle))
    given: dict[str, Array] = {"noise": draw(), "guidance_scale": np.array(request.guidance, np.float32)}
    if "step_noise" in takes:
        rows = sum(bool(row.noise) for row in request.trajectory.rows)
        if takes["step_noise"].shape[0] != rows:
            raise BundleError(
                f"{loop.path} takes noise for {takes['step_noise'].shape[0]} rows, and its plan adds some in {rows}. "
                "Make it again with: ldm-export plan --loop"
            )
        given["step_noise"] = np.stack([draw() for _ in range(rows)])
    negatives = [prompt or "" for prompt in request.negative_prompts]
    for encoder, suffix in zip(bundle.roles.text_encoders, loop_suffixes(bundle.roles), strict=True):
        tokenizer = tokenizer_of(bundle, encoder)
        given |= {f"input_ids{suffix}": tokenizer(request.prompts), f"negative_input_ids{suffix}": tokenizer(negatives)}
    given["has_negative_prompt"] = np.array([prompt is not None for prompt in request.negative_prompts], np.float32)
    if request.class_labels is not None:
        given["class_labels"] = request.class_labels
    return {name: given[name] for name in takes}


def run_loop(bundle: Bundle, loop: Graph, request: Request, timings: Timings) -> Step:
    """All of a drawing in one call, which is timed."""
    started = time.perf_counter()
    inputs = loop_inputs(bundle, loop.spec, request)
    timings.loop_ms = (time.perf_counter() - started) * 1000.0
    started = time.perf_counter()
    results = loop.run(inputs)
    _check_results(bundle, loop.spec, request, results)
    timings.whole_ms = (time.perf_counter() - started) * 1000.0
    return Step(0, 1, request.trajectory.rows[-1].timestep, results["latents"], lambda _: results["images"])


def _check_results(bundle: Bundle, loop: GraphSpec, request: Request, results: Mapping[str, Array]) -> None:
    """Raise BundleError unless a loop gave latents and pictures of the sizes that were asked for."""
    batch, height, width, channels = results["images"].shape
    shape = (request.batch, *request.latents_shape(bundle))
    if results["latents"].shape != shape:
        raise BundleError(
            f"{loop.path} gave latents of shape {results['latents'].shape} for {shape}. Export the bundle anew."
        )
    check_pictures((batch, channels, height, width), shape, bundle.manifest.model["pixels_per_latent"], loop)
