"""Prompts that are read otherwise than as they stand: with weights of their parts, or in chunks where they are long.

Both are options; a prompt is else read as it stands, brackets included.

**Weights** have the syntax of AUTOMATIC1111's webui (``modules/prompt_parser.py``):

    (text)          text weighs 1.1 times as much        [text]    1.1 times less
    (text:1.3)      1.3 times as much                    \\(  \\[  \\)  \\]  \\\\    the sign itself

Brackets may be within one another, and weights are multiplied. One that is not closed reaches to the end of the prompt;
one that closes nothing, and a number that is none, are text; a backslash before anything else is left out. Each part
is made tokens alone, so that a word ends at a bracket. What that tool has beside it (``AND``, ``BREAK``, ``[a:b:0.5]``)
is not read.

A weight multiplies the states that a text encoder gives at its tokens; then all states of the prompt are multiplied so
that their mean is what it was, as that tool's emphasis "Original" does, each encoder and each chunk for itself. What an
encoder pools of the prompt is not weighted. Where the mean is nothing beside the values (1e-4 of their mean magnitude,
as after a norm without gains) there is none to restore.

**Chunks**: a prompt of more tokens than the encoder reads is cut after every so many, each chunk is put between start
and end token and encoded alone, and what the denoiser reads token by token is concatenated. All else, such as what is
pooled, is of the first chunk. Prompts and negative prompts of one generation are filled up to the same number of chunks
with those of the empty text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ldm_export.contract import GraphSpec, Roles
from ldm_export.errors import InputError
from ldm_export.runtime.graph import Array
from ldm_export.runtime.tokenizer import Tokenizer
from ldm_export.runtime.tokenizer_clip import ClipTokenizer

CHUNKED_KIND = "clip"
"""Kind of tokenizer (:class:`ldm_export.contract.TextEncoder`) whose prompts can have weights and chunks."""
EMPHASIS = 1.1
LARGEST_WEIGHT = 100.0
"""Largest weight of a part; the least is its negative."""
MOST_NESTED = 100
"""Brackets within one another."""
MOST_CHUNKS = 32
LEAST_MEAN = 1e-4
"""Share of the mean magnitude that a mean must be; what is less may be a rounding error of zero."""
_NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
_WHITE = r"[ \t\n\r\f\v]*"
_SIGN = re.compile(rf"\\[()\[\]\\]|\\|:{_WHITE}(?P<weight>{_NUMBER}){_WHITE}\)|[()\[\]:]|[^\\()\[\]:]+")


@dataclass(frozen=True)
class Reading:
    """How prompts are read.

    Attributes
    ----------
    weights : whether their brackets are weights
    chunks : whether long ones are read in chunks, and not cut off
    """

    weights: bool = False
    chunks: bool = False


@dataclass(frozen=True)
class TokenRow:
    """One row of token ids for a text encoder.

    Attributes
    ----------
    ids : int64 (L,)
    weights : float32 (L,), or None where all are 1
    """

    ids: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32] | None = None


def check_reading(reading: Reading, roles: Roles, graphs: Mapping[str, GraphSpec], *, whole: bool) -> None:
    """Raise InputError unless a model's prompts can be read so; ``whole`` is whether a loop graph is to draw."""
    asked = [name for name, wanted in (("prompt_weights", reading.weights), ("long_prompts", reading.chunks)) if wanted]
    if not asked:
        return
    other = next((encoder for encoder in roles.text_encoders if encoder.kind != CHUNKED_KIND), None)
    if not roles.text_encoders:
        raise InputError(f"{asked[0]} was asked for; this model reads no text. Leave it out.")
    if other is not None:
        raise InputError(
            f"{asked[0]} was asked for; it is for tokenizers of the kind '{CHUNKED_KIND}', and this model's "
            f"{other.graph} has one of the kind '{other.kind}'. Leave it out."
        )
    if whole:
        raise InputError(
            f"{asked[0]} was asked for with the whole loop at once; a loop graph reads each prompt as it stands. "
            "Leave one of them out."
        )
    if reading.chunks and not joined_conditions(roles, graphs):
        raise InputError(
            "long_prompts was asked for; this model's denoiser reads a fixed number of tokens. Leave it out."
        )


def joined_conditions(roles: Roles, graphs: Mapping[str, GraphSpec]) -> frozenset[str]:
    """Names of the denoiser's inputs that have a free number of tokens, (B, tokens, width)."""
    return frozenset(
        tensor.name
        for tensor in graphs[roles.denoiser].inputs
        if tensor.name in roles.conditions and len(tensor.shape) == 3 and isinstance(tensor.shape[1], str)
    )


