"""Graphs that are not what the manifest says, though each is sound ONNX; and what no graph may have in it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import onnx
from onnx import TensorProto, helper

from tests.hostile.base import CONDITIONER, GRAPHS, Draft, with_conditioner
from tests.hostile.case import ASKS, Case

PNG = {**ASKS, "image": True}
STATES = "text_encoder.last_hidden_state"

OTHER: dict[str, tuple[str, str, str]] = {
    "a UNet of another output": ("unet", "out_sample", "foo"),
    "a UNet of half precision": ("unet", "out_sample = Add (small, told)", "sum = Add (small, told) "),
    "a UNet that reads other widths": ("unet", "float[batch, tokens, 6]", "float[batch, tokens, 7]"),
    "a UNet of other latents": (
        "unet",
        "float[batch, 4, height, width] sample",
        "float[batch, 5, height, width] sample",
    ),
    "a UNet of one batch": ("unet", "float[batch, 4, height, width] sample", "float[1, 4, height, width] sample"),
    "a decoder of the latents' size": ("vae_decoder", "{1, 1, 2, 2}", "{1, 1, 1, 1}"),
    "a decoder of pictures that are larger": ("vae_decoder", "{1, 1, 2, 2}", "{1, 1, 4, 4}"),
    "a decoder of other pictures' shape": ("vae_decoder", "{1, 1, 2, 2}", "{1, 1, 2, 4}"),
    "a decoder of two pictures a picture": ("vae_decoder", "{1, 1, 2, 2}", "{2, 1, 2, 2}"),
    "an encoder of smaller latents": ("vae_encoder", "strides = [2, 2]", "strides = [4, 4]"),
}
"""A text of a graph that is replaced."""


def _replaced(draft: Draft, graph: str, old: str, new: str) -> None:
    text = GRAPHS[graph]
    assert old in text
    draft.graph(graph, text.replace(old, new))


def _half_output(draft: Draft) -> None:
    text = GRAPHS["unet"].replace(
        "float[batch, 4, height, width] out_sample", "float16[batch, 4, height, width] out_sample"
    )
    draft.graph(
        "unet",
        text.replace("out_sample = Add (small, told)", "sum = Add (small, told) out_sample = Cast <to = 10> (sum)"),
    )


def _wider_output(draft: Draft) -> None:
    text = GRAPHS["unet"].replace(
        "out_sample = Add (small, told)", "sum = Add (small, told) out_sample = Concat <axis = 3> (sum, sum)"
    )
    draft.graph("unet", text)


CONDITIONERS: dict[str, tuple[bool, dict[str, str], str]] = {
    "as it shall be": (True, {}, STATES),
    "that reads the pooled states": (False, {}, "text_encoder.pooler_output"),
    "that reads what no encoder gives": (False, {}, "text_encoder.none"),
    "that reads what nothing gives": (False, {}, "states"),
    "that reads its own output": (False, {}, "conditioner.encoder_hidden_states"),
    "that reads the decoder's pictures": (False, {}, "vae_decoder.sample"),
    "of fewer states": (False, {"[batch, 8, 6] states": "[batch, 7, 6] states"}, STATES),
    "of states of whole numbers": (False, {"float[batch, 8, 6] states": "int64[batch, 8, 6] states"}, STATES),
    "of one picture": (False, {"float[batch] has_prompt": "float[1] has_prompt"}, STATES),
    "of a height for each row": (False, {"float height": "float[batch] height"}, STATES),
    "that gives states of another width": (False, {"[batch, 8, 6] enc": "[batch, 8, 7] enc"}, STATES),
    "that gives another name": (False, {"encoder_hidden_states": "other"}, STATES),
}
"""Whether it opens, texts that are replaced in it, and the source of its first input."""


def _conditioner(draft: Draft, changes: dict[str, str], source: str) -> None:
    text = CONDITIONER
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    with_conditioner(draft, text, source)


def _functions(draft: Draft, depth: int, calls: int) -> None:
    """The decoder's input through functions that each call the next one several times."""
    domain, nodes = "com.f", helper.make_opsetid("com.f", 1)
    functions = []
    for level in range(depth):
        body = [
            helper.make_node(
                f"F{level + 1}", ["x" if k == 0 else f"v{k}"], ["y" if k == calls - 1 else f"v{k + 1}"], domain=domain
            )
            for k in range(calls)
        ]
        if level == depth - 1:
            body = [helper.make_node("Identity", ["x"], ["y"])]
        functions.append(
            helper.make_function(domain, f"F{level}", ["x"], ["y"], body, [nodes, helper.make_opsetid("", 18)])
        )
    _calling(draft, functions)


