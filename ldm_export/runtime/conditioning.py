"""What the denoiser is given beside latents and timestep: the prompt, a class label, the picture's sizes, the guidance.

A batch of B pictures becomes B rows of every input, or 2 B with guidance (Ho & Salimans, 2207.12598): first the
negative prompts', then the prompts', so that one call of the denoiser gives both predictions; or, of models that edit a
picture, 3 B: the negative prompts' without the picture and with it, then the prompts'. Which graph makes which
input of what is said by the bundle's roles (:class:`ldm_export.contract.Roles`).

Weights in prompts, and prompts of several chunks, are those of :mod:`ldm_export.runtime.prompts`: every chunk goes
through text encoders and conditioner, and the denoiser's inputs of tokens are joined.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ldm_export.bundle import Bundle
from ldm_export.bundle.adapters import Mixture
from ldm_export.contract import TextEncoder, conditions_of
from ldm_export.errors import BundleError
from ldm_export.runtime.adapters import AdaptedGraph, changes
from ldm_export.runtime.backends.base import Backend
from ldm_export.runtime.facts import check_length
from ldm_export.runtime.graph import Array, Graph
from ldm_export.runtime.prompts import Reading, TokenRow, joined_conditions, token_rows, weighted_states
from ldm_export.runtime.tokenizer import Tokenizer, tokenizer_of

if TYPE_CHECKING:
    from ldm_export.runtime.request import Request

CACHED_PROMPTS = 256
KEPT_MIXTURES = 16
"""Mixtures of adapters whose prompts are remembered."""


class Conditioning:
    """The text encoders and the conditioner of a bundle, loaded."""

    def __init__(self, bundle: Bundle, backend: Backend):
        roles, graphs = bundle.roles, bundle.manifest.graphs
        sources = roles.sources(graphs)
        self._roles, self._graphs, self._read = roles, graphs, sources
        self._bundle, self._backend = bundle, backend
        self._encoders = {
            encoder.graph: self._prompt_encoder(encoder, backend.load(encoder.graph)) for encoder in roles.text_encoders
        }
        self._adapted: dict[str, Graph] = {}
        self._mixed: OrderedDict[tuple[str, Mixture], PromptEncoder] = OrderedDict()
        self._conditioner = None if roles.conditioner is None else backend.load(roles.conditioner)
        self._image_encoder = None if roles.image_encoder is None else backend.load(roles.image_encoder)

    def __call__(self, request: Request, rows: int, image_latents: Array | None = None) -> dict[str, Array]:
        """The denoiser's conditions for a request.

        Parameters
        ----------
        rows : of each picture: 1 its prompt's, the others before it the negative prompt's
        image_latents : float32 (B, n, h, w), what it reads beside its latents, if it does
        """
        guided = rows > 1
        negatives = (request.negative_prompts or (None,) * request.batch) if guided else ()
        sources = request_sources(
            self._read,
            request.batch,
            height=request.height,
            width=request.width,
            guidance=request.guidance,
            has_negative_prompt=[prompt is not None for prompt in negatives] * (rows - 1) if guided else None,
            class_labels=request.class_labels,
            image_latents=image_latents,
            image_scale=0.0 if request.image_prompt is None else request.image_prompt.scale,
        )
        if self._image_encoder is not None:
            sources[f"{self._roles.image_encoder}.image_tokens"] = self._image_tokens(request, rows)
        texts = [request.prompts, *([[prompt or "" for prompt in negatives]] if guided else [])]
        read = {
            name: [encoder.read(each, request.reading) for each in texts] for name, encoder in self._encoders.items()
        }
        count = max((len(own) for groups in read.values() for group in groups for own in group), default=1)
        chunks = [self._conditions_of_chunk(sources, read, chunk, request.mixtures, rows) for chunk in range(count)]
        joined = joined_conditions(self._roles, self._graphs) if count > 1 else ()
        return chunks[0] | {name: np.concatenate([chunk[name] for chunk in chunks], axis=1) for name in joined}

    def _conditions_of_chunk(
        self,
        sources: Mapping[str, Array],
        read: Mapping[str, Sequence[Sequence[Sequence[TokenRow]]]],
        chunk: int,
        mixtures: Sequence[Mixture],
        rows: int,
    ) -> dict[str, Array]:
        """The denoiser's conditions by one chunk of each prompt: of its rows by encoder, prompts or negative prompts,
        and picture; of the empty text where a prompt has no such chunk."""
        made = dict(sources)
        for encoder, groups in read.items():
            empty = self._encoders[encoder].empty
            prompts, *negatives = (
                self._encoded(encoder, [own[chunk] if chunk < len(own) else empty for own in group], mixtures)
                for group in groups
            )
            for name, value in prompts.items():
                before = [negative[name] for negative in negatives] * (rows - 1)
                made[f"{encoder}.{name}"] = np.concatenate([*before, value])
        return conditions_of(self._roles, self._graphs, made, self._run)

    def _image_tokens(self, request: Request, rows: int) -> Array:
        """Tokens of the request's picture for an IP-Adapter, before them with guidance those of none."""
        assert self._image_encoder is not None
        if request.image_prompt is None:
            _, *sizes = self._image_encoder.spec.outputs[0].shape
            return np.zeros((request.batch * rows, *map(int, sizes)), np.float32)
        pixels = np.concatenate([request.image_prompt.pixels] * rows)
        there = np.repeat(np.array([0] * (rows - 1) + [1], np.float32), request.batch)
        return self._image_encoder.run({"pixels": pixels, "has_picture": there})["image_tokens"]

    def _prompt_encoder(self, encoder: TextEncoder, graph: Graph) -> PromptEncoder:
        outputs = [tensor.name for tensor in self._graphs[encoder.graph].outputs]
        read = [name for name in outputs if f"{encoder.graph}.{name}" in self._read]
        return PromptEncoder(tokenizer_of(self._bundle, encoder), graph, read)

    def _encoded(self, name: str, rows: Sequence[TokenRow], mixtures: Sequence[Mixture]) -> dict[str, Array]:
        """What an encoder makes of token ids, each row under its picture's adapters."""
        if not changes(mixtures, name):
            return self._encoders[name].encode(rows)
        if name not in self._adapted:
            self._adapted[name] = self._backend.load_adapted(name)
        encoder = next(each for each in self._roles.text_encoders if each.graph == name)
        found: dict[int, dict[str, Array]] = {}
        for mixture in dict.fromkeys(mixtures):
            own = [number for number, other in enumerate(mixtures) if other == mixture]
            reads = self._mixed_encoder(encoder, mixture) if changes([mixture], name) else self._encoders[name]
            results = reads.encode([rows[number] for number in own])
            found |= {number: {key: value[k] for key, value in results.items()} for k, number in enumerate(own)}
        return {key: np.stack([found[number][key] for number in range(len(found))]) for key in found[0]}

    def _mixed_encoder(self, encoder: TextEncoder, mixture: Mixture) -> PromptEncoder:
        """An encoder under adapters, with its own cache; the latest are kept."""
        key = encoder.graph, mixture
        if key not in self._mixed:
            graph = AdaptedGraph(self._adapted[encoder.graph], encoder.graph, self._graphs[encoder.graph], mixture)
            self._mixed[key] = self._prompt_encoder(encoder, graph)
        self._mixed.move_to_end(key)
        while len(self._mixed) > KEPT_MIXTURES:
            self._mixed.popitem(last=False)
        return self._mixed[key]

    def _run(self, _: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        assert self._conditioner is not None
        return self._conditioner.run(inputs)


class PromptEncoder:
    """Prompts to rows of token ids, and those to what one text encoder makes of them, with a cache keyed by the ids.

    Parameters
    ----------
    outputs : names of the graph's outputs that are read
    """

    def __init__(self, tokenizer: Tokenizer, graph: Graph, outputs: Sequence[str]):
        check_length(tokenizer, graph.spec)
        self.name = graph.spec.name
        self._tokenizer, self._graph, self._outputs = tokenizer, graph, outputs
        self._cache: OrderedDict[bytes, tuple[Array, ...]] = OrderedDict()

    def read(self, prompts: Sequence[str], reading: Reading) -> list[list[TokenRow]]:
        """Rows of token ids of each prompt; raises as `token_rows` does."""
        return [token_rows(self._tokenizer, prompt, reading) for prompt in prompts]

    @property
    def empty(self) -> TokenRow:
        """Token ids of the empty text."""
        return token_rows(self._tokenizer, "", Reading())[0]

    def encode(self, rows_of_ids: Sequence[TokenRow]) -> dict[str, Array]:
        """The outputs by name, a row a row of ids; states (L, width) are weighted."""
        ids = np.stack([row.ids for row in rows_of_ids])  # (B, L)
        keys = [row.tobytes() for row in ids]
        new = {key: number for number, key in enumerate(keys) if key not in self._cache}
        if new:
            results = self._graph.run({"input_ids": ids[list(new.values())]})
            for key, *row in zip(new, *(results[name] for name in self._outputs), strict=True):
                self._cache[key] = tuple(row)
        for key in keys:
            self._cache.move_to_end(key)
        rows = [self._weighted(key, row.weights) for key, row in zip(keys, rows_of_ids, strict=True)]
        while len(self._cache) > max(CACHED_PROMPTS, len(set(keys))):
            self._cache.popitem(last=False)
        return {name: np.stack(parts) for name, parts in zip(self._outputs, zip(*rows, strict=True), strict=True)}

    def _weighted(self, key: bytes, weights: Array | None) -> tuple[Array, ...]:
        """The cached outputs of a row of ids, its states weighted."""
        outputs = self._cache[key]
        if weights is None:
            return outputs
        return tuple(weighted_states(output, weights) if output.ndim == 2 else output for output in outputs)


def request_sources(
    read: Collection[str],
    batch: int,
    *,
    height: int,
    width: int,
    guidance: float,
    has_negative_prompt: Sequence[bool] | None,
    class_labels: Array | None,
    image_latents: Array | None = None,
    image_scale: float = 0.0,
) -> dict[str, Array]:
    """What a request gives to graphs (`ldm_export.contract.REQUEST_SOURCES`), as far as it is ``read``.

    Parameters
    ----------
    has_negative_prompt : for each picture whether a negative text was given, and that again where a picture has two
        rows of it, the first of which is without the picture's image latents; None where there are no rows for it
    class_labels, image_latents : a row a picture, or None
    image_scale : how much an IP-Adapter's picture counts

    Raises
    ------
    BundleError
        If something is read that no request gives.
    """
    negative = np.asarray([] if has_negative_prompt is None else has_negative_prompt, np.float32)
    times = 1 + len(negative) // batch
    ones, zeros = np.ones(batch, np.float32), np.zeros(batch, np.float32)
    made: dict[str, Array] = {
        "height": np.array(height, np.float32),
        "width": np.array(width, np.float32),
        "guidance": np.array(guidance, np.float32),
        "guidance_weight": np.array(guidance - 1.0, np.float32),
        "has_prompt": np.concatenate([negative, ones]),
        "image_scale": np.full(len(negative) + batch, image_scale, np.float32),
        "is_negative": np.concatenate([np.ones_like(negative), zeros]),
    }
    for name, rows in (("class_labels", class_labels), ("image_latents", image_latents)):
        if rows is not None:
            made[name] = np.concatenate([rows] * times)
    if image_latents is not None and times > 2:
        made["image_latents"][:batch] = 0
    unknown = {source for source in read if "." not in source} - made.keys()
    if unknown:
        raise BundleError(f"The denoiser reads {min(unknown)}, which nothing gives it here. Run its graphs yourself.")
    return {name: value for name, value in made.items() if name in read}
