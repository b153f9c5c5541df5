"""What a ``tokenizer.json`` says, checked: the module `ldm_export.runtime.tokenizer_json` lists what it may say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

from ldm_export.bundle.roles import LARGEST_SIZE, LEAST_TOKENS
from ldm_export.reading.documents import MalformedError
from ldm_export.runtime.charsmap import check_charsmap

VERSION = "1.0"
SPACE = "▁"
"""How vocabularies of SentencePiece write a space."""
WHITE_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
LARGEST_GROWTH = 1024
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""How an added token is matched."""
KEYS = {
    "Lowercase": (),
    "NFC": (),
    "Strip": ("strip_left", "strip_right"),
    "Replace": ("pattern", "content"),
    "Precompiled": ("precompiled_charsmap",),
    "Metaspace": ("replacement", "prepend_scheme", "split"),
    "Split": ("pattern", "behavior", "invert"),
    "WhitespaceSplit": (),
}
"""What is read of a normalizer or pre-tokenizer, by type."""


def check_tokenizer(document: Mapping[str, Any]) -> dict[str, int]:
    """Raise MalformedError unless a ``tokenizer.json`` has the parts that the module's docstring lists; gives its
    ids by token, the added ones among them."""
    if document.get("version", VERSION) != VERSION:
        raise MalformedError(f"has the version {_shown(document['version'])}; {VERSION} is read")
    if "lowercase_prompts" in document:
        _need(document, "lowercase_prompts", bool)
    growth = 1
    for part in _sequence(document.get("normalizer"), "normalizers"):
        growth *= _check_normalizer(part)
        if growth > LARGEST_GROWTH:
            raise MalformedError(f"has normalizers that make a text more than {LARGEST_GROWTH} times as long")
    for part in _sequence(document.get("pre_tokenizer"), "pretokenizers"):
        _check_pre_tokenizer(part)
    return _with_added_tokens(document, _vocabulary(document.get("model")))


def what_is_read(document: Mapping[str, Any]) -> dict[str, Any]:
    """What a checked document says of text, without what is not read here."""
    model = document["model"]
    kept = {"type": model["type"], "byte_fallback": model["byte_fallback"]}
    if kept["type"] == "Unigram":
        kept |= {"unk_id": model["unk_id"], "vocab": [(token, float(score)) for token, score in model["vocab"]]}
    else:
        kept |= {key: model[key] for key in ("vocab", "unk_token", "fuse_unk")}
        kept["merges"] = [_pair(merge) for merge in model["merges"]]
    return {
        "version": VERSION,
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {key: token[key] for key in ("id", "content", *FLAGS)} for token in document.get("added_tokens", [])
        ],
        "normalizer": {"type": "Sequence", "normalizers": _kept(document.get("normalizer"), "normalizers")},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _kept(document.get("pre_tokenizer"), "pretokenizers")},
        "post_processor": None,
        "decoder": None,
        "model": kept,
    }


def _kept(part: Any, items: str) -> list[dict[str, Any]]:
    return [{key: each[key] for key in ("type", *KEYS[each["type"]])} for each in _sequence(part, items)]


def check_sought(added: Sequence[Mapping[str, Any]], normalize: Callable[[str], str]) -> None:
    """Raise MalformedError unless added tokens differ and do not overlap."""
    raw = {token["content"] for token in added if not token["normalized"]}
    normalised = {normalize(token["content"]) for token in added if token["normalized"]}
    if "" in normalised or len(raw) + len(normalised) < len(added):
        raise MalformedError("adds tokens that are the same, or nothing, in normalised text")
    if any(token["rstrip"] for token in added) and any(text[0] in WHITE_SPACE for text in raw | normalised):
        raise MalformedError("adds a token of white space that another one takes along")


