"""What is computed once from every picture and kept on disk: posterior parameters of the autoencoder, features.

A cache is one safetensors file, read through a memory map, so that it may be larger than the memory. It is used only
while its key, a hash of all that went into it, is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from ldm_reference.data import CaptionedImages
from ldm_reference.state import write_tensors

CHUNK = 64


def fingerprint(*parts: str | nn.Module | CaptionedImages) -> str:
    """SHA-256 of texts, of networks' weights, and of pictures' names, sizes and dates."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            for key, tensor in part.state_dict().items():
                digest.update(key.encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(part, CaptionedImages):
            for name in part.files:
                status = (part.folder / name).stat()
                digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
        else:
            digest.update(part.encode())
    return digest.hexdigest()


def cached(file: Path, key: str, compute: Callable[[], Tensor], *, writes: bool = True) -> Tensor:
    """What ``compute`` gives, (N, ...), from ``file`` if it holds that already; memory-mapped where it does.

    Every process of a run calls it, and the one with ``writes`` writes.
    """
    if (found := _read(file, key)) is not None:
        return found
    value = compute()
    if writes:
        write_tensors(file, {"value": value.contiguous()}, {"key": key})
    return value


def _read(file: Path, key: str) -> Tensor | None:
    if not file.is_file():
        return None
    try:
        with safetensors.safe_open(file, "pt") as opened:
            same = (opened.metadata() or {}).get("key") == key
            return opened.get_tensor("value") if same else None
    except safetensors.SafetensorError:  # damaged: made again
        return None


@torch.no_grad()
def over_pictures(data: CaptionedImages, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``function`` of all pictures (N, C, H, W) in order, a chunk at a time."""
    count = len(data.files)
    chunks: Iterable[range] = (range(i, min(i + CHUNK, count)) for i in range(0, count, CHUNK))
    return torch.cat([function(data.load(chunk)) for chunk in chunks])
