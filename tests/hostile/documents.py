"""JSON and text as such: syntax, encoding, numbers, nesting, size; alike in every file that is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from tests.hostile.base import Draft, sparse
from tests.hostile.case import ASKS, Case, file_value, manifest_value, rows

OPENED = (
    "1e308",
    "-1.5E+2",
    "1e-400",
    "1" + "0" * 300,
    "1000000000000000019884624838656",
    '"\\ud83d\\ude00"',
    '"\\u0000"',
    '"' + "[" * 2000 + '"',
    "[" * 498 + "]" * 498,
    '[{}, [], "", null, true, false, 0, -0]',
    '"\U0001f600 \u2028 \ufeff \x7f"',
    '" \\" \\\\ \\/ \\b \\f \\n \\r \\t "',
)
"""Values of a free key; two containers are around it in the manifest."""
REFUSED = (
    "NaN",
    "Infinity",
    "-Infinity",
    "nan",
    "1e999",
    "-1e999",
    "1" + "0" * 400,
    "9" * 5000,
    "-2" + "0" * 308,
    '"\\ud800"',
    '"x\\udE00"',
    '"\\ude00\\ud83d"',
    '{"\\uDBFF": 1}',
    "[" * 600 + "]" * 600,
    "[" * 100_000,
    '{"a":' * 600 + "1" + "}" * 600,
    '"a\nb"',
    '"a\x00b"',
    '"\\x41"',
    '"\\u12"',
    '"unterminated',
    "01",
    "+1",
    "1.",
    ".5",
    "1e",
    "0x10",
    "1_000",
    "\uff11",
    "[1,]",
    '{"a": 1,}',
    "{a: 1}",
    "'a'",
    "True",
    "None",
    "undefined",
    "// note\n1",
    "/* note */ 1",
    "1, 2",
    "",
    "[",
    "]",
)
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], bool]] = {
    "spaces around": (lambda data: b" \t\r\n" + data + b"\r\n\t ", True),
    "a byte order mark": (lambda data: b"\xef\xbb\xbf" + data, False),
    "NUL after": (lambda data: data.rstrip() + b"\0", False),
    "NUL and more after": (lambda data: data.rstrip() + b"\0x", False),
    "a second document after": (lambda data: data + b"{}", False),
    "a form feed before": (lambda data: b"\x0c" + data, False),
    "a no-break space after": (lambda data: data + b"\xc2\xa0", False),
    "cut short": (lambda data: data.rstrip()[:-1], False),
    "empty": (lambda data: b"", False),
    "spaces alone": (lambda data: b"  \n", False),
    "UTF-16": (lambda data: data.decode().encode("utf-16"), False),
    "a list around": (lambda data: b"[" + data + b"]", False),
    "null": (lambda data: b"null", False),
    "a byte that is no UTF-8": (lambda data: data.replace(b'": ', b'\xff": ', 1), False),
    "an overlong form": (lambda data: data.replace(b'": ', b'\xc0\x80": ', 1), False),
    "UTF-8 of a surrogate": (lambda data: data.replace(b'": ', b'\xed\xa0\x80": ', 1), False),
}
"""What may become of a whole file, and whether the bundle is opened."""
PLAN, VOCABULARY, CONFIG, SPECIAL = (
    "plans/ddim-2.json",
    "tokenizer/vocab.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
)
GIB = 1 << 30


def _damaged(draft: Draft, path: str, damage: Callable[[bytes], bytes]) -> None:
    draft.files[path] = damage(draft.files[path])


def _damaged_manifest(draft: Draft, damage: Callable[[bytes], bytes]) -> None:
    draft.manifest_bytes = lambda text: damage(text.encode())


def _giant(draft: Draft, path: str, size_bytes: int) -> None:
    if path != "manifest.json":
        draft.entries[path] = {"size_bytes": size_bytes, "sha256": "0" * 64}
    draft.after.append(sparse(path, size_bytes))


def cases() -> Iterator[Case]:
    """All of this part."""
    yield Case("nothing is wrong", True, lambda draft: None)
    yield Case("nothing is wrong, verified", True, lambda draft: None, verify=True)
    yield Case("nothing is wrong, with an image", True, lambda draft: None, asks={**ASKS, "image": True})
    yield from rows(manifest_value("source", "x"), OPENED, REFUSED)
    yield from rows(manifest_value("source", "x"), refused=('1, "x": 2', '{"a": 1, "a": 2}', '{"a": 1, "\\u0061": 2}'))
    yield from rows(file_value(CONFIG, "x"), OPENED, REFUSED)
    yield from rows(file_value(CONFIG, "x"), opened=('1, "x": 2', '{"a": 1, "a": 2}'))  # as transformers reads it
    yield from rows(file_value(PLAN, "sampler"), refused=('"ddim", "sampler": "ddim"', "NaN", '"\\ud800"'))
    for name, (damage, opens) in DAMAGE.items():
        yield Case(f"manifest.json: {name}", opens, partial(_damaged_manifest, damage=damage))
        for path in (PLAN, VOCABULARY, CONFIG, SPECIAL):
            yield Case(f"{path}: {name}", opens, partial(_damaged, path=path, damage=damage))
    for path in ("manifest.json", PLAN, VOCABULARY, CONFIG, SPECIAL, "tokenizer/merges.txt"):
        yield Case(f"{path} of 20 GiB", False, partial(_giant, path=path, size_bytes=20 * GIB))
    yield Case("manifest.json of 70 MB of spaces", False, _padded)


def _padded(draft: Draft) -> None:
    draft.manifest_bytes = lambda text: text.encode() + b" " * 70_000_000
