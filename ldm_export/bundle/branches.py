"""What a graph's branches for adapters are given (:mod:`ldm_export.graph.branches`), for a call of some rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ldm_export.bundle.adapters import Array, LayerFactors, Mixture
from ldm_export.contract import BRANCH, GraphSpec, branch_input, branch_layers
from ldm_export.errors import InputError

Shape = Sequence[int | str]
Uses = Sequence[tuple[LayerFactors, float]]
"""What one row has of a layer: factors and their strengths."""


def branch_arrays(graph: GraphSpec, name: str, rows: Sequence[Mixture]) -> dict[str, Array]:
    """The inputs of a graph's branches, for a call of as many rows.

    A layer that no adapter changes gets one rank of zeros.

    Parameters
    ----------
    graph : of an opened graph with branches
    name : its name in the bundle, and so in adapters

    Raises
    ------
    InputError
        If an adapter changes a layer that has no branch for it, or has factors of other shapes; or if one that is DoRA
        shares a layer with another one, or is of no finite strength there.
    """
    shapes = {tensor.name: tensor.shape for tensor in graph.inputs}
    layers = branch_layers(graph)
    scaled = {layer for layer in layers if branch_input(layer, "gain") in shapes}
    for adapter in {adapter for row in rows for adapter, _ in row}:
        own = adapter.factors.get(name, {})
        missing = [layer for layer in own if layer not in (layers if own[layer].magnitude is None else scaled)]
        if missing:
            raise InputError(
                f"{adapter.path} changes {min(missing)} of {name}, which this bundle has no branch for. Run ldm-export "
                "lora with this bundle and the adapter's own file once more, and open the bundle anew."
            )
    found: dict[str, Array] = {}
    for layer in layers:
        uses = [_uses(row, name, layer) for row in rows]
        inputs = {role: shapes[key] for role in BRANCH if (key := branch_input(layer, role)) in shapes}
        down, up = inputs["down"], inputs["up"]
        axes = len(down) if "scale" in inputs else 2
        if not all(_fits(use.down, down, axes) and _fits(use.up, up, axes) for row in uses for use, _ in row):
            raise InputError(f"An adapter's factors for {layer} of {name} have other shapes than its branch takes.")
        arrays = _side_by_side(down, up, inputs["scale"], uses) if "scale" in inputs else _by_row(down, up, uses)
        if layer in scaled:
            arrays["gain"] = _gains(inputs["gain"], uses, f"{layer} of {name}")
        found |= {branch_input(layer, role): array for role, array in arrays.items()}
    return found


def _uses(row: Mixture, graph: str, layer: str) -> Uses:
    found = ((adapter.factors.get(graph, {}).get(layer), strength) for adapter, strength in row)
    return [(factors, strength) for factors, strength in found if factors is not None]


def _by_row(down: Shape, up: Shape, rows: Sequence[Uses]) -> dict[str, Array]:
    """Factors of each row, shapes (rows, ..., in, rank) and (rows, ..., rank, out), with zeros up to the highest rank;
    of one row for all where all have the same."""
    each = rows[:1] if all(row == rows[0] for row in rows) else rows
    rank = max(1, *(sum(use.rank for use, _ in row) for row in each))
    into, out = (int(size) for size in (down[-2], up[-1]))  # which a branch fixes
    firsts = np.zeros((len(each), into, rank), np.float32)
    seconds = np.zeros((len(each), rank, out), np.float32)
    for number, row in enumerate(each):
        at = 0
        for use, strength in row:
            end = at + use.rank
            firsts[number, :, at:end] = use.down * np.float32(strength)
            seconds[number, at:end] = use.up
            at = end
    between = [1] * (len(down) - 3)
    return {
        "down": firsts.reshape(len(each), *between, into, rank),
        "up": seconds.reshape(len(each), *between, rank, out),
    }


def _side_by_side(down: Shape, up: Shape, scale: Shape, rows: Sequence[Uses]) -> dict[str, Array]:
    """Factors of all rows' adapters along the rank, and each row's strengths for its own, 0 for the others."""
    all_uses = list(dict.fromkeys(use for row in rows for use, _ in row)) or [LayerFactors(_zeros(down), _zeros(up))]
    strengths = np.array([[dict(row).get(use, 0.0) for use in all_uses] for row in rows], np.float32)
    weights = np.repeat(strengths, [use.rank for use in all_uses], axis=1)  # (rows, rank)
    axes = (1, 0) if len(down) == 2 else (0, 1)
    return {
        "down": _joined([use.down for use in all_uses], axes[0]),
        "up": _joined([use.up for use in all_uses], axes[1]),
        "scale": weights.reshape(*weights.shape, *[1] * (len(scale) - 2)),
    }


def _gains(shape: Shape, rows: Sequence[Uses], layer: str) -> Array:
    """What each row's outputs are multiplied with: DoRA's gain, or 1."""
    found = np.ones((len(rows), math.prod(size for size in shape if isinstance(size, int))), np.float32)
    for number, row in enumerate(rows):
        scaling = [(use, strength) for use, strength in row if use.magnitude is not None]
        if scaling and len(row) > 1:
            raise InputError(
                f"An adapter that is DoRA and another one change {layer} of one picture, which depends on the order. "
                "Give one of them, or merge them: ldm-export export CHECKPOINT -o BUNDLE --lora ADAPTER.safetensors"
            )
        for use, strength in scaling:
            found[number] = use.gain(strength)
    if not np.isfinite(found).all():
        raise InputError(f"An adapter that is DoRA leaves nothing of a row of {layer}. Give it another strength.")
    return found.reshape(len(rows), *(int(size) for size in shape[1:]))  # all but the rows are fixed


def _joined(parts: Sequence[Array], axis: int) -> Array:
    return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts, axis))


def _zeros(shape: Shape) -> Array:
    return np.zeros([1 if isinstance(size, str) else size for size in shape], np.float32)


def _fits(factor: Array, shape: Shape, axes: int) -> bool:
    """Whether a factor has so many axes, of the sizes of the last ones that a branch takes."""
    return factor.ndim == axes and all(
        isinstance(size, str) or size == own for own, size in zip(factor.shape, shape[-axes:], strict=True)
    )
