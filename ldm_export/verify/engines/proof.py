"""What engines are built from, compared with what it shall compute before anything is built of it, in ONNX Runtime.

A plain graph was compared with PyTorch when it was exported: its files have the hashes that the bundle's parity record
is of. A converted graph is compared with the plain one, on other values and sizes than it was calibrated with; a loop
against the graphs that it is composed of, called one by one; ``step`` against its formula in float64. On a CPU that
computes fp16 in fp32, this proves graphs and weights; that rounding what lies between costs little is what `Half`
itself makes sure of.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir

from ldm_export.bundle import Bundle
from ldm_export.bundle.parity import PICTURE_TOLERANCE, STEP_TOLERANCE, TOLERANCE, largest_error, least_snr
from ldm_export.contract import REMEMBERED, STEP_CELLS, GraphSpec, conditions_of, loop_suffixes
from ldm_export.errors import ParityError
from ldm_export.export.parity import graph_session
from ldm_export.graph.base import Array, Inputs
from ldm_export.graph.weights import least_snr_db
from ldm_export.plan import Plan, Stepper
from ldm_export.runtime.conditioning import request_sources
from ldm_export.runtime.results import pixels_of
from ldm_export.verify.engines.calls import example_calls, random_call, run_graph

COMPARED = {"batch": 3, "height": 21, "width": 15}
"""Sizes of a graph's inputs, in latents: odd, so that halvings round."""
LOOP_SIZES = {"batch": 2, "height": 16, "width": 8}
GUIDANCE = 4.0
LOOP_TOLERANCES = {"images": PICTURE_TOLERANCE, "latents": TOLERANCE}
Comparison = dict[str, Any]
"""Record of a comparison: the ``graph``, ``against`` what, its ``error`` as a share of the largest value, what is
``allowed``."""


def recorded(bundle: Bundle, graph: str) -> Comparison:
    """What the bundle says of one of its graphs: the worst of its outputs."""
    records = [record for record in bundle.manifest.parity if record["graph"] == graph]
    if not records:
        return {"graph": graph, "against": "nothing, since the bundle has no record of it"}
    worst = max(records, key=lambda record: record["max_error"] / record["tolerance"])
    return {"graph": graph, "against": "PyTorch", "error": worst["max_error"], "allowed": worst["tolerance"]}


def compare_converted(bundle: Bundle, made: Bundle, graph: GraphSpec, precision: str, allowed: float) -> Comparison:
    """A converted graph, of the bundle ``made``, against the plain one; one of the two is in memory at a time.

    Raises
    ------
    ParityError
        If it differs by more than is allowed; so do the others.
    """
    calls = example_calls(bundle, graph, COMPARED)
    names = [tensor.name for tensor in graph.outputs]

    def results(of: Bundle) -> list[Array]:
        session = _session(of.file(graph.path))
        return [array for call in calls for array in session.run(names, dict(call))]

    expected, given = results(bundle), results(made)
    what, remedy = f"{graph.name} in {precision}", "Use another precision."
    snr, least = least_snr(expected, given), least_snr_db(onnx_ir.load(made.file(graph.path)))
    if least is not None and not snr >= least:
        raise ParityError(
            f"{what} has a signal-to-noise ratio of {snr:.1f} dB, compared with the plain graph; {least:.1f} dB is the "
            f"least for numbers that are rounded as its are. {remedy}"
        )
    return _checked(what, "the plain graph", largest_error(expected, given), allowed, remedy)


def compare_loop(bundle: Bundle, made: Bundle, spec: GraphSpec, plan: Plan, file: Path) -> list[Comparison]:
    """A loop graph against its plan and the graphs of ``made``, of which it is composed."""
    given = random_call(bundle, spec, LOOP_SIZES)
    if "guidance_scale" in given:
        given["guidance_scale"] = np.array(GUIDANCE, np.float32)
    expected = _called_one_by_one(made, plan, given)
    results = _session(file).run(list(LOOP_TOLERANCES), given)
    against, remedy = "its graphs, called one by one", "Leave the loop out."
    return [
        _checked(f"{output} of {spec.name}", against, largest_error([a], [b]), allowed, remedy)
        for (output, allowed), a, b in zip(LOOP_TOLERANCES.items(), expected, results, strict=True)
    ]