def length_and_padding(document: Mapping[str, Any]) -> tuple[int, int, bool]:
    """Length of a row, id of the padding, and whether that comes first."""
    truncation, padding = document.get("truncation"), document.get("padding")
    if not isinstance(truncation, dict) or not isinstance(padding, dict):
        raise MalformedError("lacks truncation or padding, which say how long a row of ids is")
    length, strategy = truncation.get("max_length"), padding.get("strategy")
    if type(length) is not int or not LEAST_TOKENS <= length <= LARGEST_SIZE:
        raise MalformedError(f"truncates to {_shown(length)}; {LEAST_TOKENS} to {LARGEST_SIZE} tokens are possible")
    if truncation.get("direction") != "Right" or not _is_id(truncation.get("stride")) or truncation["stride"] > 0:
        raise MalformedError("truncates other than on the right, with stride 0")
    fixed = strategy.get("Fixed") if isinstance(strategy, dict) and len(strategy) == 1 else None
    if type(fixed) is not int or fixed != length or padding.get("pad_to_multiple_of") is not None:
        raise MalformedError(f"pads to {_shown(strategy)} and truncates to {length}; rows are of one length")
    if padding.get("direction") not in ("Left", "Right") or not _is_id(padding.get("pad_id")):
        raise MalformedError("pads with no id, or neither on the left nor on the right")
    return length, padding["pad_id"], padding["direction"] == "Left"


def _sequence(part: Any, items: str) -> list[Mapping[str, Any]]:
    """The parts of a Sequence, or the one part; each an object with a type."""
    if part is None:
        return []
    parts = part.get(items) if isinstance(part, dict) and part.get("type") == "Sequence" else [part]
    if not isinstance(parts, list) or not all(
        isinstance(each, dict) and isinstance(each.get("type"), str) for each in parts
    ):
        raise MalformedError(f"has {items} that are no list of objects with a type")
    return parts


def _check_normalizer(part: Mapping[str, Any]) -> int:
    """How many times as long it may make a text, but for what letter case and normal forms do."""
    kind = part["type"]
    if kind in ("Lowercase", "NFC"):
        return 1
    if kind == "Strip":
        _need(part, "strip_left", bool)
        _need(part, "strip_right", bool)
    elif kind == "Replace":
        _check_text(part.get("pattern"))
        return max(1, -(-len(_need(part, "content", str)) // len(part["pattern"]["String"])))
    elif kind == "Precompiled":
        return max(1, check_charsmap(_need(part, "precompiled_charsmap", str)))
    else:
        raise MalformedError(f"has the normalizer {kind[:60]!r}, which is not read here")
    return 1


def _check_pre_tokenizer(part: Mapping[str, Any]) -> None:
    kind = part["type"]
    if kind == "Metaspace":
        if part.get("replacement") != SPACE or part.get("prepend_scheme") not in ("always", "first", "never"):
            raise MalformedError(f"has a Metaspace that is not with {SPACE}, or prepends it in an unknown way")
        _need(part, "split", bool)
    elif kind == "Split":
        _check_text(part.get("pattern"))
        if part.get("behavior") != "MergedWithPrevious" or part.get("invert") is not False:
            raise MalformedError("has a Split that is not MergedWithPrevious")
    elif kind != "WhitespaceSplit":
        raise MalformedError(f"has the pre_tokenizer {kind[:60]!r}, which is not read here")


def _check_text(pattern: Any) -> None:
    if not isinstance(pattern, dict) or [*pattern] != ["String"] or not isinstance(pattern["String"], str):
        raise MalformedError(f"has the pattern {_shown(pattern)}; a String is read here")
    if not pattern["String"]:
        raise MalformedError("has an empty pattern")


def _vocabulary(model: Any) -> dict[str, int]:
    """Ids by token of the model, which is checked."""
    if not isinstance(model, dict) or model.get("type") not in ("BPE", "Unigram"):
        raise MalformedError("has no model of the type Unigram or BPE")
    fallback = _need(model, "byte_fallback", bool)
    vocabulary: dict[str, int] = {}
    if model["type"] == "Unigram":
        for entry in _need(model, "vocab", list):
            if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str) or not entry[0]:
                raise MalformedError(f"has {_shown(entry)} in its vocabulary; a token and its score are needed")
            if type(entry[1]) not in (int, float) or not math.isfinite(entry[1]):
                raise MalformedError(f"has the score {_shown(entry[1])} of {_shown(entry[0])}; a number is needed")
            vocabulary[entry[0]] = len(vocabulary)
        if len(vocabulary) < len(model["vocab"]):
            raise MalformedError("has a token twice in its vocabulary")
        unknown = model.get("unk_id")
        if not _is_id(unknown) or unknown >= len(vocabulary):
            raise MalformedError(f"has the unk_id {_shown(unknown)}; one of its {len(vocabulary)} tokens is needed")
    else:
        for token, number in _need(model, "vocab", dict).items():
            if not token or not _is_id(number):
                raise MalformedError(f"gives {_shown(token)} the id {_shown(number)}; ids are whole numbers from 0")
            vocabulary[token] = number
        if len(set(vocabulary.values())) < len(vocabulary):
            raise MalformedError("gives two tokens the same id")
        if not isinstance(model.get("unk_token"), str) or model["unk_token"] not in vocabulary:
            raise MalformedError(f"has the unk_token {_shown(model.get('unk_token'))}, none of its vocabulary")
        if any(model.get(key) not in (None, "") for key in ("continuing_subword_prefix", "end_of_word_suffix")):
            raise MalformedError("has a BPE with a prefix or a suffix, which is not read here")
        if model.get("dropout") is not None:
            raise MalformedError("has a BPE with dropout, which is not read here")
        _need(model, "fuse_unk", bool)
        if model.get("ignore_merges") is not None and model["ignore_merges"] is not False:
            raise MalformedError("has a BPE with ignore_merges, which is not read here")
        for merge in _need(model, "merges", list):
            pair = _pair(merge)
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(each, str) for each in pair):
                raise MalformedError(f"has the merge {_shown(merge)}; a merge is two tokens")
            if any(token not in vocabulary for token in (*pair, "".join(pair))):
                raise MalformedError(f"has the merge {_shown(merge)} of what is not in its vocabulary")
    if fallback and any(f"<0x{byte:02X}>" not in vocabulary for byte in range(256)):
        raise MalformedError("falls back to bytes, and lacks the token of one")
    return vocabulary


