"""What the Python runtime refuses or passes over in a bundle, the C++ one does too."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
from click.testing import CliRunner

from ldm_export.bundle.manifest import MANIFEST
from ldm_export.bundle.plans import SCHEDULER
from ldm_export.cli.main import main
from ldm_export.errors import BundleError, InputError
from ldm_export.runtime import Pipeline
from tests.bundle.test_bundle import DEEP_LIES, LIES, make
from tests.bundle.test_target import DOES_NOT_FIT
from tests.hostile.base import sound
from tests.hostile.case import MISSING

STATUS_INPUT, STATUS_BUNDLE, STATUS_BACKEND = 1, 2, 3
PROMPT = "a red circle"
IN_PYTHONS_WORDS = re.compile(r"of type|shape|cannot be read|, which$")
"""Messages that name Python's types or quote as Python does."""


@pytest.mark.parametrize("lie", [*LIES, *DEEP_LIES])
def test_a_lie_is_found(open_cpp: Callable[..., Any], binding: ModuleType, tmp_path: Path, lie: str) -> None:
    spoil, message = (LIES | DEEP_LIES)[lie]
    folder = make(tmp_path / "bundle").path
    spoil(folder)
    with pytest.raises(binding.LdmError) as caught:
        open_cpp(folder, verify=int(lie in DEEP_LIES))
    assert caught.value.status == STATUS_BUNDLE
    assert str(folder) in str(caught.value)
    if not IN_PYTHONS_WORDS.search(message):
        assert re.search(message, str(caught.value)), str(caught.value)


def test_what_an_interrupted_export_leaves_is_refused(
    open_cpp: Callable[..., Any], binding: ModuleType, tiny_bundle: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_bundle, tmp_path / ".tiny.partial-1-0a")
    with pytest.raises(binding.LdmError, match="interrupted export"):
        open_cpp(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": "64"}, "model.height"),
        ({"class_count": 0}, "model.class_count"),
        ({"default_steps": True}, "model.default_steps"),
        ({"latent_channels": 10**12}, "model.latent_channels"),
        ({"default_sampler": 1}, "model.default_sampler"),
    ],
)
def test_facts_that_cannot_be_drawn_with(
    open_cpp: Callable[..., Any],
    binding: ModuleType,
    tiny_bundle: Path,
    tmp_path: Path,
    change: dict[str, Any],
    message: str,
) -> None:
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["model"] |= change
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(binding.LdmError, match=message):
        open_cpp(folder)


@pytest.mark.parametrize("case", DOES_NOT_FIT)
def test_a_target_that_does_not_fit_is_passed_over(
    open_cpp: Callable[..., Any], bundle: Path, tiny_bundle: Path, tmp_path: Path, case: str
) -> None:
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    DOES_NOT_FIT[case][0](folder)
    told: list[str] = []
    pipeline = open_cpp(folder, warn=told.append, verify=1)
    pixels = pipeline.draw([PROMPT], steps=10)
    assert not pipeline.info().backend.endswith(b"ort-cpu")
    (warning,) = told
    assert warning.startswith(f"targets/ort-cpu of {folder} is passed over, since ")
    assert pixels == open_cpp(tiny_bundle).draw([PROMPT], steps=10)


def test_another_model_is_refused(
    open_cpp: Callable[..., Any], binding: ModuleType, kinds: Callable[[str], tuple[Path, Path]]
) -> None:
    with pytest.raises(binding.LdmError, match="reads the latents of another picture without a mask") as caught:
        open_cpp(kinds("8 channels")[1]).draw([PROMPT])
    assert caught.value.status == STATUS_INPUT


