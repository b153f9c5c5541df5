"""The command line: what each command prints and writes, its exit codes, and errors of one line without a traceback."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from ldm_export import __version__
from ldm_export.bundle import Bundle
from ldm_export.bundle.plans import read_plan
from ldm_export.cli import doctor, main
from ldm_export.cli.main import COMMANDS
from ldm_export.export import chain
from ldm_export.families import open_checkpoint
from ldm_export.plan import SAMPLERS
from ldm_export.runtime import Pipeline
from tests.tiny_recipe import CONFIG

Run = Callable[..., Result]

LDM_EXPORT = [sys.executable, "-c", "from ldm_export.cli import main; main(prog_name='ldm-export')"]
"""The command in a process of its own."""

TRAINING = CONFIG.replace("batch_size = 5", "batch_size = 2")  # for the four pictures here


@pytest.fixture
def run() -> Run:
    """Run `ldm-export` in this process; exceptions other than exits are the test's failure."""
    return lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def assert_refused(done: Result, message: str, exit_code: int = 2) -> None:
    """One line on stderr that begins with ``error:``, nothing on stdout."""
    assert done.exit_code == exit_code, done.output
    assert re.search(message, done.stderr), done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


# --- help -----------------------------------------------------------------------------------------------------------


def test_the_group_lists_every_command(run: Run) -> None:
    done = run("--help")
    assert done.exit_code == 0
    assert all(re.search(rf"^  {command} ", done.stdout, re.MULTILINE) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run: Run, command: str) -> None:
    done = run(command, "-h")
    assert done.exit_code == 0
    assert done.stdout.startswith(f"Usage: main {command} [OPTIONS]")


