"""``auto`` on a CPU: what is measured, what is remembered, and that neither ever stands in the way of a picture."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from ldm_export.bundle import Bundle
from ldm_export.cli import main
from ldm_export.errors import BackendError, BundleError
from ldm_export.runtime import Pipeline
from ldm_export.runtime.backends import auto
from ldm_export.runtime.backends.onnxruntime import OnnxRuntimeBackend

pytestmark = pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO (extra openvino) is not installed")

OPENVINO_WINS = {"onnxruntime": 4.0, "openvino": 3.0}
ONNXRUNTIME_WINS = {"onnxruntime": 3.0, "openvino": 4.0}
NO_TIMES = {
    "empty": b"",
    "not JSON": b"\x00\xff{",
    "a list": b"[1, 2]",
    "a side is missing": b'{"onnxruntime": 1.5}',
    "text": b'{"onnxruntime": "1.5", "openvino": 2.5}',
    "not a number": b'{"onnxruntime": NaN, "openvino": 2.5}',
    "infinite": b'{"onnxruntime": Infinity, "openvino": 2.5}',
    "negative": b'{"onnxruntime": -1.5, "openvino": 2.5}',
    "deep": b"[" * 100_000,
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of a user who has both libraries."""
    monkeypatch.setattr(auto, "openvino_version", lambda: "1.0")
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ldm_export"


class Measured(list[dict[str, float]]):
    """What was measured, in place of the truth; ``result`` is what comes next."""

    result = OPENVINO_WINS

    def __call__(self, *_: object) -> dict[str, float]:
        self.append(self.result)
        return self.result


@pytest.fixture
def timed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Measured:
    measured = Measured()
    monkeypatch.setattr(auto, "measure", measured)
    return measured


def opened(bundle: Path, threads: int | None = None) -> str:
    return Pipeline.open(bundle, threads=threads).backend.partition(" ")[0]


# --- what is measured -----------------------------------------------------------------------------------------------


