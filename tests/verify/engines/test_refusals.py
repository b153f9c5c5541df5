"""What cannot be built: one sentence, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from ldm_export.bundle import Bundle
from ldm_export.bundle.plans import read_plan
from ldm_export.bundle.targets.engines import ShapeRange
from ldm_export.contract import GraphSpec, Guidance, TensorSpec, step_spec
from ldm_export.errors import BackendError, BundleError, ExportError, InputError
from ldm_export.export.tensorrt.library import library_of
from ldm_export.export.tensorrt.process import in_a_process, last_words
from ldm_export.export.tensorrt.profiles import Range, profile_of
from ldm_export.graph.quantize_dynamic import QuantizeDynamic
from ldm_export.verify.engines import build
from ldm_export.verify.engines.build import EngineSettings, build_engines
from tests.verify.engines.engines import KIND, RTX, SMALL, child, contents, settings

library = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")


@pytest.mark.parametrize(
    ("sm_versions", "message"),
    [
        (("90",), r"^--sm 90 is no GPU that TensorRT-RTX \S+ builds for; it has .*, 89, .* H100 needs the data-centre"),
        (("100",), r"B200 needs the data-centre flavour: --target tensorrt on that machine\.$"),
        (("89", "banana"), r"^--sm banana is no GPU that"),
        ((), r"^--target rtx needs --sm, the GPUs to build for: 75, "),
    ],
)
def test_gpus_that_the_flavour_lacks(bundle: Path, sm_versions: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_engines(Bundle.open(bundle), EngineSettings(RTX, sm_versions))
    assert not (bundle / "targets").exists()


def test_the_data_centre_flavour_takes_its_library(bundle: Path) -> None:
    if "tensorrt" in sys.modules or shutil.which("nvidia-smi"):
        pytest.skip("TensorRT may be installed here")
    with pytest.raises(BackendError, match=r"^tensorrt is not installed, .* pip install 'ldm_export\[export,gpu\]'$"):
        build_engines(Bundle.open(bundle), EngineSettings("tensorrt"))


def test_the_data_centre_flavour_takes_a_gpu(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "library_of", lambda flavour: library)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(BackendError, match=r"^--target tensorrt builds for the GPU of this machine, and PyTorch finds"):
        build_engines(Bundle.open(bundle), EngineSettings("tensorrt"))
    with pytest.raises(InputError, match="leave --sm out"):
        build_engines(Bundle.open(bundle), EngineSettings("tensorrt", ("90",)))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    child("raise SystemExit(3)", monkeypatch)
    with pytest.raises(ExportError, match="exit code 3"):
        build_engines(Bundle.open(bundle), EngineSettings("tensorrt", precision="fp16"))


def test_a_flavour_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, RTX, None)
    with pytest.raises(BackendError, match=r"^tensorrt_rtx is not installed, .* 'ldm_export\[export,rtx\]'$"):
        library_of(RTX)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2:1:4", "does not rise"),
        ("4:2:1", "is no range"),
        ("1:8:4", "does not rise"),
        ("0", "is no range"),
        ("0:1:2", "is no range"),
        ("1:2", "is no range"),
        ("-1:1:2", "is no range"),
        ("", "is no range"),
        ("1:x:2", "is no range"),
    ],
)
def test_ranges_that_are_none(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Range.parse("batch", text)


def test_ranges() -> None:
    assert Range.parse("batch", "3") == Range(3, 3, 3)
    assert Range.parse("size", "64:64:128") == Range(64, 64, 128)


def test_pictures_that_the_model_cannot_draw(bundle: Path) -> None:
    with pytest.raises(
        InputError, match=r"^size 17 cannot be drawn by this model; sizes are multiples of 2 .* Use 16\.$"
    ):
        build_engines(Bundle.open(bundle), settings(pixels=Range(16, 17, 32)))
    assert not (bundle / "targets").exists()


def test_profiles_follow_the_contract(bundle: Path) -> None:
    manifest, roles = Bundle.open(bundle).manifest, Bundle.open(bundle).roles
    graphs = manifest.graphs
    of = {
        name: profile_of(graphs[name], graphs, roles, manifest.model, Range(1, 2, 3), Range(16, 16, 32))
        for name in graphs
    }
    assert of["unet"] == {
        "sample": ShapeRange((1, 4, 8, 8), (4, 4, 8, 8), (6, 4, 16, 16)),
        "timestep": ShapeRange((1,), (4,), (6,)),
        "encoder_hidden_states": ShapeRange((1, 16, 32), (4, 16, 32), (6, 16, 32)),
    }
    step = profile_of(step_spec(graphs["unet"]), graphs, roles, manifest.model, Range(1, 2, 3), Range(16, 16, 32))
    assert (step["latents"].max, step["out_sample"].max) == ((3, 4, 16, 16), (6, 4, 16, 16))
    assert step["remembered"] == ShapeRange((4, 1, 4, 8, 8), (4, 2, 4, 8, 8), (4, 3, 4, 16, 16))
    assert of["text_encoder"] == {"input_ids": ShapeRange((1, 16), (4, 16), (6, 16))}
    assert of["vae_decoder"] == {"latent_sample": ShapeRange((1, 4, 8, 8), (2, 4, 8, 8), (3, 4, 16, 16))}
    assert of["vae_encoder"] == {"sample": ShapeRange((1, 3, 16, 16), (2, 3, 16, 16), (3, 3, 32, 32))}
    alone = replace(roles, guidance=Guidance("none", 4.0))
    folded = profile_of(graphs["unet"], graphs, alone, manifest.model, Range(1, 2, 3), Range(16, 16, 16))
    assert folded["sample"].max == (3, 4, 8, 8)


def test_profiles_have_the_tokens_of_what_the_denoiser_reads(kinds: Callable[[str], tuple[Path, Path]]) -> None:
    """Two text encoders' 16 and the 256 of a third, which the conditioner joins."""
    manifest, roles = Bundle.open(kinds("sd3")[1]).manifest, Bundle.open(kinds("sd3")[1]).roles
    graphs = manifest.graphs
    size = Range(16, 16, 32)
    of = profile_of(graphs["transformer"], graphs, roles, manifest.model, Range(1, 1, 1), size)
    assert of["encoder_hidden_states"] == ShapeRange((1, 272, 96), (2, 272, 96), (2, 272, 96))


