"""Tokenizers of a bundle's text encoders: a prompt to the row of ids that the encoder reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ldm_export.bundle import Bundle
from ldm_export.contract import TextEncoder
from ldm_export.runtime.tokenizer_clip import ClipTokenizer
from ldm_export.runtime.tokenizer_files import TokenizerFiles
from ldm_export.runtime.tokenizer_json import JsonTokenizer


class Tokenizer(Protocol):
    """What reads a tokenizer's files, opened.

    Attributes
    ----------
    files : what it was read from
    length_file : name of the file that says the length
    model_max_length : length of every row of ids
    """

    files: TokenizerFiles
    length_file: str
    model_max_length: int

    def __call__(self, prompts: str | Sequence[str]) -> NDArray[np.int64]:
        """Token ids of prompts, (B, model_max_length); warns of what is cut off."""


READERS: Mapping[str, Callable[[TokenizerFiles], Tokenizer]] = {"clip": ClipTokenizer, "tokenizers": JsonTokenizer}
"""Readers by the kind that a manifest says (:class:`ldm_export.contract.TextEncoder`)."""


def tokenizer_of(bundle: Bundle, encoder: TextEncoder) -> Tokenizer:
    """The tokenizer of a bundle's text encoder.

    Raises
    ------
    BundleError
        If its files are not what they should be.
    """
    return READERS[encoder.kind](TokenizerFiles.of_bundle(bundle, encoder.tokenizer))
