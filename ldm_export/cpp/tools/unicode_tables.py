"""Writes ``src/unicode_tables.inc`` from what ``tokenizers`` and Python's strings do with every code point.

The regular expressions, lower case and normal form of ``tokenizers`` come from three libraries with a Unicode version
each, and Python's strings have another, so they are asked and not looked up. Run again, with Python 3.11, when the
tests say that a new release of ``tokenizers`` differs:

    python tools/unicode_tables.py > src/unicode_tables.inc
"""

import struct
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

CODE_POINTS = [*range(0xD800), *range(0xE000, 0x110000)]
HANGUL = range(0xAC00, 0xD7A4)  # composed by arithmetic, not by table (The Unicode Standard, section 3.12)
MARKS = {  # one character of every canonical combining class that is given to characters
    1: 0x334, 7: 0x93C, 8: 0x3099, 9: 0x94D, 10: 0x5B0, 11: 0x5B1, 12: 0x5B2, 13: 0x5B3, 14: 0x5B4,
    15: 0x5B5, 16: 0x5B6, 17: 0x5B7, 18: 0x5B8, 19: 0x5B9, 20: 0x5BB, 21: 0x5BC, 22: 0x5BD, 23: 0x5BF, 24: 0x5C1,
    25: 0x5C2, 26: 0xFB1E, 27: 0x64B, 28: 0x64C, 29: 0x64D, 30: 0x64E, 31: 0x64F, 32: 0x650, 33: 0x651, 34: 0x652,
    35: 0x670, 36: 0x711, 84: 0xC55, 91: 0xC56, 103: 0xE38, 107: 0xE48, 118: 0xEB8, 122: 0xEC8, 129: 0xF71,
    130: 0xF72, 132: 0xF74, 202: 0x321, 214: 0x1DCE, 216: 0x31B, 218: 0x302A, 220: 0x316, 222: 0x59A, 224: 0x302E,
    226: 0x1D16D, 228: 0x5AE, 230: 0x300, 232: 0x315, 233: 0x35C, 234: 0x35D, 240: 0x345,
}  # fmt: skip

COPYRIGHT, GRAVE, KA, VIRAMA, JOINER, HANGUL_VT = "\u00a9", "\u0300", "\u0915", "\u094d", "\u200d", "\u1161\u11a8"
SIGMA, FINAL_SIGMA = "\u03a3", "\u03c2"

lower = normalizers.Lowercase().normalize_str
nfc = normalizers.NFC().normalize_str
nfd = normalizers.NFD().normalize_str


def members(pattern: str) -> list[int]:
    """The code points that match, ``!`` not being one of them."""
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated").pre_tokenize_str
    return [c for c in CODE_POINTS if len(split("!" + chr(c) + "!")) == 3]


