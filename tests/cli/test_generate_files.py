"""What ``generate`` writes one file a picture, and what ``inspect`` shows of it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image, PngImagePlugin

from ldm_export.cli import main
from ldm_export.pictures.files import read_picture_file
from ldm_export.pictures.text import options_of, requests_from
from ldm_export.runtime import Pipeline

LDM_EXPORT = [sys.executable, "-c", "from ldm_export.cli import main; main(prog_name='ldm-export')"]
Kinds = Callable[[str], tuple[Path, Path]]


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def drawn(*arguments: Any) -> dict[str, Any]:
    done = run("generate", *arguments, "--json")
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout))


def refused(done: Result) -> str:
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image)


def redrawn(pipeline: Pipeline, path: Path, **options: Any) -> Any:
    """Pictures (B, H, W, C) by the text in a file alone."""
    return pipeline.generate(**options_of(requests_from(read_picture_file(path).parameters or "")), **options).images


def test_lines_of_a_list_may_have_weights(tiny_bundle: Path, tmp_path: Path) -> None:
    lines = [{"prompt": "(red:1.5) eyes", "prompt_weights": on, "seed": 3, "steps": 2} for on in (True, False)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    made = drawn(tiny_bundle, "-f", tmp_path / "list.jsonl", "-o", f"{tmp_path / 'out'}/")
    first, second = map(Path, made["files"])
    assert pixels(first).tobytes() != pixels(second).tobytes()
    assert requests_from(read_picture_file(first).parameters or "")[0].prompt_weights
    (tmp_path / "list.jsonl").write_text('{"prompt": "red", "long_prompts": 1}')
    said = refused(run("generate", tiny_bundle, "-f", tmp_path / "list.jsonl", "-o", f"{tmp_path / 'out'}/"))
    assert "line 1: long_prompts is 1; give True or False" in said


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--steps", 12, "--calls", 5, "--sampler", "plms"],
        ["--sampler", "euler-ancestral", "--steps", 7, "--guidance", 2.1, "--negative", " Negative:\n x\t"],
        ["--size", "16x24", "--negative", "", "--seed", -3, "--steps", 5],
        ["--prompt-weights", "--long-prompts", "--negative", "(red:0.5) " * 20, "--steps", 5],
    ],
    ids=["defaults", "calls", "noisy", "size", "weights and chunks"],
)
def test_pictures_can_be_drawn_again_from_their_text(tiny_bundle: Path, tmp_path: Path, options: list[Any]) -> None:
    out = tmp_path / "out"
    drawn(tiny_bundle, " red\n", "grün 红", "--count", 2, "-o", f"{out}/", *options)
    files = sorted(out.iterdir())
    assert [file.name for file in files] == ["0000.png", "0001.png", "0002.png", "0003.png"]
    assert len({pixels(file).tobytes() for file in files}) == 4
    pipeline = Pipeline.open(tiny_bundle)
    for file in files:
        np.testing.assert_array_equal(redrawn(pipeline, file)[0], pixels(file))


def test_a_grid_can_be_drawn_again_from_its_text(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    drawn(tiny_bundle, "red", "green", "--count", 2, "-o", path, "--steps", 5, "--seed", 3)
    images = redrawn(Pipeline.open(tiny_bundle), path)
    sheet = pixels(path)
    side = images.shape[1]
    for k, image in enumerate(images):
        row, column = divmod(k, 2)
        np.testing.assert_array_equal(sheet[row * side :][:side, column * side :][:, :side], image)


def test_a_picture_from_a_picture_can_be_drawn_again(tiny_bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (16, 24), "red").save(tmp_path / "in.png")
    options = ["--image", tmp_path / "in.png", "--strength", 0.4, "--steps", 10]
    drawn(tiny_bundle, "red", "-o", tmp_path / "p.png", *options)
    images = redrawn(Pipeline.open(tiny_bundle), tmp_path / "p.png", image=pixels(tmp_path / "in.png"))
    np.testing.assert_array_equal(images[0], pixels(tmp_path / "p.png"))


def test_a_picture_that_was_edited_can_be_edited_again(kinds: Kinds, tmp_path: Path) -> None:
    bundle = kinds("instruct-pix2pix")[1]
    Image.new("RGB", (16, 24), "red").save(tmp_path / "in.png")
    options = [bundle, "make it winter", "--image", tmp_path / "in.png", "--steps", 6, "-o", tmp_path / "p.png"]
    drawn(*options)
    plain = pixels(tmp_path / "p.png")
    drawn(*options, "--guidance", 9, "--image-guidance", 2)
    text = read_picture_file(tmp_path / "p.png").parameters or ""
    assert "CFG scale: 9, " in text
    assert "Image CFG scale: 2, Init image hash: " in text
    assert (pixels(tmp_path / "p.png") != plain).any()
    images = redrawn(Pipeline.open(bundle), tmp_path / "p.png", image=pixels(tmp_path / "in.png"))
    np.testing.assert_array_equal(images[0], pixels(tmp_path / "p.png"))
    assert "edits a picture" in refused(run("generate", bundle, "red", "-o", tmp_path / "q.png"))


def test_deepcache_is_in_the_text(variants: Callable[[str], Path], tmp_path: Path) -> None:
    bundle = variants("target")
    options = [bundle, "red", "-o", tmp_path / "p.png", "--steps", 6, "--backend", "cpu"]
    drawn(*options)
    plain = pixels(tmp_path / "p.png")
    drawn(*options, "--deepcache", 3)
    assert "DeepCache: 3" in (read_picture_file(tmp_path / "p.png").parameters or "")
    assert (pixels(tmp_path / "p.png") != plain).any()
    images = redrawn(Pipeline.open(bundle, backend="cpu"), tmp_path / "p.png")
    np.testing.assert_array_equal(images[0], pixels(tmp_path / "p.png"))


@pytest.mark.parametrize(
    ("kind", "options"), [("unconditional", ["--count", 2]), ("class-conditional", ["--class-label", 4])]
)
def test_models_without_text(kinds: Kinds, tmp_path: Path, kind: str, options: list[Any]) -> None:
    bundle = kinds(kind)[1]
    document = drawn(bundle, "-o", f"{tmp_path}/out/", "--steps", 4, *options)
    for file in map(Path, document["files"]):
        np.testing.assert_array_equal(redrawn(Pipeline.open(bundle), file)[0], pixels(file))


def test_the_seeds_of_count(tiny_bundle: Path, tmp_path: Path) -> None:
    document = drawn(tiny_bundle, "a", "b", "--count", 2, "--seed", 5, "-o", tmp_path / "p.png", "--steps", 2)
    assert document["seeds"] == [5, 6, 7, 8]
    found = requests_from(read_picture_file(tmp_path / "p.png").parameters or "")
    assert [(request.prompt, request.seed) for request in found] == [("a", 5), ("a", 6), ("b", 7), ("b", 8)]


def test_a_pattern(tiny_bundle: Path, tmp_path: Path) -> None:
    drawn(tiny_bundle, "Red apple", "-o", tmp_path / "{prompt}" / "{number:03}-{seed}.webp", "--seed", 9, "--steps", 2)
    with Image.open(tmp_path / "red-apple" / "000-9.webp") as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment.removeprefix(b"UNICODE\0").decode("utf-16-be").startswith("Red apple\nSteps: 2, Sampler: DDIM, ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["red", "-o", "{steps}.png"], "has the unknown field {steps}"),
        (["red", "-o", "{number}/../../x.png"], "leaves its folder"),
        (["red", "red", "-o", "{prompt}.png"], "Pictures 0 and 1 would both be red.png"),
        (["red", "-o", "{number}.txt"], "not the name of a picture file"),
        (["red", "-o", "new/", "--latents", "x.npy"], "--latents is one file, and new/ is one a picture"),
        (["red" * 20_000, "-o", "{number}.jpg"], "is longer than a JPEG holds"),
        (["red" * 20_000, "-o", "x.jpg"], "is longer than a JPEG holds"),
        (["-f", "list.jsonl", "-o", "x.png"], "x.png is one file, and -f draws one file a picture"),
        (["red", "-f", "list.jsonl", "-o", "new/"], "-f was given with prompts or classes"),
        (["-f", "absent.jsonl", "-o", "new/"], "absent.jsonl cannot be read"),
        (["-f", "list.jsonl", "-o", "new/"], "list.jsonl, line 2: There is no"),
        (["-f", "list.jsonl", "-o", "{number}.jpg", "--steps", 0], "list.jsonl, line 1: steps is 0"),
    ],
)
def test_nothing_is_drawn_where_anything_is_wrong(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[Any], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pipeline, "generate", lambda *_, **__: pytest.fail("drawn"))
    lines = [{"prompt": "red"}, {"prompt": "red", "sampler": "magic"}]
    Path("list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    says = says.replace("There is no", "This bundle has no plan for 'magic'")
    assert says in refused(run("generate", tiny_bundle, *arguments))
    assert [path.name for path in tmp_path.iterdir()] == ["list.jsonl"]


def test_a_list_resumes(tiny_bundle: Path, tmp_path: Path) -> None:
    lines = [{"prompt": "red", "count": 2}, {"prompt": "green", "steps": 3, "guidance": 1.0, "seed": 40}]
    listing, out = tmp_path / "list.jsonl", tmp_path / "out"
    listing.write_text("\n".join(map(json.dumps, lines)))
    arguments = (tiny_bundle, "-f", listing, "-o", f"{out}/", "--steps", 2)
    document = drawn(*arguments)
    assert document["drawn"] == document["files"] == [str(out / f"000{k}.png") for k in range(3)]
    assert document["seeds"] == [0, 1, 40]
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    requests = [requests_from(read_picture_file(file).parameters or "")[0] for file in sorted(out.iterdir())]
    assert [(request.prompt, request.steps, request.guidance) for request in requests][2] == ("green", 3, 1.0)
    (out / "0001.png").unlink()
    assert drawn(*arguments)["drawn"] == [str(out / "0001.png")]
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    done = run("generate", *arguments)
    assert re.search(r"out/: 0 drawn, 3 were there, on onnxruntime", done.stdout)


def test_what_is_there_is_not_replaced(tiny_bundle: Path, tmp_path: Path) -> None:
    arguments = (tiny_bundle, "red", "-o", f"{tmp_path}/{{number}}.png", "--count", 2, "--steps", 2)
    drawn(*arguments)
    first = (tmp_path / "0.png").read_bytes()
    for content in (b"no picture", None):
        if content is None:  # another request
            drawn(tiny_bundle, "green", "-o", tmp_path / "1.png", "--steps", 2)
        else:
            (tmp_path / "1.png").write_bytes(content)
        kept = (tmp_path / "1.png").read_bytes()
        (tmp_path / "0.png").unlink()
        assert "1.png is there and is not the picture that was asked for. Use --force" in refused(
            run("generate", *arguments)
        )
        assert (tmp_path / "1.png").read_bytes() == kept
        assert not (tmp_path / "0.png").exists()
        assert len(drawn(*arguments, "--force")["drawn"]) == 2
        assert (tmp_path / "0.png").read_bytes() == first


def test_ctrl_c_leaves_whole_files(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [*LDM_EXPORT, "generate", tiny_bundle, "red", "--count", 4000, "-o", f"{out}/", "--backend", "cpu"]
    options: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True}

    def heed_ctrl_c() -> None:  # a job in the background of a shell inherits that it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen([*map(str, command)], preexec_fn=heed_ctrl_c, **options) as process:
        deadline = time.monotonic() + 120
        while not (out / "0001.png").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert "Aborted!" in errors
    assert "Traceback" not in errors
    files = sorted(out.iterdir())
    assert 2 <= len(files) < 4000
    for number, file in enumerate(files):
        assert file.name == f"{number:04}.png"
        assert requests_from(read_picture_file(file).parameters or "")[0].seed == number
        assert pixels(file).ndim == 3


# --- inspect --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["p.png", "p.jpg", "p.webp"])
def test_inspect_shows_the_request(tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    drawn(tiny_bundle, "red, grün", "-o", path, "--steps", 2, "--negative", "blue")
    done = run("inspect", path)
    assert done.exit_code == 0, done.output
    assert "red, grün\nNegative prompt: blue\nSteps: 2, Sampler: DDIM, CFG scale: " in done.stdout
    document = json.loads(run("inspect", path, "--json").stdout)
    assert document["prompt"] == "red, grün"
    assert document["settings"]["Plan"] == "ddim"
    assert document["requests"][0]["steps"] == 2
    assert (document["format"], document["width"]) == (read_picture_file(path).format, pixels(path).shape[1])


def test_inspect_of_other_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (8, 4)).save(tmp_path / "plain.png")
    assert "PNG, 8x4\nIt has no parameters text.\n" in run("inspect", tmp_path / "plain.png").stdout
    assert json.loads(run("inspect", tmp_path / "plain.png", "--json").stdout)["parameters"] is None
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "a \x1b[2Jcat\u202e [bold]x[/bold]\nSteps: 1, Sampler: Euler, Seed: 2")
    Image.new("RGB", (8, 4)).save(tmp_path / "other.png", pnginfo=text)
    shown = run("inspect", tmp_path / "other.png").stdout
    assert "a \\x1b[2Jcat\\u202e [bold]x[/bold]\nSteps: 1" in shown
    assert "\x1b" not in shown
    document = json.loads(run("inspect", tmp_path / "other.png", "--json").stdout)
    assert (document["requests"], document["settings"]["Seed"]) == ([], "2")


def test_inspect_of_no_picture(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("no picture")
    assert "is not a picture that is read" in refused(run("inspect", tmp_path / "x.png"))
    assert "no such folder" in refused(run("inspect", tmp_path / "absent.png"))
