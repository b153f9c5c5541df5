from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table

from ldm_export.bundle import Bundle
from ldm_export.bundle.targets.engines import EngineTarget, engine_targets, sound_engine_target
from ldm_export.cli.engines import print_engine
from ldm_export.cli.options import bundle_argument, console, json_option
from ldm_export.cli.passes import print_passes
from ldm_export.contract import TensorSpec


def _tensors(tensors: tuple[TensorSpec, ...]) -> str:
    return "\n".join(f"{tensor.name} {tensor.dtype} ({', '.join(map(str, tensor.shape))})" for tensor in tensors)


@click.command()
@bundle_argument
@json_option
def command(bundle: Path, as_json: bool) -> None:
    """Show what BUNDLE holds: the model, its graphs, plan files, passes, parity record and TensorRT engines."""
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    if as_json:
        click.echo(manifest.to_json(), nl=False)
        return
    console.print(
        f"{manifest.source.get('checkpoint', bundle.name)}, exported by ldm_export {manifest.ldm_export_version}"
    )
    for key, value in manifest.model.items():
        console.print(f"  {key}: {value}")
    graphs = Table("graph", "inputs", "outputs", "MB")
    for name, graph in manifest.graphs.items():
        size_bytes = sum(
            entry.size_bytes
            for path, entry in manifest.files.items()
            if path.startswith(f"{name}/") or path == graph.path
        )
        graphs.add_row(name, _tensors(graph.inputs), _tensors(graph.outputs), f"{size_bytes / 1e6:.1f}")
    console.print(graphs)
    parity = Table("graph", "output", "max error", "allowed")
    for record in manifest.parity:
        cells = [record.get(key, "") for key in ("graph", "output", "max_error", "tolerance")]
        parity.add_row(*(f"{value:.1e}" if isinstance(value, float) else str(value) for value in cells))
    console.print(parity)
    plans = sorted(Path(path).stem for path in manifest.files if path.startswith("plans/"))
    if plans:
        console.print(f"plans: {', '.join(plans)}")
    if manifest.passes:
        print_passes(manifest.passes)
    for kind in engine_targets(opened):
        target = sound_engine_target(opened, kind)
        if not isinstance(target, EngineTarget):
            console.print(f"targets/{kind} is damaged: {target}")
            continue
        console.print(f"targets/{kind}: {target.flavour} {target.version}")
        for name, engine in target.engines.items():
            print_engine(target, name, f"built in {engine.seconds:.1f} s", kinds=True)
