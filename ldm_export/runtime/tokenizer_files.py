"""A tokenizer's files in the Hugging Face layout, each checked as it is read."""

from __future__ import annotations

import os
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from ldm_export.bundle import Bundle
from ldm_export.errors import BundleError
from ldm_export.reading.documents import MalformedError, parsed, read_bytes


class TokenizerFiles:
    """A tokenizer's files, each checked as it is read.

    Parameters
    ----------
    folder : where they are, for errors
    read : gives a file's bytes by its name, or None where there is none
    """

    def __init__(self, folder: Path, read: Callable[[str], bytes | None]) -> None:
        self._folder, self._read = folder, read

    @classmethod
    def of_folder(cls, folder: str | PathLike[str]) -> TokenizerFiles:
        """Return the files of a folder, whatever is there."""

        def read(name: str) -> bytes | None:
            file = Path(folder) / name
            return read_bytes(file) if os.path.lexists(file) else None

        return cls(Path(folder), read)

    @classmethod
    def of_bundle(cls, bundle: Bundle, folder: str = "tokenizer") -> TokenizerFiles:
        """Return the files that a bundle lists in a folder; what else lies there is not read."""

        def read(name: str) -> bytes | None:
            listed = f"{folder}/{name}"
            return bundle.read(listed) if listed in bundle.manifest.files else None

        return cls(bundle.path / folder, read)

    def bad(self, name: str, what: str) -> BundleError:
        return BundleError(f"Tokenizer folder {self._folder}: {name} {what}. Export the bundle anew.")

    def read(self, name: str) -> bytes | None:
        """Return a file's bytes, or None if there is no such file."""
        try:
            return self._read(name)
        except (OSError, MalformedError) as exc:
            raise self.bad(name, f"cannot be read ({exc})") from exc

    def json(self, name: str) -> dict[str, Any] | None:
        """Return the JSON object in a file, or None if there is no such file; of a repeated key the last value."""
        data = self.read(name)
        if data is None:
            return None
        try:
            found = parsed(data, repeats=True)
        except MalformedError as exc:
            raise self.bad(name, f"is {exc}") from exc
        if not isinstance(found, dict):
            raise self.bad(name, f"holds a JSON {type(found).__name__}; an object is needed")
        return found
