"""The one reader of foreign text: what it takes, what it refuses, and that it never reads what it need not."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from ldm_export.reading.documents import DEEPEST, MalformedError, parsed, read_bytes, read_json, read_text

TAKEN = {
    "an object": ('{"a": [1, 2.5, true, null, "x"]}', {"a": [1, 2.5, True, None, "x"]}),
    "transformers' word for no limit": ("1000000000000000019884624838656", 1000000000000000019884624838656),
    "the largest float": ("1.7976931348623157e308", 1.7976931348623157e308),
    "a number that rounds to zero": ("1e-400", 0.0),
    "a whole surrogate pair": ('"\\ud83d\\ude00"', "\U0001f600"),
    "an escaped NUL": ('"\\u0000"', "\0"),
    "a brace in a text": ('"' + "[" * 2000 + '"', "[" * 2000),
}
REFUSED = {
    "a repeated key": '{"a": 1, "a": 2}',
    "NaN": "NaN",
    "Infinity": "[Infinity]",
    "a float beyond float64": "1e999",
    "an integer beyond float64": "1" + "0" * 400,
    "an integer of many digits": "9" * 5000,
    "a negative one": "-2" + "0" * 308,
    "half a surrogate": '"\\ud800"',
    "the other half": '"x\\udE00"',
    "halves in the wrong order": '"\\ude00\\ud83d"',
    "half a surrogate in a key": '{"\\uDBFF": 1}',
    "nested too deep": "[" * (DEEPEST + 1) + "]" * (DEEPEST + 1),
    "nested far too deep": "[" * 100_000,
    "objects nested too deep": '{"a":' * (DEEPEST + 1) + "1" + "}" * (DEEPEST + 1),
    "NUL after the document": "1\0",
    "a byte order mark": "\ufeff1",
    "a line break in a text": '"a\nb"',
    "a leading zero": "01",
    "a comma too many": "[1,]",
    "nothing": "",
    "bytes that are not UTF-8": b'"\xff"',
    "UTF-8 of a surrogate": b'"\xed\xa0\x80"',
    "an overlong form": b'"\xc0\x80"',
}


@pytest.mark.parametrize("name", TAKEN)
def test_json_that_is_taken(name: str) -> None:
    text, value = TAKEN[name]
    assert parsed(text) == value == parsed(text.encode())


def test_nesting_up_to_the_bound_is_taken() -> None:
    assert json.dumps(parsed("[" * DEEPEST + "]" * DEEPEST)) == "[" * DEEPEST + "]" * DEEPEST


@pytest.mark.parametrize("name", REFUSED)
def test_json_that_is_refused(name: str) -> None:
    with pytest.raises(MalformedError):
        parsed(REFUSED[name])


def test_python_s_own_dialect_is_taken_where_it_is_asked_for() -> None:
    assert parsed('{"a": -Infinity}', constants=True) == {"a": -math.inf}
    assert parsed('{"a": 1, "a": 2}', repeats=True) == {"a": 2}


def test_files_are_regular_and_bounded(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"a": 1}')
    (tmp_path / "link.json").symlink_to(file)
    assert read_json(file) == read_json(tmp_path / "link.json") == {"a": 1}
    assert read_bytes(file, 8) == b'{"a": 1}'
    with pytest.raises(MalformedError, match="at most 7 are read"):
        read_bytes(file, 7)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MalformedError, match="not a regular file"):
        read_text(tmp_path / "pipe")
    with pytest.raises((MalformedError, OSError)):
        read_bytes(tmp_path)
    with (tmp_path / "giant").open("wb") as sparse:
        sparse.truncate(100 << 30)
    with pytest.raises(MalformedError, match=r"107,374,182,400 bytes long"):
        read_bytes(tmp_path / "giant")
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "missing")
