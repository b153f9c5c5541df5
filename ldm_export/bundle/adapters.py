"""Adapters that are given when a picture is drawn: read from files, and laid out as a graph's branches take them.

A file (``.ldma``) is in the form of safetensors: in float32, for each layer of a graph ``<graph>/<layer>.down``
and ``.up``, (in, rank) and (rank, out) or, of a convolution, (rank, in, kh, kw) and (out, rank, 1, 1); of DoRA
(2402.09353) also ``.magnitude``, (out,), and ``.norms``, (3, out): for each row of the weight W and of its change D
|W|^2, <W, D> and |D|^2. And this metadata:

    format      "ldm_export adapter 1"
    name        of the file that it was made of
    sha256      of that file
    networks    JSON object: for each graph the SHA-256 of the network's weights that it was made for, as a bundle's
                manifest has it

A bundle takes adapters for its own networks alone, whatever its graphs' precision is.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ldm_export.errors import InputError
from ldm_export.reading.documents import MalformedError, parsed
from ldm_export.reading.json_fields import field

if TYPE_CHECKING:
    from ldm_export.bundle.bundle import Bundle

Array = npt.NDArray[Any]
FORMAT = "ldm_export adapter 1"
NEEDED, OF_DORA = ("down", "up"), ("magnitude", "norms")
"""What an adapter has for a layer, and what beside that if it is DoRA."""
MOST_HEADER_BYTES = 16 << 20
HOW_TO_MAKE = "Make it with: ldm-export lora BUNDLE ADAPTER.safetensors -o ADAPTER.ldma"


@dataclass(frozen=True, eq=False)
class LayerFactors:
    """What an adapter has for one layer: shapes as the module's docstring has them; the last two of DoRA alone."""

    down: Array
    up: Array
    magnitude: Array | None = None
    norms: Array | None = None

    @property
    def rank(self) -> int:
        return int(self.down.shape[1 if self.down.ndim == 2 else 0])

    def gain(self, strength: float) -> Array:
        """What DoRA multiplies the outputs with, (out,): magnitude / |W + strength D|."""
        assert self.magnitude is not None
        assert self.norms is not None
        own, mixed, changed = self.norms.astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):  # whoever uses it checks
            found = self.magnitude / np.sqrt(own + 2 * strength * mixed + strength**2 * changed)
        return np.asarray(found, np.float32)


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter that was made for a bundle.

    Attributes
    ----------
    path : its file
    sha256 : of the file
    networks : SHA-256 of the weights that it is for, by graph
    factors : by graph and by layer
    """

    path: Path
    sha256: str
    networks: Mapping[str, str]
    factors: Mapping[str, Mapping[str, LayerFactors]]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Adapter:
        """Read a file whole.

        Raises
        ------
        InputError
            If it cannot be read, or is no such file.
        """
        file = Path(path)
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        try:
            with open(os.open(file, flags), "rb") as stream:  # without O_NONBLOCK a pipe would be waited for
                return _adapter_from(file, stream)
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


Mixture = tuple[tuple[Adapter, float], ...]
"""What one picture is drawn with: adapters and their strengths."""


def _adapter_from(file: Path, stream: BinaryIO) -> Adapter:
    status = os.fstat(stream.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise MalformedError("it is no regular file")
    start = stream.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= min(MOST_HEADER_BYTES, status.st_size - 8):
        raise MalformedError("it is cut short, or not in the form of safetensors")
    head = stream.read(length)
    header = parsed(head.decode().rstrip())
    metadata = field(header, "__metadata__", dict)
    if metadata.get("format") != FORMAT:  # before the rest is read, which may be a whole checkpoint
        raise MalformedError(f"its format is {str(metadata.get('format'))[:60]!r}; {FORMAT!r} is read")
    networks = parsed(field(metadata, "networks", str))
    if not isinstance(networks, dict) or not all(isinstance(value, str) for value in networks.values()):
        raise MalformedError("its networks are no texts by name")
    data = memoryview(stream.read())
    arrays = {name: _array(name, header[name], data) for name in header if name != "__metadata__"}
    layers: dict[tuple[str, str], dict[str, Array]] = {}
    for name, array in arrays.items():
        key, _, role = name.rpartition(".")
        graph, _, layer = key.partition("/")
        if role not in (*NEEDED, *OF_DORA) or graph not in networks:
            raise MalformedError(f"it has {name!r}, which is nothing of a graph that it names")
        layers.setdefault((graph, layer), {})[role] = array
    factors: dict[str, dict[str, LayerFactors]] = {graph: {} for graph in networks}
    for (graph, layer), roles in layers.items():
        if roles.keys() not in ({*NEEDED}, {*NEEDED, *OF_DORA}):
            raise MalformedError(f"it has just {', '.join(sorted(roles))} of {layer}")
        factors[graph][layer] = LayerFactors(**roles)
        if not _go_together(factors[graph][layer]):
            shapes = ", ".join(f"{role} {array.shape}" for role, array in roles.items())
            raise MalformedError(f"what it has of {layer} does not go together: {shapes}")
    if not factors or not all(factors.values()):
        raise MalformedError("it has nothing of a graph that it names")
    digest = hashlib.sha256(start + head)
    digest.update(data)
    return Adapter(file, digest.hexdigest(), networks, factors)


def _go_together(factors: LayerFactors) -> bool:
    down, up = factors.down, factors.up
    if down.ndim != up.ndim or down.ndim not in (2, 4) or factors.rank != up.shape[down.ndim // 4] or factors.rank < 1:
        return False
    out = up.shape[1 if up.ndim == 2 else 0]
    return factors.magnitude is None or (
        factors.magnitude.shape == (out,) and factors.norms is not None and factors.norms.shape == (3, out)
    )


def _array(name: str, entry: Any, data: memoryview) -> Array:
    shape, (start, end) = field(entry, "shape", list), field(entry, "data_offsets", list)
    whole = all(type(number) is int and number >= 0 for number in (*shape, start, end))
    if entry.get("dtype") != "F32" or not whole or end - start != 4 * math.prod(shape) or end > len(data):
        raise MalformedError(f"{name!r} is not float32 of the size that it says")
    found: Array = np.frombuffer(data[start:end], "<f4").reshape(shape).copy()  # libraries want to be able to write
    if not np.isfinite(found).all():
        raise MalformedError(f"{name!r} holds NaN or infinity")
    return found
