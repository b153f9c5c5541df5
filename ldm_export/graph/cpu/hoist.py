"""Hoists out of a graph what need not be computed in every call of the sampling loop.

In a sampling loop the prompt stays and the timestep is one of a plan's few, so that whatever depends on nothing else
(the keys and values of cross attention; the time embedding and its projection into every block) is a graph of its own,
run once a prompt or once a timestep. The rest takes its results as further inputs:

    denoiser(x, t, c)  =  rest(x, early(t), early(c))
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from ldm_export.graph.cpu.matching import remove_unused


def hoist_invariants(
    model: ir.Model, names: Collection[str], prefix: str, costly: Collection[str] = ()
) -> ir.Model | None:
    """Take out of ``model``, in place, what depends on the inputs ``names`` and on no other; its outputs stay in it.

    Returns
    -------
    The graph of what was taken out: inputs ``names``, outputs ``<prefix>.0``, ``<prefix>.1``, …, which are inputs of
    ``model`` now. None if nothing depends on them alone, or of that nothing is one of the ``costly`` operators, where
    some are given.
    """
    graph = model.graph
    needs: dict[ir.Value, frozenset[str]] = {value: frozenset((str(value.name),)) for value in graph.inputs}
    for node in graph:
        of_node = frozenset().union(*(needs.get(value, frozenset()) for value in node.inputs if value is not None))
        if any(
            attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for attribute in node.attributes.values()
        ):
            of_node |= {str(value.name) for value in graph.inputs}  # what is inside reads whatever is outside
        for value in node.outputs:
            needs[value] = of_node
    early = {
        value
        for value, of_value in needs.items()
        if of_value and of_value <= set(names) and not value.is_graph_output()
    }
    border = [
        value
        for node in graph
        for value in node.outputs
        if value in early and any(reader.outputs[0] not in early for reader in value.consumers())
    ]
    made = (value.producer() for value in early)
    if not border or (costly and not any(node is not None and node.op_type in costly for node in made)):
        return None
    inputs = [value for value in graph.inputs if value.name in names]
    taken = ir.Model(ir.convenience.extract(graph, inputs, border), ir_version=model.ir_version)
    for number, (value, copied) in enumerate(zip(border, taken.graph.outputs, strict=True)):
        name = f"{prefix}.{number}"
        given = ir.Value(name=name, shape=value.shape, type=value.type)
        ir.convenience.replace_all_uses_with(value, given)
        graph.inputs.append(given)
        copied.name = name
    remove_unused(model)
    for value in inputs:
        if not value.uses():
            graph.inputs.remove(value)
    return taken
