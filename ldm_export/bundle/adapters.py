"""Adapters that are given when a picture is drawn: read from files, and laid out as a graph's branches take them.

A file (``.ldma``) is in the form of safetensors: for each layer of a graph ``<graph>/<layer>.down`` and ``.up``, in
float32 and in the shapes that the graph takes (:mod:`ldm_export.graph.branches`), and this metadata:

    format      "ldm_export adapter 1"
    name        of the file that it was made of
    sha256      of that file
    networks    JSON object: for each graph the SHA-256 of the network's weights that it was made for, as a bundle's
                manifest has it

A bundle takes adapters for its own networks alone, whatever its graphs' precision is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ldm_export.contract import BRANCH, GraphSpec, branch_input, branch_layers
from ldm_export.errors import InputError
from ldm_export.reading.documents import MalformedError, parsed
from ldm_export.reading.hashes import sha256_of
from ldm_export.reading.json_fields import field

if TYPE_CHECKING:
    from ldm_export.bundle.bundle import Bundle

Array = npt.NDArray[Any]
FORMAT = "ldm_export adapter 1"
MOST_HEADER_BYTES = 16 << 20
HOW_TO_MAKE = "Make it with: ldm-export lora BUNDLE ADAPTER.safetensors -o ADAPTER.ldma"


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter that was made for a bundle.

    Attributes
    ----------
    path : its file
    sha256 : of the file
    networks : SHA-256 of the weights that it is for, by graph
    factors : (down, up), float32, by graph and by layer
    """

    path: Path
    sha256: str
    networks: Mapping[str, str]
    factors: Mapping[str, Mapping[str, tuple[Array, Array]]]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Adapter:
        """Read a file whole.

        Raises
        ------
        InputError
            If it cannot be read, or is no such file.
        """
        file = Path(path)
        try:
            return _adapter_from(file, file.read_bytes())
        except OSError as error:
            raise InputError(f"The adapter {file} cannot be read ({error.strerror}). {HOW_TO_MAKE}") from error
        except (MalformedError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file} is no adapter for bundles ({error}). {HOW_TO_MAKE}") from error

    def check_fits(self, bundle: Bundle) -> None:
        """Raise InputError unless it was made for the networks of this bundle."""
        source = bundle.manifest.source
        hashes, components = source.get("sha256", {}), source.get("components", {})
        for graph, sha256 in self.networks.items():
            if hashes.get(components.get(graph, graph)) != sha256:
                raise InputError(
                    f"{self.path} was made for another {graph} than that of {bundle.path}. Make it for this bundle: "
                    f"ldm-export lora {bundle.path} ADAPTER.safetensors -o {self.path}"
                )


Shape = Sequence[int | str]
Uses = Sequence[tuple[tuple[Array, Array], float]]
"""Factors of one layer, and their strengths."""
Mixture = tuple[tuple[Adapter, float], ...]
"""What one picture is drawn with: adapters and their strengths."""


