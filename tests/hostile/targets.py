"""``targets/ort-cpu``: what is wrong with a target never stops the bundle; the target is skipped with a warning."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.hostile.base import Draft, sparse, with_target
from tests.hostile.case import MISSING, Case, set_raw, told

FOLDER = "targets/ort-cpu"


def _value(*path: str | int) -> Callable[[str, bool], Case]:
    def case(raw: str, runs: bool) -> Case:
        def change(draft: Draft) -> None:
            with_target(draft)
            set_raw(draft, draft.target, path, raw)

        return Case(f"target {told(path, raw)}", True, change, target=runs)

    return case


def _changed(change: Callable[[Draft], object]) -> Callable[[Draft], None]:
    def spoil(draft: Draft) -> None:
        with_target(draft)
        change(draft)

    return spoil


def _after(change: Callable[[Path], object]) -> Callable[[Draft], None]:
    return _changed(lambda draft: draft.after.append(lambda folder: change(folder / FOLDER)))


def _values() -> Iterator[Case]:
    for path, skipped in {
        ("format_version",): ("0", "1", "2.0", "true", "null", MISSING),
        ("kind",): ('"ort-gpu"', "null", "1", MISSING),
        ("source_hashes",): ("{}", "[]", "null", '{"unet/model.onnx": 1}', MISSING),
        ("needs",): ("{}", "[]", "null", '{"onnxruntime": 1}', MISSING),
        ("needs", "onnxruntime"): ('"0.1"', '""', "null", "1.32", MISSING),
        ("needs", "cpu"): ('"another"', "null", MISSING),
        ("needs", "more"): ('"x"',),
        ("graphs",): ("{}", "[]", "null", MISSING),
        ("graphs", "unet"): ("{}", "[]", "null", MISSING),
        ("graphs", "more"): ('{"path": "unet.onnx", "hoisted": {}, "shallow": "", "deep_channels": 0}',),
        ("graphs", "unet", "path"): ('"../../unet/model.onnx"', '"none.onnx"', '""', "null", '"/etc/passwd"', MISSING),
        ("graphs", "unet", "hoisted"): (
            "[]",
            "null",
            '{"sample": "none.onnx"}',
            '{"x": "unet.onnx"}',
            '{"sample": 1}',
            MISSING,
        ),
        ("graphs", "unet", "shallow"): ('"none.onnx"', '"unet.onnx"', "null", "1", MISSING),
        ("graphs", "unet", "deep_channels"): ("-1", "1", "1.0", "true", "null", '"0"', "1" + "0" * 30, MISSING),
        ("report",): ("[]", "null", "NaN", "1e999", MISSING),
    }.items():
        for raw in skipped:
            yield _value(*path)(raw, False)
    yield _value("report")('{"x": [1, null, "y"]}', True)
    yield _value("report", "x")('1, "x": 2', False)
    yield _value("files")("{}", False)
    yield _value("files")("null", False)


def _text(change: Callable[[str], bytes]) -> Callable[[Draft], None]:
    return _changed(lambda draft: setattr(draft, "target_bytes", change))


def _swapped(draft: Draft) -> None:
    draft.target_files["unet.onnx"] = draft.target_files["vae_decoder.onnx"]


def _unlisted_weights(draft: Draft) -> None:
    import onnx

    model = onnx.load_from_string(draft.target_files["text_encoder.onnx"])
    table = next(tensor for tensor in model.graph.initializer if tensor.name == "table")
    table.ClearField("raw_data")
    table.data_location = onnx.TensorProto.EXTERNAL
    table.external_data.add(key="location", value="../../text_encoder/model.onnx")
    draft.target_files["text_encoder.onnx"] = model.SerializeToString()


def _linked(folder: Path, name: str) -> None:
    file = folder / name
    os.rename(file, folder.parent / "outside")
    file.symlink_to(folder.parent / "outside")


def _all_linked(folder: Path) -> None:
    os.rename(folder, folder.parent.parent.parent / "outside-target")
    folder.symlink_to(folder.parent.parent.parent / "outside-target")


def _replaced(folder: Path, name: str, make: Callable[[Path], object]) -> None:
    (folder / name).unlink()
    make(folder / name)


def _altered(folder: Path) -> None:
    data = bytearray((folder / "unet.onnx").read_bytes())
    data[data.index(b"g\x12") if b"g\x12" in data else -1] ^= 1
    (folder / "unet.onnx").write_bytes(data)


def cases() -> Iterator[Case]:
    """All of this part."""

    def skipped(name: str, change: Callable[[Draft], object], **options: Any) -> Case:
        return Case(f"target: {name}", True, change, target=False, **options)

    yield Case("target: nothing is wrong", True, with_target, target=True)
    yield Case("target: nothing is wrong, verified", True, with_target, target=True, verify=True)
    yield from _values()
    yield skipped("target.json with a byte order mark", _text(lambda text: b"\xef\xbb\xbf" + text.encode()))
    yield skipped("target.json with a NUL after", _text(lambda text: text.encode() + b"\0"))
    yield skipped("target.json that is no UTF-8", _text(lambda text: text.encode() + b"\xff"))
    yield skipped("target.json that is empty", _text(lambda text: b""))
    yield skipped("target.json nested too deep", _text(lambda text: b"[" * 100_000))
    yield skipped("target.json that is a list", _text(lambda text: b"[]"))
    yield skipped("target.json of 20 GiB", _after(lambda folder: sparse("target.json", 20 << 30)(folder)))
    yield skipped("target.json that is a pipe", _after(partial(_replaced, name="target.json", make=os.mkfifo)))
    yield skipped("target.json that is missing", _after(partial(_replaced, name="target.json", make=lambda path: None)))
    yield skipped("target.json that is a link", _after(partial(_linked, name="target.json")))
    yield skipped("a folder that is a link", _after(_all_linked))
    yield skipped("a graph that is a link", _after(partial(_linked, name="unet.onnx")))
    yield skipped("a graph that is missing", _after(partial(_replaced, name="unet.onnx", make=lambda path: None)))
    yield skipped("a graph that is a pipe", _after(partial(_replaced, name="unet.onnx", make=os.mkfifo)))
    yield skipped("a graph of another size", _after(sparse("unet.onnx", 10)))
    yield skipped("a file that is not listed", _after(lambda folder: (folder / "more.bin").write_bytes(b"x")))
    yield skipped("an altered graph, verified", _after(_altered), verify=True)
    yield skipped("another graph of the UNet", _changed(_swapped))
    yield skipped("a graph that reads weights outside", _changed(_unlisted_weights))
    yield skipped(
        "a graph that is no ONNX", _changed(lambda draft: draft.target_files.update({"unet.onnx": b"no graph"}))
    )
    yield skipped("made from other graphs", _changed(_of_other_graphs))
    yield Case("target: no folder of targets", True, lambda draft: None, target=False)


def _of_other_graphs(draft: Draft) -> None:
    assert draft.target is not None
    source_hashes = json.loads(json.dumps(draft.target["source_hashes"]))
    draft.target["source_hashes"] = {**source_hashes, "unet/model.onnx": "0" * 64}
