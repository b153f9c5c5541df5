"""What follows a call of the denoiser, as ONNX: guidance, one row of a plan, and what the next call is given.

    out = negative + guidance_scale * (prompt - negative)
    h_0 = from_output * out + from_sample * x                     clipped to +-clip
    x  <- keep * x + direct * out + sum_k weight_k * h_k + noise * z

Terms come in the order of `ldm_export.plan.Stepper`, in float32. A loop graph has this in its body. As a graph of its
own, ``step``, it lets a runtime whose denoiser runs on a GPU keep the latents there: one small engine serves every
plan, since the row is an input, and no runtime needs a compiler for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import ModelProto, helper

from ldm_export.contract import REMEMBERED, STEP_CELLS, GraphSpec, step_spec
from ldm_export.export.splicing import GraphWriter

OPSET, IR_VERSION = 20, 9


def guide(writer: GraphWriter, negative: str, prompted: str, scale: str) -> str:
    """negative + scale * (prompted - negative)"""
    away = writer.node("Mul", writer.node("Sub", prompted, negative), scale)
    return str(writer.node("Add", away, negative))


def update(
    writer: GraphWriter, cell: Mapping[str, str], x: str, out: str, older: Sequence[str] | None, z: str
) -> tuple[str, list[str]]:
    """Add one row of a plan; gives the next latents, and all remembered values, the newest first.

    Parameters
    ----------
    cell : of the row, the values that are there by their names; a term without one is left out
    x, out : the latents, and what the denoiser gave for them
    older : what is remembered of earlier rows, the newest first; None if no row remembers anything
    z : noise, or an empty name
    """

    def sum_of(*terms: tuple[str, str]) -> str:
        """``coefficient * value`` of every coefficient that there is, from left to right."""
        products = [writer.node("Mul", value, cell[name]) for name, value in terms if name in cell]
        total: str = products[0] if products else writer.node("Sub", x, x)
        for product in products[1:]:
            total = writer.node("Add", total, product)
        return total

    h: list[str] = []
    if older is not None:
        newest = sum_of(("from_output", out), ("from_sample", x))
        if "clip" in cell:
            newest = writer.node("Min", writer.node("Max", newest, writer.node("Neg", cell["clip"])), cell["clip"])
        h = [newest, *older]
    weighed = [(f"weight_{age}", value) for age, value in enumerate(h)]
    return sum_of(("keep", x), ("direct", out), *weighed, *([("noise", z)] if z else [])), h


def step_model(denoiser: GraphSpec) -> ModelProto:
    """The graph ``step`` of a bundle with this denoiser, by the contract `ldm_export.contract.step_spec`."""
    spec, writer = step_spec(denoiser), GraphWriter()
    given = {tensor.name: writer.input(tensor) for tensor in spec.inputs}
    x, out = given["latents"], given["out_sample"]
    cells = writer.node("Split", given["row"], axis=0, num_outputs=len(STEP_CELLS), outputs=len(STEP_CELLS))
    cell = dict(zip(STEP_CELLS, cells, strict=True))  # (1,) each

    def index(name: str, *values: int) -> str:
        return str(writer.constant(name, np.array(values, np.int64)))

    first, start = index("first_axis", 0), index("start", 0)
    batch, rows = (writer.node("Shape", value, start=0, end=1) for value in (x, out))
    end = index("end", np.iinfo(np.int64).max)
    negative = writer.node("Slice", out, start, batch, first)
    prompted = writer.node(
        "Slice", out, writer.node("Neg", batch), end, first
    )  # the same rows where there is no guidance
    stacked = writer.node("Split", given["remembered"], axis=0, num_outputs=REMEMBERED, outputs=REMEMBERED)
    older = [writer.node("Squeeze", value, first) for value in stacked]
    guided = guide(writer, negative, prompted, cell["guidance_scale"])
    latents, h = update(writer, cell, x, guided, older, given["noise"])
    kept = [writer.node("Unsqueeze", value, first) for value in h[:REMEMBERED]]
    scaled = writer.node("Mul", latents, cell["next_input_scale"])
    results = {
        "next_latents": latents,
        "next_remembered": writer.node("Concat", *kept, axis=0),
        "sample": writer.node("Slice", writer.node("Concat", scaled, scaled, axis=0), start, rows, first),
        "timestep": writer.node("Expand", cell["next_timestep"], rows),
    }
    for tensor in spec.outputs:
        writer.output(tensor, results[tensor.name])
    writer.graph.name = spec.name
    return helper.make_model(writer.graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