def test_the_measured_faster_one_draws(tiny_bundle: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ldm_export"):
        pipeline = Pipeline.open(tiny_bundle)
    (file,) = cache.iterdir()
    times = json.loads(file.read_text())
    faster = min(times, key=times.get)
    assert pipeline.requested_backend == "auto"
    assert pipeline.backend.startswith(f"{faster} ")
    assert [record.getMessage() for record in caplog.records] == [
        f"measured: onnxruntime {times['onnxruntime']:.1f} ms, openvino {times['openvino']:.1f} ms a call of the "
        f"denoiser; {faster} is used from now on"
    ]
    assert np.isfinite(pipeline.generate("a red circle", steps=10).latents).all()


@pytest.mark.parametrize("kind", ["unconditional", "class-conditional", "lcm", "sdxl"])
def test_models_of_other_kinds_are_measured(
    kinds: Callable[[str], tuple[Path, Path]], kind: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "BUDGET_S", 0.0)
    opened(kinds(kind)[1])
    assert len(list(cache.iterdir())) == 1


class Clock:
    """A clock that only sleeps and calls move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now, self.calls = 0.0, ""
        monkeypatch.setattr(auto.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(auto.time, "sleep", self.advance)

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def side(self, letter: str, *seconds: float) -> Callable[[], None]:
        """A call that takes these times, the last of them for ever."""
        left = list(seconds)

        def call() -> None:
            self.calls += letter
            self.advance(left.pop(0) if len(left) > 1 else left[0])

        return call


def test_small_networks_are_timed_in_turn_for_about_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    times = auto.time_calls({"a": clock.side("a", 0.2, 0.02, 0.01, 0.02), "b": clock.side("b", 0.2, 0.03)})
    assert times == pytest.approx({"a": 10.0, "b": 30.0})
    assert clock.calls.startswith("ab" + "aaabb" * 2)
    assert 1.0 <= clock.now < 1.5


def test_large_networks_are_called_twice_each(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert auto.time_calls({"a": clock.side("a", 20.0), "b": clock.side("b", 10.0)}) == pytest.approx(
        {"a": 20_000.0, "b": 10_000.0}
    )
    assert clock.calls == "abab"


def test_large_networks_are_never_both_in_memory(
    tiny_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together: list[list[str]] = []
    monkeypatch.setattr(auto, "time_calls", lambda calls: together.append(list(calls)) or dict.fromkeys(calls, 1.0))
    opened(tiny_bundle)
    monkeypatch.setattr(auto, "LARGE_BYTES", 1)
    opened(tiny_bundle, threads=1)
    assert together == [["onnxruntime", "openvino"], ["onnxruntime"], ["openvino"]]


# --- what is remembered ---------------------------------------------------------------------------------------------


def test_it_is_measured_once(tiny_bundle: Path, timed: Measured, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ldm_export"):
        assert [opened(tiny_bundle) for _ in range(3)] == ["openvino"] * 3
    assert len(timed) == len(caplog.records) == 1


def test_openvino_is_not_imported_where_it_is_known_to_be_slower(
    tiny_bundle: Path, timed: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed.result = ONNXRUNTIME_WINS
    assert opened(tiny_bundle) == "onnxruntime"
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert opened(tiny_bundle) == "onnxruntime"
    assert len(timed) == 1


def test_another_version_threads_processor_or_unet_is_measured_anew(
    tiny_bundle: Path,
    kinds: Callable[[str], tuple[Path, Path]],
    timed: Measured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened(tiny_bundle)
    opened(tiny_bundle, threads=7)
    opened(kinds("unconditional")[1])
    monkeypatch.setattr(auto, "processor", lambda: "another")
    opened(tiny_bundle)
    monkeypatch.setattr(auto, "openvino_version", lambda: "2.0")
    opened(tiny_bundle)
    assert len(timed) == 5
    opened(tiny_bundle)
    assert len(timed) == 5


@pytest.mark.parametrize("content", NO_TIMES.values(), ids=NO_TIMES)
def test_a_damaged_file_is_measured_anew(tiny_bundle: Path, cache: Path, timed: Measured, content: bytes) -> None:
    opened(tiny_bundle)
    (file,) = cache.iterdir()
    file.write_bytes(content)
    assert opened(tiny_bundle) == "openvino"
    assert len(timed) == 2
    assert auto.remembered(file) == OPENVINO_WINS


@pytest.mark.parametrize("where", ["a file", "a folder in its place", "no home"])
def test_a_cache_that_cannot_be_used_is_done_without(
    tiny_bundle: Path,
    cache: Path,
    timed: Measured,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if where == "a file":
        cache.parent.write_text("")
    elif where == "a folder in its place":
        opened(tiny_bundle)
        (file,) = cache.iterdir()
        file.unlink()
        file.mkdir()
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with caplog.at_level(logging.INFO, "ldm_export"):
        assert opened(tiny_bundle) == "openvino"
    assert "openvino is used this time, which cannot be remembered (" in caplog.text
    if where == "a folder in its place":
        assert list(cache.iterdir()) == [file]  # nothing half-written is left


# --- one library, or one that fails ---------------------------------------------------------------------------------


def test_onnxruntime_alone(tiny_bundle: Path, timed: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "openvino_version", lambda: None)
    assert opened(tiny_bundle) == "onnxruntime"
    assert not timed


def test_openvino_alone(tiny_bundle: Path, timed: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert opened(tiny_bundle) == "openvino"
    assert not timed


def test_neither(tiny_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "openvino_version", lambda: None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"pip install 'ldm_export\[cpu\]'"):
        Pipeline.open(tiny_bundle)


def test_openvino_that_does_not_import(tiny_bundle: Path, timed: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert opened(tiny_bundle) == "onnxruntime"
    assert not timed


def test_a_bundle_that_openvino_refuses(tiny_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise BundleError("OpenVINO refuses unet/model.onnx.")

    monkeypatch.setattr(auto.OpenVinoBackend, "load", refused)
    assert opened(tiny_bundle) == "onnxruntime"
    assert not cache.exists()


def test_where_cuda_is_nothing_is_measured(tiny_bundle: Path, timed: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr("onnxruntime.preload_dlls", lambda: None, raising=False)
    backend = auto.open_fastest(Bundle.open(tiny_bundle), None)
    assert isinstance(backend, OnnxRuntimeBackend)
    assert backend.name.endswith(" cuda")
    assert not timed


def test_the_command_line_says_it_once(tiny_bundle: Path, tmp_path: Path, timed: Measured) -> None:
    arguments = ["generate", str(tiny_bundle), "red", "-o", str(tmp_path / "p.png"), "--steps", "10"]
    first, second = (CliRunner().invoke(main, arguments) for _ in range(2))
    assert first.exit_code == second.exit_code == 0, first.output
    said = "measured: onnxruntime 4.0 ms, openvino 3.0 ms a call of the denoiser; openvino is used from now on\n"
    assert first.stderr == said
    assert second.stderr == ""
    assert "openvino" in second.stdout
