"""The library as an application gets it: headers, exports, installation, examples; and its own tests in C++."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ldm_export
from ldm_export.cli import cmake_dir
from ldm_export.runtime import Pipeline
from ldm_export.runtime.inpainting import outpainted
from tests.cpp.conftest import SOURCES, installed, need, run
from tests.cpp.fuzz_seeds import write_seeds

TESTS = Path(__file__).parent
HEADER = SOURCES / "include" / "ldm" / "ldm.h"
PROJECT = """cmake_minimum_required(VERSION 3.22)
project(app C CXX)
find_package(ldm REQUIRED)
add_executable(app main.c)
target_link_libraries(app PRIVATE ldm::ldm)
"""


def declared() -> set[str]:
    return set(re.findall(r"^LDM_API [\w ]+?\*?(ldm_\w+)\(", HEADER.read_text(), re.MULTILINE))


def first_program() -> str:
    """The program on the header's first screen."""
    lines = HEADER.read_text().split("\n")
    return "\n".join(line for line in lines[2:20]).partition("\nErrors")[0]


def test_version() -> None:
    parts = re.findall(r"#define LDM_VERSION_\w+ (\d+)", HEADER.read_text())
    assert ".".join(parts) == ldm_export.__version__


def test_the_header_fits_its_promise() -> None:
    assert len(HEADER.read_text().splitlines()) < 250
    assert len(declared()) == 12
    assert "Ort" not in HEADER.read_text() + HEADER.with_suffix(".hpp").read_text()


