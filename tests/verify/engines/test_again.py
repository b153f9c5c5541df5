"""What is there and holds is not built again."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldm_export.bundle import Bundle
from ldm_export.errors import ExportError
from ldm_export.export.tensorrt.profiles import Range
from ldm_export.verify.engines import build
from ldm_export.verify.engines.build import build_engines
from tests.verify.engines.engines import KIND, RTX, SMALL, child, contents, engines_of, settings

library = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")


def test_what_holds_is_not_built_again(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(small)
    child("raise SystemExit(3)", monkeypatch)
    started = time.perf_counter()
    made = build_engines(Bundle.open(small), settings(), SMALL)
    assert (made.built, made.because) == ((), "")
    assert time.perf_counter() - started < 1
    assert contents(small) == before
    with pytest.raises(ExportError, match="exit code 3"):
        build_engines(Bundle.open(small), settings(), SMALL, force=True)
    assert contents(small) == before


def another_release(bundle: Path) -> None:
    file = bundle / "targets" / KIND / "target.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": "1.2.0.1"}))


def another_graph(bundle: Path) -> None:
    file = bundle / "targets" / KIND / "target.json"
    document = json.loads(file.read_text())
    document["engines"]["text_encoder"]["source_hashes"]["text_encoder/model.onnx"] = "0" * 64
    file.write_text(json.dumps(document))


def damaged(bundle: Path) -> None:
    file = bundle / "targets" / KIND / "text_encoder.plan"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def cut_short(bundle: Path) -> None:
    (bundle / "targets" / KIND / "text_encoder.plan").write_bytes(b"an engine")


def lost(bundle: Path) -> None:
    (bundle / "targets" / KIND / "text_encoder.plan").unlink()


def unproved(bundle: Path) -> None:
    file = bundle / "targets" / KIND / "target.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"report": {}}))


STALE: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "another release": (another_release, {}, f"it was made with {RTX} 1.2.0.1, and this is {library.__version__}"),
    "another graph": (another_graph, {}, "its text_encoder was made from other graphs"),
    "a damaged engine": (damaged, {}, "its text_encoder.plan has been altered"),
    "other shapes": (lambda bundle: None, {"batch": Range(1, 2, 2)}, "its text_encoder was made for other shapes"),
    "an engine cut short": (cut_short, {}, "its text_encoder.plan has 9 bytes; target.json says"),
    "no engine": (lost, {}, "its text_encoder.plan is missing"),
    "no record": (unproved, {}, "it does not say what its text_encoder was compared with"),
    "another switch": (lambda bundle: None, {"sparse": True}, "it was made with other switches"),
}


@pytest.mark.parametrize("case", STALE)
def test_what_does_not_hold_is_built_again(small: Path, case: str) -> None:
    damage, options, reason = STALE[case]
    damage(small)
    made = build_engines(Bundle.open(small), settings(**options), SMALL)
    assert made.built == SMALL
    assert made.because.startswith(reason)
    assert made.target == engines_of(small)
    assert build_engines(Bundle.open(small), settings(**options), SMALL).built == ()
    assert [path.name for path in (small / "targets").iterdir()] == [KIND]


@pytest.mark.parametrize("case", ["a damaged engine", "another graph"])
def test_of_several_engines_only_the_damaged_one_is_built_again(small: Path, case: str) -> None:
    build_engines(Bundle.open(small), settings(), ["vae_encoder"])
    kept = small / "targets" / KIND / "vae_encoder.plan"
    file, both = kept.stat().st_ino, (*SMALL, "vae_encoder")
    damage, _, reason = STALE[case]
    damage(small)
    made = build_engines(Bundle.open(small), settings(), both)
    assert made.built == SMALL
    assert made.because.startswith(reason)
    assert kept.stat().st_ino == file
    assert set(engines_of(small).engines) == set(both)


def test_a_file_that_is_not_listed_goes(small: Path) -> None:
    before = contents(small)
    (small / "targets" / KIND / "more.plan").write_bytes(b"an engine")
    made = build_engines(Bundle.open(small), settings(), SMALL)
    assert (made.built, made.because) == ((), "its more.plan is not listed")
    assert contents(small) == before


def test_a_disk_without_links(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(file: Path, other: Path) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", none)
    build_engines(Bundle.open(small), settings(), ["vae_encoder"])
    assert set(engines_of(small).engines) == {*SMALL, "vae_encoder"}


def test_engines_add_up_and_each_is_kept(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that ends early keeps the engines that were done, and leaves nothing that does not open."""
    run = build.in_a_process

    def stopped(told: Any, what: str) -> Any:
        if "vae_encoder" in what:
            raise KeyboardInterrupt
        return run(told, what)

    monkeypatch.setattr(build, "in_a_process", stopped)
    with pytest.raises(KeyboardInterrupt):
        build_engines(Bundle.open(small), settings(), ["vae_decoder", "vae_encoder"])
    assert set(engines_of(small).engines) == {"text_encoder", "vae_decoder"}
    assert [path.name for path in (small / "targets").iterdir()] == [KIND]


def test_an_engine_of_an_old_loop_is_dropped(small: Path) -> None:
    """Of engines that were not asked for, those that no longer hold go, so that the others can be used."""
    build_engines(Bundle.open(small), settings(), ["vae_encoder"])
    file = small / "targets" / KIND / "target.json"
    document = json.loads(file.read_text())
    document["engines"]["vae_encoder"]["source_hashes"]["vae_encoder/model.onnx"] = "0" * 64
    file.write_text(json.dumps(document))
    made = build_engines(Bundle.open(small), settings(), SMALL)
    assert (made.built, made.because) == ((), "its vae_encoder was made from other graphs")
    assert set(engines_of(small).engines) == {"text_encoder"}
