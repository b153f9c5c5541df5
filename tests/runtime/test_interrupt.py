"""Ending what ONNX Runtime runs or opens, from another thread and by Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, parser

from ldm_export.bundle import Bundle
from ldm_export.errors import CancelledError
from ldm_export.runtime import Pipeline
from ldm_export.runtime.backends.onnxruntime import OnnxRuntimeBackend
from tests.hostile.base import GRAPHS, Draft, sound

PATIENCE_S = 10.0
ENDLESS = (
    GRAPHS["vae_decoder"]
    .replace("three = Slice (latent_sample,", "three = Slice (looped,")
    .replace(
        "three = Slice",
        """most = Constant <value = int64 {1000000000000000}> ()
            true = Constant <value_int = 1> ()
            goes_on = Cast <to = 9> (true)
            looped = Loop (most, goes_on, latent_sample) <body = b (int64 i, bool c, float[batch, 4, height, width] x)
              => (bool c2, float[batch, 4, height, width] y) { c2 = Identity (c) y = Sin (x) }>
            three = Slice""",
    )
)


def bundle_with(folder: Path, change: Callable[[Draft], object]) -> Path:
    draft = sound()
    change(draft)
    folder.mkdir()
    draft.write(folder)
    return folder


def slow_to_open(draft: Draft) -> None:
    """A decoder of some 2**15 nodes, which ONNX Runtime takes a second to inline."""
    model, opsets = draft.model("vae_decoder"), [helper.make_opsetid("com.f", 1), helper.make_opsetid("", 18)]
    for level in range(15):
        calls = [helper.make_node(f"F{level + 1}", [a], [b], domain="com.f") for a, b in (("x", "v"), ("v", "y"))]
        nodes = calls if level < 14 else [helper.make_node("Identity", ["x"], ["y"])]
        model.functions.append(helper.make_function("com.f", f"F{level}", ["x"], ["y"], nodes, opsets))
    model.graph.node.insert(0, helper.make_node("F0", ["latent_sample"], ["called"], domain="com.f"))
    model.graph.node[1].input[0] = "called"
    model.opset_import.append(opsets[0])
    draft.files["vae_decoder/model.onnx"] = model.SerializeToString()


def test_an_endless_run_is_ended(tmp_path: Path) -> None:
    assert parser.parse_model(ENDLESS).graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    backend = OnnxRuntimeBackend(
        Bundle.open(bundle_with(tmp_path / "b", lambda d: d.graph("vae_decoder", ENDLESS))), "cpu", 1
    )
    decoder = backend.load("vae_decoder")
    latents = {"latent_sample": np.zeros((1, 4, 4, 4), np.float32)}
    timer = threading.Timer(0.2, backend.interrupt)
    timer.start()
    started = time.monotonic()
    with pytest.raises(CancelledError):
        decoder.run(latents)
    call = decoder.bind(latents, {"sample": np.zeros((1, 3, 8, 8), np.float32)})
    threading.Timer(0.2, backend.interrupt).start()
    with pytest.raises(CancelledError):
        call()
    assert time.monotonic() - started < PATIENCE_S
    unet = backend.load("unet")  # others go on
    assert set(unet.spec.inputs)


def test_opening_is_ended(tmp_path: Path) -> None:
    backend = OnnxRuntimeBackend(Bundle.open(bundle_with(tmp_path / "b", slow_to_open)), "cpu", 1)
    threading.Timer(0.1, backend.interrupt).start()
    with pytest.raises(CancelledError):
        backend.load("vae_decoder")
    assert backend.load("unet").spec.name == "unet"


def test_ctrl_c_while_a_session_opens(tmp_path: Path) -> None:
    pipeline = Pipeline.open(bundle_with(tmp_path / "b", slow_to_open), backend="cpu", threads=1)
    before = threading.active_count()
    main = threading.main_thread().ident
    assert main is not None
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # under nohup it would be ignored
    threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            pipeline.generate(["a cat"])
    finally:
        signal.signal(signal.SIGINT, handler)
    assert threading.active_count() <= before + 1  # the timer may not have ended yet


def test_interrupting_what_does_not_run_changes_nothing(tmp_path: Path) -> None:
    backend = OnnxRuntimeBackend(Bundle.open(bundle_with(tmp_path / "b", lambda draft: None)), "cpu", 1)
    backend.interrupt()
    decoder = backend.load("vae_decoder")
    backend.interrupt()
    assert decoder.run({"latent_sample": np.zeros((1, 4, 4, 4), np.float32)})["sample"].shape == (1, 3, 8, 8)
