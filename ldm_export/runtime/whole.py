"""What a loop graph, the whole of a drawing in one call, is given to draw what a request asks for."""

from __future__ import annotations

import numpy as np

from ldm_export.bundle import Bundle
from ldm_export.contract import GraphSpec
from ldm_export.runtime.backends import Array
from ldm_export.runtime.request import Request
from ldm_export.runtime.tokenizer import Tokenizer


def loop_inputs(bundle: Bundle, loop: GraphSpec, request: Request) -> dict[str, Array]:
    """The inputs of a loop graph of a bundle, by name (``ldm_export.contract.loop_spec``).

    The noise is drawn in the order in which a loop of single steps draws it, so that the picture is the same.
    """
    takes = {tensor.name: tensor for tensor in loop.inputs}
    draw = request.noise(request.latents_shape(bundle))
    given: dict[str, Array] = {"noise": draw(), "guidance_scale": np.array(request.guidance, np.float32)}
    if "step_noise" in takes:
        given["step_noise"] = np.stack([draw() for _ in range(int(takes["step_noise"].shape[0]))])
    if "input_ids" in takes:
        tokenizer = Tokenizer(bundle.path / "tokenizer")
        negatives = [prompt or "" for prompt in request.negative_prompts]  # no loop is of a model with zeros for none
        given |= {"input_ids": tokenizer(request.prompts), "negative_input_ids": tokenizer(negatives)}
    if request.class_labels is not None:
        given["class_labels"] = request.class_labels
    return {name: given[name] for name in takes}
