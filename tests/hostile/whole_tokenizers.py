"""A tokenizer of the kind "tokenizers": each part of its ``tokenizer.json``."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from tests.hostile.base import TOKENS, Draft, with_tokenizer_json
from tests.hostile.case import MISSING, Case, file_value, rows
from tests.tokenizer_fixtures import BYTES, added_token, bare_document, charsmap, packed_charsmap, unigram

FILE = "tokenizer/tokenizer.json"
MAP = charsmap({b"A": "a", "\u00bd".encode(): "1\u20442", "\u00ad".encode(): ""})
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
REPLACE = {"type": "Replace", "pattern": {"String": "x"}, "content": "y"}
LEFT_OUT = ("1", '"x"', "true", "[]", "{}", "[1]", '["x"]', "[{}]", "[null]")
"""Values that are no normalizer and no pre-tokenizer."""


def _unigram() -> dict[str, Any]:
    template = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}},
    }
    return bare_document(
        unigram("<pad>", "</s>", "▁a", "▁cat", "a", "c", "t"),
        length=TOKENS,
        pad=1,
        added_tokens=[added_token(2, "</s>", special=True), added_token(8, "dog", normalized=True)],
        normalizer={"type": "Sequence", "normalizers": [REPLACE, {"type": "Precompiled", "precompiled_charsmap": MAP}]},
        pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, METASPACE]},
        post_processor=template,
    )


def _bpe() -> dict[str, Any]:
    vocabulary = ["<pad>", "<unk>", *BYTES, "a", "c", "t", "ca", "cat", "\u2581"]
    model = {
        "type": "BPE",
        "vocab": {token: number for number, token in enumerate(vocabulary)},
        "merges": [["c", "a"], ["ca", "t"]],
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
        "dropout": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "ignore_merges": False,
    }
    return bare_document(model, length=TOKENS, normalizer=REPLACE, pre_tokenizer=SPLIT)


def _value(*path: str | int, of: Callable[[], dict[str, Any]] = _unigram) -> Callable[..., Case]:
    """As `file_value`, of the document that a function makes."""
    make = file_value(FILE, *path, prepare=lambda draft: with_tokenizer_json(draft, of()))

    def case(raw: str, opens: bool, **options: Any) -> Case:
        found = make(raw, opens, **options)
        return Case(f"{of.__name__[1:]} {found.name}", opens, found.change, **options)

    return case


def _change(
    name: str, opens: bool, change: Callable[[dict[str, Any]], object], of: Callable[..., Any] = _unigram
) -> Case:
    def spoil(draft: Draft) -> None:
        document = of()
        change(document)
        with_tokenizer_json(draft, document)

    return Case(f"{of.__name__[1:]} {FILE}: {name}", opens, spoil)


def _whole() -> Iterator[Case]:
    for of in (_unigram, _bpe):
        yield _change("as it should be", True, lambda document: None, of)
    for what, content in {
        "a list": b"[]",
        "no JSON": b"{",
        "no UTF-8": b'{"\xff": 1}',
        "nothing": b"",
        "null": b"null",
    }.items():
        yield Case(f"whole {FILE}: {what}", False, partial(_file, content=content))
    yield Case(f"no {FILE}", False, partial(_file, content=None))
    yield from rows(_value("version"), opened=('"1.0"', MISSING), refused=('"2.0"', "1.0", "null", "1", "[]"))
    yield from rows(_value("decoder"), opened=("1", '{"type": "x"}', "null"))
    yield from rows(
        _value("lowercase_prompts"),
        opened=("true", "false"),
        refused=("null", "1", "0", "1.0", '"true"', '""', "[]", "{}"),
    )
    yield from rows(_value("x"), opened=("1", "[[[]]]"), refused=("[" * 501 + "]" * 501, "1e999", "NaN", '"\\ud800"'))
    yield Case("the kind of a whole tokenizer.json is clip", False, _as_clip)


def _file(draft: Draft, content: bytes | None) -> None:
    with_tokenizer_json(draft, {})
    if content is None:
        del draft.files[FILE]
    else:
        draft.files[FILE] = content


def _as_clip(draft: Draft) -> None:
    with_tokenizer_json(draft, _unigram())
    draft.manifest["roles"]["text_encoders"][0]["kind"] = "clip"


def _length_and_padding() -> Iterator[Case]:
    for part in ("truncation", "padding"):
        yield from rows(_value(part), refused=("null", "1", "[]", "{}", MISSING))
    yield from rows(
        _value("truncation", "max_length"),
        opened=("8",),
        refused=("7", "9", "8.0", '"8"', "0", "1", "-8", "true", "null", "1048577", "1" + "0" * 30, MISSING),
    )
    yield from rows(_value("truncation", "direction"), refused=('"Left"', '"right"', "1", "null", MISSING))
    yield from rows(_value("truncation", "stride"), opened=("0",), refused=("1", "-1", "0.0", "false", "null", MISSING))
    yield from rows(_value("truncation", "strategy"), opened=('"OnlyFirst"', "1", MISSING))
    yield from rows(
        _value("padding", "strategy"),
        opened=('{"Fixed": 8}',),
        refused=(
            '{"Fixed": 8.0}',
            '{"Fixed": 7}',
            '{"Fixed": 8, "x": 1}',
            '"BatchLongest"',
            "8",
            "[8]",
            "{}",
            "null",
            MISSING,
        ),
    )
    yield from rows(
        _value("padding", "pad_to_multiple_of"), opened=("null", MISSING), refused=("0", "8", "false", '""')
    )
    yield from rows(_value("padding", "direction"), opened=('"Left"',), refused=('"left"', "1", "null", "[]", MISSING))
    yield from rows(
        _value("padding", "pad_id"),
        opened=("1", "5", "513"),
        refused=("2", "514", "2147483647", "-1", "1.0", "2147483648", "1" + "0" * 30, '"1"', "true", "null", MISSING),
    )  # 2 ends each text, and the text encoder does not know the ids from 514
    yield from rows(_value("padding", "pad_token"), opened=("1", '"x"'))


def _model() -> Iterator[Case]:
    for of in (_unigram, _bpe):
        value = partial(_value, "model", of=of)
        yield from rows(value(), refused=("null", "1", "[]", "{}", '"Unigram"', MISSING))
        yield from rows(value("type"), refused=('"WordPiece"', '"WordLevel"', '"unigram"', "1", "null", "[]", MISSING))
        yield from rows(value("byte_fallback"), refused=("0", "null", '"false"', "[]", MISSING))
        yield from rows(value("vocab"), refused=("null", "1", '"x"', "[]", "{}", "[[]]", '{"a": 1}', MISSING))
        yield from rows(value("x"), opened=("1", "[]"))
    yield from rows(_value("model", "byte_fallback"), opened=("false",), refused=("true",))
    yield from rows(
        _value("model", "unk_id"), opened=("0", "7"), refused=("8", "-1", "0.0", "true", '"0"', "null", MISSING)
    )
    yield from rows(
        _value("model", "vocab", 5),
        opened=(*('["a", 0]', '["a", -0.0]', '["a", 1e308]', '["a", -1e308]', '["a", 5e-324]', '["x", 1]'),
                *('["a", 123456789012345678901234567890]', '["\\u0000", 1]', '["\\ud83d\\ude00", 1]', '["a", 1e-400]')),
        refused=(*('["a", NaN]', '["a", Infinity]', '["a", 1e309]', f'["a", 1{"0" * 400}]', '["a", null]',
                 '["a", true]'),
                 *('["a", "1"]', '["", 1]', '["a"]', '["a", 1, 2]', '[1, 1]', '"a"', "1", "null", "{}", '["c", 1]'),
                 *('["<pad>", 1]', '["\\udead", 1]', '{"0": "a", "1": 1}', "[[]]")),
    )  # fmt: skip
    yield from rows(_value("model", "vocab", 0), opened=('["<unk>", 1e308]', '["<unk>", -1e308]'))
    value = partial(_value, "model", of=_bpe)
    yield from rows(
        value("vocab", "cat"),
        opened=("262",),
        refused=("261", "-1", "262.0", '"262"', "true", "null", "[]", "2147483648", "1" + "0" * 30, MISSING),
    )
    yield from rows(value("vocab", "x"), opened=("264", "511"), refused=("0",))
    yield from rows(value("vocab", "unseen"), opened=("100000", "2147483647"))
    yield from rows(value("vocab", ""), refused=("264",))
    yield from rows(value("vocab", "<0x41>"), refused=(MISSING,))
    yield from rows(value("unk_token"), opened=('"a"',), refused=('"zz"', "1", "null", "[]", "{}", "true", MISSING))
    yield from rows(value("fuse_unk"), opened=("false",), refused=("null", "0", "1", MISSING))
    yield from rows(value("byte_fallback"), opened=("false",))
    for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
        yield from rows(value(affix), opened=('""', "null", MISSING), refused=('"x"', "0", "false", "[]", "{}"))
    yield from rows(value("dropout"), opened=("null", MISSING), refused=("0.1", "0", "0.0", "false", "2", '""'))
    yield from rows(value("ignore_merges"), opened=("false", "null", MISSING), refused=("true", "0", "0.0", '""', "[]"))
    yield from rows(
        value("merges"),
        opened=("[]", '["c a"]', '["c a", ["ca", "t"]]', '["c a", "c a"]'),
        refused=("null", "1", "{}", '"c a"', '["c"]', '["c a t"]', '["c  a"]', '[" c a"]', '[["c"]]',
                 '[["c", "a", "t"]]',
                 '[["c", 1]]', '[[1, 2]]', "[1]", "[null]", '[["c", "zz"]]', '[["c", "t"]]', '[["", "c"]]',
                 '["#version: 0.2"]',
                 MISSING),
    )  # fmt: skip


def _added_tokens() -> Iterator[Case]:
    yield from rows(
        _value("added_tokens"), opened=("[]",), refused=("null", "1", "{}", '["x"]', "[1]", "[null]", "[[]]")
    )
    yield _change("no added tokens", True, lambda document: document.pop("added_tokens"))
    for flag in ("single_word", "lstrip", "rstrip", "normalized", "special"):
        yield from rows(
            _value("added_tokens", 1, flag), opened=("true", "false"), refused=("1", "null", '"true"', "[]", MISSING)
        )
    yield from rows(
        _value("added_tokens", 1, "id"),
        opened=("8",),
        refused=("7", "9", "0", "-1", "8.0", "true", '"8"', "null", "1" + "0" * 30, MISSING),
    )
    yield from rows(
        _value("added_tokens", 1, "content"),
        opened=('"x"', '"\\u0000"', '" d"', '"\\ud83d\\ude00"'),
        refused=('""', "1", "null", "[]", '"</s>"', '"a"', '"\\u00ad"', '"\\ud800"', MISSING),
    )
    for of, number in ((_unigram, 8), (_bpe, 264)):
        for what, (tokens, opens) in _added(number).items():
            yield _change(
                f"added tokens: {what}", opens, lambda document, t=tokens: document.update(added_tokens=t), of
            )
    far = {"vocab": {"far": 100_000}}
    gaps = {
        "an added token beside a gap": ([added_token(265, "dog")], False),
        "an added token behind a gap": ([added_token(100_001, "dog")], False),
        "one of the vocabulary beside a gap": ([added_token(100_000, "far")], True),
    }
    for what, (tokens, opens) in gaps.items():

        def change(document: dict[str, Any], tokens: Any = tokens) -> None:
            document["model"]["vocab"] |= far["vocab"]
            document["added_tokens"] = tokens

        yield _change(what, opens, change, _bpe)


def _added(number: int) -> Mapping[str, tuple[list[dict[str, Any]], bool]]:
    first, second = partial(added_token, number), partial(added_token, number + 1)
    return {
        "one twice": ([first("dog"), second("dog")], False),
        "the same id twice": ([first("dog"), first("fox")], False),
        "another order": ([second("fox"), first("dog")], False),
        "the same raw and normalised": ([first("x", normalized=True), second("y")], True),
        "the same in normalised text": ([first("x", normalized=True), second("y", normalized=True)], False),
        "a space": ([first(" ")], True),
        "a space that another takes along": ([first(" "), second("dog", rstrip=True)], False),
        "a wide space that another takes along": ([first("\u3000x", normalized=True), second("a", rstrip=True)], False),
        "a separator of files, which is no space": ([first("\x1c"), second("dog", rstrip=True)], True),
        "a space that its follower takes along": ([first(" "), second("dog", lstrip=True)], True),
        "a thousand": ([added_token(number + k, f"dog{k}") for k in range(1000)], True),
    }


def _steps() -> Iterator[Case]:
    yield from rows(
        _value("normalizer"),
        opened=("null", MISSING, '{"type": "NFC"}', '{"type": "Lowercase", "x": 1}',
                '{"type": "Sequence", "normalizers": []}'),
        refused=(*LEFT_OUT, '{"type": "Sequence"}', '{"type": "Sequence", "normalizers": {}}', '{"type": "NFKC"}',
                 '{"type": 1}',
                 '{"type": "Sequence", "normalizers": [null]}', '{"type": "Nmt"}', '{"normalizers": []}',
                 '{"type": "nfc"}',
                 '{"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": []}]}'),
    )  # fmt: skip
    yield from rows(
        _value("pre_tokenizer"),
        opened=("null", MISSING, '{"type": "WhitespaceSplit"}', '{"type": "Sequence", "pretokenizers": []}'),
        refused=(*LEFT_OUT, '{"type": "Sequence"}', '{"type": "Sequence", "pretokenizers": 1}',
                 '{"type": "Whitespace"}',
                 '{"type": "Sequence", "pretokenizers": [{"type": "NFC"}]}', '{"type": "BertPreTokenizer"}'),
    )  # fmt: skip
    for side in ("strip_left", "strip_right"):
        strip = {"type": "Strip", "strip_left": True, "strip_right": False}
        yield from rows(
            _step("normalizer", strip, side), opened=("true", "false"), refused=("1", "null", '""', MISSING)
        )
    for kind, part in (("normalizer", REPLACE), ("pre_tokenizer", SPLIT)):
        yield from rows(
            _step(kind, part, "pattern"),
            opened=('{"String": "a"}', '{"String": ".*"}', '{"String": "[\\\\"}', '{"String": "\\u0000"}'),
            refused=('{"String": ""}', '{"Regex": "a"}', '{"String": "a", "Regex": "a"}', '{"String": 1}', "{}",
                     '"a"', "null",
                     '["String"]', MISSING),
        )  # fmt: skip
    yield from rows(
        _step("normalizer", REPLACE, "content"),
        opened=('""', '"\\u0000"', json.dumps("a" * 1024)),
        refused=("1", "null", "[]", json.dumps("a" * 1025), MISSING),
    )
    doubling = [REPLACE | {"content": "xx"}] * 11
    for count in (10, 11):
        parts = {"type": "Sequence", "normalizers": doubling[:count]}
        yield _change(f"doubled {count} times", count == 10, lambda document, p=parts: document.update(normalizer=p))
    yield from rows(
        _step("pre_tokenizer", SPLIT, "behavior"), refused=('"Removed"', '"Isolated"', "1", "null", MISSING)
    )
    yield from rows(_step("pre_tokenizer", SPLIT, "invert"), refused=("true", "0", "null", MISSING))
    yield from rows(
        _step("pre_tokenizer", METASPACE, "replacement"), refused=('"_"', '"\u2581\u2581"', '""', "1", MISSING)
    )
    yield from rows(
        _step("pre_tokenizer", METASPACE, "prepend_scheme"),
        opened=('"first"', '"never"', '"always"'),
        refused=('"First"', "true", "null", "[]", MISSING),
    )
    yield from rows(
        _step("pre_tokenizer", METASPACE, "split"), opened=("false",), refused=("0", "null", '"x"', MISSING)
    )
    yield from rows(_step("pre_tokenizer", METASPACE, "add_prefix_space"), opened=("false", "1"))


def _step(kind: str, part: Mapping[str, Any], key: str) -> Callable[..., Case]:
    """Cases of a value of the one normalizer or pre-tokenizer of a document."""

    def made() -> dict[str, Any]:
        return _unigram() | {kind: dict(part)}

    made.__name__ = f"_{part['type']}"
    return _value(kind, key, of=made)


def _charsmaps() -> Iterator[Case]:
    plain = [0] * 256
    units = [256 << 10, *plain[1:], *plain]
    texts = b"a\0"

    def leaf(where: int, value: int) -> str:
        """A trie in which the letter c ends: at the unit ``where`` there is what it stands for."""
        at = 256 + ord("c")
        found = [*units, *plain]
        found[at] = (at ^ where) << 10 | 1 << 8 | ord("c")
        if where < len(found):
            found[where] = 1 << 31 | value
        return packed_charsmap(found, texts + "\u00e9\0".encode())

    endless = [0, *plain[1:]]
    endless[0] = 1 << 10
    for label in range(1, 256):  # each byte leads to the same units again
        endless[label] = label << 10 | label
    cut = base64.b64decode(MAP)
    maps = {
        "one that is right": (leaf(512, 0), True),
        "a text that begins in the middle": (leaf(512, 1), True),
        "the last text's end": (leaf(512, 4), True),
        "half a character": (leaf(512, 3), False),
        "behind the texts": (leaf(512, 5), False),
        "far behind the texts": (leaf(512, 2**31 - 1), False),
        "a leaf outside": (leaf(768, 0), False),
        "a leaf far outside": (leaf(1 << 20, 0), False),
        "children outside": (packed_charsmap([512 << 10, *plain[1:]], texts), False),
        "children far outside": (packed_charsmap([0x7FFFFFFF & ~0x100, *plain[1:]], texts), False),
        "no end": (packed_charsmap(endless, texts), True),
        "no children": (packed_charsmap(plain, texts), True),
        "no trie": (packed_charsmap([], texts), False),
        "half a block": (packed_charsmap(plain[:128], texts), False),
        "no texts": (packed_charsmap(plain, b""), False),
        "a text without an end": (packed_charsmap(plain, b"a\0b"), False),
        "texts of no UTF-8": (packed_charsmap(plain, b"\xff\0"), False),
        "a text of half a surrogate pair": (packed_charsmap(plain, b"\xed\xa0\x80\0"), False),
        "a text of 1024 letters": (packed_charsmap(plain, b"a" * 1024 + b"\0"), True),
        "a text of 1025 letters": (packed_charsmap(plain, b"a" * 1025 + b"\0"), False),
        "a text of 1024 wide letters": (packed_charsmap(plain, "\u00e9".encode() * 1024 + b"\0"), True),
        "nothing": ("", False),
        "three bytes": (base64.b64encode(cut[:3]).decode(), False),
        "a size alone": (base64.b64encode(cut[:4]).decode(), False),
        "half of it": (base64.b64encode(cut[: len(cut) // 2]).decode(), False),
        "a size beyond the file": (base64.b64encode(b"\0\0\0\xfc" + cut[4:]).decode(), False),
        "the largest size": (base64.b64encode(b"\xff\xff\xff\xff" + cut[4:]).decode(), False),
        "no padding": (MAP.rstrip("="), MAP.endswith("=") is False),
        "more padding": (MAP + "====", False),
        "padding alone": ("====", False),
        "padding inside": ("AA==" + MAP, False),
        "one letter less": (MAP[:-1], False),
        "a line break": (MAP[:40] + "\n" + MAP[40:], False),
        "a letter of no base64": ("-" + MAP[1:], False),
        "a letter of no ASCII": ("\u00e9" + MAP[1:], False),
        "bits behind its end": (_with_spare_bits(), False),
    }
    for what, (text, opens) in maps.items():
        part = {"type": "Precompiled", "precompiled_charsmap": text}
        yield _change(f"charsmap: {what}", opens, lambda document, p=part: document.update(normalizer=p))
    made = {"type": "Precompiled", "precompiled_charsmap": MAP}
    yield from rows(_step("normalizer", made, "precompiled_charsmap"), refused=("null", "1", "[]", '"x"', MISSING))


def _with_spare_bits() -> str:
    """Base64 of which the last letter has bits that stand for nothing."""
    text = packed_charsmap([0] * 256, b"a\0")
    body = text.rstrip("=")
    return body[:-1] + chr(ord(body[-1]) + 1) + "=" * (len(text) - len(body))


def _templates() -> Iterator[Case]:
    yield from rows(_value("post_processor"), opened=("null", MISSING), refused=("1", "[]", "{}", '"x"', "false"))
    yield from rows(_value("post_processor", "type"), refused=('"RobertaProcessing"', '"Sequence"', "1", MISSING))
    yield from rows(
        _value("post_processor", "single"),
        opened=('[{"Sequence": {"id": "A"}}]', '[{"Sequence": {"id": "A"}, "SpecialToken": 1}]',
                '[{"SpecialToken": {"id": "</s>"}}, {"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "</s>"}}]'),
        refused=("null", "{}", "[]", "[1]", "[{}]", '[{"Sequence": {"id": "B"}}]', '[{"Sequence": "A"}]',
                 '["$A", "</s>"]',
                 '[{"Sequence": {"id": "A"}}, {"Sequence": {"id": "A"}}]', '[{"SpecialToken": {"id": "</s>"}}]',
                 '[{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "zz"}}]',
                 '[{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": 1}}]',
                 '[{"Sequence": {"id": "A"}}, {"SpecialToken": {}}]',
                 '[{"Sequence": {"id": "A"}}, {"SpecialToken": 1}]', MISSING),
    )  # fmt: skip
    yield from rows(
        _value("post_processor", "special_tokens", "</s>", "ids"),
        opened=("[2]", "[]", "[8]", "[2, 2, 2, 2, 2, 2, 2]"),
        refused=(
            "[9]",
            "[-1]",
            "[2.0]",
            '["2"]',
            "[true]",
            "2",
            "null",
            "{}",
            "[1]",
            "[2, 2, 2, 2, 2, 2, 2, 2]",
            MISSING,
        ),
    )  # 1 is the padding
    yield from rows(
        _value("post_processor", "special_tokens"), refused=("null", "[]", '"x"', "{}", '{"</s>": 1}', MISSING)
    )
    yield from rows(_value("post_processor", "pair"), opened=("1", "null"))


def cases() -> Iterator[Case]:
    """All of this part."""
    yield from _whole()
    yield from _length_and_padding()
    yield from _model()
    yield from _added_tokens()
    yield from _steps()
    yield from _charsmaps()
    yield from _templates()
