"""The tokenizer that is trained on the captions: transformers reads it, and every process learns the same."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import ldm_reference
import pytest
import torch
import transformers
from ldm_reference.config import ConfigError
from ldm_reference.tokenizer import encode, save_tokenizer, train_tokenizer

from tests.training import COLOURS

CAPTIONS = [
    *("grinning face with smiling eyes", "a photo of a cat sitting on a red chair", "flag of a far country"),
    *("it's the artist's best; they're sure we've seen it", "the café's naïve façade, für elise", "keycap 10"),
]


def strings() -> list[str]:
    """Captions, their pieces shuffled, odd spacing, other scripts and random characters: 400 texts."""
    draw = random.Random(0)
    words = " ".join(CAPTIONS).split()
    alphabets = ["abcXYZ 019'!?.,-_()", "éßñøçÅ žš", "字漢 かな한글", "🎨👩‍🚀❤️ ", "\t\n  a", "\u2028\xa0\u3000ǅİſ"]
    texts = ["", " ", "A  PHOTO\tof\n\na Cat", "<|endoftext|>", "a <|startoftext|>b", "don't'll", "x" * 40, *CAPTIONS]
    while len(texts) < 200:
        texts.append(" ".join(draw.choices(words, k=draw.randint(1, 12))))
    while len(texts) < 400:
        texts.append("".join(draw.choices(draw.choice(alphabets), k=draw.randint(1, 15))))
    return texts


@pytest.mark.parametrize("vocab_size", [514, 600, 5000])
def test_tokenizer_is_transformers(tmp_path: Path, vocab_size: int) -> None:
    length = 20
    tokenizer = train_tokenizer(CAPTIONS, vocab_size)
    save_tokenizer(tokenizer, tmp_path, length)
    judge = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    given = encode(tokenizer, strings(), length)
    expected = judge(strings(), padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert judge.model_max_length == length
    for text, ids, others in zip(strings(), given.tolist(), expected.tolist(), strict=True):
        assert ids == others, text
    assert given.dtype == torch.int64
    assert int(given.max()) == tokenizer.get_vocab_size() - 1 <= vocab_size - 1


def test_tokenizer_is_the_same_in_every_process() -> None:
    """A resumed run learns its tokenizer anew: equally frequent pairs must not follow a hash table's order."""
    code = f"from ldm_reference.tokenizer import train_tokenizer as t;print(t({[*CAPTIONS, *COLOURS]!r}, 560).to_str())"
    folder = str(Path(ldm_reference.__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {folder!r}); {code}"
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout
    assert other.decode() == train_tokenizer([*CAPTIONS, *COLOURS], 560).to_str() + "\n"
    assert train_tokenizer([*CAPTIONS, *COLOURS][::-1], 560).to_str() + "\n" == other.decode()


def test_tokenizer_of_too_few_symbols() -> None:
    with pytest.raises(ConfigError, match="vocab_size = 513 is below 514"):
        train_tokenizer(CAPTIONS, 513)
