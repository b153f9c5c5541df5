"""Maps of characters of SentencePiece's normalisation, which a ``tokenizer.json`` has as one text."""

from __future__ import annotations

import base64

import numpy as np
from numpy.typing import NDArray

from ldm_export.reading.documents import MalformedError


def check_charsmap(text: str) -> int:
    """Raise MalformedError unless the characters' map of a Precompiled normalizer can be walked: bytes of a trie
    (a double array, darts-clone), the trie, and the texts that its leaves point to, each ended by a zero; gives the
    length of the longest of them."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        data = b""
    if base64.b64encode(data).decode() != text:
        raise MalformedError("has a precompiled_charsmap that is not base64")
    size = int.from_bytes(data[:4], "little")
    texts = data[4 + size :]
    if len(data) < 4 or len(data) < 4 + size or size % 1024 or not size or not texts.endswith(b"\0"):
        raise MalformedError("has a precompiled_charsmap of a size that none has")
    units: NDArray[np.uint32] = np.frombuffer(data[4 : 4 + size], "<u4")
    try:
        longest = max(map(len, texts.decode().split("\0")))
    except UnicodeDecodeError:
        raise MalformedError("has a precompiled_charsmap whose texts are not UTF-8") from None
    places = np.arange(len(units), dtype=np.int64)
    wide = units.astype(np.int64)
    offsets = (wide >> 10) << ((wide & 512) >> 6)
    seen, frontier = np.zeros(len(units), bool), places[:1]
    labels = np.arange(1, 256, dtype=np.int64)
    while len(frontier):
        seen[frontier] = True
        blocks = frontier ^ offsets[frontier]
        if blocks.max() >= len(units):
            raise MalformedError("has a precompiled_charsmap that leads out of itself")
        leaves = blocks[(wide[frontier] >> 8) & 1 == 1]
        starts = wide[leaves] & 0x7FFFFFFF
        if len(starts) and (starts.max() >= len(texts) or any(texts[at] & 0xC0 == 0x80 for at in starts.tolist())):
            raise MalformedError("has a precompiled_charsmap that points out of its texts")
        children = blocks[:, None] ^ labels
        there = children[(wide[children] & 0x800000FF) == labels]
        frontier = np.unique(there[~seen[there]])
    return longest
