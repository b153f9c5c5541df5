"""The two flavours of TensorRT: what is installed, and the devices that it builds for."""

from __future__ import annotations

import importlib
import re
from types import ModuleType
from typing import Any

from ldm_export.errors import BackendError, InputError

EXTRAS = {"tensorrt_rtx": "rtx", "tensorrt": "gpu"}
CALLED = {"tensorrt_rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}
DATA_CENTRE = {"90": "H100", "100": "B200"}


def library_of(flavour: str) -> ModuleType:
    """The flavour's Python package.

    Raises
    ------
    BackendError
        If it, or what builds with it, is not installed.
    """
    try:
        importlib.import_module("polygraphy")
        return importlib.import_module(flavour)
    except ImportError as error:
        raise BackendError(
            f"{error.name} is not installed, which engines of {CALLED[flavour]} are built with. "
            f"Run: pip install 'ldm_export[export,{EXTRAS[flavour]}]'"
        ) from error


def capabilities_of(flavour: str, library: Any, sm_versions: tuple[str, ...]) -> tuple[str, ...]:
    """Compute capabilities, such as ``8.9``, of the devices to build for.

    Parameters
    ----------
    sm_versions : such as ``89``; none for ``tensorrt``, which builds for the GPU at hand

    Raises
    ------
    InputError
        For a device that the flavour has no engines for.
    BackendError
        If ``tensorrt`` is to build where there is no GPU.
    """
    if flavour == "tensorrt":
        if sm_versions:
            raise InputError("--target tensorrt builds for the GPU of this machine; leave --sm out.")
        return (_capability_here(),)
    known = sorted((name[2:] for name in dir(library.ComputeCapability) if re.fullmatch(r"SM\d+", name)), key=int)
    if not sm_versions:
        raise InputError(f"--target rtx needs --sm, the GPUs to build for: {', '.join(known)}, or several of them.")
    for version in sm_versions:
        if version not in known:
            gpu = DATA_CENTRE.get(version)
            do = f"{gpu} needs the data-centre flavour: --target tensorrt on that machine." if gpu else "Use these."
            raise InputError(
                f"--sm {version} is no GPU that {CALLED[flavour]} {library.__version__} builds for; it has "
                f"{', '.join(known)}. {do}"
            )
    return tuple(f"{version[:-1]}.{version[-1]}" for version in sorted(set(sm_versions), key=int))


def _capability_here() -> str:
    import torch

    if not torch.cuda.is_available():
        raise BackendError(
            "--target tensorrt builds for the GPU of this machine, and PyTorch finds none here. Build where that GPU "
            "is, or with --target rtx, which needs none."
        )
    return "{}.{}".format(*torch.cuda.get_device_capability())
