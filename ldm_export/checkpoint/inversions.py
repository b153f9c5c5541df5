"""Textual inversions put into the text encoders of a checkpoint when they are loaded: rows of their token tables.

The vectors become the last rows of the table, in the order in which they are given, so that their ids are the next ones
of a tokenizer that has as many tokens as the table rows.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ldm_reference.text_encoder import CLIPTextModel
from torch import nn

from ldm_export.adapters.embeddings import Embedding, read_embedding

_log = logging.getLogger(__name__)
HIGHEST = 2
"""``eos_token_id`` of configs from before transformers 4.31, whose models end a text with the highest id they know."""


def read_embeddings(given: Sequence[tuple[Path, str | None]], widths: Mapping[str, int]) -> tuple[Embedding, ...]:
    """Textual inversions, each a file and a token or None; names that are of no text encoder are logged as a warning.

    Raises
    ------
    InputError
        If one cannot be used.
    """
    found = []
    for path, token in given:
        embedding = read_embedding(path, token, widths)
        if embedding.unmatched:
            _log.warning(f"{embedding.file}: left out, of no text encoder here: {', '.join(embedding.unmatched)}")
        found.append(embedding)
    return tuple(found)


def added_tokens(component: str, embeddings: Sequence[Embedding]) -> tuple[str, ...]:
    """The tokens that a text encoder's tokenizer gets, in the order of their ids."""
    return tuple(name for embedding in embeddings for name in embedding.names(component))


def config_with(component: str, config: Mapping[str, Any], embeddings: Sequence[Embedding]) -> dict[str, Any]:
    """A text encoder's config with the rows that are added.

    A new token would be the highest id; so a text's end, where it was known by that, gets its id.
    """
    count = len(added_tokens(component, embeddings))
    if not count:
        return dict(config)
    end = config["vocab_size"] - 1 if config["eos_token_id"] == HIGHEST else config["eos_token_id"]
    return {**config, "vocab_size": config["vocab_size"] + count, "eos_token_id": end}


def with_vectors(component: str, network: Any, embeddings: Sequence[Embedding]) -> Any:
    """The network with the vectors in its token table."""
    rows = [embedding.vectors[component] for embedding in embeddings if component in embedding.vectors]
    if not rows:
        return network
    assert isinstance(network, CLIPTextModel)
    config = network.config
    values = config_with(component, {"vocab_size": config.vocab_size, "eos_token_id": config.eos_token_id}, embeddings)
    network.config = replace(config, **values)
    network.text_model.eos_token_id = values["eos_token_id"]
    table = network.text_model.embeddings.token_embedding
    table.weight = nn.Parameter(torch.cat([table.weight, *map(torch.from_numpy, rows)]))
    table.num_embeddings = len(table.weight)
    return network


def sha256_with(sha256: str, component: str, embeddings: Sequence[Embedding]) -> str:
    """Hash of a component's weights and of what is added to it; of the weights alone where nothing is."""
    own = [f" {each.sha256} {each.token!r}" for each in embeddings if component in each.vectors]
    return hashlib.sha256("".join([sha256, *own]).encode()).hexdigest() if own else sha256
