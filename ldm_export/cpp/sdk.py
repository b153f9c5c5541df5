"""Assembles what the C++ runtime is built against from packages: ``python sdk.py FOLDER [HEADERS]``.

For those who have no release archive of ONNX Runtime: its library from the installed Python package ``onnxruntime`` or
``onnxruntime-gpu``, its headers from an npm package, and the header-only JSON parser from PyPI. FOLDER is then laid out
as such an archive is, ``include/`` and ``lib/``, and is what CMake is given as ``ONNXRUNTIME_ROOT``. HEADERS is the
``include/`` of such a folder that is there already, for a machine without a network.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

HEADERS = "com.github.asus4.onnxruntime@0.4.9"
HEADERS_FOLDER = "package/Plugins/iOS~/onnxruntime.xcframework/ios-arm64/onnxruntime.framework/Headers/"
JSON = "nlohmann-json==3.12.0"
JSON_FOLDER = "nlohmann_json/include/"


def assemble(sdk: Path, headers: Path | None = None) -> None:
    """Make the folder ``sdk``, whole or not at all.

    Parameters
    ----------
    headers : the ``include/`` folder to copy; by default it is made from packages, which takes a network

    Raises
    ------
    SystemExit
        If ``onnxruntime`` is not installed, or a package cannot be had; the message says which.
    """
    partial = sdk.with_name(f".{sdk.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "lib").mkdir(parents=True)
    try:
        _copy_library(partial / "lib")
        if headers is not None:
            shutil.copytree(headers, partial / "include")
        else:
            (partial / "include").mkdir()
            with tempfile.TemporaryDirectory() as scratch:
                _copy_headers(Path(scratch), partial / "include")
                _copy_json(Path(scratch), partial / "include")
        shutil.rmtree(sdk, ignore_errors=True)
        partial.rename(sdk)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy_library(folder: Path) -> None:
    package = find_spec("onnxruntime")
    if package is None or package.origin is None:
        raise SystemExit("onnxruntime is not installed, and its library is needed. Run: pip install onnxruntime")
    for library in (Path(package.origin).parent / "capi").glob("libonnxruntime*.so*"):
        shutil.copy2(library, folder)
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
    if len(sys.argv) not in (2, 3):
        raise SystemExit("usage: python sdk.py FOLDER [HEADERS]")
    assemble(*(Path(argument).absolute() for argument in sys.argv[1:]))
