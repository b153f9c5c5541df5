"""Tokens that textual inversions add to a tokenizer of CLIP's kind, as changes of its files.

They are listed in ``tokenizer_config.json`` under ``added_tokens_decoder``, as transformers writes them, so that every
runtime of a bundle, and whoever else opens its files, knows them. Where that list is, older places are not read
(``added_tokens.json``, ``special_tokens_map.json``), so what they say goes into that file, too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from ldm_export.checkpoint import LatentDiffusion
from ldm_export.errors import InputError
from ldm_export.reading.documents import json_text, parsed, read_bytes
from ldm_export.runtime.tokenizer_clip import ClipTokenizer

CONFIG, WHOLE = "tokenizer_config.json", "tokenizer.json"
REMEDY = "Give the textual inversion another name: FILE=TOKEN."


def check_tokens(tokenizer: ClipTokenizer, component: str, checkpoint: LatentDiffusion) -> None:
    """Raise InputError unless a checkpoint's textual inversions can be added to a text encoder's tokenizer.

    A name must not be in the vocabulary, nor be mistaken for another's vector or have a part that is written out.
    """
    known = set(tokenizer.vocabulary)
    added = {token.content for token in tokenizer.added.values() if not token.special}
    for embedding in checkpoint.embeddings:
        names = embedding.names(component)
        if not names:
            continue
        token = embedding.token
        taken = [name for name in (token, f"{token}</w>", *names, f"{token}_{len(names)}") if name in known]
        if taken:
            raise InputError(
                f"{embedding.file} is to be called {token!r}, and the tokenizer of the {component} has {taken[0]!r} "
                f"already. {REMEDY}"
            )
        other = next((other for other in sorted(added) if _mistaken(token, len(names), other, added)), None)
        if other is not None:
            raise InputError(
                f"{embedding.file} is to be called {token!r}, which the token {other!r} of the {component} could be "
                f"mistaken for, or part of. {REMEDY}"
            )
        known |= {*names}
        added |= {*names}


def _mistaken(token: str, count: int, other: str, added: Collection[str]) -> bool:
    """Whether one name is in the other and either is written out as several vectors, or would be with the other."""
    if token not in other and other not in token:
        return False
    short, long = sorted((token, other), key=len)
    counted = re.fullmatch(r"_[0-9]+", long.removeprefix(short)) is not None and long.startswith(short)
    return count > 1 or f"{other}_1" in added or counted


def files_with_tokens(folder: Path, tokens: Sequence[str]) -> dict[str, bytes]:
    """The files of a tokenizer's folder that tokens change, by name.

    The ids are the next ones, in the tokens' order.
    """
    tokenizer = ClipTokenizer(folder)
    first = len(tokenizer.vocabulary)
    entries = {number: _entry(token) for number, token in tokenizer.added.items()}
    entries |= {first + k: _entry(AddedToken(token)) for k, token in enumerate(tokens)}
    decoder = {str(number): entry for number, entry in sorted(entries.items())}
    changed = {CONFIG: json_text({**tokenizer.config, "added_tokens_decoder": decoder}).encode()}
    if (folder / WHOLE).is_file():
        document = parsed(read_bytes(folder / WHOLE), repeats=True)
        listed = [{"id": number, **entry} for number, entry in sorted(entries.items())]
        changed[WHOLE] = json_text({**document, "added_tokens": listed}).encode()
    return changed


def _entry(token: AddedToken) -> dict[str, Any]:
    flags = ("lstrip", "normalized", "rstrip", "single_word", "special")
    return {"content": token.content, **{flag: getattr(token, flag) for flag in flags}}