@pytest.mark.parametrize(
    ("name", "message"), [("unett", "has no graph 'unett'; it has"), ("loops/x", "has no plan 'x'; it has none. Use")]
)
def test_graphs_that_there_are_not(bundle: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_engines(Bundle.open(bundle), settings(), [name])


def test_a_loop_of_no_plan(bundle: Path) -> None:
    for name, message in (("magic-7", "known are ddpm, ddim"), ("ddim-1001", "1 to 1000"), ("x", "SAMPLER-STEPS")):
        with pytest.raises(InputError, match=message):
            build_engines(Bundle.open(bundle), settings(), SMALL, [name])


def test_a_loop_of_another_plan_than_it_says(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    opened = opened.add_file("plans/ddim-10.json", read_plan(opened, "plms", 10).to_json().encode())
    with pytest.raises(BundleError, match=r"plans/ddim-10\.json has the plan plms-10\.json\. Export"):
        build_engines(opened, settings(), SMALL, ["ddim-10"])
    assert not (bundle / "targets").exists()


def test_an_operator_that_the_parser_lacks_is_refused_before_anything_is_built(bundle: Path) -> None:
    file = bundle / "text_encoder" / "model.onnx"
    model = QuantizeDynamic(smallest=1).apply(onnx.load(file), []).model
    file.write_bytes(model.SerializeToString())
    refused = next(node for node in model.graph.node if node.op_type == "DynamicQuantizeLinear")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["text_encoder/model.onnx"]["size_bytes"] = file.stat().st_size
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    stages: list[str] = []
    with pytest.raises(ExportError, match=rf"cannot read text_encoder: node {refused.name} \(Dyn\w+\): no such"):
        build_engines(Bundle.open(bundle), settings(), progress=stages.append)
    assert stages == ["parsing"]
    assert not list((bundle / "targets").iterdir())


def test_a_network_that_is_not_as_the_bundle_says(bundle: Path) -> None:
    """The parser, not the bundle, says what the network takes."""
    spec = Bundle.open(bundle).manifest.graphs["text_encoder"]
    graphs = {"text_encoder": {"onnx": str(bundle / spec.path)}}
    found = in_a_process({"flavour": RTX, "graphs": graphs}, "The parser")["text_encoder"]
    build._check_network("text_encoder", spec, found, RTX)
    other = GraphSpec(spec.path, (TensorSpec("input_ids", "int32", spec.inputs[0].shape),), spec.outputs)
    with pytest.raises(ExportError, match=r"reads text_encoder with the inputs \{'input_ids': \('int64'"):
        build._check_network("text_encoder", other, found, RTX)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", r"^The parser was killed, most likely for want of"),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
            r"^The parser crashed \(SIGSEGV\)\. Nothing was kept",
        ),
        ("import sys; sys.exit('a last word')", r"^The parser ended with exit code 1, saying: a last word\. Nothing"),
    ],
)
def test_a_process_that_dies_takes_nothing_down(
    small: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    before = contents(small)
    child(f"import sys; sys.stdin.read(); {code}", monkeypatch)
    with pytest.raises(ExportError, match=message):
        build_engines(Bundle.open(small), settings(), ["vae_encoder"])
    assert contents(small) == before
    assert [path.name for path in (small / "targets").iterdir()] == [KIND]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"failed": True}, "[E] IBuilder::buildSerializedNetwork: Error Code 1: Myelin (Unexpected std::bad_alloc)"),
        ({"refused": [{"node": "number -1", "operator": "", "reason": "std::bad_alloc"}]}, "[E] std::bad_alloc"),
        (None, "MemoryError"),
    ],
    ids=["building", "parsing", "python"],
)
def test_out_of_memory(small: Path, monkeypatch: pytest.MonkeyPatch, found: dict[str, Any] | None, words: str) -> None:
    """What the process that builds said where its memory was limited (``RLIMIT_AS``), at several limits."""
    before = contents(small)
    child(
        f"import json, sys; sys.stdin.read(); print({words!r}, file=sys.stderr); found = {found!r}\n"
        "print(json.dumps({'vae_encoder': found})); sys.exit(found is None)",
        monkeypatch,
    )
    said = re.escape(words.removeprefix("[E] "))
    with pytest.raises(
        ExportError, match=rf"^The parser ran out of memory, saying: {said}\. Nothing was kept\. .*--batch"
    ):
        build_engines(Bundle.open(small), settings(), ["vae_encoder"])
    assert contents(small) == before


