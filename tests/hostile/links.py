"""What lies in the folder: links, pipes, sizes, files that are not listed, and the layout of the Hub's cache."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.hostile.base import Draft, with_outside_weights
from tests.hostile.case import Case

PLAN, GRAPH, VOCABULARY = "plans/ddim-2.json", "unet/model.onnx", "tokenizer/vocab.json"


def _after(change: Callable[[Path], object]) -> Callable[[Draft], None]:
    return lambda draft: draft.after.append(change)


def _linked_file(folder: Path, path: str) -> None:
    outside = folder.parent / "outside"
    shutil.move(folder / path, outside)
    (folder / path).symlink_to(outside)


def _linked_inside(folder: Path, path: str) -> None:
    shutil.move(folder / path, folder / "other")
    (folder / path).symlink_to(folder / "other")


def _linked_folder(folder: Path, path: str) -> None:
    outside = folder.parent / "outside"
    shutil.move(folder / path, outside)
    (folder / path).symlink_to(outside)


def _replaced(folder: Path, path: str, make: Callable[[Path], object]) -> None:
    (folder / path).unlink()
    make(folder / path)


def _hub(folder: Path, blobs: str = "blobs", snapshots: str = "snapshots") -> Path:
    """Move the bundle into the Hub's cache's layout, and put a link to it where it was: gives the blobs' folder."""
    cache = folder.parent / "models--a--b"
    snapshot = cache / snapshots / "0123abc"
    store = cache / blobs
    store.mkdir(parents=True)
    snapshot.parent.mkdir()
    shutil.move(folder, snapshot)
    for number, file in enumerate(sorted(file for file in snapshot.rglob("*") if file.is_file())):
        blob = store / f"{number:064x}"
        shutil.move(file, blob)
        file.symlink_to(os.path.relpath(blob, file.parent))
    folder.symlink_to(snapshot)
    return store


def _then(folder: Path, change: Callable[[Path, Path], object]) -> None:
    store = _hub(folder)
    change(folder.resolve(), store)


def _to_outside(snapshot: Path, store: Path) -> None:
    outside = store.parent / "outside"
    shutil.copy(snapshot / PLAN, outside)
    _replaced(snapshot, PLAN, lambda path: path.symlink_to(outside))


def _to_below(snapshot: Path, store: Path) -> None:
    (store / "more").mkdir()
    shutil.copy(snapshot / PLAN, store / "more" / "x")
    _replaced(snapshot, PLAN, lambda path: path.symlink_to(store / "more" / "x"))


def _to_a_link(snapshot: Path, store: Path) -> None:
    outside = store.parent / "outside"
    shutil.copy(snapshot / PLAN, outside)
    (store / "link").symlink_to(outside)
    _replaced(snapshot, PLAN, lambda path: path.symlink_to(store / "link"))


def _to_nothing(snapshot: Path, store: Path) -> None:
    _replaced(snapshot, PLAN, lambda path: path.symlink_to(store / "none"))


def _folder_to_outside(snapshot: Path, store: Path) -> None:
    shutil.move(snapshot / "tokenizer", store.parent / "tokenizer")
    (snapshot / "tokenizer").symlink_to(store.parent / "tokenizer")


def _relisted_size(draft: Draft) -> None:
    draft.after.append(lambda folder: (folder / PLAN).write_bytes((folder / PLAN).read_bytes() + b" "))


def cases() -> Iterator[Case]:
    """All of this part."""
    for path in (PLAN, GRAPH, VOCABULARY, "manifest.json"):
        yield Case(f"{path} is a link out of the bundle", False, _after(partial(_linked_file, path=path)))
        yield Case(f"{path} is a pipe", False, _after(partial(_replaced, path=path, make=os.mkfifo)))
        yield Case(f"{path} is a folder", False, _after(partial(_replaced, path=path, make=Path.mkdir)))
        yield Case(f"{path} is missing", False, _after(partial(_replaced, path=path, make=lambda path: None)))
    yield Case("a link inside the bundle", False, _after(partial(_linked_inside, path=PLAN)))
    for path in ("tokenizer", "unet", "plans"):
        yield Case(f"{path} is a link out of the bundle", False, _after(partial(_linked_folder, path=path)))
    yield Case("an unlisted link", False, _after(lambda folder: (folder / "x").symlink_to("/etc/passwd")))
    yield Case("a link in a circle", False, _after(lambda folder: (folder / "x").symlink_to(folder)))
    yield Case("a file is longer than listed", False, _relisted_size)
    yield Case("the whole bundle is a link", True, _after(_whole_linked))
    for name, opens in (
        (".gitattributes", True),
        (".DS_Store", True),
        ("unet/.DS_Store", True),
        (".cache/huggingface/download/x.lock", True),
        ("README.md", True),
        ("unet/README.md", False),
        ("README.txt", False),
        ("unet/more.bin", False),
        ("tokenizer/tokenizer.json", False),
    ):
        for verify in (False, True):
            told = ", verified" if verify else ""
            change = partial(_unlisted, path=name)
            yield Case(f"an unlisted {name}{told}", opens or not verify, change, verify=verify)
    for verify in (False, True):
        told = ", verified" if verify else ""
        yield Case(f"the Hub's cache{told}", True, _after(_hub), verify=verify)
        yield Case(f"the Hub's cache with weights outside{told}", True, _hub_outside, verify=verify)
    yield Case("the Hub's cache, blobs of another name", False, _after(partial(_hub, blobs="stuff")))
    yield Case("the Hub's cache, snapshots of another name", False, _after(partial(_hub, snapshots="shots")))
    for change in (_to_outside, _to_below, _to_a_link, _to_nothing, _folder_to_outside):
        name = change.__name__.strip("_").replace("_", " ")
        yield Case(f"the Hub's cache with a link {name}", False, _after(partial(_then, change=change)))


def _whole_linked(folder: Path) -> None:
    shutil.move(folder, folder.parent / "real")
    folder.symlink_to(folder.parent / "real")


def _unlisted(draft: Draft, path: str) -> None:
    draft.unlisted[path] = b"x"


def _hub_outside(draft: Draft) -> None:
    with_outside_weights(draft)
    draft.after.append(_hub)
