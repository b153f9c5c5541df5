"""Whatever a web form or JSON gives is drawn or refused with a sentence; what is no number is never a picture."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_export.errors import BackendError, CancelledError, InputError, LdmExportError, NumericalError
from ldm_export.runtime import Pipeline, memory
from ldm_export.runtime.backends.onnxruntime import OnnxRuntimeBackend, OnnxRuntimeGraph
from ldm_export.runtime.options import Options
from tests.bundle_fixture import CLASSES

STEPS = 10
GREY = np.full((16, 16, 3), 127, np.uint8)


class Hostile:
    """Raises whatever is asked of it."""

    def __repr__(self) -> str:
        raise RuntimeError("no")

    __iter__ = __len__ = __float__ = __array__ = __repr__


STRANGE: dict[str, Any] = {
    "text": "7.5",
    "empty text": "",
    "long text": "x" * 10000,
    "bytes": b"cat",
    "true": True,
    "zero": 0,
    "minus": -1,
    "huge": 10**4000,
    "beyond text": 10**5000,
    "huge negative": -(10**400),
    "float": 7.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "numpy nan": np.float32("nan"),
    "complex": 1j,
    "list": [7.5],
    "empty list": [],
    "nested": [[1], [2, 3]],
    "of none": [None, None],
    "of texts": ["1", "2"],
    "dict": {"a": 1},
    "set": {1, 2},
    "array of 0 axes": np.array(7),
    "array": np.arange(4.0),
    "array of objects": np.array([None, {}], object),
    "function": len,
    "type": int,
    "hostile": Hostile(),
    "endless": iter(int, 1),
}


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Pipeline:
    return Pipeline.open(tiny_bundle, backend="cpu", threads=1)


@pytest.mark.parametrize("option", ["prompts", *Options.__annotations__])
def test_any_value_of_any_option_is_taken_or_refused_with_a_sentence(pipeline: Pipeline, option: str) -> None:
    said = []
    for name, value in STRANGE.items():
        options = {"prompts": ["a", "b"], "steps": STEPS, **({"image": GREY} if option in ("strength", "mask") else {})}
        try:
            pipeline.steps(**{**options, option: value})
        except InputError as error:
            said.append((name, str(error)))
    assert len(said) > len(STRANGE) / 2
    assert [name for name, text in said if "\n" in text or len(text) > 400] == []


@pytest.mark.parametrize("kind", STRANGE)
def test_any_value_is_taken_or_refused_by_what_opens_and_reconstructs(
    pipeline: Pipeline, tiny_bundle: Path, kind: str
) -> None:
    value = STRANGE[kind]
    with pytest.raises(InputError):
        pipeline.reconstruct(value)
    for name in ("backend", "threads", "verify"):
        if (name, kind) not in [("threads", "array of 0 axes"), ("verify", "true")]:
            with pytest.raises(InputError, match=name):
                Pipeline.open(tiny_bundle, **{name: value})
    if not isinstance(value, str):
        with pytest.raises(InputError, match="path"):
            Pipeline.open(value)


def test_class_labels_of_any_value(kinds: Callable[[str], tuple[Path, Path]]) -> None:
    pipeline = Pipeline.open(kinds("class-conditional")[1], backend="cpu", threads=1)
    for name, value in STRANGE.items():
        with pytest.raises(InputError) as raised:
            pipeline.steps(class_labels=value, steps=STEPS)
        assert "\n" not in str(raised.value), name
    with pytest.raises(InputError, match="negative prompt was given, and this model reads no text"):
        pipeline.steps(class_labels=[0], negative_prompt="a cat", steps=STEPS)
    assert CLASSES > 1
    pipeline.steps(class_labels=np.array([0, 1], np.uint8), steps=STEPS)


def test_numbers_of_numpy_and_other_sequences_are_taken(pipeline: Pipeline) -> None:
    plain = pipeline.generate(["a", "b"], steps=STEPS, seed=[3, 4], guidance=4, height=16)
    options = {"steps": np.int64(STEPS), "guidance": np.float32(4), "height": np.uint8(16), "deepcache": np.int8(1)}
    same = pipeline.generate((text for text in "ab"), seed=np.array([3, 4]), whole=np.bool_(False), **options)
    np.testing.assert_array_equal(plain.latents, same.latents)
    assert same.seeds == (3, 4)


def test_an_option_that_does_not_exist(pipeline: Pipeline) -> None:
    with pytest.raises(InputError, match="no option 'cfg'; there are sampler, steps"):
        pipeline.steps(["a"], cfg=7)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.5}, "strength was given without an image"),
        ({"negative_prompt": "b", "guidance": 1.0}, "negative prompt was given, and guidance is 1, which is off"),
        ({"guidance": 1e308}, r"guidance is 1e\+308; give a number from 0 to 1e\+06"),
    ],
)
def test_what_would_do_nothing_is_said(pipeline: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipeline.steps(["a"], steps=STEPS, **options)


# --- numbers --------------------------------------------------------------------------------------------------------


def spoiled(monkeypatch: pytest.MonkeyPatch, graph: str, value: float, call: int = 1) -> None:
    """From its ``call``-th call on, a graph gives ``value`` in one place."""
    run, bind, calls = OnnxRuntimeGraph.run, OnnxRuntimeGraph.bind, [0]

    def spoil(self: OnnxRuntimeGraph, arrays: Mapping[str, Any]) -> None:
        if self.spec.name == graph:
            calls[0] += 1
            if calls[0] >= call:
                next(iter(arrays.values())).flat[-1] = value

    def spoiling_run(self: OnnxRuntimeGraph, inputs: Mapping[str, Any]) -> dict[str, Any]:
        results = run(self, inputs)
        spoil(self, results)
        return results

    def spoiling_bind(self: OnnxRuntimeGraph, inputs: Any, outputs: Any, *more: Any) -> Callable[[], None]:
        bound = bind(self, inputs, outputs, *more)
        return lambda: (bound(), spoil(self, outputs))[0]

    monkeypatch.setattr(OnnxRuntimeGraph, "run", spoiling_run)
    monkeypatch.setattr(OnnxRuntimeGraph, "bind", spoiling_bind)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_latents_that_are_no_numbers_are_no_picture(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    spoiled(monkeypatch, "unet", value, call=4)
    with pytest.raises(NumericalError, match=f"After step 4 of {STEPS} the latents .* verify BUNDLE --against"):
        pipeline.generate("a", steps=STEPS)
    with pytest.raises(NumericalError, match=r"Lower the guidance, which is 9000 \(the bundle's own is 4\)"):
        list(pipeline.steps("a", steps=STEPS, guidance=9000))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_and_encoded_pictures_that_are_no_numbers(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    with monkeypatch.context() as patch:
        spoiled(patch, "vae_decoder", value)
        *_, step = pipeline.steps("a", steps=STEPS)
        for call in (step.decode, lambda: pipeline.generate("a", steps=STEPS), lambda: pipeline.reconstruct(GREY)):
            with pytest.raises(NumericalError, match="VAE decoder gives pixels that are no finite numbers"):
                call()
    spoiled(monkeypatch, "vae_encoder", value)
    for call in (lambda: pipeline.generate("a", steps=STEPS, image=GREY), lambda: pipeline.reconstruct(GREY)):
        with pytest.raises(NumericalError, match="VAE encoder"):
            call()


def test_guidance_too_great_for_float32_is_no_picture(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled(monkeypatch, "unet", 1e36)
    with pytest.raises(NumericalError, match="Lower the guidance"):
        pipeline.generate("a", steps=STEPS, guidance=1e6)


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"height": 1 << 20, "width": 1 << 20}, {"seed": 1, "prompts": ["a"] * 4096}])
def test_what_no_memory_holds_is_refused_before_it_is_begun(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 100 << 20)
    monkeypatch.setattr(memory, "ALWAYS_BYTES", 1 << 20)
    if "prompts" not in options:
        with pytest.raises(InputError, match=r"need at least [\d.]+ GB of memory; this process may have 0\.1 GB"):
            pipeline.steps(**{"prompts": "a", "steps": STEPS, **options})
    else:
        pipeline.steps(**{"steps": STEPS, **options})
        with pytest.raises(InputError, match="memory"):
            pipeline.steps(**{"steps": STEPS, **options}, height=160, width=160)


def test_the_memory_that_is_left_is_told() -> None:
    left = memory.available_bytes()
    assert left is None or left > 1 << 20


def test_control_groups_of_both_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of any group above count; a group without one does not."""
    real = Path
    files = {
        "proc/self/cgroup": "4:memory:/a/b\n3:cpuset:/\n0::/c\n",
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "5000",
        "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "3000",
        "sys/fs/cgroup/memory/a/memory.stat": "cache 1\ninactive_file 500\n",
        "sys/fs/cgroup/c/memory.max": "max",
        "sys/fs/cgroup/memory.max": "9000",
        "sys/fs/cgroup/memory.current": "4000",
        "sys/fs/cgroup/memory.stat": "inactive_file 0\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(memory, "Path", lambda path: real(tmp_path / str(path).lstrip("/")))
    assert sorted(memory._control_groups()) == [2500, 5000]


# --- interruption ---------------------------------------------------------------------------------------------------


def test_an_interruption_ends_what_runs_and_nothing_else(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = threading.Event()
    monkeypatch.setattr(OnnxRuntimeBackend, "interrupt", lambda self: told.set())
    pipeline = Pipeline.open(tiny_bundle, backend="cpu", threads=1)
    pipeline.interrupt()  # nothing runs
    expected = pipeline.generate("a", steps=STEPS).latents

    def interrupting(step: Any) -> None:
        if step.index == 2:
            threading.Thread(target=pipeline.interrupt).start()
            told.wait()

    told.clear()
    with pytest.raises(CancelledError, match="Interrupted"):
        pipeline.generate("a", steps=STEPS, callback=interrupting)
    np.testing.assert_array_equal(pipeline.generate("a", steps=STEPS).latents, expected)


def test_what_an_interruption_makes_a_library_raise_is_a_cancellation(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline.open(tiny_bundle, backend="cpu", threads=1)

    def stopped(*_: Any) -> Any:
        pipeline.interrupt()
        raise BackendError("ONNX Runtime could not run it: terminate flag")

    monkeypatch.setattr(OnnxRuntimeGraph, "run", stopped)
    for call in (lambda: pipeline.generate("a", steps=STEPS), lambda: pipeline.reconstruct(GREY)):
        with pytest.raises(CancelledError) as raised:
            call()
        assert isinstance(raised.value.__cause__, LdmExportError)