def test_cmake_dir() -> None:
    printed = subprocess.run(
        [sys.executable, "-c", f"from {cmake_dir.__name__} import command; command()"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert (Path(printed.strip()) / "CMakeLists.txt").is_file()


def test_only_the_api_is_exported(library: Path) -> None:
    need(shutil.which("nm") is not None, "nm")
    lines = run("nm", "-D", "--defined-only", library / "libldm.so").splitlines()
    names = {line.split()[-1].partition("@")[0] for line in lines}
    assert names - {"LDM_0"} == declared()


def test_the_headers_are_plain_c_and_cpp(library: Path, tmp_path: Path) -> None:
    strict = ("-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", f"-I{SOURCES / 'include'}")
    (tmp_path / "a.c").write_text("#include <ldm/ldm.h>\n")
    (tmp_path / "a.cpp").write_text("#include <ldm/ldm.hpp>\n#include <ldm/ldm.h>\n")
    run("cc", "-std=c11", *strict, tmp_path / "a.c")
    run("c++", "-std=c++17", *strict, tmp_path / "a.cpp")


@pytest.mark.parametrize("shared", ["ON", pytest.param("OFF", marks=pytest.mark.slow)])
def test_an_installed_library_is_found_and_draws(
    build: Callable[..., Path], library: Path, sdk: Path, bundle: Path, tmp_path: Path, shared: str
) -> None:
    built = library
    if shared == "OFF":
        built = build(SOURCES, tmp_path / "static", "-DBUILD_SHARED_LIBS=OFF", "-DCMAKE_BUILD_TYPE=Debug")
    run("cmake", "--install", built, "--prefix", tmp_path / "prefix")
    app = tmp_path / "app"
    app.mkdir()
    (app / "CMakeLists.txt").write_text(PROJECT)
    (app / "main.c").write_text(first_program().replace("emoji64.bundle", str(bundle)))
    done = build(app, app / "build", f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}")
    drawn = subprocess.run([done / "app"], capture_output=True, check=True)
    expected = Pipeline.open(bundle, backend="cpu").generate(["red apple"]).images.ravel()
    pixels = np.frombuffer(drawn.stdout, np.uint8)
    assert drawn.stderr == b""
    assert np.abs(pixels.astype(int) - expected.astype(int)).max() <= 1
    (told,) = (tmp_path / "prefix").glob("lib/**/pkgconfig/ldm.pc")
    if shutil.which("pkg-config") is not None:
        (tmp_path / "prefix").rename(tmp_path / "moved")
        folder = tmp_path / "moved" / told.parent.relative_to(tmp_path / "prefix")
        includes = run("pkg-config", "--variable=includedir", "ldm", PKG_CONFIG_PATH=str(folder)).strip()
        assert (Path(includes) / "ldm" / "ldm.h").is_file()


@pytest.fixture(scope="module")
def examples(build: Callable[..., Path], library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    need(installed("png.h"), "libpng")
    folder = tmp_path_factory.mktemp("examples")
    run("cmake", "--install", library, "--prefix", folder / "prefix")
    return build(SOURCES / "examples", folder / "build", f"-DCMAKE_PREFIX_PATH={folder / 'prefix'}")


def test_example_in_cpp(examples: Path, bundle: Path, tmp_path: Path) -> None:
    picture = tmp_path / "in.png"
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(picture)
    prompts = ["a red circle", "a blue square", "two green triangles"]
    options = ["--sampler", "euler", "--steps", "10", "--calls", "6", "--guidance", "3", "--negative", "blue"]
    options += ["--seed", "5", "--image", str(picture), "--strength", "0.7", "--latents", str(tmp_path / "out.npy")]
    run(examples / "txt2img", bundle, *prompts, "-o", tmp_path / "out.png", *options)
    asked: dict[str, Any] = {"sampler": "euler", "steps": 10, "calls": 6, "guidance": 3.0, "negative_prompt": "blue"}
    pipeline = Pipeline.open(bundle, backend="cpu")
    expected = pipeline.generate(prompts, **asked, seed=5, image=pixels, strength=0.7)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected.latents, rtol=0, atol=1e-4)
    sheet = np.asarray(Image.open(tmp_path / "out.png")).astype(int)
    assert sheet.shape == (32, 32, 3)
    assert np.abs(sheet[16:, :16] - expected.images[2]).max() <= 1
    assert (sheet[16:, 16:] == 255).all()


def test_example_in_cpp_draws_a_part_anew_and_beyond(examples: Path, bundle: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 9:] = 255
    Image.fromarray(pixels).save(tmp_path / "in.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    options = ["--steps", "10", "--image", tmp_path / "in.png", "--mask", tmp_path / "mask.png", "--keep-pixels"]
    run(examples / "txt2img", bundle, "a red circle", "-o", tmp_path / "out.png", *options)
    pipeline = Pipeline.open(bundle, backend="cpu")
    wishes: dict[str, Any] = {"steps": 10, "keep_pixels": True}
    expected = pipeline.generate("a red circle", image=pixels, mask=mask, **wishes).images[0]
    drawn = np.asarray(Image.open(tmp_path / "out.png"))
    assert np.abs(drawn.astype(int) - expected).max() <= 1
    np.testing.assert_array_equal(drawn[:, :9], pixels[:, :9])
    run(
        examples / "txt2img",
        bundle,
        "a red circle",
        "-o",
        tmp_path / "wide.png",
        *options,
        "--outpaint",
        "left=4,bottom=6",
    )
    image, white = outpainted(pixels, mask, (4, 0, 0, 6), 2)
    expected = pipeline.generate("a red circle", image=image, mask=white, **wishes).images[0]
    assert np.abs(np.asarray(Image.open(tmp_path / "wide.png")).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "A bundle, and -o"),
        (("BUNDLE", "x", "-o", "x.png", "--mask", "m.png"), "are of an --image"),
        (
            ("BUNDLE", "x", "-o", "x.png", "--image", "IMAGE", "--mask", "MASK"),
            "The mask is 8x16 and the image 16x16; a",
        ),
        (("BUNDLE", "x", "-o", "x.png", "--image", "IMAGE", "--outpaint", "left"), "--outpaint is SIDE=PIXELS"),
        (("BUNDLE", "x", "-o", "x.png", "--image", "IMAGE", "--outpaint", "top=3"), "3 pixels were asked for (top)"),
        (("BUNDLE", "x", "-o", "x.png", "--image", "IMAGE", "--keep-pixels"), "keep_pixels was given without a mask"),
        (("BUNDLE", "x", "-o", "x.png", "--image", "IMAGE", "--image-guidance", "2"), "this model edits no picture"),
        (("--magic", "1"), "--magic is no option"),
        (("/nowhere", "x", "-o", "x.png"), "there is no such folder"),
        (("BUNDLE", "x", "-o", "x.png", "--sampler", "magic"), "no plan for 'magic'"),
        (("BUNDLE", "x", "-o", "x.png", "--steps", "-3"), "--steps is -3"),
        (("BUNDLE", "x", "-o", "x.png", "--steps", "10", "--calls", "11"), "calls is 11; the plan makes 10"),
        (("BUNDLE", "x", "-o", "x.png", "--image", "/nowhere.png"), "cannot be read as a PNG"),
    ],
)
def test_bad_arguments(examples: Path, bundle: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    named = {"BUNDLE": str(bundle), "IMAGE": str(tmp_path / "in.png"), "MASK": str(tmp_path / "mask.png")}
    Image.new("RGB", (16, 16)).save(named["IMAGE"])
    Image.new("L", (16, 8), 255).save(named["MASK"])
    words = [named.get(word, word) for word in arguments]
    done = subprocess.run([examples / "txt2img", *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("program", ["txt2img_c", "embed"])
def test_other_examples(examples: Path, bundle: Path, tmp_path: Path, program: str) -> None:
    done = subprocess.run(
        [examples / program, bundle, "a red circle", tmp_path / "out.png"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "step 1 of" in done.stderr
    expected = Pipeline.open(bundle, backend="cpu").generate(["a red circle"]).images[0]
    assert np.abs(np.asarray(Image.open(tmp_path / "out.png")).astype(int) - expected).max() <= 1


def build_tests(build: Callable[..., Path], folder: Path, *options: str) -> Path:
    need(installed("catch2/catch.hpp"), "Catch2 2")
    return build(TESTS, folder, "-DCMAKE_BUILD_TYPE=Debug", *options)


def test_its_own_tests(programs: Path, bundle: Path) -> None:
    print(run(programs / "ldm_unit", "--rng-seed", "0", LDM_TEST_BUNDLE=str(bundle)))
    print(run(programs / "ldm_unit", "[life]", LDM_TEST_BUNDLE=str(bundle), LDM_TEST_ROUNDS="50"))
    print(run(programs / "ldm_memory", LDM_TEST_BUNDLE=str(bundle), LDM_TEST_ROUNDS="50"))


@pytest.mark.slow
def test_a_thousand_lives(programs: Path, bundle: Path) -> None:
    print(run(programs / "ldm_unit", "[life]", LDM_TEST_BUNDLE=str(bundle)))
    print(run(programs / "ldm_memory", LDM_TEST_BUNDLE=str(bundle), LDM_TEST_ROUNDS="1000"))


@pytest.mark.slow
def test_lives_under_valgrind(programs: Path, tiny_bundle: Path) -> None:
    """Without the target, whose weights are packed for a processor that valgrind hides."""
    need(shutil.which("valgrind") is not None, "valgrind")
    checks = ("--leak-check=full", "--errors-for-leak-kinds=definite,possible", "--error-exitcode=1")
    suppressed = f"--suppressions={TESTS / 'valgrind.supp'}"
    settings = {"LDM_TEST_BUNDLE": str(tiny_bundle), "LDM_TEST_ROUNDS": "5"}
    print(run("valgrind", *checks, suppressed, programs / "ldm_unit", "[life]", **settings))


CHECKED = "-DCMAKE_CXX_FLAGS=-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -D_GLIBCXX_ASSERTIONS"
SANITIZERS = {
    # a large allocation may fail, and ldm_memory replaces `new` and not every form of it
    "address,undefined": {"ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=1:alloc_dealloc_mismatch=0"},
    # of ONNX Runtime's own mutexes it sees the unlocking and not the locking
    "thread": {"TSAN_OPTIONS": f"suppressions={TESTS / 'tsan.supp'}:report_mutex_bugs=0"},
}


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_under_sanitizers(build: Callable[..., Path], bundle: Path, tmp_path: Path, sanitizer: str) -> None:
    programs = build_tests(build, tmp_path / "build", CHECKED.replace("address,undefined", sanitizer))
    settings = {"LDM_TEST_BUNDLE": str(bundle), "LDM_TEST_ROUNDS": "50"} | SANITIZERS[sanitizer]
    if sanitizer == "thread":
        print(run(programs / "ldm_unit", "[threads]", **settings))
    else:
        print(run(programs / "ldm_unit", **settings))
        print(run(programs / "ldm_memory", **settings))


@pytest.mark.slow
def test_fuzzing(build: Callable[..., Path], bundle: Path, tmp_path: Path) -> None:
    need(shutil.which("clang++") is not None, "clang++")
    compilers = ("-DCMAKE_C_COMPILER=clang", "-DCMAKE_CXX_COMPILER=clang++", "-DLDM_FUZZ=ON")
    program = build(TESTS, tmp_path / "build", *compilers, CHECKED)
    write_seeds(bundle, tmp_path / "seeds")
    (tmp_path / "corpus").mkdir()
    seconds = os.environ.get("LDM_FUZZ_SECONDS", "60")
    limits = (f"-max_total_time={seconds}", "-max_len=20000", "-timeout=600", f"-dict={TESTS / 'fuzz.dict'}")
    tokenizer = str(bundle / "tokenizer")
    run(
        program / "ldm_fuzz",
        tmp_path / "corpus",
        tmp_path / "seeds",
        *limits,
        f"-artifact_prefix={tmp_path}/",
        LDM_TEST_TOKENIZER=tokenizer,
        TMPDIR=str(tmp_path),
    )
