"""Adapters that a request asks for, each picture's own, and graphs that are given them."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ldm_export.bundle.adapters import HOW_TO_MAKE, Adapter, Mixture
from ldm_export.bundle.branches import branch_arrays
from ldm_export.contract import GraphSpec
from ldm_export.errors import InputError
from ldm_export.runtime.graph import Array, Graph
from ldm_export.runtime.values import listed, real_number, shown

if TYPE_CHECKING:
    from ldm_export.bundle import Bundle

LARGEST_STRENGTH = 1e3
REMEMBERED = 16
"""Files that are kept in memory after they were read."""


def mixtures_for(bundle: Bundle, given: Any, batch: int) -> tuple[Mixture, ...]:
    """What each picture is drawn with, checked against the bundle.

    Parameters
    ----------
    given : None; (adapter or its file, strength) pairs for all pictures; or a list of such lists, one a picture

    Raises
    ------
    InputError
        If it is nothing of that kind, an adapter cannot be read or is of another bundle, or a strength is no number
        from -1000 to 1000.
    """
    pairs = [] if given is None else listed("adapters", given)
    each = bool(pairs) and all(isinstance(pair, list) for pair in pairs)
    if each and len(pairs) != batch:
        raise InputError(f"{len(pairs)} lists of adapters were given for {batch} pictures. Give one each, or one list.")
    mixtures = tuple(_mixture(bundle, own) for own in (pairs if each else [pairs]))
    return mixtures if each else mixtures * batch


def opened(path: str | os.PathLike[str]) -> Adapter:
    """A file's adapter; one that was read a moment ago and is as it was is not read again."""
    try:
        facts = os.stat(path)
    except OSError as error:
        raise InputError(f"The adapter {path} cannot be read ({error.strerror}). {HOW_TO_MAKE}") from error
    except ValueError as error:  # a null byte, which is not printed
        raise InputError(f"The adapter {str(path)!r} cannot be read ({error}). {HOW_TO_MAKE}") from error
    return _opened(os.fspath(path), facts.st_ino, facts.st_size, facts.st_mtime_ns)


@lru_cache(REMEMBERED)
def _opened(path: str, *_: int) -> Adapter:
    return Adapter.open(path)


def _mixture(bundle: Bundle, pairs: Sequence[Any]) -> Mixture:
    found: dict[Adapter, float] = {}
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], (Adapter, str, os.PathLike)):
            raise InputError(f"adapters has {shown(pair)}; give pairs such as ('style.ldma', 0.8).")
        adapter = pair[0] if isinstance(pair[0], Adapter) else opened(pair[0])
        adapter.check_fits(bundle)
        if adapter in found:
            raise InputError(f"{adapter.path} was given twice for one picture. Give it once, with the sum.")
        found[adapter] = real_number("an adapter's strength", pair[1], -LARGEST_STRENGTH, LARGEST_STRENGTH)
    return tuple(found.items())


def changes(rows: Sequence[Mixture], graph: str) -> bool:
    """Whether an adapter of any row changes a graph."""
    return any(graph in adapter.factors for row in rows for adapter, _ in row)


class AdaptedGraph:
    """A graph with branches, of which every row of every call is drawn with one mixture.

    Parameters
    ----------
    graph : with branches, opened
    name : its name in the bundle
    plain : what it takes and gives without them
    """

    can_skip = False

    def __init__(self, graph: Graph, name: str, plain: GraphSpec, mixture: Mixture):
        self.spec = plain
        self._graph, self._name, self._mixture = graph, name, mixture

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        rows = len(next(iter(inputs.values())))
        return self._graph.run({**inputs, **branch_arrays(self._graph.spec, self._name, [self._mixture] * rows)})

    def bind(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], fixed: Collection[str] = (), every: int = 1
    ) -> Callable[[], None]:
        rows = len(next(iter(inputs.values())))
        branches = branch_arrays(self._graph.spec, self._name, [self._mixture] * rows)
        return self._graph.bind({**inputs, **branches}, outputs, {*fixed, *branches}, every)