ASKED = [
    *(("magic", 10), ("it's", 10), ("x" * 70, 10), ("ddim", 1001), ("ddim", 1 << 20), ("unipc", 1000), ("lcm", 51)),
    *(("ddim-calls", 10), ("ddim-calls0", 10), ("ddim-calls11", 10), ("heun-calls20", 10), ("plms-calls15", 20)),
    ("ddim-calls1234567", 10),
]
CONFIGS: dict[str, Any] = {
    "its own": {},
    "no class": {"_class_name": "FlowMatchLCMScheduler"},
    "of flow matching": {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    "of NaN": {"beta_start": float("nan")},
    "of infinity": {"beta_end": float("inf"), "lambda_min_clipped": float("-inf")},
    "numbers that no float32 holds": {"clip_sample_range": 1e300, "clip_sample": True},
    "no object": None,
    "none": MISSING,
}


@pytest.mark.parametrize("config", CONFIGS)
def test_what_cannot_be_compiled_is_refused_in_the_same_words(
    open_cpp: Callable[..., Any], binding: ModuleType, tmp_path: Path, config: str
) -> None:
    draft, folder = sound(), tmp_path / "bundle"
    if CONFIGS[config] is MISSING:
        del draft.files[SCHEDULER]
    elif CONFIGS[config] is None:
        draft.files[SCHEDULER] = b"[]"
    else:
        draft.files[SCHEDULER] = json.dumps(draft.document(SCHEDULER) | CONFIGS[config]).encode()
    folder.mkdir()
    draft.write(folder)
    cpp, python = open_cpp(folder, backend=b"cpu"), Pipeline.open(folder, backend="cpu")
    for sampler, steps in ASKED if config == "its own" else [("ddim", 5)]:
        with pytest.raises((InputError, BundleError)) as expected:
            python.generate("a cat", sampler=sampler, steps=steps)
        with pytest.raises(binding.LdmError) as caught:
            cpp.draw(["a cat"], sampler=sampler.encode(), steps=steps)
        assert caught.value.status == (STATUS_INPUT if expected.type is InputError else STATUS_BUNDLE)
        assert str(caught.value) == str(expected.value)
        assert "plan" in str(caught.value) or "JSON object" in str(caught.value)


@pytest.mark.parametrize("calls", [21, 1 << 20, (1 << 20) + 1])
@pytest.mark.parametrize("whole", [False, True])
def test_calls_that_there_are_not_are_refused_in_the_same_words(
    open_cpp: Callable[..., Any], binding: ModuleType, bundle: Path, calls: int, whole: bool
) -> None:
    with pytest.raises(InputError) as expected:
        Pipeline.open(bundle, backend="cpu").generate(PROMPT, steps=20, calls=calls, whole=whole)
    with pytest.raises(binding.LdmError) as caught:
        open_cpp(bundle).draw([PROMPT], steps=20, calls=calls, whole=whole)
    assert caught.value.status == STATUS_INPUT
    assert str(caught.value) == str(expected.value)


def test_a_loop_of_other_calls_is_told(
    open_cpp: Callable[..., Any], binding: ModuleType, bundle: Path, tmp_path: Path
) -> None:
    command = re.escape(f"ldm-export plan {bundle} --sampler ddim-calls5 --steps 10 --loop")
    with pytest.raises(InputError, match=command):
        Pipeline.open(bundle, backend="cpu").generate(PROMPT, steps=10, calls=5, whole=True)
    with pytest.raises(binding.LdmError, match=command):
        open_cpp(bundle).draw([PROMPT], steps=10, calls=5, whole=1)
    with_loop = shutil.copytree(bundle, tmp_path / "bundle")
    done = CliRunner().invoke(main, ["plan", str(with_loop), "--sampler", "ddim-calls5", "--steps", "10", "--loop"])
    assert done.exit_code == 0, done.output
    assert len(open_cpp(with_loop).draw([PROMPT], steps=10, calls=5, whole=1)) == 16 * 16 * 3


UNET = """<ir_version: 9, opset_import: ["" : 18]>
g (float[batch, 4, height, width] sample, float[batch] timestep, float[batch, tokens, 32] encoder_hidden_states)
  => (TYPE[batch, 4, height, width] out_sample) { out_sample = NODE }"""
GRAPHS_THAT_LIE = {
    "more tokens for a prompt than for none": (
        "text_encoder",
        """<ir_version: 9, opset_import: ["" : 18]>
        g (int64[batch, 16] input_ids) => (float[batch, 16, 32] last_hidden_state, float[batch, 32] pooler_output)
        <int64[1] most = {600}, int64[1] one = {1}, int64[1] width = {32}> {
            least = ReduceMin <keepdims = 0> (input_ids)
            row = Reshape (least, one)
            tokens = Sub (most, row)
            all = Shape (input_ids)
            start = Constant <value = int64[1] {0}> ()
            batch = Gather (all, start)
            sizes = Concat <axis = 0> (batch, tokens, width)
            last_hidden_state = ConstantOfShape (sizes)
            pooled = Concat <axis = 0> (batch, width)
            pooler_output = ConstantOfShape (pooled)
        }""",
        STATUS_BUNDLE,
    ),
    "a prediction of another type": (
        "unet",
        UNET.replace("TYPE", "float16").replace("NODE", "Cast <to = 10> (sample)"),
        STATUS_BUNDLE,
    ),
    "a prediction of another size": (
        "unet",
        UNET.replace("TYPE", "float").replace("NODE", "Concat <axis = 3> (sample, sample)"),
        STATUS_BACKEND,
    ),
    "pictures of the latents' size": (
        "vae_decoder",
        """<ir_version: 9, opset_import: ["" : 18]>
        g (float[batch, 4, height, width] latent_sample) => (float[batch, 3, image_height, image_width] sample) {
            channels = Constant <value = int64[2] {3, 1}> ()
            sample, rest = Split <axis = 1> (latent_sample, channels)
        }""",
        STATUS_BUNDLE,
    ),
}


@pytest.mark.parametrize("lie", GRAPHS_THAT_LIE)
def test_a_graph_that_gives_what_it_must_not_is_refused(
    open_cpp: Callable[..., Any], binding: ModuleType, tiny_bundle: Path, tmp_path: Path, lie: str
) -> None:
    name, text, status = GRAPHS_THAT_LIE[lie]
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    model = onnx.parser.parse_model(text)
    (folder / name / "model.onnx").write_bytes(model.SerializeToString())
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][f"{name}/model.onnx"]["size_bytes"] = model.ByteSize()
    for output, told in zip(manifest["graphs"][name]["outputs"], model.graph.output, strict=True):
        output["dtype"] = onnx.helper.tensor_dtype_to_np_dtype(told.type.tensor_type.elem_type).name
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(binding.LdmError) as caught:
        open_cpp(folder).draw([PROMPT], steps=10)
    assert caught.value.status == status, str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [("controls", {"canny": "unet"}, "ControlNets"), ("image_encoder", "unet", "an IP-Adapter")],
)
def test_what_pictures_control_is_refused(
    open_cpp: Callable[..., Any],
    binding: ModuleType,
    tiny_bundle: Path,
    tmp_path: Path,
    key: str,
    value: object,
    what: str,
) -> None:
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["roles"][key] = value
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(binding.LdmError, match=f"has {what}, which the C.. runtime does not run"):
        open_cpp(folder)