def _adapter_from(file: Path, content: bytes) -> Adapter:
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or not 2 <= length <= min(MOST_HEADER_BYTES, len(content) - 8):
        raise MalformedError("it is cut short, or not in the form of safetensors")
    header = parsed(content[8 : 8 + length].decode().rstrip())
    metadata = field(header, "__metadata__", dict)
    if metadata.get("format") != FORMAT:
        raise MalformedError(f"its format is {str(metadata.get('format'))[:60]!r}; {FORMAT!r} is read")
    networks = parsed(field(metadata, "networks", str))
    if not isinstance(networks, dict) or not all(isinstance(value, str) for value in networks.values()):
        raise MalformedError("its networks are no texts by name")
    data = memoryview(content)[8 + length :]
    arrays = {name: _array(name, header[name], data) for name in header if name != "__metadata__"}
    factors: dict[str, dict[str, tuple[Array, Array]]] = {graph: {} for graph in networks}
    for name in arrays:
        key, _, role = name.rpartition(".")
        graph, _, layer = key.partition("/")
        if role not in BRANCH[:2] or graph not in factors:
            raise MalformedError(f"it has {name!r}, which is no factor of a graph that it names")
        if role == BRANCH[0]:
            down, up = factors[graph][layer] = arrays[name], arrays[f"{key}.{BRANCH[1]}"]
            if down.ndim != up.ndim or down.ndim not in (2, 4) or rank_of(down) != up.shape[down.ndim // 4]:
                raise MalformedError(f"its factors of {layer} have shapes {down.shape} and {up.shape}")
    if 2 * sum(map(len, factors.values())) != len(arrays) or not all(factors.values()):
        raise MalformedError("one of its factors lacks the other, or a graph has none")
    return Adapter(file, sha256_of(file), networks, factors)


def rank_of(down: Array) -> int:
    """Rank of a factor ``down``: its last axis of a linear layer, its first of a convolution."""
    return int(down.shape[1 if down.ndim == 2 else 0])


def _array(name: str, entry: Any, data: memoryview) -> Array:
    shape, (start, end) = field(entry, "shape", list), field(entry, "data_offsets", list)
    whole = all(type(number) is int and number >= 0 for number in (*shape, start, end))
    if entry.get("dtype") != "F32" or not whole or end - start != 4 * math.prod(shape) or end > len(data):
        raise MalformedError(f"{name!r} is not float32 of the size that it says")
    found: Array = np.frombuffer(data[start:end], "<f4").reshape(shape).copy()  # libraries want to be able to write
    if not np.isfinite(found).all():
        raise MalformedError(f"{name!r} holds NaN or infinity")
    return found


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
        If an adapter changes a layer that has no branch, or has factors of other shapes.
    """
    shapes = {tensor.name: tensor.shape for tensor in graph.inputs}
    layers = branch_layers(graph)
    for adapter in {adapter for row in rows for adapter, _ in row}:
        if missing := adapter.factors.get(name, {}).keys() - set(layers):
            raise InputError(
                f"{adapter.path} changes {min(missing)} of {name}, which this bundle has no branch for. Run ldm-export "
                "lora with this bundle and the adapter's own file once more."
            )
    found: dict[str, Array] = {}
    for layer in layers:
        own = [
            [
                (adapter.factors[name][layer], strength)
                for adapter, strength in row
                if layer in adapter.factors.get(name, {})
            ]
            for row in rows
        ]
        inputs = {role: shapes[key] for role in BRANCH if (key := branch_input(layer, role)) in shapes}
        down, up = inputs["down"], inputs["up"]
        if not all(_fits(first, down) and _fits(second, up) for row in own for (first, second), _ in row):
            raise InputError(f"An adapter's factors for {layer} of {name} have other shapes than its branch takes.")
        arrays = _side_by_side(down, up, inputs["scale"], own) if "scale" in inputs else _by_row(down, up, own)
        found |= {branch_input(layer, role): array for role, array in zip(inputs, arrays, strict=True)}
    return found


def _uses(row: Mixture, graph: str, layer: str) -> Uses:
    found = ((adapter.factors.get(graph, {}).get(layer), strength) for adapter, strength in row)
    return [(pair, strength) for pair, strength in found if pair is not None]


def _by_row(down: Shape, up: Shape, rows: Sequence[Uses]) -> tuple[Array, Array]:
    """Factors of each row, shapes (rows, ..., in, rank) and (rows, ..., rank, out), with zeros up to the highest rank;
    of one row for all where all have the same."""
    same = all(_identities(row) == _identities(rows[0]) for row in rows)
    each = rows[:1] if same else rows
    rank = max(1, *(sum(rank_of(first) for (first, _), _ in row) for row in each))
    into, out = (int(size) for size in (down[-2], up[-1]))  # which a branch fixes
    between = [1] * (len(down) - 3)
    firsts = np.zeros((len(each), into, rank), np.float32)
    seconds = np.zeros((len(each), rank, out), np.float32)
    for number, row in enumerate(each):
        at = 0
        for (first, second), strength in row:
            end = at + rank_of(first)
            firsts[number, :, at:end] = first * np.float32(strength)
            seconds[number, at:end] = second
            at = end
    return firsts.reshape(len(each), *between, into, rank), seconds.reshape(len(each), *between, rank, out)


def _identities(row: Uses) -> list[tuple[int, float]]:
    return [(id(first), strength) for (first, _), strength in row]


def _side_by_side(down: Shape, up: Shape, scale: Shape, rows: Sequence[Uses]) -> tuple[Array, Array, Array]:
    """Factors of all rows' adapters along the rank, and each row's strengths for its own, 0 for the others."""
    linear = len(down) == 2
    pairs = list({id(first): (first, second) for row in rows for (first, second), _ in row}.values())
    strengths = [dict(_identities(row)) for row in rows]
    weights = np.array([[own.get(id(first), 0.0) for first, _ in pairs] for own in strengths], np.float32)
    if not pairs:
        pairs, weights = [(_zeros(down), _zeros(up))], np.zeros((len(rows), 1), np.float32)
    joined = [
        np.ascontiguousarray(sides[0] if len(sides) == 1 else np.concatenate(sides, axis))
        for sides, axis in zip(zip(*pairs, strict=True), (1, 0) if linear else (0, 1), strict=True)
    ]
    weights = np.repeat(weights, [rank_of(first) for first, _ in pairs], axis=1)  # (rows, rank)
    return joined[0], joined[1], weights.reshape(*weights.shape, *[1] * (len(scale) - 2))


def _zeros(shape: Shape) -> Array:
    return np.zeros([1 if isinstance(size, str) else size for size in shape], np.float32)


def _fits(factor: Array, shape: Shape) -> bool:
    """Whether a factor has the sizes that a branch takes: of a linear layer those of its last two axes."""
    sizes = shape if factor.ndim == 4 else shape[-2:]
    return factor.ndim <= len(shape) and all(
        isinstance(size, str) or size == own for own, size in zip(factor.shape, sizes, strict=True)
    )
