from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from ldm_export.bundle import Bundle
from ldm_export.cli.options import (
    bundle_argument,
    check_output,
    console,
    folder,
    json_option,
    margins_from_text,
    print_json,
    size_from_text,
    steps_bar,
    write_output,
)
from ldm_export.cli.pictures import check_writable, read_picture, save_grid
from ldm_export.errors import InputError
from ldm_export.runtime import Pipeline
from ldm_export.runtime.backends import BACKENDS
from ldm_export.runtime.inpainting import Margins, outpainted
from ldm_export.runtime.pipeline import MOST_THREADS
from ldm_export.runtime.request import picture_channels
from ldm_export.runtime.values import MOST_ITEMS


def _requested(prompts: tuple[str, ...], class_labels: tuple[int, ...], count: int | None, seed: int) -> dict[str, Any]:
    """What decides the number of pictures; ``count`` repeats one prompt or class, or counts where there is neither."""
    given = max(len(prompts), len(class_labels))
    if count is not None and given > 1 and count != given:
        raise InputError(f"--count {count} was given with {given} prompts or classes, of which each is one picture.")
    times = 1 if count is None or given > 1 else count
    several: dict[str, Any] = {"seed": seed} if given else {"seed": [seed + k for k in range(times)]}
    return several | {"prompts": list(prompts) * times or None, "class_labels": list(class_labels) * times or None}


def _pictures(bundle: Bundle, image: Path | None, mask: Path | None, margins: Margins | None) -> dict[str, Any]:
    """What is started from and what of it is drawn anew, with the room of ``--outpaint``."""
    picture = None if image is None else read_picture(image, picture_channels(bundle))
    white = None if mask is None else read_picture(mask, 1)[..., 0]
    if picture is not None and margins is not None:
        picture, white = outpainted(picture, white, margins, bundle.manifest.model["pixels_per_latent"])
    return {"image": picture, "mask": white}


@click.command()
@bundle_argument
@click.argument("prompts", nargs=-1, metavar="PROMPT...")
@click.option("-o", "--output", type=folder, required=True, help="The PNG; several pictures become a grid.")
@click.option("--sampler", default=None, help="A sampler, such as euler; the bundle's own (ddim) by default.")
@click.option("--steps", type=int, default=None, help="Denoising steps; the bundle's own number (20) by default.")
@click.option("--calls", type=int, default=None, help="Network calls; outputs of the other steps are forecast.")
@click.option("--guidance", type=float, default=None, help="Guidance scale, 1 is off; the bundle's own (4) by default.")
@click.option("--negative", default=None, metavar="TEXT", help="What to steer away from.")
@click.option("--seed", type=int, default=0, show_default=True, help="Picture k uses seed + k.")
@click.option("--image", type=folder, default=None, help="A picture to start from.")
@click.option("--mask", type=folder, default=None, help="White is drawn anew in --image, black is kept.")
@click.option(
    "--outpaint", default=None, metavar="SIDE=PIXELS,...", help="Draw beyond --image: left, top, right, bottom."
)
@click.option("--keep-pixels", is_flag=True, help="What is black in --mask is --image to the bit.")
@click.option("--strength", type=float, help="Share of the steps redone on --image.  [default: 0.6; with a mask 1]")
@click.option("--size", default=None, metavar="HxW", help="In pixels; the model's own by default.")
@click.option(
    "--class-label", "class_labels", type=int, multiple=True, help="For class-conditional models; repeatable."
)
@click.option(
    "--count",
    type=click.IntRange(1, MOST_ITEMS),
    default=None,
    help="Pictures, of the one PROMPT if any.  [default: 1]",
)
@click.option(
    "--deepcache", default=1, metavar="N", help="The whole denoiser in every N-th step only: faster, rougher."
)
@click.option("--whole", is_flag=True, help="All in one call, by the plan's loop graph or engine.")
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True)
@click.option(
    "--threads", type=click.IntRange(1, MOST_THREADS), default=None, help="CPU threads; one a physical core by default."
)
@click.option("--latents", type=folder, default=None, help="Also write the final latents as .npy.")
@json_option
def command(
    bundle: Path,
    prompts: tuple[str, ...],
    output: Path,
    sampler: str | None,
    steps: int | None,
    calls: int | None,
    guidance: float | None,
    negative: str | None,
    seed: int,
    image: Path | None,
    mask: Path | None,
    outpaint: str | None,
    keep_pixels: bool,
    strength: float | None,
    size: str | None,
    class_labels: tuple[int, ...],
    count: int | None,
    deepcache: int,
    whole: bool,
    backend: str,
    threads: int | None,
    latents: Path | None,
    as_json: bool,
) -> None:
    """Draw one picture a PROMPT from BUNDLE, without PyTorch."""
    height, width = (None, None) if size is None else size_from_text(size)
    check_writable(output)
    if latents is not None:
        check_output(latents)
        if latents.resolve() == output.resolve():
            raise InputError(f"--latents and --output both name {output}. Name two files.")
    requested = _requested(prompts, class_labels, count, seed)
    margins = None if outpaint is None else margins_from_text(outpaint)
    if image is None and margins is not None:
        raise InputError(f"--outpaint {outpaint} was given without --image, around which it draws. Name the picture.")
    pipeline = Pipeline.open(bundle, backend=backend, threads=threads)
    requested |= _pictures(pipeline.bundle, image, mask, margins)
    with steps_bar("drawing") as advance:
        result = pipeline.generate(
            sampler=sampler,
            steps=steps,
            calls=calls,
            guidance=guidance,
            negative_prompt=negative,
            height=height,
            width=width,
            strength=strength,
            keep_pixels=keep_pixels,
            deepcache=deepcache,
            whole=whole,
            callback=lambda step: advance(step.index + 1, step.count),
            **requested,
        )
    save_grid(result.images, output)
    if latents is not None:
        content = io.BytesIO()
        np.save(content, result.latents, allow_pickle=False)
        write_output(latents, content.getvalue())
    if as_json:
        timings = asdict(result.timings) | {"total_ms": result.timings.total_ms}
        print_json(
            {
                "output": str(output),
                "seeds": list(result.seeds),
                "requested_backend": pipeline.requested_backend,
                "backend": result.backend,
                "timings": timings,
            }
        )
        return
    console.print(
        f"{output}: {len(result.images)} of {result.images.shape[2]}x{result.images.shape[1]} in "
        f"{result.timings.total_ms / 1000:.2f} s on {result.backend} (asked for: {pipeline.requested_backend})"
    )