def word_characters() -> Iterator[int]:
    """The code points beside which an added token of ``single_word`` is not seen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_tokens([AddedToken("x", single_word=True, normalized=False)])
    return (c for c in CODE_POINTS if c != ord("x") and not tokenizer.encode(chr(c) + "x").ids)


def combining_class(c: int) -> int:
    """Class by which marks change places: one of a higher class moves behind one of a lower."""
    mark = chr(c)
    above = [k for k, other in MARKS.items() if nfd(chr(other) + mark) != chr(other) + mark]
    below = [k for k, other in MARKS.items() if nfd(mark + chr(other)) != mark + chr(other)]
    between = [k for k in MARKS if k not in above and k not in below]
    assert len(between) == 1, (hex(c), between)
    return between[0]


def combining_classes() -> Iterator[tuple[int, int]]:
    lowest, highest = chr(MARKS[1]), chr(MARKS[240])
    for c in CODE_POINTS:
        mark = chr(c)
        if nfd(mark) == mark and (nfd(highest + mark) != highest + mark or nfd(mark + lowest) != mark + lowest):
            yield c, combining_class(c)


def decompositions() -> dict[int, str]:
    return {c: nfd(chr(c)) for c in CODE_POINTS if c not in HANGUL and nfd(chr(c)) != chr(c)}


def compositions(decomposed: dict[int, str]) -> Iterator[tuple[int, int, int]]:
    """First, second, composed: the pairs that normal form C joins."""
    for c, whole in decomposed.items():
        first, second = nfc(whole[:-1]), whole[-1]
        if nfc(chr(c)) == chr(c) and len(first) == 1 and nfc(first + second) == chr(c):
            yield ord(first), ord(second), c


def charsmap_of_every_byte() -> bytes:
    """A map of characters for `normalizers.Precompiled` whose trie has each byte, and for each the text "x"."""
    leaf = 512
    units = [256 << 10, *[0] * 767]
    for byte in range(1, 256):
        units[256 + byte] = ((256 + byte) ^ leaf) << 10 | 1 << 8 | byte
    units[leaf] = 1 << 31
    return struct.pack(f"<{len(units) + 1}I", 4 * len(units), *units) + b"x\0"


marked = normalizers.Precompiled(charsmap_of_every_byte()).normalize_str
"""Gives an x for each extended grapheme cluster of fewer than six bytes, and for each character of a longer one."""


def is_joined(before: str, after: str) -> bool:
    """Whether a character goes on with the cluster of six bytes or more before it.

    With an accent behind it makes two x where it is a part of that, and one where a cluster begins.
    """
    text = before + after + GRAVE
    return len(marked(text)) == len(text)


def traits(c: int) -> int:
    """What the rules of Unicode Standard Annex 29 ask of a character, as in unicode.cpp; but for Hangul syllables, and
    for regional indicators, of which no cluster of fewer than six bytes has more than one."""
    one = chr(c)
    is_prepended = len(marked(one + "a")) == 1
    if is_prepended:  # whatever follows goes on, so that no more can be asked
        return 4
    is_extending = len(marked("a" + one)) == 1
    before_v, before_t = (is_joined(one, syllable) for syllable in HANGUL_VT)
    return sum(
        flag
        for flag, has in (
            (1, is_extending),
            (2, is_extending and is_joined(COPYRIGHT + one + JOINER, COPYRIGHT)),
            (8, len(marked(one + GRAVE + GRAVE)) == 2),
            (16, before_v and not before_t),
            (32, before_v and before_t),
            (64, before_t and not before_v),
            (128, is_joined(one + JOINER, COPYRIGHT)),
            (256, is_joined(one + VIRAMA, KA)),
            (512, is_joined(KA + one, KA)),
            (1024, is_joined(KA + VIRAMA + one, KA)),
        )
        if has
    )


def grapheme_traits() -> Iterator[tuple[int, int, int]]:
    """First and last of each run of characters with the same traits, and those."""
    by_character = {c: found for c in CODE_POINTS if c not in HANGUL and (found := traits(c))}
    for found in sorted({*by_character.values()}):
        yield from ((first, last, found) for first, last in ranges(c for c in by_character if by_character[c] == found))


def ends_with_final_sigma(text: str) -> bool:
    return text.lower().endswith(FINAL_SIGMA)


def case_ignorable() -> list[int]:
    """What `str.lower` does not look at, where it asks whether a sigma is the last letter of a word."""
    known = (c for c in CODE_POINTS if ends_with_final_sigma("A" + chr(c) + SIGMA))
    return [c for c in known if not ends_with_final_sigma(chr(c) + SIGMA)]


def cased() -> list[int]:
    """What makes a word of the sigma behind it; of the characters that are looked at."""
    return [c for c in CODE_POINTS if ends_with_final_sigma(chr(c) + SIGMA)]


def ranges(points: Iterable[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run of neighbours."""
    runs: list[tuple[int, int]] = []
    for c in points:
        if runs and c == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], c)
        else:
            runs.append((c, c))
    yield from runs


def braced(row: tuple[Any, ...]) -> str:
    return "{" + ",".join(braced(cell) if isinstance(cell, tuple) else f"0x{cell:x}" for cell in row) + "}"


def table(declaration: str, rows: Iterable[tuple[Any, ...]]) -> None:
    print(f"{declaration}[] = {{")
    line = "   "
    for row in rows:
        cell = f" {braced(row)},"
        if len(line) + len(cell) > 118:
            print(line)
            line = "   "
        line += cell
    print(line)
    print("};\n")


def mapping(name: str, texts: dict[int, str], longest: int) -> None:
    rows = ((c, (*map(ord, text), *[0] * (longest - len(text)))) for c, text in texts.items())
    assert all(len(text) <= longest for text in texts.values())
    table(f"constexpr Mapping<{longest}> {name}", rows)


def main() -> None:
    print("// Made by tools/unicode_tables.py; not to be edited.\n")
    for name, pattern in (("LETTERS", r"\p{L}"), ("NUMBERS", r"\p{N}"), ("SPACES", r"\s")):
        table(f"constexpr Range {name}", ranges(members(pattern)))
    table("constexpr Range WORD_CHARACTERS", ranges(sorted({*word_characters(), ord("x")})))
    mapping("LOWER", {c: lower(chr(c)) for c in CODE_POINTS if lower(chr(c)) != chr(c)}, 2)
    decomposed = decompositions()
    mapping("DECOMPOSED", decomposed, max(map(len, decomposed.values())))
    table("constexpr Pair COMPOSED", sorted(compositions(decomposed)))
    table("constexpr CombiningClass COMBINING_CLASSES", combining_classes())
    table("constexpr Traits GRAPHEMES", sorted(grapheme_traits()))
    print(f"// Python's strings, of Unicode {unicodedata.unidata_version}.\n")
    table("constexpr Range PYTHON_SPACES", ranges(c for c in CODE_POINTS if chr(c).isspace()))
    table("constexpr Range PYTHON_CASED", ranges(cased()))
    table("constexpr Range PYTHON_CASE_IGNORABLE", ranges(case_ignorable()))
    mapping("PYTHON_LOWER", {c: chr(c).lower() for c in CODE_POINTS if chr(c).lower() != chr(c)}, 2)


if __name__ == "__main__":
    main()
