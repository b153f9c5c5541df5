from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from ldm_export import __version__
from ldm_export.cli.options import console, json_option, print_json

PACKAGES = {
    "numpy": "everything",
    "tokenizers": "prompts",
    "onnxruntime": "drawing on CPUs (extra cpu)",
    "onnxruntime-gpu": "drawing on NVIDIA GPUs (extra gpu)",
    "openvino": "drawing on CPUs (extra openvino)",
    "torch": "export and training (extras export, train)",
    "onnx": "export (extra export)",
    "onnxscript": "export (extra export)",
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


def diagnose() -> dict[str, Any]:
    """Versions, ONNX Runtime's providers, and one sentence for each thing that is wrong."""
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
    return {
        "ldm_export": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "packages": packages,
        "onnxruntime_providers": providers,
        "problems": problems,
    }


@click.command()
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Show what is installed here, and what is missing for what. Exit code 1 if something is wrong."""
    found = diagnose()
    if as_json:
        print_json(found)
    else:
        console.print(
            f"ldm_export {found['ldm_export']}, Python {found['python']}, {found['machine']}, {found['cpus']} CPUs"
        )
        for package, installed in found["packages"].items():
            console.print(f"  {package:16} {installed or 'not installed':14} {PACKAGES[package]}")
        console.print(f"  providers        {', '.join(found['onnxruntime_providers']) or 'none'}")
        for problem in found["problems"]:
            console.print(f"problem: {problem}", style="red", markup=False)
        if not found["problems"]:
            console.print("nothing is wrong", style="green")
    if found["problems"]:
        ctx.exit(1)
