"""The C++ runtime, built once a session where there are a compiler, CMake and an SDK."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ldm_export.bundle import Bundle
from ldm_export.bundle.atomic import locked
from ldm_export.export.ort_cpu import build_ort_cpu
from ldm_export.verify.loops import add_loop

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "ldm_export" / "cpp"


def run(*command: str | Path, **environment: str) -> str:
    """Run a command and return what it printed; fail with that if it fails."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, errors="replace", env={**os.environ, **environment}
    )
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def sdk() -> Path:
    """Where ONNX Runtime's headers and library are."""
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    folder = Path(os.environ.get("ONNXRUNTIME_ROOT", ROOT / "build" / "cpp-sdk"))
    if not (folder / "include").is_dir():
        pytest.skip("there is no SDK to build against: set ONNXRUNTIME_ROOT, or run `make cpp-sdk`")
    return folder.resolve()


@pytest.fixture(scope="session")
def build(sdk: Path) -> Callable[..., Path]:
    """A function that configures and builds a CMake project into a folder, and returns that."""

    def make(source: Path, folder: Path, *options: str) -> Path:
        run("cmake", "-S", source, "-B", folder, f"-DONNXRUNTIME_ROOT={sdk}", *options)
        run("cmake", "--build", folder, "--parallel", "2")
        return folder

    return make


@pytest.fixture(scope="session")
def library(build: Callable[..., Path], shared_folder: Path) -> Path:
    """The folder that the shared library is built in, once for all processes of this run."""
    folder = shared_folder / "ldm"
    folder.mkdir(exist_ok=True)
    with locked(folder):
        return build(SOURCES, folder, "-DCMAKE_BUILD_TYPE=Release")


def need(found: bool, what: str) -> None:
    if not found:
        pytest.skip(f"{what} is not installed")


def installed(prefix: str) -> bool:
    """Whether a header of a Debian package is there."""
    return any((Path(root) / prefix).exists() for root in ("/usr/include", "/usr/local/include"))


@pytest.fixture(scope="session")
def programs(build: Callable[..., Path], shared_folder: Path) -> Path:
    """The folder that the tests in C++ are built in, once for all processes of this run."""
    need(installed("catch2/catch.hpp"), "Catch2 2")
    folder = shared_folder / "ldm_tests"
    folder.mkdir(exist_ok=True)
    with locked(folder):
        return build(Path(__file__).parent, folder, "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O0")


def binding_of() -> ModuleType:
    """The example that binds ldm.h with ctypes."""
    spec = importlib.util.spec_from_file_location("ldm_ctypes", SOURCES / "examples" / "ldm_ctypes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def binding() -> ModuleType:
    return binding_of()


@pytest.fixture(scope="session")
def ldm(binding: ModuleType, library: Path) -> Any:
    return binding.load(str(library / "libldm.so"))


@pytest.fixture(scope="session")
def open_cpp(binding: ModuleType, ldm: Any) -> Iterator[Callable[..., Any]]:
    """A function that opens a bundle in C++."""
    opened = []

    def open_bundle(folder: Path, **options: Any) -> Any:
        opened.append(binding.Pipeline(ldm, str(folder), **options))
        return opened[-1]

    yield open_bundle
    for pipeline in opened:
        pipeline.close()


@pytest.fixture(scope="session")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_bundle` with its target for this machine and loops: one draws noise on its way, one forecasts."""
    folder = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("cpp") / "bundle")
    for loop in ("ddim-10", "euler-ancestral-10", "ddim-calls4-10"):
        add_loop(Bundle.open(folder), loop)
    build_ort_cpu(Bundle.open(folder))
    return folder