def _calling(draft: Draft, functions: list[onnx.FunctionProto]) -> None:
    model = draft.model("vae_decoder")
    first = model.graph.node[0]
    call = helper.make_node("F0", [first.input[0]], ["called"], domain="com.f")
    first.input[0] = "called"
    model.graph.node.insert(0, call)
    model.functions.extend(functions)
    model.opset_import.append(helper.make_opsetid("com.f", 1))
    draft.files["vae_decoder/model.onnx"] = model.SerializeToString()


def _recursive(draft: Draft) -> None:
    opsets = [helper.make_opsetid("com.f", 1), helper.make_opsetid("", 18)]
    body = [helper.make_node("F0", ["x"], ["y"], domain="com.f")]
    _calling(draft, [helper.make_function("com.f", "F0", ["x"], ["y"], body, opsets)])


def _recursive_in_a_subgraph(draft: Draft) -> None:
    opsets = [helper.make_opsetid("com.f", 1), helper.make_opsetid("", 18)]
    value = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    branch = helper.make_graph([helper.make_node("F0", ["x"], ["z"], domain="com.f")], "b", [], [value])
    condition = helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", TensorProto.BOOL, [], [True]))
    body = [condition, helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)]
    _calling(draft, [helper.make_function("com.f", "F0", ["x"], ["y"], body, opsets)])


def _twice_defined(draft: Draft) -> None:
    opsets = [helper.make_opsetid("", 18)]
    once = helper.make_function("com.f", "F0", ["x"], ["y"], [helper.make_node("Identity", ["x"], ["y"])], opsets)
    _calling(draft, [once, once])


def _node(draft: Draft, op_type: str, domain: str, **attributes: Any) -> None:
    model = draft.model("vae_decoder")
    node = helper.make_node(op_type, ["latent_sample"], ["unused"], domain=domain, **attributes)
    model.graph.node.append(node)
    model.opset_import.append(helper.make_opsetid(domain, 1))
    draft.files["vae_decoder/model.onnx"] = model.SerializeToString()


def _more_states(draft: Draft) -> None:
    """A text encoder that says it gives the states of 8 tokens, and gives those of 9."""
    text = (
        GRAPHS["text_encoder"]
        .replace("Gather <axis = 0> (table, input_ids)", "Identity (nine)")
        .replace(
            "<int64[1] tokens = {1}> {",
            """<int64[1] tokens = {1}, int64[1] width = {6}, int64[1] length = {9}, int64[1] first = {0}> {
            all = Shape (input_ids)
            batch = Gather (all, first)
            sizes = Concat <axis = 0> (batch, length, width)
            nine = ConstantOfShape (sizes)""",
        )
    )
    draft.graph("text_encoder", text)


def _with_text(draft: Draft, graph: str, data: bytes) -> None:
    draft.files[f"{graph}/model.onnx"] = data


def cases() -> Iterator[Case]:
    """All of this part."""
    for what, (graph, old, new) in OTHER.items():
        if what != "a UNet of half precision":
            yield Case(f"graph: {what}", False, partial(_replaced, graph=graph, old=old, new=new), asks=PNG)
    yield Case("graph: a UNet of half precision", False, _half_output)
    yield Case("graph: a text encoder of more tokens than it says", False, _more_states)
    yield Case("graph: a UNet of wider predictions", False, _wider_output)
    for what, (opens, changes, source) in CONDITIONERS.items():
        change = partial(_conditioner, changes=changes, source=source)
        yield Case(f"graph: a conditioner {what}", opens, change)
    for depth, calls, opens in (
        (1, 1, True),
        (8, 2, True),
        (20, 1, True),
        (22, 2, False),
        (40, 2, False),
        (12, 8, False),
    ):
        yield Case(
            f"graph: {depth} functions that call {calls} times", opens, partial(_functions, depth=depth, calls=calls)
        )
    yield Case("graph: a function that calls itself", False, _recursive)
    yield Case("graph: a function that calls itself in a branch", False, _recursive_in_a_subgraph)
    yield Case("graph: a function that is defined twice", False, _twice_defined)
    yield Case("graph: an operator that nobody knows", False, partial(_node, op_type="Nothing", domain="com.x"))
    yield Case(
        "graph: a compiled graph in another file",
        False,
        partial(_node, op_type="EPContext", domain="com.microsoft", embed_mode=0, ep_cache_context="/etc/passwd"),
    )
    for name in GRAPHS:
        yield Case(f"graph: an empty {name}", False, partial(_with_text, graph=name, data=b""))
    yield Case("graph: text", False, partial(_with_text, graph="unet", data=b"this is no model"))
    yield Case("graph: zeros", False, partial(_with_text, graph="unet", data=bytes(1000)))
    yield Case(
        "graph: another graph",
        False,
        lambda draft: draft.files.update({"unet/model.onnx": draft.files["vae_decoder/model.onnx"]}),
    )
