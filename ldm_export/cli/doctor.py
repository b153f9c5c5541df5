from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from ldm_export import __version__
from ldm_export.bundle import Bundle
from ldm_export.bundle.targets.base import ORT_CPU, needs_of, read_target
from ldm_export.bundle.targets.engines import FLAVOURS, EngineTarget
from ldm_export.cli.options import console, folder, json_option, print_json
from ldm_export.errors import BackendError
from ldm_export.runtime.backends.cuda import driver_version, gpus
from ldm_export.runtime.backends.engine import EXTRAS
from ldm_export.runtime.backends.tensorrt import engine_fits, remedy

PACKAGES = {
    "numpy": "everything",
    "tokenizers": "prompts",
    "onnxruntime": "drawing on CPUs (extra cpu)",
    "onnxruntime-gpu": "drawing on NVIDIA GPUs (extra gpu)",
    "openvino": "drawing on CPUs (extra openvino)",
    "cuda-bindings": "TensorRT engines (extras rtx, gpu)",
    "tensorrt-rtx": "engines for RTX GPUs (extra rtx)",
    "tensorrt": "engines for data-centre GPUs (extra gpu)",
    "onnxruntime-ep-nv-tensorrt-rtx": "the backend ort-tensorrt-rtx",
    "torch": "export and training (extras export, train)",
    "onnx": "export (extra export)",
    "onnxscript": "export (extra export)",
    "peft": "adapting (extra adapt)",
    "safetensors": "checkpoints (extras export, train)",
}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _providers() -> list[str]:
    try:
        import onnxruntime
    except ImportError:
        return []
    providers: list[str] = onnxruntime.get_available_providers()
    return providers


def _gpu() -> dict[str, Any]:
    """What CUDA says of this machine; that there is no GPU is nothing wrong."""
    try:
        return {"devices": [vars(gpu) for gpu in gpus()], "driver_runs_cuda": driver_version(), "why_none": ""}
    except BackendError as error:
        return {"devices": [], "driver_runs_cuda": None, "why_none": str(error)}


def targets_of(bundle: Bundle, found: dict[str, Any]) -> dict[str, str]:
    """Each target of a bundle by its kind: empty where it runs here, or why it does not and what to type."""
    advice = {}
    onnxruntime = found["packages"]["onnxruntime"] or found["packages"]["onnxruntime-gpu"] or "not installed"
    cpu = read_target(bundle, ORT_CPU, needs_of(onnxruntime))
    if cpu is not None:
        advice[ORT_CPU] = f"{cpu}. Run: ldm-export build {bundle.path} --target cpu" if isinstance(cpu, str) else ""
    devices = found["gpu"]["devices"]
    capability = devices[0]["compute_capability"] if devices else None
    for flavour in FLAVOURS:
        installed = found["packages"][flavour.replace("_", "-")]
        for kind, target in engine_fits(bundle, flavour, installed, capability).items():
            if not isinstance(target, EngineTarget):
                run = f". Run: {remedy(bundle, kind, target, flavour, capability)}" if capability else ""
                advice[kind] = f"{target}{run}"
            elif installed is None:
                advice[kind] = f"{flavour} is not installed. Run: pip install 'ldm_export[{EXTRAS[flavour]}]'"
            else:
                advice[kind] = "" if capability else "there is no GPU here"
    return advice


def diagnose(bundle: Bundle | None = None) -> dict[str, Any]:
    """Versions, providers, GPUs, whether a bundle's targets run here, and a sentence for each thing that is wrong."""
    packages = {package: _version(package) for package in PACKAGES}
    problems = []
    if packages["onnxruntime"] and packages["onnxruntime-gpu"]:
        problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; only one may be. "
            "Run: pip uninstall -y onnxruntime onnxruntime-gpu, then install the one you want."
        )
    if not (packages["onnxruntime"] or packages["onnxruntime-gpu"] or packages["openvino"]):
        problems.append(
            "Neither ONNX Runtime nor OpenVINO is installed, so nothing can be drawn. "
            "Run: pip install 'ldm_export[cpu]'"
        )
    providers = _providers()
    if packages["onnxruntime-gpu"] and "CUDAExecutionProvider" not in providers:
        problems.append("onnxruntime-gpu is installed without a CUDA provider. Reinstall 'ldm_export[gpu]'.")
    found = {
        "ldm_export": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "packages": packages,
        "onnxruntime_providers": providers,
        "gpu": _gpu(),
        "problems": problems,
    }
    if bundle is not None:
        found["targets"] = targets_of(bundle, found)
    return found


@click.command()
@click.argument("bundle", type=folder, required=False)
@json_option
@click.pass_context
def command(ctx: click.Context, bundle: Path | None, as_json: bool) -> None:
    """Show what is installed here, and what is missing for what. Exit code 1 if something is wrong.

    With BUNDLE, also which of its targets run here and, of the others, why not and what to type.
    """
    found = diagnose(None if bundle is None else Bundle.open(bundle))
    if as_json:
        print_json(found)
    else:
        _print(found)
    if found["problems"]:
        ctx.exit(1)


def _print(found: dict[str, Any]) -> None:
    def line(name: str, text: str) -> None:
        console.print(f"  {name:30} {text}")

    console.print(
        f"ldm_export {found['ldm_export']}, Python {found['python']}, {found['machine']}, {found['cpus']} CPUs"
    )
    for package, installed in found["packages"].items():
        line(package, f"{installed or 'not installed':14} {PACKAGES[package]}")
    line("providers", ", ".join(found["onnxruntime_providers"]) or "none")
    gpu = found["gpu"]
    for device in gpu["devices"]:
        line("GPU", f"{device['name']}, compute capability {device['compute_capability']}")
    if gpu["devices"]:
        line("CUDA of its driver", gpu["driver_runs_cuda"])
    else:
        line("GPU", f"none. {gpu['why_none']}")
    for kind, why in found.get("targets", {}).items():
        line(f"targets/{kind}", f"does not run here: {why}" if why else "runs here")
    for problem in found["problems"]:
        console.print(f"problem: {problem}", style="red")
    if not found["problems"]:
        console.print("nothing is wrong", style="green")