def test_the_version(run: Run) -> None:
    assert run("--version").stdout == f"ldm-export, version {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["draw"], ["generate"], ["export", "x"], ["generate", "b", "-o", "p.png", "--steps", "many"]]
)
def test_wrong_usage_exits_with_2(run: Run, arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert "Usage: " in done.stderr


# --- every command on good input ------------------------------------------------------------------------------------


def test_export(run: Run, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    done = run("export", tiny_checkpoint, "-o", tmp_path / "new")
    assert done.exit_code == 0, done.output
    assert re.search(r"^unet +out_sample +differs from PyTorch by \S+ \(allowed 1e-04\)$", done.stdout, re.MULTILINE)
    again = run("export", tiny_checkpoint, "-o", tmp_path / "new", "--force", "--json")
    document = json.loads(again.stdout)
    assert document["bundle"] == str(tmp_path / "new")
    assert {record["graph"] for record in document["parity"]} == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    assert Pipeline.open(tmp_path / "new").backend.endswith(" cpu ort-cpu")
    plain = run("export", tiny_checkpoint, "-o", tmp_path / "new", "--force", "--target", "none")
    assert plain.exit_code == 0, plain.output
    assert not (tmp_path / "new" / "targets").exists()


def test_build(run: Run, bundle: Path) -> None:
    done = run("build", bundle, "--target", "cpu")
    assert done.exit_code == 0, done.output
    says = r"^unet +attention 8, pointwise 8, gated 4, upsample 1, \d+ values once a prompt, \d+ values "
    assert re.search(says + r"once a timestep; differs from the plain graph by \S+$", done.stdout, re.MULTILINE)
    assert re.search(r"^vae_encoder .*; differs from the plain graph by", done.stdout, re.MULTILINE)
    assert re.search(r"targets/ort-cpu: \d+\.\d MB for cpu .* and onnxruntime \S+$", done.stdout, re.MULTILINE)
    assert Pipeline.open(bundle, verify=True).backend.endswith(" cpu ort-cpu")
    document = json.loads(run("build", bundle, "--target", "cpu", "--json").stdout)
    assert document["target"] == str(bundle / "targets" / "ort-cpu")
    assert set(document["graphs"]) == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    assert all(0 <= graph["error"] <= graph["allowed"] == 1e-4 for graph in document["graphs"].values())


def test_build_engines(run: Run, bundle: Path) -> None:
    library = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    options = ["--target", "rtx", "--sm", "89,86", "--precision", "fp16", "--graphs", "text_encoder", "--batch", "2"]
    done = run("build", bundle, *options)
    assert done.exit_code == 0, done.output
    says = (
        r"^text_encoder +\d\.\d MB, built in \d+\.\d s\n +\d+ layers: .*HALF \d+.*\n( +in fp32: .*\n)?"
        r" +text_encoder differs from PyTorch by \S+ \(1e-04 allowed\); "
        r"text_encoder in fp16 differs from the plain graph by \S+ \(2e-02 allowed\)$"
    )
    assert re.search(says, done.stdout, re.MULTILINE)
    end = rf"targets/rtx-sm86-sm89-fp16: tensorrt_rtx {library.__version__} for compute capability 8\.6 and 8\.9$"
    assert re.search(end, done.stdout, re.MULTILINE)
    again = json.loads(run("build", bundle, *options, "--json").stdout)
    assert again["target"] == str(bundle / "targets" / "rtx-sm86-sm89-fp16")
    assert (again["built"], set(again["engines"])) == ([], {"text_encoder"})
    assert again["engines"]["text_encoder"]["layers"]["SOFTMAX"]
    assert re.search(r"^ +HALF: .*MATRIX_MULTIPLY \d+", run("inspect", bundle).stdout, re.MULTILINE)
    assert json.loads(run("verify", bundle, "--json").stdout)["targets"]["rtx-sm86-sm89-fp16"] is None
    (bundle / "targets" / "rtx-sm86-sm89-fp16" / "text_encoder.plan").write_bytes(b"short")
    assert "is damaged: its text_encoder.plan has 5 bytes" in run("inspect", bundle).stdout
    assert run("verify", bundle).exit_code == 1
    says = "Not all that was there is used, since its text_encoder.plan has 5 bytes; target.json says"
    assert says in run("build", bundle, *options).stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "rtx"], "needs --sm"),
        (["--target", "rtx", "--sm", "90"], "H100 needs the data-centre flavour"),
        (["--target", "rtx", "--sm", "89", "--batch", "4:2:8"], "does not rise"),
        (["--target", "rtx", "--sm", "89", "--size", "65"], "multiples of 2 pixels"),
        (["--target", "rtx", "--sm", "89", "--graphs", "unet,unett"], "no graph 'unett'"),
        (["--target", "cpu", "--sm", "89"], "--sm is for engines"),
        (["--target", "cpu", "--loop", "ddim-10"], "--loop is for engines"),
    ],
)
def test_engines_that_cannot_be_built(run: Run, bundle: Path, options: list[str], message: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    assert_refused(run("build", bundle, *options), message)
    assert not (bundle / "targets").exists()


@pytest.mark.parametrize(("arguments", "message"), [(["--target", "toaster"], "'toaster' is not"), ([], "--target")])
def test_a_build_for_no_such_machine(run: Run, bundle: Path, arguments: list[str], message: str) -> None:
    done = run("build", bundle, *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (bundle / "targets").exists()


@pytest.mark.filterwarnings("default:targets/ort-cpu")
def test_a_target_that_does_not_fit_is_named(run: Run, bundle: Path, tmp_path: Path) -> None:
    assert run("build", bundle, "--target", "cpu").exit_code == 0
    (bundle / "targets" / "ort-cpu" / "unet.onnx").unlink()
    done = run("generate", bundle, "red", "-o", tmp_path / "p.png", "--steps", "10")
    assert done.exit_code == 0, done.output
    assert re.search(r"^warning: targets/ort-cpu of .* is passed over, since its unet.onnx is missing", done.stderr)
    assert done.stderr.count("warning: ") == 1


def test_generate(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    options = ["--steps", "10", "--sampler", "euler", "--seed", "5", "--negative", "blue", "--size", "16x24"]
    files = ["-o", tmp_path / "out" / "p.png", "--latents", tmp_path / "latents.npy"]
    done = run("generate", tiny_bundle, "red", "green", "blue", *files, *options, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["seeds"] == [5, 6, 7]
    assert document["requested_backend"] == "auto"
    assert document["backend"].endswith("cpu")
    assert len(document["timings"]["denoiser_ms"]) == 10
    expected = Pipeline.open(tiny_bundle).generate(
        ["red", "green", "blue"], sampler="euler", steps=10, seed=5, negative_prompt="blue", height=16, width=24
    )
    np.testing.assert_array_equal(np.load(tmp_path / "latents.npy"), expected.latents)
    sheet = np.asarray(Image.open(tmp_path / "out" / "p.png"))
    assert sheet.shape == (32, 48, 3)  # two columns, two rows, the last place white
    np.testing.assert_array_equal(sheet[:16, 24:], expected.images[1])
    np.testing.assert_array_equal(sheet[16:, :24], expected.images[2])
    assert (sheet[16:, 24:] == 255).all()


def test_generate_from_an_image(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    Image.new("RGBA", (16, 24), (255, 0, 0, 0)).save(tmp_path / "in.png")  # transparent, so white
    picture = tmp_path / "p.png"
    done = run("generate", tiny_bundle, "red", "-o", picture, "--steps", 10, "--image", tmp_path / "in.png")
    assert done.exit_code == 0, done.output
    assert re.search(r"p\.png: 1 of 16x24 in .* on onnxruntime .* cpu \(asked for: auto\)", done.stdout)
    white = np.full((24, 16, 3), 255, np.uint8)
    expected = Pipeline.open(tiny_bundle).generate("red", steps=10, image=white).images[0]
    np.testing.assert_array_equal(np.asarray(Image.open(picture)), expected)


def test_generate_a_part_of_an_image(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    mask = np.zeros((16, 24), np.uint8)
    mask[:, 10:] = 255
    Image.fromarray(image).save(tmp_path / "in.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    given = ["--image", tmp_path / "in.png", "--mask", tmp_path / "mask.png", "--keep-pixels", "--steps", 10]
    done = run("generate", tiny_bundle, "red", "-o", tmp_path / "p.png", *given, "--strength", 0.8)
    assert done.exit_code == 0, done.output
    wishes = {"steps": 10, "image": image, "mask": mask, "keep_pixels": True}
    expected = Pipeline.open(tiny_bundle).generate("red", strength=0.8, **wishes).images[0]
    drawn = np.asarray(Image.open(tmp_path / "p.png"))
    np.testing.assert_array_equal(drawn, expected)
    np.testing.assert_array_equal(drawn[mask == 0], image[mask == 0])


def test_generate_beyond_an_image(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "in.png")
    given = ["--image", tmp_path / "in.png", "--outpaint", "left=4,bottom=8", "--keep-pixels", "--steps", 10]
    done = run("generate", tiny_bundle, "red", "-o", tmp_path / "p.png", *given)
    assert done.exit_code == 0, done.output
    drawn = np.asarray(Image.open(tmp_path / "p.png"))
    assert drawn.shape == (24, 28, 3)
    np.testing.assert_array_equal(drawn[:16, 4:], image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mask", "small.png"], "A mask was given without an image"),
        (["--image", "in.png", "--mask", "small.png"], "The mask is 8x8 and the image 16x16; .* Resize the mask"),
        (["--image", "in.png", "--mask", "black.png"], "Mask 0 is black everywhere"),
        (["--image", "in.png", "--mask", "absent.png"], "absent.png does not exist"),
        (
            ["--image", "in.png", "--mask", "in.png", "--whole"],
            "The whole loop was asked for at once, with an image and",
        ),
        (["--image", "in.png", "--keep-pixels"], "keep_pixels was given without a mask"),
        (["--outpaint", "left=4"], "--outpaint left=4 was given without --image"),
        (["--image", "in.png", "--outpaint", "left=5"], r"5 pixels were asked for \(left\) .* a multiple of 2"),
        (["--image", "in.png", "--outpaint", "left=4,left=4"], "it is sides with their pixels, each once"),
        (["--image", "in.png", "--outpaint", "up=4"], "it is sides with their pixels"),
        (["--image", "in.png", "--outpaint", "left=0"], "--outpaint left=0 adds nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_generate_with_wrong_masks(
    run: Run, tiny_bundle: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    for name, size, colour in (("in", 16, "white"), ("small", 8, "white"), ("black", 16, "black")):
        Image.new("RGB", (size, size), colour).save(tmp_path / f"{name}.png")
    given = [tmp_path / word if word.endswith(".png") else word for word in options]
    assert_refused(run("generate", tiny_bundle, "red", "-o", tmp_path / "p.png", *given), message)
    assert not (tmp_path / "p.png").exists()


@pytest.mark.parametrize(
    ("kind", "options", "seeds"),
    [("unconditional", ["--count", "3"], [0, 1, 2]), ("class-conditional", ["--class-label", "4"], [0])],
)
def test_generate_without_text(
    run: Run,
    kinds: Callable[[str], tuple[Path, Path]],
    tmp_path: Path,
    kind: str,
    options: list[str],
    seeds: list[int],
) -> None:
    done = run("generate", kinds(kind)[1], "-o", tmp_path / "p.png", *options, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["seeds"] == seeds


def test_verify(run: Run, tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    done = run("verify", tiny_bundle)
    assert done.exit_code == 0, done.output
    assert "4 graphs open" in done.stdout
    document = json.loads(run("verify", tiny_bundle, "--against", tiny_checkpoint, "--json").stdout)
    assert document["passed"] is True
    assert len(document["parity"]) == 5


def test_inspect(run: Run, tiny_bundle: Path) -> None:
    done = run("inspect", tiny_bundle)
    assert done.exit_code == 0, done.output
    assert all(words in done.stdout for words in ("encoder_hidden_states", "latent_parameters", "epsilon"))
    assert "plans" not in done.stdout
    assert json.loads(run("inspect", tiny_bundle, "--json").stdout) == json.loads(
        (tiny_bundle / "manifest.json").read_text(encoding="utf-8")
    )


def test_plan(run: Run, bundle: Path, tmp_path: Path) -> None:
    done = run("plan", bundle, "--sampler", "lcm", "--steps", 4, "--json")
    assert json.loads(done.stdout) == {"plan": "plans/lcm-4.json", "rows": 4}
    assert run("verify", bundle).exit_code == 0
    done = run("generate", bundle, "red", "-o", tmp_path / "p.png", "--sampler", "lcm", "--steps", 4)
    assert done.exit_code == 0, done.output


def test_plan_with_a_loop(run: Run, bundle: Path) -> None:
    done = run("plan", bundle, "--sampler", "dpmpp-2m", "--steps", 5, "--loop", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert (document["plan"], document["rows"]) == ("plans/dpmpp-2m-5.json", 5)
    assert document["loop"] == "loops/dpmpp-2m-5.onnx"
    assert [record["output"] for record in document["parity"]] == ["images", "latents"]
    assert all(record["passed"] for record in document["parity"])
    done = run("verify", bundle)
    assert "5 graphs open" in done.stdout, done.output
    done = run("plan", bundle, "--sampler", "dpmpp-2m", "--steps", 5, "--loop")
    assert re.search(
        r"^loops/dpmpp-2m-5 +latents +differs from the runtime by \S+ \(allowed 1e-04\)$", done.stdout, re.M
    )
    assert "dpmpp-2m-5" in run("inspect", bundle).stdout


def test_export_with_loops(run: Run, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    options = ["--loop", "ddim-10", "--loop", "euler-ancestral-7"]  # whose plans become files
    done = run("export", tiny_checkpoint, "-o", tmp_path / "new", *options)
    assert done.exit_code == 0, done.output
    assert re.search(r"^loops/ddim-10 +latents +differs from the runtime by ", done.stdout, re.MULTILINE)
    files = Bundle.open(tmp_path / "new", verify=True).manifest.files
    assert {"loops/ddim-10.onnx", "loops/euler-ancestral-7.onnx"} <= files.keys()
    assert {path for path in files if path.startswith("plans/")} == {f"plans/{name}.json" for name in options[1::2]}


def test_doctor(run: Run) -> None:
    done = run("doctor", "--json")
    document = json.loads(done.stdout)
    assert done.exit_code == (1 if document["problems"] else 0)
    assert document["ldm_export"] == __version__
    assert run("doctor").stdout.startswith(f"ldm_export {__version__}, Python ")


@pytest.mark.parametrize(
    ("installed", "problem"),
    [
        ({"onnxruntime", "onnxruntime-gpu"}, "are both installed"),
        (set(), "Neither ONNX Runtime nor OpenVINO is installed"),
        ({"onnxruntime-gpu"}, "without a CUDA provider"),
    ],
)
def test_doctor_finds_what_is_wrong(
    run: Run, monkeypatch: pytest.MonkeyPatch, installed: set[str], problem: str
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: "1.0" if package in installed else None)
    monkeypatch.setattr(doctor, "_providers", lambda: ["CPUExecutionProvider"])
    done = run("doctor")
    assert done.exit_code == 1
    assert re.search(f"^problem: .*{problem}", done.stdout, re.MULTILINE)


# --- wrong input: exit code 2 and one sentence ----------------------------------------------------------------------


def pickle_file(folder: Path) -> Path:
    (folder / "model.ckpt").write_bytes(b"\x80\x04")
    return folder / "model.ckpt"


def empty_folder(folder: Path) -> Path:
    return folder


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (lambda folder: folder / "absent", "There is no checkpoint"),
        (pickle_file, "is a pickle, which can run code when it is opened"),
        (empty_folder, r"has no model_index\.json"),
    ],
)
def test_export_of_what_is_no_checkpoint(
    run: Run, tmp_path: Path, checkpoint: Callable[[Path], Path], message: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    assert_refused(run("export", checkpoint(source), "-o", tmp_path / "new"), message)
    assert not (tmp_path / "new").exists()


def test_export_does_not_overwrite(run: Run, tiny_checkpoint: Path, bundle: Path) -> None:
    assert_refused(run("export", tiny_checkpoint, "-o", bundle), "exists; use --force")


def test_export_overwrites_nothing_but_a_bundle(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert_refused(run("export", tiny_checkpoint, "-o", tmp_path, "--force"), "is not a bundle")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sampler", "magic"], "no plan for 'magic'"),
        (["--steps", "1001"], "it must be 1 to 1000, .* Choose one of those"),
        (["--size", "big"], "--size big is not a size; it is HEIGHTxWIDTH"),
        (["--size", "17x16"], "17x16 does not fit"),
        (["--size", "0x16"], "height is 0; give a whole number"),
        (["--guidance", "nan"], "guidance is nan"),
        (["--class-label", "1"], "1 class labels were given"),
        (["--seed", str(2**64)], "seed"),
        (["--image", "absent.png"], "absent.png does not exist"),
        (["--image", __file__], "is not a readable picture"),
        (["--backend", "cuda"], "cuda was asked for"),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, list) else "",
)
def test_generate_with_wrong_options(
    run: Run, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    assert_refused(run("generate", tiny_bundle, "red", "-o", tmp_path / "p.png", *options), message)
    assert not (tmp_path / "p.png").exists()


@pytest.mark.parametrize("command", [["generate", "red", "-o", "p.png"], ["verify"], ["inspect"]])
def test_what_is_no_bundle(run: Run, tmp_path: Path, command: list[str]) -> None:
    assert_refused(run(command[0], tmp_path, *command[1:]), r"manifest\.json is missing, so it is no bundle")


@pytest.mark.parametrize(
    ("option", "name"), [("-o", "file/p.png"), ("-o", "p.unknown"), ("--latents", "file/latents.npy")]
)
def test_an_output_that_cannot_be_written(run: Run, tiny_bundle: Path, tmp_path: Path, option: str, name: str) -> None:
    (tmp_path / "file").write_text("")
    files = {"-o": tmp_path / "p.png", option: tmp_path / name}
    arguments = [part for pair in files.items() for part in pair]
    assert_refused(run("generate", tiny_bundle, "red", "--steps", 10, *arguments), "cannot be written")


@pytest.mark.parametrize(("sampler", "steps"), [("magic", 10), ("ddim", 0), ("ddim", 1001)])
def test_a_plan_that_cannot_be_compiled(run: Run, bundle: Path, sampler: str, steps: int) -> None:
    allowed = ", ".join(SAMPLERS) if sampler == "magic" else "1 to 1000"
    assert_refused(run("plan", bundle, "--sampler", sampler, "--steps", steps), allowed)


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        ("magic-10", "sampler 'magic' is not known; known are ddpm, ddim"),
        ("ddim", "--loop ddim is not the name of a plan; it is SAMPLER-STEPS, such as ddim-20"),
        ("ddim-1001", "must be 1 to 1000"),
    ],
)
def test_a_loop_of_no_plan(run: Run, tiny_checkpoint: Path, tmp_path: Path, loop: str, message: str) -> None:
    done = run("export", tiny_checkpoint, "-o", tmp_path / "new", "--loop", "ddim-10", "--loop", loop)
    assert_refused(done, message)
    assert list(tmp_path.iterdir()) == []  # refused before anything was exported


@pytest.mark.parametrize("kind", ["inpainting", "8 channels"])
def test_a_model_without_loops(run: Run, kinds: Callable[[str], tuple[Path, Path]], tmp_path: Path, kind: str) -> None:
    checkpoint, bundle = kinds(kind)
    done = run("export", checkpoint, "-o", tmp_path / "new", "--loop", "ddim-10")
    assert_refused(done, "A loop was asked for of a .*Leave the loop out")
    assert not (tmp_path / "new").exists()
    copied = shutil.copytree(bundle, tmp_path / "bundle")
    assert_refused(run("plan", copied, "--sampler", "ddim", "--steps", 10, "--loop"), "A loop was asked for of a ")


def test_verify_knows_a_loop_of_another_plan(run: Run, bundle: Path) -> None:
    assert run("plan", bundle, "--sampler", "ddim", "--steps", 10, "--loop").exit_code == 0
    opened = Bundle.open(bundle)
    plan = read_plan(opened, "ddim", 10)
    opened.add_file("plans/ddim-10.json", replace(plan, init_scale=2.0).to_json().encode())
    assert_refused(run("verify", bundle), r"loops/ddim-10 was made of another plans/ddim-10\.json than the bundle has")


def test_verify_names_the_file_that_was_altered(run: Run, bundle: Path) -> None:
    graph = bundle / "unet" / "model.onnx"
    content = bytearray(graph.read_bytes())
    content[-100] ^= 1
    graph.write_bytes(content)
    assert_refused(run("verify", bundle), r"unet/model\.onnx has been altered")


@pytest.mark.filterwarnings("ignore:targets/ort-cpu of")
def test_verify_names_the_file_of_a_target_that_was_altered(run: Run, bundle: Path) -> None:
    assert run("build", bundle, "--target", "cpu").exit_code == 0
    assert json.loads(run("verify", bundle, "--json").stdout)["targets"] == {"ort-cpu": None}
    weights = bundle / "targets" / "ort-cpu" / "unet.onnx_data"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    done = run("verify", bundle)
    assert done.exit_code == 1, done.output
    says = (
        "FAIL targets/ort-cpu: its unet.onnx_data has been altered. Delete that folder, or run ldm-export build again."
    )
    assert says in done.stdout
    document = json.loads(run("verify", bundle, "--json").stdout)
    assert document["targets"] == {"ort-cpu": "its unet.onnx_data has been altered"}
    assert not document["passed"]
    assert run("build", bundle, "--target", "cpu").exit_code == 0
    assert run("verify", bundle).exit_code == 0


def test_verify_against_a_model_of_another_shape(
    run: Run, tiny_bundle: Path, kinds: Callable[[str], tuple[Path, Path]]
) -> None:
    done = run("verify", tiny_bundle, "--against", kinds("class-conditional")[0])
    assert_refused(done, "unet of .* has other inputs or outputs than the bundle")


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [("torch", ["export", "x", "-o", "y"]), ("torch", ["verify", "{bundle}", "--against", "x"])],
)
def test_a_package_that_is_not_installed(tiny_bundle: Path, missing: str, arguments: list[str]) -> None:
    hide = f"import sys; sys.modules[{missing!r}] = None; {LDM_EXPORT[-1]}"
    command = [sys.executable, "-c", hide, *(argument.format(bundle=tiny_bundle) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    needs = f"error: This needs {missing}, which is not installed. Run: pip install 'ldm_export[export]'\n"
    assert done.stderr.endswith(needs)
    assert "Traceback" not in done.stderr


# --- a check that fails: exit code 1 --------------------------------------------------------------------------------


@pytest.fixture
def retrained(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint with other weights in its UNet."""
    import safetensors.torch

    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "retrained"))
    weights = open_checkpoint(tiny_checkpoint).load("unet").state_dict()
    changed = {name: tensor * 1.01 for name, tensor in weights.items()}
    safetensors.torch.save_file(changed, folder / "unet" / "diffusion_pytorch_model.safetensors")
    return folder


def test_verify_against_other_weights(run: Run, tiny_bundle: Path, retrained: Path) -> None:
    done = run("verify", tiny_bundle, "--against", retrained)
    assert done.exit_code == 1, done.output
    assert re.search(r"^FAIL unet +out_sample", done.stdout, re.MULTILINE)
    assert re.search(r"^ok +vae_decoder", done.stdout, re.MULTILINE)


def test_an_export_without_parity(run: Run, retrained: Path, tiny_bundle: Path, monkeypatch: Any) -> None:
    def export_another(module: object, graph: object, example: object, folder: Path) -> Path:
        shutil.copytree(tiny_bundle / folder.name, folder)
        return folder / "model.onnx"

    monkeypatch.setattr(chain, "export_graph", export_another)
    done = run("export", retrained, "-o", retrained.parent / "new")
    assert_refused(done, "unet output 'out_sample' differs from PyTorch by .* Nothing was sealed", exit_code=1)
    assert not (retrained.parent / "new").exists()


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------


def test_an_interrupted_export_leaves_nothing(
    run: Run, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(chain, "export_graph", interrupt)
    done = run("export", tiny_checkpoint, "-o", tmp_path / "new" / "bundle")
    assert done.exit_code == 1
    assert done.stderr.strip() == "Aborted!"
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_gets_ctrl_c(tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = [*LDM_EXPORT, "export", tiny_checkpoint, "-o", tmp_path / "new"]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def heed_ctrl_c() -> None:  # a job in the background of a shell inherits that it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, preexec_fn=heed_ctrl_c, **options) as process:
        while process.poll() is None and not any(tmp_path.iterdir()):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert "Aborted!" in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_a_process_with_wrong_input(tmp_path: Path) -> None:
    command = [*LDM_EXPORT, "verify", tmp_path / "absent"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: Bundle {tmp_path / 'absent'}: there is no such folder. Check the path.\n"


def test_a_process_that_cuts_a_prompt(tiny_bundle: Path, tmp_path: Path) -> None:
    arguments = [
        "generate",
        tiny_bundle,
        "red circle " * 40,
        "-o",
        tmp_path / "p.png",
        "--steps",
        "10",
        "--backend",
        "cpu",
    ]
    done = subprocess.run([*LDM_EXPORT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert re.fullmatch(r"warning: The prompt has \d+ tokens; this model reads 14\. Cut off: .*\n", done.stderr)
    assert (tmp_path / "p.png").is_file()


# --- train ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four captioned pictures."""
    folder = tmp_path / "data"
    folder.mkdir()
    for colour in ("red", "green", "blue", "black"):
        Image.new("RGB", (20, 16), colour).save(folder / f"{colour}.png")
    captions = [
        {"file_name": f"{colour}.png", "text": f"a {colour} wall"} for colour in ("red", "green", "blue", "black")
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, captions)))
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "config.toml").write_text(TRAINING)
    return tmp_path / "config.toml"


def test_what_train_makes_can_be_opened_by_export(run: Run, data: Path, config: Path, tmp_path: Path) -> None:
    done = run("train", "--data", data, "-o", tmp_path / "model", "--config", config)
    assert done.exit_code == 0, done.output
    assert "ldm-export export" in done.stdout
    checkpoint = open_checkpoint(tmp_path / "model")
    assert all(checkpoint.load(component) for component in checkpoint.components)
    assert_refused(run("train", "--data", data, "-o", tmp_path / "model", "--config", config), "is not empty")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data, config: (data / "metadata.jsonl").unlink(), r"has no metadata\.jsonl"),
        (lambda data, config: (data / "red.png").unlink(), r"'red\.png' is not a file in"),
        (lambda data, config: (data / "red.png").write_text("no picture"), "is not a readable picture"),
        (lambda data, config: config.unlink(), r"config\.toml cannot be read \(No such file"),
        (lambda data, config: config.write_text("seed = "), "is not a readable TOML file"),
        (lambda data, config: config.write_text(TRAINING.replace("resolution = 16", "resolution = 17")), "resolution"),
        (lambda data, config: config.write_text(TRAINING.replace("batch_size = 2", "batch_size = 9")), "batch"),
    ],
)
def test_train_on_what_cannot_be_used(
    run: Run, data: Path, config: Path, tmp_path: Path, damage: Callable[[Path, Path], object], message: str
) -> None:
    damage(data, config)
    assert_refused(run("train", "--data", data, "-o", tmp_path / "model", "--config", config), message)


def test_a_plan_with_fewer_calls(run: Run, bundle: Path, tmp_path: Path) -> None:
    done = run("plan", bundle, "--sampler", "ddim", "--steps", 10, "--calls", 4, "--json")
    assert json.loads(done.stdout) == {"plan": "plans/ddim-calls4-10.json", "rows": 4}
    latents = [tmp_path / "4.npy", tmp_path / "at.npy"]
    drawn = ("generate", bundle, "red", "-o", tmp_path / "x.png", "--steps", 10, "--calls", 4, "--latents")
    assert run(*drawn, latents[0]).exit_code == 0
    assert run("plan", bundle, "--sampler", "ddim", "--steps", 10, "--at", "0,1,2,9", "--order", 0).exit_code == 0
    assert run(*drawn, latents[1]).exit_code == 0
    first, second = (np.load(file, allow_pickle=False) for file in latents)
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--calls", 11), "calls is 11; the plan makes 10, of which 1 to 10 can be kept"),
        (("--at", "0,b"), "--at 0,b is no list of calls"),
        (("--at", "0,5,3"), "the calls 0, 5, 3 were asked for"),
        (("--at", "0,3", "--calls", 3), "--calls 3 was given with --at of 2 calls"),
        (("--order", 2), "--order is of the forecast between --calls, which was not given"),
        (("--calls", 3, "--order", 4), "order is 4; a forecast is of order 0 to 3"),
    ],
)
def test_a_wrong_forecast(run: Run, bundle: Path, options: tuple[Any, ...], says: str) -> None:
    assert_refused(run("plan", bundle, "--sampler", "ddim", "--steps", 10, *options), re.escape(says))
    assert not (bundle / "plans").exists()
