"""The layers of a network in its graph: products by a weight that has the layer's name, whatever it is stored as.

    ``network.<layer>.weight``               the factor of a Conv or Gemm, (out, in, ...)
    ``network.<layer>.weight.transposed``    of a MatMul, (in, out)

A pass that stores weights otherwise adds to the name (``.integer``, ``.quantized``, ``.half``, ``.part_0``). So a layer
is found in graphs of every precision, with the float tensors that it reads and gives.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx_ir as ir

from ldm_export.graph.base import Array

TRANSPOSED = ".transposed"
NAME = re.compile(r"network\.(.+)\.weight((?:\.(?:transposed|part_\d+|integer|quantized|half))*)")
PRODUCTS = {"Conv", "Gemm", "MatMul", "MatMulInteger"}


@dataclass(frozen=True)
class LayerProduct:
    """A product by a layer's weight.

    Attributes
    ----------
    node : Conv, Gemm, MatMul or MatMulInteger
    shape : of the layer's weight, (out, in) or (out, in, kh, kw)
    """

    node: ir.Node
    shape: tuple[int, ...]

    @property
    def is_transposed(self) -> bool:
        """Whether the weight is stored as (in, out)."""
        return self.node.op_type in ("MatMul", "MatMulInteger")

    @property
    def weight(self) -> Array | None:
        """The layer's weight in float32, of ``shape``; None where it is stored otherwise."""
        value = self.node.inputs[1]
        if value is None or value.const_value is None or value.dtype != ir.DataType.FLOAT:
            return None
        found = value.const_value.numpy()
        return found.T if self.is_transposed else found

    @property
    def x(self) -> ir.Value | None:
        """What it reads now, before that is coded as integers for it."""
        source = None if self.node.inputs[0] is None else self.node.inputs[0].producer()
        if source is not None and source.op_type == "DequantizeLinear":
            source = None if source.inputs[0] is None else source.inputs[0].producer()
        coded = source is not None and source.op_type in ("QuantizeLinear", "DynamicQuantizeLinear")
        return source.inputs[0] if source is not None and coded else self.node.inputs[0]

    @property
    def y(self) -> ir.Value | None:
        """What it gives, a bias included: behind the scales of MatMulInteger, and behind the codes of its output, which
        must follow it at once to be computed as integers."""
        value: ir.Value | None = self.node.outputs[0]
        for following in ("Cast", "Mul") if self.node.op_type == "MatMulInteger" else ():
            value = None if value is None else _only_read_by(value, following)
        for following in ("QuantizeLinear", "DequantizeLinear"):
            value = None if value is None else _only_read_by(value, following) or value
        return value


def layers_of(model: ir.Model) -> dict[str, LayerProduct]:
    """Products by weights that are known by name, each layer's first, by the layers' names.

    Convolutions in groups are left out, and those that were divided into a sum.
    """
    found: dict[str, LayerProduct] = {}
    for node in model.graph:
        weight = _stored(node.inputs[1]) if node.op_type in PRODUCTS else None
        match = NAME.fullmatch(str(weight.name)) if weight is not None else None
        if weight is None or match is None or match[1] in found or weight.shape is None:
            continue
        sizes = weight.shape.numpy()
        if ".part_" in match[2] or node.attributes.get_int("group", 1) != 1:
            continue
        if LayerProduct(node, sizes).is_transposed:
            sizes = sizes[::-1]
        elif node.op_type == "Gemm" and not node.attributes.get_int("transB", 0):
            continue
        found[match[1]] = LayerProduct(node, sizes)
    return found


def layers_without_branches(model: ir.Model) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of layers that are in a graph and not among `layers_of`: convolutions in groups, and those
    that were divided along their inputs into a sum."""
    own = layers_of(model)
    found: dict[str, tuple[int, ...]] = {}
    for node in model.graph:
        weight = _stored(node.inputs[1]) if node.op_type == "Conv" else None
        match = NAME.fullmatch(str(weight.name)) if weight is not None else None
        if weight is None or match is None or match[1] in own or weight.shape is None:
            continue
        out, into, *kernel = weight.shape.numpy()
        before = found[match[1]][1] if match[1] in found and ".part_" in match[2] else 0
        found[match[1]] = (out, before + into, *kernel)
    return found


def nameless_products(model: ir.Model) -> int:
    """How many products by a constant matrix there are whose weight has no layer's name."""
    weights = (_stored(node.inputs[1]) for node in model.graph if node.op_type in PRODUCTS)
    return sum(
        weight is not None
        and weight.shape is not None
        and len(weight.shape) == 2
        and min(weight.shape.numpy()) > 1
        and not NAME.fullmatch(str(weight.name))
        for weight in weights
    )


def _stored(value: ir.Value | None) -> ir.Value | None:
    """The initializer that a factor is, or is decoded from."""
    while value is not None and not value.is_initializer():
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type in ("Cast", "DequantizeLinear") else None
    return value


def _only_read_by(value: ir.Value, op_type: str) -> ir.Value | None:
    """What the one reader of a value gives, if it is of this type."""
    readers = [use.node for use in value.uses()]
    alone = len(readers) == 1 and not value.is_graph_output() and readers[0].op_type == op_type
    return readers[0].outputs[0] if alone else None