def _pair(merge: Any) -> Any:
    """The two tokens of a merge, which older files write with a space between."""
    return merge.split(" ") if isinstance(merge, str) else merge


def _with_added_tokens(document: Mapping[str, Any], vocabulary: Mapping[str, int]) -> dict[str, int]:
    """The vocabulary with the added tokens, each of which must have the id that it gets when they are added in order:
    of the vocabulary, or the next one."""
    known, following = dict(vocabulary), len(vocabulary)
    gaps = max(vocabulary.values()) >= following
    added = document.get("added_tokens", [])
    if not isinstance(added, list):
        raise MalformedError("has added_tokens that are no list")
    seen = set[str]()
    for token in added:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or not token["content"]:
            raise MalformedError(f"has the added token {_shown(token)}; an object with content is needed")
        for flag in FLAGS:
            _need(token, flag, bool)
        content, number = token["content"], token.get("id")
        if content in seen:
            raise MalformedError(f"adds {_shown(content)} twice")
        seen.add(content)
        expected = known.get(content, following)
        if number != expected or type(number) is not int:
            raise MalformedError(f"gives the added token {_shown(content)} the id {_shown(number)}, not {expected}")
        if content not in known:
            if gaps:
                raise MalformedError("has ids in its vocabulary that are not the first numbers")
            following += 1
        known[content] = number
    return known


def template(part: Any, vocabulary: Mapping[str, int]) -> tuple[list[int], list[int]]:
    """Ids of the special tokens before and after a text."""
    if part is None:
        return [], []
    if not isinstance(part, dict) or part.get("type") != "TemplateProcessing":
        raise MalformedError("has a post_processor that is no TemplateProcessing")
    sides: tuple[list[int], list[int]] = [], []
    texts = 0
    for piece in _need(part, "single", list):
        if isinstance(piece, dict) and isinstance(piece.get("Sequence"), dict) and piece["Sequence"].get("id") == "A":
            texts += 1
        elif isinstance(piece, dict) and isinstance(piece.get("SpecialToken"), dict):
            name = piece["SpecialToken"].get("id")
            special = part.get("special_tokens")
            entry = special.get(name) if isinstance(special, dict) and isinstance(name, str) else None
            ids = entry.get("ids") if isinstance(entry, dict) else None
            if not isinstance(ids, list) or not all(_is_id(one) and one in vocabulary.values() for one in ids):
                raise MalformedError(f"has the special token {_shown(name)}, of which it has no ids")
            sides[texts > 0].extend(ids)
        else:
            raise MalformedError(f"has {_shown(piece)} in its template")
    if texts != 1:
        raise MalformedError(f"has a template with {texts} texts; one is needed")
    return sides


def _need(part: Mapping[str, Any], key: str, kind: type) -> Any:
    if type(part.get(key)) is not kind:
        raise MalformedError(f"has {key} = {_shown(part.get(key))}; a {kind.__name__} is needed")
    return part[key]


def _is_id(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**31


def _shown(value: Any) -> str:
    return repr(value)[:60]
