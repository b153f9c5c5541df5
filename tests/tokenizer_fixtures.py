"""Tokenizers of T5's and Gemma's kind, prompts of every Unicode category, and maps of characters."""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import sys
import unicodedata
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
import transformers
from tokenizers import models, normalizers, pre_tokenizers, trainers

LENGTH = 40
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
WRITTEN_OUT = (
    *("a", "cat", "the mat,", "Model", "graph.", "x</s>y", "<extra_id_3>", "<unk>", "<eos>", "<mask>", "▁", "▁▁a"),
    *("aaaaaaa", "!!!!!!!!", "......", "hahahaha", " ", "  ", "\n", "\u00a0", "\u3000", "\r\n", "\ufeff"),
    *(
        "e\u0301",
        "\u00a8",
        "\u00bd",
        "\u2026",
        "\u2122",
        "\ufdfa",
        "\ufb01",
        "\u212b",
        "\u0344",
        "\u0130",
        "\uff76\uff9e",
    ),
    *("\u0915\u094d\u0915\u0300", "\u0915\u093c", "\u1100\u1161\u0300", "\uac01\u11a8", "\u00a9\u200d\u00a9"),
    *("\u263a\u200d\u00a9\u0300", "\u00ae\u0301\u200d\U0001f600", "\U0001f1e9\U0001f1ea\U0001f1eb", "\u0600a\u0300"),
    *(
        "\U0001f469\u200d\U0001f469\u200d\U0001f467",
        "\U0001f44d\U0001f3fd",
        "\u00ad\u0300\u0300",
        "\u0e33",
        "\u200d\u0301",
    ),
)
"""Parts of prompts: added tokens, repeats, spaces, what normalisation rewrites, and clusters of each rule."""


