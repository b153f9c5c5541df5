from __future__ import annotations

from pathlib import Path

import click

from ldm_export.bundle import Bundle
from ldm_export.bundle.manifest import stale_loops
from ldm_export.bundle.plans import check_plans
from ldm_export.bundle.targets.base import kinds_of, sound_target
from ldm_export.bundle.targets.engines import engine_targets, sound_engine_target
from ldm_export.cli.control import controlnet_option, controlnets_from, image_adapter_from, ip_adapter_options
from ldm_export.cli.options import (
    adapters_from,
    bundle_argument,
    console,
    embedding_option,
    embeddings_from,
    family_option,
    json_option,
    lora_option,
    print_json,
    stages,
)
from ldm_export.errors import BundleError, InputError
from ldm_export.runtime.backends import open_backend
from ldm_export.runtime.conditioning import Conditioning
from ldm_export.runtime.facts import check_drawable


@click.command()
@bundle_argument
@click.option("--against", metavar="CHECKPOINT", default=None, help="Also compare every graph with this PyTorch model.")
@lora_option
@controlnet_option
@ip_adapter_options
@embedding_option
@family_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    bundle: Path,
    against: str | None,
    loras: tuple[str, ...],
    controlnets: tuple[str, ...],
    ip_adapter: Path | None,
    image_encoder: Path | None,
    embeddings: tuple[str, ...],
    as_json: bool,
) -> None:
    """Check BUNDLE: every file's hash, graphs, plans and tokenizers, and with --against the graphs' numbers.

    Exit code 1 if the numbers differ or what is under targets/ is damaged, 2 if the bundle is damaged.
    """
    if embeddings and against is None:
        raise InputError("--embedding changes the checkpoint of --against, which was not given. Give both, or neither.")
    if loras and against is None:
        raise InputError("--lora changes the checkpoint of --against, which was not given. Give both, or neither.")
    image_adapter = image_adapter_from(ip_adapter, image_encoder)
    if against is None and (controlnets or image_adapter):
        given = "--controlnet" if controlnets else "--ip-adapter"
        raise InputError(f"{given} goes with the checkpoint of --against, which was not given. Give both, or neither.")
    with stages("verify") as progress:
        progress("hashes")
        opened = Bundle.open(bundle, verify=True)
        for name, changed in stale_loops(opened.manifest).items():
            raise BundleError(
                f"Bundle {bundle}: {name} was made of another {changed[0]} than the bundle has. Make it again "
                "with: ldm-export plan --loop"
            )
        progress("targets")
        engines = engine_targets(opened)
        targets = {
            kind: sound_engine_target(opened, kind) if kind in engines else sound_target(opened, kind)
            for kind in kinds_of(opened)
        }
        faults = {kind: found for kind, found in targets.items() if isinstance(found, str)}
        backend = open_backend(opened, "cpu", None)
        for name in opened.manifest.graphs:
            progress(f"{name}: contract")
            backend.load(name)
        check_drawable(opened)
        progress("plans")
        check_plans(opened)
        if opened.manifest.roles is not None:
            progress("tokenizers")
            Conditioning(opened, backend)
        records = []
        if against is not None:
            from ldm_export.families import open_checkpoint
            from ldm_export.verify.parity import compare_with_checkpoint

            compared = compare_with_checkpoint(
                opened,
                open_checkpoint(
                    against,
                    adapters=adapters_from(loras),
                    embeddings=embeddings_from(embeddings),
                    controls=controlnets_from(controlnets),
                    image_adapter=image_adapter,
                ),
                progress,
            )
            records = [record.to_dict() for record in compared]
    passed = not faults and all(record["passed"] for record in records)
    if as_json:
        print_json(
            {
                "bundle": str(bundle),
                "files": len(opened.manifest.files),
                "targets": {kind: faults.get(kind) for kind in targets},
                "parity": records,
                "passed": passed,
            }
        )
    else:
        console.print(
            f"{len(opened.manifest.files)} files have their hashes, {len(opened.manifest.graphs)} graphs open"
        )
        for kind, fault in faults.items():
            console.print(f"FAIL targets/{kind}: {fault}. Delete that folder, or run ldm-export build again.")
        for record in records:
            mark = "ok  " if record["passed"] else "FAIL"
            console.print(
                f"{mark} {record['graph']:15} {record['output']:20} {record['max_error']:.1e} "
                f"(allowed {record['tolerance']:.0e})"
            )
    if not passed:
        ctx.exit(1)
