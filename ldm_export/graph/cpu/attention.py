"""Attention blocks to ONNX Runtime's kernel, which takes tokens as they lie.

    Transpose(softmax(s Q_h K_h^T) V_h) over heads h, each cut out of (B, L, H D) by Reshape and Transpose
    = MultiHeadAttention(Q, K, V; H, s), with Q, K, V and the result (B, L, H D)

(Vaswani et al., 1706.03762, eq. 1.) Four transposes of whole tensors go, and the scores need not be written to memory:
the kernel computes them in blocks (Dao et al., 2205.14135). The rule reads the plain export's form, where the factor s
is split between Q and K and the transpose of K goes through two Reshapes, and the short form.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ldm_export.graph.cpu.matching import (
    CONTRIB,
    Writer,
    made_by,
    may_be,
    number,
    only_reader,
    replace,
    static_shape,
    transposed,
)
from ldm_export.graph.cpu.rule import RefusedError


@dataclass(frozen=True)
class FuseAttention:
    name = "attention"

    def rewrite(self, softmax: ir.Node) -> bool:
        """Rewrite the attention around a Softmax over keys; False if this is none."""
        scores, values = made_by(softmax.inputs[0], "MatMul"), only_reader(softmax.outputs[0], "MatMul")
        if scores is None or values is None or values.inputs[0] is not softmax.outputs[0]:
            return False
        axis = softmax.attributes.get("axis")
        if axis is not None and axis.as_int() not in (-1, 3):
            return False
        (q, scale_q), (k, scale_k) = scaled(scores.inputs[0]), scaled(scores.inputs[1])
        tokens_q, heads = split_heads(q)
        tokens_k, heads_k = split_heads(keys(k))
        tokens_v, heads_v = split_heads(values.inputs[1])
        merged = merged_heads(values.outputs[0])
        if tokens_q is None or tokens_k is None or tokens_v is None or merged is None:
            raise RefusedError("its heads are not cut out of and put back into (B, L, C)")
        if heads is None or heads < 1 or not heads == heads_k == heads_v:
            raise RefusedError(f"its heads are not constant: {heads}, {heads_k}, {heads_v}")
        if tokens_q.dtype not in (None, ir.DataType.FLOAT):
            raise RefusedError(f"its values are {tokens_q.dtype}, and the kernel is for FLOAT")
        if not shapes_fit(tokens_q, tokens_k, tokens_v, merged.outputs[0], heads):
            raise RefusedError("its heads are not cut out of and put back into (B, L, C)")
        if scale_q * scale_k == 0:
            raise RefusedError("its factor is 0, which the kernel takes for none")
        writer = Writer(merged)
        (fused,) = writer.node(
            "MultiHeadAttention",
            [tokens_q, tokens_k, tokens_v],
            {"num_heads": heads, "scale": scale_q * scale_k},
            domain=CONTRIB,
        )
        replace(merged.outputs[0], fused)
        return True

    op_type = "Softmax"


def shapes_fit(q: ir.Value, k: ir.Value, v: ir.Value, out: ir.Value, heads: int) -> bool:
    """Whether Q (B, L, H D), K (B, M, H D), V (B, M, H E) and the result (B, L, H E) may have such shapes."""
    known = [shape for value in (q, k, v, out) if (shape := static_shape(value)) is not None and len(shape) == 3]
    if len(known) != 4:
        return False
    (batch, length, width), (batch_k, length_k, width_k), (batch_v, length_v, width_v), result = known
    if not all(isinstance(number, int) and number % heads == 0 for number in (width, width_v)) or width_k != width:
        return False
    same = [
        (batch, batch_k),
        (batch, batch_v),
        (length_k, length_v),
        *zip(result, (batch, length, width_v), strict=True),
    ]
    return all(may_be(one, other) for one, other in same)


def scaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """A value and the number that it is multiplied by, 1 if by none."""
    product = made_by(value, "Mul")
    factor = None if product is None else number(product.inputs[1])
    return (value, 1.0) if product is None or factor is None else (product.inputs[0], factor)


def keys(value: ir.Value | None) -> ir.Value | None:
    """(B, H, L, D), of which ``value`` is (B, H, D, L)."""
    if (direct := transposed(value, 0, 1, 3, 2)) is not None:
        return direct
    again = made_by(value, "Reshape")
    flat = None if again is None else made_by(transposed(again.inputs[0], 0, 2, 1), "Reshape")
    if again is None or flat is None:
        return None
    heads, rows, turned = static_shape(flat.inputs[0]), static_shape(flat.outputs[0]), static_shape(again.outputs[0])
    if heads is None or rows is None or turned is None or len(heads) != 4 or len(turned) != 4:
        return None
    kept = (heads[0], heads[1], heads[3], heads[2])
    return flat.inputs[0] if rows[1:] == heads[2:] and all(map(may_be, turned, kept)) else None


def split_heads(value: ir.Value | None) -> tuple[ir.Value | None, int | None]:
    """(B, L, H D), of which ``value`` is (B, H, L, D); and H."""
    reshape = made_by(transposed(value, 0, 2, 1, 3), "Reshape")
    if reshape is None:
        return None, None
    tokens, shape = static_shape(reshape.inputs[0]), static_shape(reshape.outputs[0])
    if tokens is None or shape is None or len(tokens) != 3 or len(shape) != 4:
        return None, None
    heads, width = shape[2:]
    if not isinstance(heads, int):
        return reshape.inputs[0], None
    cut = isinstance(width, int) and heads * width == tokens[2] and all(map(may_be, shape[:2], tokens[:2]))
    return (reshape.inputs[0], heads) if cut else (None, None)


def merged_heads(value: ir.Value) -> ir.Node | None:
    """The Reshape that makes (B, L, H D) of (B, H, L, D)."""
    transpose = only_reader(value, "Transpose")
    if transpose is None or transposed(transpose.outputs[0], 0, 2, 1, 3) is not value:
        return None
    return only_reader(transpose.outputs[0], "Reshape")
