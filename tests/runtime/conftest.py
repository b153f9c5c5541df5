"""CLIP tokenizer folders, made here from a byte-pair encoding trained on a few sentences."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

SENTENCES = [
    "a photo of a cat sitting on a red chair",
    "a photo of two dogs playing in the snow, highly detailed",
    "an emoji of a grinning face with smiling eyes",
    "it's the artist's best painting; they're sure we've seen it",
    "a smiling sun behind a small cloud, digital art, 8 k, 1 2 3 4 5",
    "flag of a far country, waving in the wind!",
    "the café's naïve façade, für Elise, señor",
]
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
START, END = "<|startoftext|>", "<|endoftext|>"


def byte_alphabet() -> list[str]:
    """The printable characters that stand for bytes, in CLIP's order: ``!`` first."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) for byte in visible] + [chr(256 + rank) for rank in range(len(hidden))]


@pytest.fixture(scope="session")
def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id as CLIP lays them out (bytes, bytes ending a word, merges, start, end), and the merges."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700, show_progress=False, initial_alphabet=byte_alphabet(), end_of_word_suffix="</w>"
    )
    learner.train_from_iterator(SENTENCES, trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    letters = byte_alphabet()
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(merge) for merge in merges] + [START, END]
    unique = list(dict.fromkeys(tokens))
    return {token: number for number, token in enumerate(unique)}, merges


@pytest.fixture(scope="session")
def make_tokenizer_folder(clip_vocabulary):
    """Return a function that writes a tokenizer folder: ``vocab.json``, ``merges.txt`` and any other JSON files."""

    def make(folder: Path, **json_files: Any) -> Path:
        vocab, merges = clip_vocabulary
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        for name, content in json_files.items():
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        return folder

    return make
