from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ldm_export.checkpoint import shipped_checkpoints
from ldm_export.cli.build import print_target
from ldm_export.cli.control import controlnet_option, controlnets_from, image_adapter_from, ip_adapter_options
from ldm_export.cli.options import (
    adapters_from,
    console,
    embedding_option,
    embeddings_from,
    family_option,
    folder,
    json_option,
    lora_option,
    parity_line,
    print_json,
    stages,
    steps_bar,
    was_given,
)
from ldm_export.cli.passes import print_passes
from ldm_export.errors import InputError
from ldm_export.export.chain import export_bundle
from ldm_export.export.ort_cpu import build_ort_cpu
from ldm_export.families import open_checkpoint
from ldm_export.plan import SAMPLERS

if TYPE_CHECKING:
    from ldm_export.bundle import Bundle

TARGETS = ("cpu", "none")


@click.command()
@click.argument("checkpoint")
@click.option("-o", "--output", type=folder, required=True, help="The bundle's folder.")
@click.option("--recipe", default=None, metavar="FILE|NAME", help="Passes to apply, such as the shipped cpu-fast.")
@click.option("--prompts", type=folder, default=None, help="What to draw, one a line; the recipe's own by default.")
@click.option("--work", type=folder, default=None, help="Where the recipe's stages are kept; OUTPUT.work by default.")
@click.option("--data", type=folder, default=None, help="Pictures to judge passes by; drawn by the model by default.")
@click.option("--held-out", type=folder, default=None, help="Pictures that distances are to; those of --data else.")
@click.option("--from-scratch", is_flag=True, help="Train even what a shipped checkpoint has the result of.")
@click.option("--target", type=click.Choice(TARGETS), default="cpu", help="What to build beside; cpu by default.")
@click.option(
    "--loop",
    "loops",
    multiple=True,
    metavar="SAMPLER-STEPS",
    help="Also make the whole sampling loop of a plan, such as ddim-20, one ONNX graph; repeatable.",
)
@click.option(
    "--sampler",
    type=click.Choice([*SAMPLERS]),
    default=None,
    help="What to generate with by default, in place of the checkpoint's own scheduler.",
)
@click.option(
    "--prediction-type",
    type=click.Choice(["epsilon", "v_prediction", "sample"]),
    default=None,
    help="What the denoiser predicts, where the checkpoint's files do not say, or say it wrongly.",
)
@click.option("--force", is_flag=True, help="Replace a bundle that is there.")
@lora_option
@controlnet_option
@ip_adapter_options
@embedding_option
@family_option
@json_option
def command(
    checkpoint: str,
    output: Path,
    recipe: str | None,
    prompts: Path | None,
    work: Path | None,
    data: Path | None,
    held_out: Path | None,
    from_scratch: bool,
    target: str,
    loops: tuple[str, ...],
    sampler: str | None,
    prediction_type: str | None,
    force: bool,
    loras: tuple[str, ...],
    controlnets: tuple[str, ...],
    ip_adapter: Path | None,
    image_encoder: Path | None,
    embeddings: tuple[str, ...],
    as_json: bool,
) -> None:
    """Turn CHECKPOINT, a folder in diffusers layout or a shipped name such as emoji64, into a bundle.

    Every graph is compared with PyTorch before the bundle is sealed; exit code 1 if one differs. With --recipe the
    model is distilled, pruned or quantized first, pass by pass, each measured and undone if it costs too much. A loop
    is compared with the runtime before it is added to the bundle; exit code 1 if one differs.
    """
    for name in ("prompts", "work", "data", "held_out", "from_scratch"):
        if recipe is None and was_given(name):
            raise InputError(
                f"--{name.replace('_', '-')} is about the passes of a recipe. Give --recipe too, or leave it."
            )
    adapters = adapters_from(loras)
    controls, image_adapter = controlnets_from(controlnets), image_adapter_from(ip_adapter, image_encoder)
    if recipe is not None and (controls or image_adapter):
        given = "--controlnet" if controls else "--ip-adapter"
        raise InputError(f"{given} was given with --recipe, whose passes change networks. Leave one of them out.")
    model = open_checkpoint(
        checkpoint,
        sampler=sampler,
        prediction_type=prediction_type,
        adapters=adapters,
        embeddings=embeddings_from(embeddings),
        controls=controls,
        image_adapter=image_adapter,
    )
    if loops:
        from ldm_export.verify.loops import add_loop, check_loops

        check_loops(model, loops)
    records: list[dict[str, Any]] = []
    if recipe is None:
        with stages("export") as progress:
            bundle = export_bundle(model, output, force=force, progress=progress)
    else:
        from ldm_export.recipe import read_recipe, run_recipe
        from ldm_export.recipe.settings import shipped_recipes

        shipped = recipe in shipped_recipes() and not Path(recipe).exists()
        if shipped and prompts is None and model.reads_text and model.name not in shipped_checkpoints():
            raise InputError(
                f"The shipped recipe {recipe} has the prompts of emoji64, which say nothing of {model.name}. "
                "Give some that your model is to draw, one a line, with --prompts FILE."
            )
        steps = read_recipe(recipe, prompts)
        with steps_bar("export") as advance:
            bundle, records = run_recipe(
                model,
                steps,
                output,
                work or output.with_name(f"{output.name}.work"),
                data=data,
                held_out=held_out,
                from_scratch=from_scratch,
                force=force,
                progress=lambda what, done, of: advance(done, of, what),
            )
    if loops:
        with stages("loops") as progress:
            for name in loops:
                bundle = add_loop(bundle, name, progress)
    made = None
    if target == "cpu":
        with stages("build") as progress:
            made = build_ort_cpu(bundle, progress)
    if as_json:
        print_json({"bundle": str(bundle.path), "passes": records, "parity": list(bundle.manifest.parity)})
        return
    if records:
        print_passes(records)
    for record in bundle.manifest.parity:
        console.print(parity_line(record))
    _print_size(bundle)
    if made is not None:
        print_target(made)


def _print_size(bundle: Bundle) -> None:
    size_mb = bundle.size_bytes / 1e6
    console.print(f"{bundle.path}: {len(bundle.manifest.files)} files, {size_mb:.1f} MB")