def t5_tokenizer(folder: Path) -> transformers.T5Tokenizer:
    """A tokenizer as T5's, of a small vocabulary, with SentencePiece's map of characters; its files in ``folder``."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*_lines(), *["ein süßer Hund und eine Katze"] * 20]),
        model_writer=model,
        model_type="unigram",
        vocab_size=500,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    return transformers.T5Tokenizer.from_pretrained(folder)


def gemma_tokenizer() -> transformers.GemmaTokenizer:
    """A tokenizer as Gemma's, of a small vocabulary, which falls back to bytes."""
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *BYTES]
    trained.train_from_iterator(
        _lines(), trainers.BpeTrainer(vocab_size=1200, special_tokens=special, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    return transformers.GemmaTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


def _lines() -> list[str]:
    lines = [line.strip() for file in sorted(Path("docs").glob("*.md")) for line in file.read_text().splitlines()]
    return [line for line in lines if line]


def document_of(
    tokenizer: transformers.PreTrainedTokenizerBase, length: int = LENGTH, side: str = "Right"
) -> dict[str, Any]:
    """The ``tokenizer.json`` of a tokenizer of transformers, as a bundle has it."""
    found: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    padding = {"strategy": {"Fixed": length}, "direction": side, "pad_to_multiple_of": None, "pad_type_id": 0}
    found["truncation"] = {"direction": "Right", "max_length": length, "strategy": "LongestFirst", "stride": 0}
    found["padding"] = {**padding, "pad_id": tokenizer.pad_token_id, "pad_token": tokenizer.pad_token}
    return found


def bare_document(model: Mapping[str, Any], length: int = LENGTH, pad: int = 0, **parts: Any) -> dict[str, Any]:
    """A ``tokenizer.json`` made by hand: a model, and the ``parts`` that there are beside it."""
    return {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": length, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": length}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": pad},
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "model": dict(model),
        **parts,
    }


def unigram(*tokens: str, **parts: Any) -> dict[str, Any]:
    """A model whose first token, id 0, is of unknown text; longer tokens are likelier than their parts."""
    vocab = [["<unk>", 0.0], *([token, -10.0 + len(token) ** 2] for token in tokens)]
    return {"type": "Unigram", "unk_id": 0, "byte_fallback": False, "vocab": vocab, **parts}


def added_token(number: int, content: str, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": number, "content": content, **plain, **flags}


@cache
def prompts_of_every_category(count: int, longest: int = 8) -> list[str]:
    """Texts of what is written out above and of characters of all categories, surrogates among them."""
    categories: dict[str, list[str]] = {}
    for code in range(1, sys.maxunicode + 1):
        categories.setdefault(unicodedata.category(chr(code)), []).append(chr(code))
    choose = random.Random(0)

    def part() -> str:
        if choose.random() < 0.5:
            return choose.choice(WRITTEN_OUT)
        return "".join(choose.choice(categories[choose.choice([*categories])]) for _ in range(choose.randint(1, 5)))

    return [
        choose.choice(["", " ", "  "]).join(part() for _ in range(choose.randint(1, longest))) for _ in range(count)
    ]


def prompts_in_capitals(count: int) -> list[str]:
    """Texts of sigmas and of other letters whose lower case is not simple, with what may be in a word and around it."""
    letters = ["\u039f\u0394\u039f\u03a3", "<B>", *"\u03a3\u03a3\u03a3\u0391aB\n\u0130\u01c5\u01c8\u1f88\u02b0\u0345"]
    letters += "\u2160\u24b6\u1e9e\U00010400\u05d0\u4e00"
    between = ["", "", "", "\u0301\u0308", *" '\u2019\u03011.:\u00ad\u200d^-\ufffd"]
    around = ["", "", "\t ", *"\x1c\x1d\x1e\x1f\x85\u200b\ufeff\u00a0\u3000\u2028\n"]
    choose = random.Random(0)

    def word() -> str:
        return "".join(choose.choice(letters) + choose.choice(between) for _ in range(choose.randint(1, 7)))

    return [choose.choice(around) + choose.choice(between) + word() + choose.choice(around) for _ in range(count)]


def charsmap(texts: Mapping[bytes, str]) -> str:
    """A map of characters as SentencePiece makes it: by bytes of what is looked for, the text in its place."""
    trie: dict[int, Any] = {}
    for key, text in texts.items():
        node = trie
        for byte in key:
            node = node.setdefault(byte, {})
        node[0] = text
    units, ends = [0] * 256, bytearray()

    def place(node: Mapping[int, Any], at: int) -> None:
        block = len(units)  # each node's children have a block of their own
        units.extend([0] * 256)
        units[at] |= (at ^ block) << 10 | (0 in node) << 8
        for label, child in node.items():
            if label == 0:
                units[block] = 1 << 31 | len(ends)
                ends.extend(child.encode() + b"\0")
            else:
                units[block + label] = label
                place(child, block + label)

    place(trie, 0)
    return packed_charsmap(units, bytes(ends) or b"\0")


def packed_charsmap(units: list[int], texts: bytes) -> str:
    """A map of characters of the units of its trie and the texts, each ended by a zero."""
    return base64.b64encode(struct.pack(f"<{len(units) + 1}I", 4 * len(units), *units) + texts).decode()


def _of_every_byte() -> str:
    """A map by which each short cluster, and each character of a long one, is an x."""
    return charsmap({bytes([byte]): "x" for byte in range(1, 256)})


def documents_by_hand() -> dict[str, dict[str, Any]]:
    """Documents of parts that the trained ones lack, by what they are of."""
    letters = unigram("<pad>", "▁", *"abcxe.!h", "▁a", "ab", "x▁", "xx", "aa", "!!", "..", "ha", "\u0301")
    size = len(letters["vocab"])
    metaspace = {"type": "Metaspace", "replacement": "▁", "split": True}
    words = {
        "type": "Sequence",
        "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace | {"prepend_scheme": "first"}],
    }
    wide = {"type": "Replace", "pattern": {"String": "\u00bd"}, "content": " a b"}
    tidy = [{"type": "Strip", "strip_left": True, "strip_right": True}, {"type": "Lowercase"}, {"type": "NFC"}, wide]
    added = [
        added_token(size, "<A>", normalized=True),
        added_token(size + 1, "cat", single_word=True),
        added_token(size + 2, "<mask>", lstrip=True, special=True),
        added_token(0, "<unk>", rstrip=True),
    ]
    merges = [["a", "b"], "b c", ["ab", "c"], ["<unk>", "<unk>"], ["a", "a"], ["aa", "a"]]
    tokens = ["<unk>", "<pad>", *"abce.!h", "ab", "bc", "abc", "aa", "aaa", "<unk><unk>"]
    pairs = {"type": "BPE", "vocab": {token: number for number, token in enumerate(tokens)}, "merges": merges}
    pairs |= {"unk_token": "<unk>", "byte_fallback": False}
    bytes_too = unigram("<pad>", *"abc", "ab", *BYTES, byte_fallback=True)
    tags = [
        added_token(len(bytes_too["vocab"]), "\n"),
        added_token(len(bytes_too["vocab"]) + 1, "<b>", normalized=True),
    ]
    clusters = {"type": "Precompiled", "precompiled_charsmap": _of_every_byte()}
    cases: dict[str, dict[str, Any]] = {
        "clusters": {"model": letters, "normalizer": clusters},
        "the start": {
            "model": letters,
            "normalizer": {"type": "Sequence", "normalizers": tidy},
            "pre_tokenizer": words,
        },
        "added tokens": {
            "model": letters,
            "normalizer": {"type": "Lowercase"},
            "added_tokens": added,
            "pre_tokenizer": words,
        },
        "no words": {"model": letters, "pre_tokenizer": metaspace | {"prepend_scheme": "never", "split": False}},
        "unknown, fused": {"model": {**pairs, "fuse_unk": True}},
        "unknown": {"model": {**pairs, "fuse_unk": False}},
        "bytes": {"model": bytes_too, "normalizer": {"type": "NFC"}},
        "lower case": {"model": bytes_too, "added_tokens": tags, "lowercase_prompts": True},
    }
    return {name: bare_document(pad=1, **parts) for name, parts in cases.items()}
