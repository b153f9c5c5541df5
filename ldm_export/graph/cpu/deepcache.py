"""DeepCache (Ma et al., 2312.00858): between full calls, only the outermost blocks of the UNet run.

From step to step the features inside a UNet change little. The last ResNet block on the way up reads

    h = Concat(deep, skip)

where ``skip`` is what the first convolution made and ``deep`` what all other blocks made. Of two graphs the full one
gives ``deep`` as a further output, and the shallow one takes it as an input (section 3.3, with the outermost skip).
"""

from __future__ import annotations

import re

import onnx_ir as ir

from ldm_export.graph.cpu.matching import remove_unused

DEEP = "deep"
FIRST_CONVOLUTION = re.compile(r"(?:^|\.)up_blocks\.(\d+)\.resnets\.(\d+)\.conv1\.weight$")


def cut_deep(model: ir.Model) -> tuple[ir.Model, int] | None:
    """Give ``model`` the output ``deep``, in place; the shallow graph, and the channels of ``deep``.

    None if the last ResNet block or what it reads cannot be found, as in graphs of integers.
    """
    found = [
        (tuple(map(int, match.groups())), node)
        for node in model.graph
        if node.op_type == "Conv" and (match := FIRST_CONVOLUTION.search(str(node.inputs[1].name)))  # type: ignore[union-attr]
    ]
    if not found:
        return None
    concatenation = _concatenation(max(found, key=lambda one: one[0])[1])
    deep = None if concatenation is None else concatenation.inputs[0]
    channels = None if deep is None or deep.shape is None else deep.shape[1]
    if concatenation is None or deep is None or not isinstance(channels, int) or deep.is_graph_output():
        return None
    deep.name = DEEP
    model.graph.outputs.append(deep)
    shallow = model.clone()
    graph = shallow.graph
    inner = next(value for value in graph.outputs if value.name == DEEP)
    graph.outputs.remove(inner)
    inner.name = f"{DEEP}.made"
    given = ir.Value(name=DEEP, shape=inner.shape, type=inner.type)
    ir.convenience.replace_all_uses_with(inner, given)
    graph.inputs.append(given)
    remove_unused(shallow)
    for value in [value for value in graph.inputs if not value.uses()]:
        graph.inputs.remove(value)
    return shallow, channels


def _concatenation(conv: ir.Node) -> ir.Node | None:
    """The Concat that a block begins with, behind the norm and the activation in front of its first convolution."""
    waiting = [conv.inputs[0]]
    seen = set()
    while waiting:
        value = waiting.pop()
        node = None if value is None else value.producer()
        if node is None or node in seen:
            continue
        if node.op_type == "Concat" and len(node.inputs) == 2 and node.inputs[0] is not None:
            return node
        if node.op_type == "Conv" or (
            node.op_type == "Add" and all(one.const_value is None for one in node.inputs if one)
        ):
            continue  # another block
        seen.add(node)
        waiting += [one for one in node.inputs if one is not None and one.const_value is None]
    return None
