"""Tokenizers of checkpoints: opened with what will read them in a bundle, and written there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from ldm_export.checkpoint import LatentDiffusion
from ldm_export.checkpoint.inversions import added_tokens
from ldm_export.errors import BundleError, CheckpointError, InputError
from ldm_export.families.added_tokens import check_tokens, files_with_tokens
from ldm_export.families.libraries import library_class
from ldm_export.reading.documents import json_text, parsed, read_bytes
from ldm_export.runtime.tokenizer import Tokenizer
from ldm_export.runtime.tokenizer_clip import ClipTokenizer
from ldm_export.runtime.tokenizer_files import TokenizerFiles
from ldm_export.runtime.tokenizer_json import FILE as WHOLE
from ldm_export.runtime.tokenizer_json import JsonTokenizer

SOURCES = ("tokenizer.json", "spiece.model", "tokenizer.model")
"""Files of which transformers makes a tokenizer that is not of CLIP's kind; without any it makes one of no words."""
FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class CheckpointTokenizer(Protocol):
    """A tokenizer of a checkpoint."""

    @property
    def kind(self) -> str:
        """What reads its files in a bundle (:class:`ldm_export.contract.TextEncoder`)."""

    @property
    def folder(self) -> Path:
        """Where it is in the checkpoint."""

    @property
    def length(self) -> int:
        """Token ids of a text."""

    def open(self) -> Tokenizer:
        """The tokenizer as a bundle's runtime will have it."""

    def write(self, folder: Path) -> None:
        """Make the folder of its files in a bundle."""


@dataclass(frozen=True)
class ClipFiles:
    """A tokenizer of CLIP's kind, whose files a bundle takes over as they are, but for ``tokens`` that are added."""

    folder: Path
    kind: str = "clip"
    tokens: tuple[str, ...] = ()

    @classmethod
    def of(cls, checkpoint: LatentDiffusion, name: str) -> ClipFiles:
        """The tokenizer of a text encoder.

        Raises
        ------
        CheckpointError
            If it cannot be used, is longer than the encoder's positions or ends texts with an unknown id.
        InputError
            If a textual inversion cannot be added to it.
        """
        folder, config = checkpoint.tokenizer_folder(name), checkpoint.configs[name]
        tokenizer = open_tokenizer(folder)
        if tokenizer.model_max_length > config["max_position_embeddings"]:
            raise CheckpointError(
                f"{folder} gives {tokenizer.model_max_length} tokens; the {name} has "
                f"{config['max_position_embeddings']} positions. Set model_max_length in its tokenizer_config.json to "
                "that number, if the model was trained so."
            )
        special = max(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        if special >= config["vocab_size"]:
            raise CheckpointError(
                f"{folder} has special tokens with ids up to {special}; the {name} knows {config['vocab_size']} "
                "tokens. Use the tokenizer that was saved with the text encoder."
            )
        tokens = added_tokens(name, checkpoint.embeddings)
        if tokens:
            check_tokens(tokenizer, name, checkpoint)
            first, end = config["vocab_size"] - len(tokens), config["eos_token_id"]
            if len(tokenizer.vocabulary) != first or tokenizer.eos_token_id != end:
                raise InputError(
                    f"{folder} has {len(tokenizer.vocabulary)} tokens and ends texts with {tokenizer.eos_token_id}; "
                    f"the {name} has {first} and {end}, so that no textual inversion can be added. Use a tokenizer and "
                    "a text encoder that were saved together."
                )
        return cls(folder, tokens=tokens)

    @cached_property
    def length(self) -> int:
        return self.open().model_max_length

    def open(self) -> ClipTokenizer:
        if not self.tokens:
            return open_tokenizer(self.folder)
        changed, plain = files_with_tokens(self.folder, self.tokens), TokenizerFiles.of_folder(self.folder)
        return ClipTokenizer(TokenizerFiles(self.folder, lambda name: changed.get(name) or plain.read(name)))

    def write(self, folder: Path) -> None:
        """Copy the files; ``vocab.json`` and ``merges.txt`` are written out where only ``tokenizer.json`` has them."""
        whole = self.folder / WHOLE
        self.open()  # refuses what no runtime could read
        folder.mkdir()
        for name in (*FILES, WHOLE):
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)
        for name, content in (files_with_tokens(self.folder, self.tokens) if self.tokens else {}).items():
            (folder / name).write_bytes(content)
        if whole.is_file() and not (folder / FILES[0]).is_file():
            model = parsed(read_bytes(whole), repeats=True)["model"]
            merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
            (folder / FILES[0]).write_text(json_text(model["vocab"]), encoding="utf-8")
            (folder / FILES[1]).write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def open_tokenizer(folder: Path) -> ClipTokenizer:
    """Open a checkpoint's tokenizer of CLIP's kind, its faults reported as the checkpoint's."""
    if not (folder / WHOLE).is_file() and not all((folder / name).is_file() for name in FILES[:2]):
        raise CheckpointError(
            f"{folder} has neither tokenizer.json nor vocab.json and merges.txt. Put the model's tokenizer there."
        )
    try:
        return ClipTokenizer(folder)
    except BundleError as error:
        raise _of_checkpoint(error) from error