def compare_step(spec: GraphSpec, file: Path) -> Comparison:
    """The graph ``step`` against its formula (``ldm_export.plan.table``), on random values, guided and not."""
    random, session = np.random.default_rng(0), _session(file)
    names = [tensor.name for tensor in spec.outputs]
    expected, results = [], []
    for rows in (2, 4):
        sizes = {"batch": 2, "rows": rows, "height": 5, "width": 7}
        given = {
            tensor.name: random.standard_normal(
                [sizes[size] if isinstance(size, str) else size for size in tensor.shape], np.float32
            )
            for tensor in spec.inputs
        }
        given["row"][STEP_CELLS.index("clip")] = 1.0  # which clips some
        expected += _stepped({name: array.astype(np.float64) for name, array in given.items()})
        results += session.run(names, given)
    error = largest_error(expected, results)
    return _checked(spec.name, "its formula in float64", error, STEP_TOLERANCE, "Report it.")


_session = partial(graph_session, as_written=True)


def _called_one_by_one(made: Bundle, plan: Plan, given: Inputs) -> list[Array]:
    """The pictures and latents that a loop shall give; one graph is in memory at a time."""
    roles, graphs = made.roles, made.manifest.graphs
    latents = given["noise"] * np.float32(plan.init_scale)
    guided, run = roles.guidance.takes_two_rows(), partial(run_graph, made, as_written=True)
    factor, (batch, _, height, width) = made.manifest.model["pixels_per_latent"], latents.shape
    sources = request_sources(
        roles.sources(graphs),
        batch,
        height=height * factor,
        width=width * factor,
        guidance=GUIDANCE,
        has_negative_prompt=list(given.get("has_negative_prompt", np.ones(batch))) if guided else None,
        class_labels=given.get("class_labels"),
    )
    for encoder, suffix in zip(roles.text_encoders, loop_suffixes(roles), strict=True):
        names = (f"negative_input_ids{suffix}", f"input_ids{suffix}")
        ids = np.concatenate([given[name] for name in names if name in given])
        sources |= {f"{encoder.graph}.{name}": value for name, value in run(encoder.graph, {"input_ids": ids}).items()}
    conditions = conditions_of(roles, graphs, sources, run)
    denoiser, noise = _session(made.file(graphs[roles.denoiser].path)), iter(given.get("step_noise", ()))
    stepper = Stepper(plan.rows, latents)
    rows = np.empty((1 + guided, *latents.shape), np.float32)
    for row in plan.rows:
        stepper.network_input(out=rows)
        sample = rows.reshape(-1, *latents.shape[1:])
        call = {"sample": sample, "timestep": np.full(len(sample), row.timestep, np.float32), **conditions}
        out = denoiser.run(["out_sample"], call)[0]
        if guided:
            negative, prompted = np.split(out, 2)
            out = negative + np.float32(GUIDANCE) * (prompted - negative)
        stepper.advance(out, lambda: next(noise))
    del denoiser
    sample = run(roles.vae_decoder, {"latent_sample": latents})["sample"]
    if not np.isfinite(sample).all():  # as bytes they would be some number or other
        return [np.full((), np.nan, np.float32), latents]
    return [pixels_of(sample).astype(np.float32), latents]


def _stepped(given: Mapping[str, Array]) -> list[Array]:
    """The next latents, the next remembered values, and the denoiser's next inputs."""
    cell, x, batch = dict(zip(STEP_CELLS, given["row"], strict=True)), given["latents"], len(given["latents"])
    negative, prompted = given["out_sample"][:batch], given["out_sample"][-batch:]
    out = negative + cell["guidance_scale"] * (prompted - negative)
    newest = np.clip(cell["from_sample"] * x + cell["from_output"] * out, -cell["clip"], cell["clip"])
    h = [newest, *given["remembered"]]
    following = cell["keep"] * x + cell["direct"] * out + cell["noise"] * given["noise"]
    following += sum(cell[f"weight_{age}"] * value for age, value in enumerate(h))
    sample = cell["next_input_scale"] * following
    rows = len(given["out_sample"])
    timesteps = np.full(rows, cell["next_timestep"])
    return [following, np.stack(h[:REMEMBERED]), np.concatenate([sample] * (rows // batch)), timesteps]


def _checked(graph: str, against: str, error: float, allowed: float, remedy: str) -> Comparison:
    if not error <= allowed:  # NaN is not, either
        raise ParityError(
            f"{graph} differs from {against} by {error:.2g} of its largest value; {allowed:g} is allowed. "
            f"Nothing was kept. {remedy}"
        )
    return {"graph": graph, "against": against, "error": error, "allowed": allowed}
