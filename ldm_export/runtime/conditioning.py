"""What the UNet is told beside the latents: the prompt, a class label, SDXL's sizes, LCM's guidance.

A batch of B pictures becomes B rows of every input, or 2 B with guidance (Ho & Salimans, 2207.12598): first the
negative prompts', then the prompts', so that one call of the UNet gives both predictions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from ldm_export.bundle import Bundle
from ldm_export.contract import GraphSpec
from ldm_export.plan.guidance import guidance_embedding
from ldm_export.runtime.backends.base import Backend
from ldm_export.runtime.facts import check_length
from ldm_export.runtime.graph import Array, Graph
from ldm_export.runtime.tokenizer import Tokenizer, TokenizerFiles

CACHED_PROMPTS = 256


class PromptEncoder:
    """Prompts to embeddings through one text encoder, or through SDXL's two, with a cache keyed by token ids."""

    def __init__(self, bundle: Bundle, backend: Backend):
        self._encoders: list[tuple[Tokenizer, Graph]] = []
        for suffix in ("", "_2"):
            if f"text_encoder{suffix}" in bundle.manifest.graphs:
                tokenizer = Tokenizer(TokenizerFiles.of_bundle(bundle, f"tokenizer{suffix}"))
                check_length(tokenizer, bundle.manifest.graphs[f"text_encoder{suffix}"])
                self._encoders.append((tokenizer, backend.load(f"text_encoder{suffix}")))
        self._zeros_for_none = bool(bundle.manifest.model.get("zeros_for_empty_prompt"))
        self._cache: OrderedDict[bytes, tuple[Array, ...]] = OrderedDict()

    def encode(self, prompts: Sequence[str | None]) -> dict[str, Array]:
        """The UNet inputs from text: ``encoder_hidden_states`` (B, L, C) and, for SDXL, ``text_embeds`` (B, P).

        None, no prompt, is zeros where the model was trained so (SDXL), and else the empty text.
        """
        texts = [prompt or "" for prompt in prompts]
        ids = [tokenizer(texts) for tokenizer, _ in self._encoders]  # each (B, L)
        keys = [b"".join(rows[i].tobytes() for rows in ids) for i in range(len(prompts))]
        new = {key: i for i, key in enumerate(keys) if key not in self._cache}
        if new:
            picked = list(new.values())
            for key, row in zip(new, self._run([rows[picked] for rows in ids]), strict=True):
                self._cache[key] = row
        for key in keys:
            self._cache.move_to_end(key)
        rows = [self._cache[key] for key in keys]
        while len(self._cache) > max(CACHED_PROMPTS, len(set(keys))):
            self._cache.popitem(last=False)
        if self._zeros_for_none:
            rows = [
                tuple(np.zeros_like(part) for part in row) if prompt is None else row
                for row, prompt in zip(rows, prompts, strict=True)
            ]
        names = ("encoder_hidden_states", "text_embeds")
        return {name: np.stack(parts) for name, parts in zip(names, zip(*rows, strict=True), strict=False)}

    def _run(self, ids: list[Array]) -> list[tuple[Array, ...]]:
        outputs = [graph.run({"input_ids": rows}) for (_, graph), rows in zip(self._encoders, ids, strict=True)]
        if "text_embeds" not in outputs[-1]:  # Stable Diffusion 1.x and 2.x
            return [(states,) for states in outputs[0]["last_hidden_state"]]
        # SDXL reads the input of the last layer of both encoders (2307.01952, section 2.1)
        layers = [sum(name.startswith("hidden_states.") for name in output) for output in outputs]
        states = [output[f"hidden_states.{count - 2}"] for output, count in zip(outputs, layers, strict=True)]
        joined = np.concatenate(states, axis=-1)
        return list(zip(joined, outputs[-1]["text_embeds"], strict=True))


def fixed_inputs(unet: GraphSpec, rows: int, *, height: int, width: int, guidance: float) -> dict[str, Array]:
    """The inputs that depend on neither prompt nor step: SDXL's ``time_ids`` and LCM's ``timestep_cond``."""
    shapes = {tensor.name: tensor.shape for tensor in unet.inputs}
    inputs: dict[str, Array] = {}
    if "time_ids" in shapes:  # original size, crop corner, target size (2307.01952, section 2.2)
        inputs["time_ids"] = np.tile(np.array([height, width, 0, 0, height, width], np.float32), (rows, 1))
    if "timestep_cond" in shapes:
        inputs["timestep_cond"] = np.tile(guidance_embedding(guidance, int(shapes["timestep_cond"][1])), (rows, 1))
    return inputs
