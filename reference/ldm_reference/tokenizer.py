"""A CLIP-style byte-level BPE trained on the captions, saved as CLIP's files.

CLIP's scheme (Radford et al., 2103.00020, after Sennrich et al., 1508.07909): text is NFC-normalised, its white space
folded, lower-cased and split into words; each word is spelt in 256 printable byte symbols, the last marked ``</w>``.
Ids: the 256 bytes, the 256 marked bytes, one id a merge, start of text, end of text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from ldm_reference.config import ConfigError

START, END = "<|startoftext|>", "<|endoftext|>"
SMALLEST_VOCAB = 2 * 256 + 2
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def _clip_scheme(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn at most ``vocab_size - 514`` merges from the captions; the same captions give the same merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < SMALLEST_VOCAB:
        raise ConfigError(f"vocab_size = {vocab_size} is below {SMALLEST_VOCAB}, the bytes and the two marks")
    symbols = [*alphabet, *(byte + "</w>" for byte in alphabet)]
    learner = _clip_scheme(models.BPE(end_of_word_suffix="</w>"))
    # Equally frequent pairs are merged in the order of their ids: unless every symbol is given one, as a special token,
    # ids follow the order of a hash table, and each run learns another vocabulary.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=symbols, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(captions, trainer)
    learned = json.loads(learner.to_str())["model"]["merges"]
    merges = [(left, right) for left, right in learned][: vocab_size - len(symbols) - 2]
    tokens = dict.fromkeys([*symbols, *(left + right for left, right in merges), START, END])
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = _clip_scheme(models.BPE(vocab, merges, end_of_word_suffix="</w>", unk_token=END))
    tokenizer.add_special_tokens([AddedToken(START, normalized=True, special=True), AddedToken(END, special=True)])
    tokenizer.post_processor = processors.RobertaProcessing(
        (END, vocab[END]), (START, vocab[START]), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer


def encode(tokenizer: Tokenizer, captions: Sequence[str], length: int) -> Tensor:
    """Token ids (N, length), int64: start, words, end, and the end token again as padding."""
    end = tokenizer.token_to_id(END)
    rows = []
    for encoding in tokenizer.encode_batch(list(captions)):
        ids = [*encoding.ids[: length - 1], end] if len(encoding.ids) > length else encoding.ids
        rows.append(ids + [end] * (length - len(ids)))
    return torch.tensor(rows)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, length: int) -> None:
    """``vocab.json`` and ``merges.txt`` as CLIP has them, with the two config files that transformers reads."""
    folder.mkdir(parents=True, exist_ok=True)
    model = json.loads(tokenizer.to_str())["model"]
    _write(folder / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False))
    _write(folder / "merges.txt", "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]))
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    _write(folder / "special_tokens_map.json", json.dumps(special, indent=2))
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    _write(folder / "tokenizer_config.json", json.dumps({**settings, **special}, indent=2))


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")
