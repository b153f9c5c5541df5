"""Factors of one layer's change, and what they make of its weight.

With W (out, in) or (out, in, kh, kw) the weight and s the scale, alpha / rank (alpha / sqrt(rank) as rsLoRA has it):

    LoRA (2106.09685)   dW = s up @ down                     down (r, in, kh, kw), up (out, r)
      with a middle     dW = s sum_pq up_op mid_pqhw down_qi  down (r, in), mid (r, r, kh, kw): Tucker's form
    LoHa (2108.06098)   dW = s (w1_a @ w1_b) * (w2_a @ w2_b)  w_a (out, r), w_b (r, in kh kw)
      Tucker's form     each factor is sum_pq t_pqhw w_a_po w_b_qi, with w_a (r, out), w_b (r, in), t (r, r, kh, kw)
    LoKr (2212.10650, 2309.14859)  dW = s kron(w1, w2)        each whole, or w_a @ w_b; w2 also in Tucker's form
    DoRA (2402.09353)   W' = m (W + dW) / |W + dW|            norms of output rows, or of input columns

An adapter's strength multiplies dW, also inside DoRA's norm: what PEFT and so diffusers' ``fuse_lora`` do. Everything
is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_export.reading.documents import MalformedError

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

LORA, LOHA, LOKR = "lora", "loha", "lokr"
LOKR_SIDES = (
    (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")),
    (
        ("lokr_w2",),
        ("lokr_w2_a", "lokr_w2_b"),
        ("lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    ),
)
LOHA_PAIRS = ("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")
WHOLE = {
    LORA: [{"down", "up"}, {"down", "up", "mid"}],
    LOHA: [
        {name for pair in LOHA_PAIRS for name in pair},
        {"hada_t1", "hada_t2", *(name for pair in LOHA_PAIRS for name in pair)},
    ],
    LOKR: [{*first, *second} for first in LOKR_SIDES[0] for second in LOKR_SIDES[1]],
}
"""Sets of factors that are whole, by kind; the first is the one that a message asks for."""


@dataclass(frozen=True)
class Factors:
    """What an adapter has for one layer.

    Attributes
    ----------
    kind : `LORA`, `LOHA` or `LOKR`
    tensors : float arrays by the names that `WHOLE` has
    scale : what their product is multiplied with before an adapter's strength
    magnitude : of DoRA, (n,), one for each output or input of the layer, or None
    magnitude_axis : 0 where ``magnitude`` is of outputs, 1 of inputs
    """

    kind: str
    tensors: Mapping[str, Array]
    scale: float = 1.0
    magnitude: Array | None = None
    magnitude_axis: int = 0


def kind_of(roles: set[str]) -> str:
    """The kind that factors of these names are of.

    Raises
    ------
    MalformedError
        If they are of several kinds, or some are missing.
    """
    kinds = {LOHA if role.startswith("hada_") else LOKR if role.startswith("lokr_") else LORA for role in roles}
    if len(kinds) != 1:
        raise MalformedError(f"has factors of {' and '.join(sorted(kinds)) or 'no kind'}")
    kind = kinds.pop()
    if roles not in WHOLE[kind]:
        nearest = min(WHOLE[kind], key=lambda whole: len(whole ^ roles))
        missing, beside = sorted(nearest - roles), sorted(roles - nearest)
        raise MalformedError(f"lacks {' and '.join(missing)}" if missing else f"has {' and '.join(beside)} too many")
    return kind


def rank_of(kind: str, tensors: Mapping[str, Array]) -> int | None:
    """The rank that alpha is divided by; None where a LoKr has both factors whole."""
    for name in {LORA: ("down",), LOHA: ("hada_w1_b",), LOKR: ("lokr_w1_b", "lokr_w2_b")}[kind]:
        if name in tensors:
            return int(tensors[name].shape[0])
    return None


def delta_shape(kind: str, shapes: Mapping[str, Shape]) -> Shape:
    """Shape of the product of factors of these shapes.

    Raises
    ------
    MalformedError
        If they cannot be multiplied, naming two that disagree.
    """
    if any(len(shape) not in (2, 4) for shape in shapes.values()):
        name = next(name for name, shape in shapes.items() if len(shape) not in (2, 4))
        raise MalformedError(f"has {name} of shape {shapes[name]}, which has not two or four axes")
    if kind == LORA:
        up, down = shapes["up"], shapes["down"]
        if math.prod(up[2:]) != 1:
            raise MalformedError(f"has up of shape {up}, whose kernel is not one pixel")
        if "mid" in shapes:
            return _tucker(shapes["mid"], up[1::-1], down[:2], ("mid", "up", "down"))
        return _matrix(up[:2], down, ("up", "down"))
    if kind == LOHA:
        first, second = (
            _side(shapes, (*pair, f"hada_t{number}") if f"hada_t{number}" in shapes else pair)
            for number, pair in enumerate(LOHA_PAIRS, 1)
        )
        if first != second:
            raise MalformedError(f"has a first factor of shape {first} and a second of {second}")
        return first
    first, second = (
        _side(shapes, next(names for names in reversed(sides) if all(name in shapes for name in names)))
        for sides in LOKR_SIDES
    )
    if len(first) != 2:
        raise MalformedError(f"has lokr_w1 of shape {first}; two axes are needed")
    return first[0] * second[0], first[1] * second[1], *second[2:]


def _side(shapes: Mapping[str, Shape], names: tuple[str, ...]) -> Shape:
    """Shape of a factor that is whole, of two matrices, or in Tucker's form, whose core is the last name."""
    if len(names) == 1:
        return shapes[names[0]]
    if len(names) == 2:
        return _matrix(shapes[names[0]], shapes[names[1]], names)
    return _tucker(shapes[names[2]], shapes[names[0]], shapes[names[1]], (names[2], names[0], names[1]))