def test_a_full_disk(tiny_bundle: Path) -> None:
    """/dev/full takes nothing: the engine's own file fails in the process that builds it."""
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    graphs = Bundle.open(tiny_bundle).manifest.graphs
    profile = {"input_ids": {key: [1, 16] for key in ("min", "opt", "max")}}
    graph = {"onnx": str(tiny_bundle / graphs["text_encoder"].path), "plan": "/dev/full", "profile": profile}
    switches = {"compute_capabilities": ["8.9"], "refittable": False, "stripped": False, "sparse": False}
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        in_a_process({"flavour": RTX, **switches, "graphs": {"text_encoder": graph}}, "The build")


def test_a_full_disk_is_said_and_leaves_what_was_there(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(small)

    def full(told: Any, what: str) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(build, "in_a_process", full)
    with pytest.raises(ExportError, match=r"^The disk is full: .*rtx-sm89 could not be written; .* Make room\.$"):
        build_engines(Bundle.open(small), settings(), ["vae_encoder"])
    assert contents(small) == before


@pytest.mark.parametrize("option", ["refittable", "stripped"])
def test_engines_to_be_refitted_are_for_one_gpu(option: str) -> None:
    with pytest.raises(InputError, match=r"for one GPU; 86, 89 were given\. Build for each\.$"):
        settings("86", "89", **{option: True})


@pytest.mark.parametrize("option", ["refittable", "stripped"])
def test_engines_to_be_refitted_need_a_gpu(bundle: Path, option: str) -> None:
    """TensorRT-RTX itself says so: that the switch is set shows in that it no longer builds here."""
    if Path("/dev/nvidia0").exists():
        pytest.skip("there is a GPU")
    with pytest.raises(
        ExportError, match=r"CUDA_SUCCESS.* built where there is a GPU; else leave --refit and --strip out"
    ):
        build_engines(Bundle.open(bundle), settings(**{option: True}), SMALL)


def test_what_a_gpu_cannot_compute_is_said(bundle: Path) -> None:
    """In TensorRT's own words: Turing has no fp32 products; in fp16 the same engine is built."""
    with pytest.raises(ExportError, match=r"for Turing \(SM75\): FP32 GEMM is not supported\. Nothing was kept\.$"):
        build_engines(Bundle.open(bundle), settings("75"), SMALL)
    assert build_engines(Bundle.open(bundle), settings("75", precision="fp16"), SMALL).built == SMALL


def test_last_words() -> None:
    said = "\x1b[38;5;9m[E] IBuilder: Error Code 1: no such thing. In compile at /_src/x.cpp:2\x1b[0m\n"
    assert last_words(said + "[!] Invalid Engine. Please check") == "IBuilder: Error Code 1: no such thing"
    assert last_words("") == ""