def weighted_parts(prompt: str) -> list[tuple[str, float]]:
    """The parts of a prompt and their weights; neighbours of the same weight are one part.

    Raises
    ------
    InputError
        For a weight above 100 or below -100, or more than 100 brackets within one another.
    """
    texts: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def weigh(start: int, weight: float) -> None:
        for part in range(start, len(weights)):
            weights[part] *= weight

    for found in _SIGN.finditer(prompt):
        sign = found[0]
        if sign in opened:
            opened[sign].append(len(texts))
            if sum(map(len, opened.values())) > MOST_NESTED:
                raise InputError(f"The prompt has more than {MOST_NESTED} brackets within one another. Use a number.")
        elif found["weight"] and opened["("]:
            weigh(opened["("].pop(), float(found["weight"]))
        elif sign == ")" and opened["("]:
            weigh(opened["("].pop(), EMPHASIS)
        elif sign == "]" and opened["["]:
            weigh(opened["["].pop(), 1 / EMPHASIS)
        else:
            texts.append(sign.removeprefix("\\"))
            weights.append(1.0)
    for start in opened["("]:
        weigh(start, EMPHASIS)
    for start in opened["["]:
        weigh(start, 1 / EMPHASIS)
    return _merged(texts, weights)


def _merged(texts: Sequence[str], weights: Sequence[float]) -> list[tuple[str, float]]:
    parts: list[tuple[list[str], float]] = []
    for text, weight in zip(texts, weights, strict=True):
        if not abs(weight) <= LARGEST_WEIGHT:
            raise InputError(
                f"The prompt gives {text[:40]!r} the weight {weight:g}; weights are from -{LARGEST_WEIGHT:g} to "
                f"{LARGEST_WEIGHT:g}. Use a smaller one."
            )
        if parts and parts[-1][1] == weight:
            parts[-1][0].append(text)
        else:
            parts.append(([text], weight))
    return [("".join(merged), weight) for merged, weight in parts]


def token_rows(tokenizer: Tokenizer, prompt: str, reading: Reading) -> list[TokenRow]:
    """The rows of token ids of a prompt: several where it is read in chunks, and else one.

    Raises
    ------
    InputError
        For weights that cannot be read, or more than 32 chunks.
    """
    if not isinstance(tokenizer, ClipTokenizer) or reading == Reading():
        return [TokenRow(tokenizer([prompt])[0])]
    parts = weighted_parts(prompt) if reading.weights else [(prompt, 1.0)]
    bodies = [(tokenizer.body(text), weight) for text, weight in parts]
    ids = [number for body, _ in bodies for number in body]
    weights = np.array([weight for body, weight in bodies for _ in body], np.float32)
    room = tokenizer.model_max_length - 2
    if not reading.chunks:
        ids = tokenizer.cut(ids)
    elif not room:
        raise InputError("long_prompts was asked for; this model reads no token of a prompt. Leave it out.")
    count = max(1, -(-len(ids) // max(room, 1)))
    if count > MOST_CHUNKS:
        raise InputError(
            f"The prompt has {len(ids)} tokens, which are {count} chunks; at most {MOST_CHUNKS} are read. Shorten it."
        )
    return [_framed(tokenizer, ids[k * room :][:room], weights[k * room :][:room]) for k in range(count)]


def _framed(tokenizer: ClipTokenizer, ids: Sequence[int], weights: npt.NDArray[np.float32]) -> TokenRow:
    framed = np.ones(tokenizer.model_max_length, np.float32)
    framed[1 : len(ids) + 1] = weights[: len(ids)]
    return TokenRow(tokenizer.framed(ids), None if (framed == 1).all() else framed)


def weighted_states(states: Array, weights: npt.NDArray[np.float32]) -> Array:
    """States float32 (L, width) times the weights (L,) of their tokens, and so that their mean is what it was."""
    scaled = states * weights[:, None]
    before, after = _mean(states), _mean(scaled)
    return scaled * np.float32(before / after) if before and after else scaled


def _mean(values: Array) -> float:
    """Mean of float32 values, summed one after another in float64, as C++ does; 0 if it is none beside them."""
    flat = values.ravel().astype(np.float64)
    total, magnitude = np.cumsum(flat)[-1], np.cumsum(np.abs(flat))[-1]
    return float(total) if abs(total) > LEAST_MEAN * magnitude else 0.0