def _matrix(first: Shape, second: Shape, names: tuple[str, ...]) -> Shape:
    if first[1] != second[0] or len(first) != 2:
        raise MalformedError(f"has {names[0]} of shape {first} and {names[1]} of {second}, whose ranks differ")
    return first[0], *second[1:]


def _tucker(core: Shape, out: Shape, into: Shape, names: tuple[str, ...]) -> Shape:
    if len(core) != 4 or core[:2] != (out[0], into[0]) or len(out) != 2 or len(into) != 2:
        raise MalformedError(
            f"has {names[0]} of shape {core}, {names[1]} of {out} and {names[2]} of {into}, whose ranks differ"
        )
    return out[1], into[1], *core[2:]


def fits(given: Shape, weight: Shape) -> bool:
    """Whether a change of one shape is one of a weight: the same, or of a flattened or a one-pixel kernel."""
    alike = given == weight or len(given) == 2 or given[2:] == (1, 1) or len(weight) == 2
    return alike and given[0] == weight[0] and math.prod(given) == math.prod(weight)


def delta(factors: Factors, shape: Shape) -> npt.NDArray[np.float64]:
    """The change of a weight of this shape, scale included, strength not."""
    each = {name: np.asarray(tensor, np.float64) for name, tensor in factors.tensors.items()}
    if factors.kind == LORA:
        up, down = each["up"].reshape(each["up"].shape[:2]), each["down"]
        if "mid" in each:
            product = _tucker_product(each["mid"], up.T, down.reshape(down.shape[:2]))
        else:
            product = up @ down.reshape(len(down), -1)
    elif factors.kind == LOHA:
        product = _product(each, "hada_w1", "hada_t1") * _product(each, "hada_w2", "hada_t2")
    else:
        first, second = _product(each, "lokr_w1", "lokr_t1"), _product(each, "lokr_w2", "lokr_t2")
        outer = first.reshape(*first.shape, *(1,) * (second.ndim - 2))
        product = np.asarray(np.kron(outer, second), np.float64)
    return np.asarray(factors.scale * product.reshape(shape), np.float64)


def _product(each: Mapping[str, npt.NDArray[np.float64]], name: str, core: str) -> npt.NDArray[np.float64]:
    if name in each:
        return each[name]
    first, second = each[f"{name}_a"], each[f"{name}_b"]
    return _tucker_product(each[core], first, second) if core in each else first @ second.reshape(len(second), -1)


def _tucker_product(
    core: npt.NDArray[np.float64], out: npt.NDArray[np.float64], into: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    return np.asarray(np.einsum("pqhw,po,qi->oihw", core, out, into, optimize=True), np.float64)


def merged(weight: Array, factors: Factors, strength: float) -> npt.NDArray[np.float64]:
    """The weight with the change in it.

    Parameters
    ----------
    weight : (out, in) or (out, in, kh, kw)
    strength : the change's factor; 0 leaves the weight as it is, but for DoRA's magnitudes
    """
    changed: npt.NDArray[np.float64] = np.asarray(weight, np.float64) + strength * delta(factors, weight.shape)
    if factors.magnitude is None:
        return changed
    axis = factors.magnitude_axis
    others = tuple(k for k in range(changed.ndim) if k != axis)
    norms: npt.NDArray[np.float64] = np.sqrt((changed**2).sum(axis=others, keepdims=True))
    with np.errstate(divide="ignore", invalid="ignore"):  # of a row of zeros: whoever merges checks
        changed *= np.asarray(factors.magnitude, np.float64).reshape(norms.shape) / norms
    return changed
