"""Tokenizers of checkpoints: opened with what will read them in a bundle, and copied there."""

from __future__ import annotations

import shutil
from pathlib import Path

from ldm_export.checkpoint import LatentDiffusion
from ldm_export.errors import BundleError, CheckpointError
from ldm_export.reading.documents import json_text, parsed, read_bytes
from ldm_export.runtime.tokenizer_clip import ClipTokenizer

FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
WHOLE = "tokenizer.json"


def token_count(checkpoint: LatentDiffusion, name: str) -> int:
    """Tokens of a prompt for a text encoder: its tokenizer's length, which its positions must hold.

    Raises
    ------
    CheckpointError
        If the tokenizer cannot be used, is longer than the encoder's positions or ends texts with an unknown id.
    """
    folder, config = checkpoint.tokenizer_folder(name), checkpoint.configs[name]
    tokenizer = open_tokenizer(folder)
    if tokenizer.model_max_length > config["max_position_embeddings"]:
        raise CheckpointError(
            f"{folder} gives {tokenizer.model_max_length} tokens; the {name} has {config['max_position_embeddings']} "
            "positions. Set model_max_length in its tokenizer_config.json to that number, if the model was trained so."
        )
    special = max(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if special >= config["vocab_size"]:
        raise CheckpointError(
            f"{folder} has special tokens with ids up to {special}; the {name} knows {config['vocab_size']} tokens. "
            "Use the tokenizer that was saved with the text encoder."
        )
    return tokenizer.model_max_length


def open_tokenizer(folder: Path) -> ClipTokenizer:
    """Open a checkpoint's tokenizer, its faults reported as the checkpoint's."""
    if not (folder / WHOLE).is_file() and not all((folder / name).is_file() for name in FILES[:2]):
        raise CheckpointError(
            f"{folder} has neither tokenizer.json nor vocab.json and merges.txt. Put the model's tokenizer there."
        )
    try:
        return ClipTokenizer(folder)
    except BundleError as error:
        said = str(error).removesuffix(" Export the bundle anew.")
        raise CheckpointError(f"{said} Use the tokenizer that was saved with the model.") from error


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files; ``vocab.json`` and ``merges.txt`` are written out where only ``tokenizer.json`` has
    them."""
    whole = source / WHOLE
    open_tokenizer(source)  # refuses what no runtime could read
    target.mkdir()
    for name in (*FILES, WHOLE):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if whole.is_file() and not (target / FILES[0]).is_file():
        model = parsed(read_bytes(whole), repeats=True)["model"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        (target / FILES[0]).write_text(json_text(model["vocab"]), encoding="utf-8")
        (target / FILES[1]).write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
