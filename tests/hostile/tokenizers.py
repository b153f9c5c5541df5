"""Tokenizer files: vocabulary, merges, added tokens, lengths, and which of them are read at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from tests.hostile.base import Draft
from tests.hostile.case import MISSING, Case, file_value, rows

VOCABULARY, MERGES = "tokenizer/vocab.json", "tokenizer/merges.txt"
CONFIG, SPECIAL = "tokenizer/tokenizer_config.json", "tokenizer/special_tokens_map.json"
WHOLE, ADDED = "tokenizer/tokenizer.json", "tokenizer/added_tokens.json"

_config = partial(file_value, CONFIG)


def _vocabulary() -> Iterator[Case]:
    cat = ("cat</w>",)
    yield from rows(
        file_value(VOCABULARY, *cat),
        opened=("513",),
        refused=("-1", "513.0", '"513"', "true", "null", "[]", "512", "2147483648", "1" + "0" * 30, "NaN", MISSING),
    )
    yield from rows(file_value(VOCABULARY, "unused"), opened=("100000", "2147483647"))
    yield from rows(file_value(VOCABULARY, "<|startoftext|>"), refused=(MISSING, "0"))
    yield from rows(file_value(VOCABULARY, "<|endoftext|>"), refused=(MISSING,))
    for path in (VOCABULARY, MERGES):
        yield Case(f"no {path}", False, partial(_without, path=path))
    for path in (CONFIG, SPECIAL):
        yield Case(f"no {path}", path == SPECIAL, partial(_without, path=path))


def _without(draft: Draft, path: str) -> None:
    del draft.files[path]


MERGE_FILES: dict[str, tuple[bytes, bool]] = {
    "no merges": (b"#version: 0.2\n", True),
    "nothing": (b"", True),
    "no version": (b"c a\nca t</w>\n", True),
    "line ends of Windows": (b"#version: 0.2\r\nc a\r\nca t</w>\r\n", True),
    "no line end": (b"#version: 0.2\nc a\nca t</w>", True),
    "empty lines": (b"#version: 0.2\n\nc a\n\n", True),
    "a merge twice": (b"c a\nc a\n", True),
    "a lone carriage return": (b"#version: 0.2\nc a\rca t</w>\n", False),
    "a carriage return at the end": (b"#version: 0.2\nc a\r", False),
    "a NUL": (b"#version: 0.2\nc a\0\n", False),
    "a byte order mark": (b"\xef\xbb\xbf#version: 0.2\nc a\n", False),
    "no UTF-8": (b"#version: 0.2\nc \xff\n", False),
    "one token": (b"#version: 0.2\nca\n", False),
    "three tokens": (b"#version: 0.2\nc a t\n", False),
    "two spaces": (b"#version: 0.2\nc  a\n", False),
    "a space before": (b"#version: 0.2\n c a\n", False),
    "a space after": (b"#version: 0.2\nc a \n", False),
    "a tab": (b"#version: 0.2\nc\ta\n", False),
    "a no-break space": ("#version: 0.2\nc\u00a0a\n".encode(), False),
    "a next-line character": ("#version: 0.2\nc a\u0085\n".encode(), False),
    "a line separator": ("#version: 0.2\nc a\u2028ca t</w>\n".encode(), False),
    "a token that there is not": (b"#version: 0.2\nc zz\n", False),
    "a result that there is not": (b"#version: 0.2\nc b\n", False),
    "half of a character's bytes": (b"#version: 0.2\nc \xc3\n", False),
}


def _lengths() -> Iterator[Case]:
    yield from rows(
        _config("model_max_length"),
        opened=("8", "8.0"),
        refused=(
            "0",
            "1",
            "7",
            "9",
            "77",
            "-8",
            "8.5",
            '"8"',
            "true",
            "[8]",
            "2097152",
            "1e30",
            "NaN",
            "null",
            MISSING,
        ),
    )
    for side in ("padding_side", "truncation_side"):
        yield from rows(_config(side), opened=('"right"',), refused=('"left"', "1", "true", "null", "[]"))
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        yield from rows(
            file_value(CONFIG, role, prepare=partial(_without, path=SPECIAL)),
            opened=("null", '{"content": "<|endoftext|>"}', '{"content": "<|endoftext|>", "lstrip": true}', MISSING),
            refused=(
                '"zz"',
                "1",
                "[1]",
                '{"content": ""}',
                '{"content": 1}',
                '{"lstrip": true}',
                '{"content": "a", "lstrip": 1}',
            ),
        )


ADDED_TOKENS: dict[str, tuple[str, bool]] = {
    "one of the vocabulary": ('{"511": {"content": "<|endoftext|>", "special": true}}', True),
    "one that comes next": ('{"514": {"content": "zebra"}}', True),
    "one that is too far": ('{"600": {"content": "zebra"}}', False),
    "one of 5000 digits": (f'{{"{"9" * 5000}": {{"content": "zebra"}}}}', False),
    "one of ten digits": ('{"1000000000": {"content": "zebra"}}', False),
    "a negative one": ('{"-1": {"content": "zebra"}}', False),
    "one of Arabic digits": ('{"\\u0661": {"content": "zebra"}}', False),
    "one of superscript digits": ('{"\\u00b2": {"content": "zebra"}}', False),
    "one with a sign": ('{"+514": {"content": "zebra"}}', False),
    "one with an underscore": ('{"5_14": {"content": "zebra"}}', False),
    "one with a space": ('{" 514": {"content": "zebra"}}', False),
    "one that is no number": ('{"x": {"content": "zebra"}}', False),
    "one without content": ('{"514": {}}', False),
    "one of empty content": ('{"514": {"content": ""}}', False),
    "one of another's id": ('{"0": {"content": "zebra"}}', False),
    "one whose flag is a number": ('{"514": {"content": "zebra", "lstrip": 1}}', False),
    "one whose flag is null": ('{"514": {"content": "zebra", "normalized": null}}', False),
    "one that is text": ('{"514": "zebra"}', True),
    "one that is a number": ('{"514": 1}', False),
    "a list": ("[]", False),
    "null": ("null", False),
    "none": ("{}", True),
}


def _older_added() -> Iterator[Case]:
    for what, text, opens in (
        ("none", "{}", True),
        ("one that comes next", '{"zebra": 514}', True),
        ("an id that is text", '{"zebra": "514"}', False),
        ("an id that is half", '{"zebra": 514.5}', False),
        ("an id that is true", '{"zebra": true}', False),
        ("an id that is null", '{"zebra": null}', False),
        ("a negative id", '{"zebra": -1}', False),
        ("an id of 30 digits", '{"zebra": 1' + "0" * 30 + "}", False),
        ("a list", "[]", False),
        ("no JSON", "{", False),
    ):
        yield Case(f"{ADDED}: {what}", opens, partial(_file, path=ADDED, data=text.encode()))
        if not opens:
            yield Case(f"{ADDED}, unlisted: {what}", True, partial(_unlisted, path=ADDED, data=text.encode()))


def _file(draft: Draft, path: str, data: bytes) -> None:
    draft.files[path] = data


def _unlisted(draft: Draft, path: str, data: bytes) -> None:
    draft.unlisted[path] = data


def _whole(change: Callable[[dict[str, Any]], object]) -> Callable[[Draft], None]:
    """A ``tokenizer.json`` that says what the pair of files says, and then is changed."""

    def spoil(draft: Draft) -> None:
        model = {
            "type": "BPE",
            "end_of_word_suffix": "</w>",
            "vocab": draft.document(VOCABULARY),
            "merges": ["c a", "ca t</w>"],
        }
        document: dict[str, Any] = {"model": model}
        change(document)
        draft.put(WHOLE, document)

    return spoil


WHOLE_FILES: dict[str, tuple[Callable[[dict[str, Any]], object], bool]] = {
    "as the pair of files": (lambda whole: None, True),
    "merges as pairs": (lambda whole: whole["model"].update(merges=[["c", "a"]]), True),
    "no model": (lambda whole: whole.pop("model"), False),
    "a model that is a list": (lambda whole: whole.update(model=[]), False),
    "another suffix": (lambda whole: whole["model"].update(end_of_word_suffix=""), False),
    "no vocabulary": (lambda whole: whole["model"].pop("vocab"), False),
    "a vocabulary that is a list": (lambda whole: whole["model"].update(vocab=[]), False),
    "no merges": (lambda whole: whole["model"].pop("merges"), False),
    "merges that are an object": (lambda whole: whole["model"].update(merges={}), False),
    "a merge of three": (lambda whole: whole["model"].update(merges=[["c", "a", "t"]]), False),
    "a merge of numbers": (lambda whole: whole["model"].update(merges=[[1, 2]]), False),
    "a merge that is a number": (lambda whole: whole["model"].update(merges=[1]), False),
    "an added token without an id": (lambda whole: whole.update(added_tokens=[{"content": "zebra"}]), False),
    "an added token": (lambda whole: whole.update(added_tokens=[{"id": 514, "content": "zebra"}]), True),
    "an added token of a half id": (
        lambda whole: whole.update(added_tokens=[{"id": 514.0, "content": "zebra"}]),
        False,
    ),
    "added tokens that are a number": (lambda whole: whole.update(added_tokens=1), False),
    "added tokens that are texts": (lambda whole: whole.update(added_tokens=["zebra"]), False),
}


def _extra() -> Iterator[Case]:
    for key in ("extra_special_tokens", "additional_special_tokens"):
        yield from rows(
            _config(key),
            opened=("[]", "null", "{}", '["zebra"]', '[{"content": "zebra"}]', '{"a": "zebra"}'),
            refused=("1", '"zebra"', "true", "[1]", '[""]', "[null]", "[[]]"),
        )


def cases() -> Iterator[Case]:
    """All of this part."""
    yield from _vocabulary()
    yield from _lengths()
    yield from _extra()
    for what, (data, opens) in MERGE_FILES.items():
        yield Case(f"{MERGES}: {what}", opens, partial(_file, path=MERGES, data=data))
    for what, (raw, opens) in ADDED_TOKENS.items():
        case = file_value(CONFIG, "added_tokens_decoder")(raw, opens)
        yield Case(f"{CONFIG}: added_tokens_decoder: {what}", opens, case.change)
    yield from _older_added()
    for what, (change, opens) in WHOLE_FILES.items():
        yield Case(f"{WHOLE}: {what}", opens, _whole(change))
    wrong = json.dumps({"model": 1}).encode()
    yield Case(f"{WHOLE}, unlisted", True, partial(_unlisted, path=WHOLE, data=wrong))
    yield Case(f"{WHOLE}, unlisted, verified", False, partial(_unlisted, path=WHOLE, data=wrong), verify=True)
    yield Case(f"{SPECIAL}, unlisted", True, _unlisted_special)


def _unlisted_special(draft: Draft) -> None:
    draft.unlisted[SPECIAL] = b"{"
    del draft.files[SPECIAL]