@dataclass(frozen=True)
class WholeTokenizer:
    """A tokenizer of transformers, which a bundle has as one ``tokenizer.json``.

    Attributes
    ----------
    class_name : of transformers' class, which reads the checkpoint's files, such as a ``spiece.model``
    length : token ids of a text; by default what the files say
    lowercase : whether the family's pipeline strips prompts and makes them lower case
    """

    folder: Path
    class_name: str
    given_length: int | None = None
    lowercase: bool = False
    kind: str = "tokenizers"

    @classmethod
    def of(
        cls, checkpoint: LatentDiffusion, name: str, length: int | None = None, *, lowercase: bool = False
    ) -> WholeTokenizer:
        """The tokenizer of a text encoder.

        Raises
        ------
        CheckpointError
            If it cannot be used, or gives ids that the encoder does not know.
        """
        folder, known = checkpoint.tokenizer_folder(name), checkpoint.configs[name]["vocab_size"]
        entry = checkpoint.index.get(folder.name)
        class_name = entry[1] if isinstance(entry, list) and len(entry) == 2 and entry[1] else "AutoTokenizer"
        made = cls(folder, class_name, length, lowercase)
        count = len(made.document["model"]["vocab"])
        largest = max([count - 1, *(token["id"] for token in made.document["added_tokens"])])
        if largest >= known:
            raise CheckpointError(
                f"{folder} has tokens with ids up to {largest}; the {name} knows {known}. "
                "Use the tokenizer that was saved with the text encoder."
            )
        return made

    @property
    def length(self) -> int:
        return int(self.document["truncation"]["max_length"])

    @cached_property
    def document(self) -> dict[str, Any]:
        """The ``tokenizer.json`` of a bundle."""
        if not any((self.folder / name).is_file() for name in SOURCES):
            raise CheckpointError(
                f"{self.folder} has neither {' nor '.join(SOURCES)}. Put the model's tokenizer there, whole."
            )
        reader, place = library_class("transformers", self.class_name), self.folder.resolve()
        try:
            tokenizer = reader.from_pretrained(place, local_files_only=True)
            found: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
            pad, token, side = int(tokenizer.pad_token_id), tokenizer.pad_token, tokenizer.padding_side
            cut = tokenizer.truncation_side
        except Exception as error:  # whatever transformers and tokenizers raise
            why = [*str(error).splitlines(), type(error).__name__][0][:200]
            raise CheckpointError(
                f"{self.folder} cannot be read as transformers' {self.class_name} ({why}). "
                "Use the tokenizer that was saved with the model."
            ) from error
        length = self.given_length or tokenizer.model_max_length
        if length > 1 << 20:
            raise CheckpointError(f"{self.folder} does not say how many tokens a text has. Set its model_max_length.")
        if cut != "right":
            raise CheckpointError(f"{self.folder} cuts long texts off on the {cut}; only 'right' is known.")
        found["truncation"] = {"direction": "Right", "max_length": length, "strategy": "LongestFirst", "stride": 0}
        padding = {"strategy": {"Fixed": length}, "direction": side.capitalize(), "pad_to_multiple_of": None}
        found["padding"] = {**padding, "pad_id": pad, "pad_type_id": 0, "pad_token": token}
        return {**found, "lowercase_prompts": self.lowercase}

    @property
    def pad_token_id(self) -> int:
        return int(self.document["padding"]["pad_id"])

    @property
    def pads_left(self) -> bool:
        return bool(self.document["padding"]["direction"] == "Left")

    def open(self) -> JsonTokenizer:
        text = json_text(self.document).encode()
        try:
            return JsonTokenizer(TokenizerFiles(self.folder, {WHOLE: text}.get))
        except BundleError as error:
            raise _of_checkpoint(error) from error

    def write(self, folder: Path) -> None:
        self.open()  # refuses what no runtime could read
        folder.mkdir()
        (folder / WHOLE).write_text(json_text(self.document), encoding="utf-8")


def _of_checkpoint(error: BundleError) -> CheckpointError:
    said = str(error).removesuffix(" Export the bundle anew.")
    return CheckpointError(f"{said} Use the tokenizer that was saved with the model.")


Tokenizers = Mapping[str, CheckpointTokenizer]
"""Tokenizers of a checkpoint by the text encoder that reads their ids."""
