from __future__ import annotations

from pathlib import Path

import click

from ldm_export.bundle import Bundle
from ldm_export.cli.options import bundle_argument, console, json_option, print_json, stages
from ldm_export.export.ort_cpu import build_ort_cpu
from ldm_export.target import Target

OFTEN = {"encoder_hidden_states": "prompt"}


@click.command()
@bundle_argument
@click.option("--target", type=click.Choice(["cpu"]), required=True, help="The kind of machine: cpu is this one.")
@json_option
def command(bundle: Path, target: str, as_json: bool) -> None:
    """Make what a BUNDLE runs faster with on one kind of machine, under its targets/.

    cpu: the graphs rewritten for ONNX Runtime's CPU, their weights packed for this kind of processor. It can be deleted
    and built again at any time.
    """
    with stages("build") as progress:
        made = build_ort_cpu(Bundle.open(bundle), progress)
    if as_json:
        print_json({"target": str(made.folder), **made.report})
        return
    print_target(made)


def print_target(target: Target) -> None:
    for name, graph in target.report["graphs"].items():
        rules = [f"{rule['name']} {rule['applied']}" for rule in graph["rules"] if rule["applied"]]
        cut = [f"{count} values once a {OFTEN.get(key, key)}" for key, count in graph["once"].items()]
        says = ", ".join([*rules, *cut]) or "no rule fits"
        console.print(f"{name:15} {says}; differs from the plain graph by {graph['error']:.1e}")
        for rule in graph["rules"]:
            for reason in rule["refused"]:
                console.print(f"{'':15} {rule['name']} left {reason}", markup=False)
    size_mb = sum(file.stat().st_size for file in target.folder.iterdir()) / 1e6
    console.print(f"{target.folder}: {size_mb:.1f} MB for {' and '.join(f'{k} {v}' for k, v in target.needs.items())}")
