from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ldm_export.bundle import Bundle
from ldm_export.bundle.targets.base import Target
from ldm_export.cli.engines import print_engine
from ldm_export.cli.options import bundle_argument, console, json_option, print_json, stages
from ldm_export.errors import InputError

OFTEN = {"encoder_hidden_states": "prompt"}
FLAVOUR_OF_TARGET = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}


@click.command()
@bundle_argument
@click.option("--target", type=click.Choice(["cpu", *FLAVOUR_OF_TARGET]), required=True, help="The kind of machine.")
@click.option("--sm", help="rtx: the GPUs, such as 89 (compute capability 8.9), or 86,89,120 in one engine.")
@click.option(
    "--precision", type=click.Choice(["fp32", "fp16", "int8"]), help="Engines: fp32; int8 has integer weights."
)
@click.option("--batch", help="Engines: pictures at a time, one number or min:opt:max.  [default: 1:1:4]")
@click.option("--size", help="Engines: pixels of a side, one number or min:opt:max.  [default: the model's]")
@click.option("--graphs", help="Engines: the graphs to build, such as unet,vae_decoder.  [default: all]")
@click.option(
    "--loop", "loops", multiple=True, help="Engines: also the whole loop of a plan, such as ddim-20. Repeatable."
)
@click.option("--refit", is_flag=True, help="Engines whose weights can be replaced. Needs a GPU.")
@click.option("--strip", is_flag=True, help="Engines without weights, put in by refitting. Needs a GPU.")
@click.option("--sparse", is_flag=True, help="Engines may use kernels for 2:4 sparse weights.")
@click.option("--force", is_flag=True, help="Build engines again that are there.")
@json_option
def command(bundle: Path, target: str, as_json: bool, **given: Any) -> None:
    """Make what a BUNDLE runs faster with on one kind of machine, under its targets/.

    cpu: the graphs rewritten for ONNX Runtime's CPU, their weights packed for this kind of processor. rtx: TensorRT-RTX
    engines, for which no GPU is needed here. tensorrt: engines for the data-centre GPU of this machine. Any can be
    deleted and built again at any time.
    """
    opened = Bundle.open(bundle)
    if target == "cpu":
        if used := [name for name, value in given.items() if value]:
            name = {"loops": "loop"}.get(used[0], used[0])
            raise InputError(f"--{name} is for engines, not for --target cpu; leave it out.")
        _build_cpu(opened, as_json)
    else:
        _build_engines(opened, FLAVOUR_OF_TARGET[target], given, as_json)


def _build_cpu(bundle: Bundle, as_json: bool) -> None:
    from ldm_export.export.ort_cpu import build_ort_cpu

    with stages("build") as progress:
        made = build_ort_cpu(bundle, progress)
    if as_json:
        print_json({"target": str(made.folder), **made.report})
        return
    print_target(made)


def _build_engines(bundle: Bundle, flavour: str, given: dict[str, Any], as_json: bool) -> None:
    from ldm_export.export.tensorrt.profiles import Range
    from ldm_export.verify.engines.build import DEFAULT_BATCH, EngineSettings, build_engines

    settings = EngineSettings(
        flavour,
        _listed(given["sm"]),
        given["precision"] or "fp32",
        Range.parse("batch", given["batch"]) if given["batch"] else DEFAULT_BATCH,
        Range.parse("size", given["size"]) if given["size"] else None,
        refittable=given["refit"],
        stripped=given["strip"],
        sparse=given["sparse"],
    )
    with stages("build") as progress:
        made = build_engines(
            bundle, settings, _listed(given["graphs"]), given["loops"], force=given["force"], progress=progress
        )
    target = made.target
    if as_json:
        document = {
            "target": str(target.folder),
            "built": made.built,
            "because": made.because,
            "engines": target.report,
        }
        seconds = {name: engine.seconds for name, engine in target.engines.items()}
        print_json({**document, "seconds": seconds, "version": target.version})
        return
    if made.because:
        console.print(f"Not all that was there is used, since {made.because}.")
    for name, engine in target.engines.items():
        print_engine(target, name, f"built in {engine.seconds:.1f} s" if name in made.built else "unchanged")
    able = " and ".join(target.compute_capabilities)
    console.print(f"{target.folder}: {target.flavour} {target.version} for compute capability {able}")


def _listed(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",")) if text else ()


def print_target(target: Target) -> None:
    for name, graph in target.report["graphs"].items():
        rules = [f"{rule['name']} {rule['applied']}" for rule in graph["rules"] if rule["applied"]]
        cut = [f"{count} values once a {OFTEN.get(key, key)}" for key, count in graph["hoisted"].items()]
        says = ", ".join([*rules, *cut]) or "no rule fits"
        console.print(f"{name:15} {says}; differs from the plain graph by {graph['error']:.1e}")
        for rule in graph["rules"]:
            for reason in rule["refused"]:
                console.print(f"{'':15} {rule['name']} left {reason}")
    size_mb = sum(file.stat().st_size for file in target.folder.iterdir()) / 1e6
    console.print(f"{target.folder}: {size_mb:.1f} MB for {' and '.join(f'{k} {v}' for k, v in target.needs.items())}")
