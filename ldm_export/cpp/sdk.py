"""Assembles what the C++ runtime is built against from packages: ``python sdk.py FOLDER``.

For those who have no release archive of ONNX Runtime: its library from the installed Python package ``onnxruntime``,
its headers from an npm package, and the header-only JSON parser from PyPI. FOLDER is then laid out as such an archive
is, ``include/`` and ``lib/``, and is what CMake is given as ``ONNXRUNTIME_ROOT``.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib.metadata import files
from pathlib import Path

HEADERS = "com.github.asus4.onnxruntime@0.4.9"
HEADERS_FOLDER = "package/Plugins/iOS~/onnxruntime.xcframework/ios-arm64/onnxruntime.framework/Headers/"
JSON = "nlohmann-json==3.12.0"
JSON_FOLDER = "nlohmann_json/include/"


def assemble(sdk: Path) -> None:
    """Make the folder ``sdk``, whole or not at all.

    Raises
    ------
    SystemExit
        If ``onnxruntime`` is not installed, or a package cannot be had; the message says which.
    """
    partial = sdk.with_name(f".{sdk.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "include").mkdir(parents=True)
    (partial / "lib").mkdir()
    try:
        _copy_library(partial / "lib")
        with tempfile.TemporaryDirectory() as scratch:
            _copy_headers(Path(scratch), partial / "include")
            _copy_json(Path(scratch), partial / "include")
        shutil.rmtree(sdk, ignore_errors=True)
        partial.rename(sdk)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy_library(folder: Path) -> None:
    try:
        listed = files("onnxruntime") or []
    except ImportError:
        raise SystemExit(
            "onnxruntime is not installed, and its library is needed. Run: pip install onnxruntime"
        ) from None
    libraries = [file for file in listed if file.name.startswith("libonnxruntime") and ".so" in file.name]
    for library in libraries:
        shutil.copy2(str(library.locate()), folder)
    for copied in folder.glob("libonnxruntime.so.*"):
        for link in ("libonnxruntime.so.1", "libonnxruntime.so"):
            (folder / link).symlink_to(copied.name)


def _copy_headers(scratch: Path, folder: Path) -> None:
    _run("npm", "pack", "--silent", HEADERS, cwd=scratch)
    (archive,) = scratch.glob("*.tgz")
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.removeprefix(HEADERS_FOLDER)
            if member.isfile() and name != member.name and name.endswith(".h") and "experimental" not in name:
                content = tar.extractfile(member)
                assert content is not None
                (folder / Path(name).name).write_bytes(content.read())


def _copy_json(scratch: Path, folder: Path) -> None:
    _run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), JSON, cwd=scratch)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            inside = name.removeprefix(JSON_FOLDER)
            if inside != name and inside.endswith(".hpp"):
                target = folder / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))


def _run(*command: str, cwd: Path) -> None:
    try:
        subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"{' '.join(command)} failed ({error}); a package of the SDK cannot be had.") from error


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python sdk.py FOLDER")
    assemble(Path(sys.argv[1]).absolute())
