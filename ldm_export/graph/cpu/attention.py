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
    constant,
    length,
    made_by,
    number,
    only_reader,
    replace,
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
    return None if flat is None else flat.inputs[0]


def split_heads(value: ir.Value | None) -> tuple[ir.Value | None, int | None]:
    """(B, L, H D), of which ``value`` is (B, H, L, D); and H."""
    reshape = made_by(transposed(value, 0, 2, 1, 3), "Reshape")
    if reshape is None:
        return None, None
    shape = constant(reshape.inputs[1])
    if shape is not None:
        return reshape.inputs[0], int(shape[2]) if len(shape) == 4 else None
    parts = made_by(reshape.inputs[1], "Concat")
    if parts is None or len(parts.inputs) != 4 or (heads := number(parts.inputs[2])) is None:
        return reshape.inputs[0], None
    return reshape.inputs[0], int(heads)


def merged_heads(value: ir.Value) -> ir.Node | None:
    """The Reshape that makes (B, L, H D) of (B, H, L, D)."""
    transpose = only_reader(value, "Transpose")
    if transpose is None or transposed(transpose.outputs[0], 0, 2, 1, 3) is not value:
        return None
    reshape = only_reader(transpose.outputs[0], "Reshape")
    return reshape if reshape is not None and length(reshape.inputs[1]) == 3 else None
