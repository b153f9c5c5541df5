from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from ldm_export.bundle import Bundle
from ldm_export.cli.control import control_option, controls_from, image_prompt_from, ip_adapter_image_option
from ldm_export.cli.options import (
    adapters_from,
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
from ldm_export.cli.pictures import read_picture
from ldm_export.errors import InputError
from ldm_export.pictures.drawing import draw_files
from ldm_export.pictures.files import check_text, check_writable, save_grid
from ldm_export.pictures.lists import checked_requests, pictures_from_file, pictures_from_prompts
from ldm_export.pictures.names import Names, names_from, paths_of
from ldm_export.pictures.text import PictureRequest, options_of, parameters_text
from ldm_export.runtime import Pipeline
from ldm_export.runtime.backends import BACKENDS
from ldm_export.runtime.inpainting import Margins, outpainted
from ldm_export.runtime.pipeline import MOST_THREADS
from ldm_export.runtime.request import picture_channels
from ldm_export.runtime.values import MOST_ITEMS


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
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="FILE|FOLDER/|PATTERN",
    help="A PNG, JPEG or WebP, in which several pictures are a grid; or one file a picture: a folder, or a pattern "
    "such as out/{number:04}-{seed}-{prompt}.webp. Each file has its request inside.",
)
@click.option(
    "-f",
    "--file",
    "listing",
    type=folder,
    default=None,
    help="Draw what this file lists, one JSON object a line (docs/pictures.md); what is there already is kept.",
)
@click.option("--force", is_flag=True, help="Replace files of a folder or pattern that hold something else.")
@click.option("--sampler", default=None, help="A sampler, such as euler; the bundle's own (ddim) by default.")
@click.option("--steps", type=int, default=None, help="Denoising steps; the bundle's own number (20) by default.")
@click.option("--calls", type=int, default=None, help="Network calls; outputs of the other steps are forecast.")
@click.option("--guidance", type=float, default=None, help="Guidance scale, 1 is off; the bundle's own (4) by default.")
@click.option("--negative", default=None, metavar="TEXT", help="What to steer away from.")
@click.option("--prompt-weights", is_flag=True, help="Read (word:1.2), (word) and [word] in prompts as weights.")
@click.option("--long-prompts", is_flag=True, help="Read prompts in chunks that are too long for the text encoder.")
@click.option("--seed", type=int, default=0, show_default=True, help="Picture k uses seed + k.")
@click.option("--image", type=folder, default=None, help="A picture to start from, or to edit.")
@click.option("--mask", type=folder, default=None, help="White is drawn anew in --image, black is kept.")
@click.option(
    "--outpaint", default=None, metavar="SIDE=PIXELS,...", help="Draw beyond --image: left, top, right, bottom."
)
@click.option("--keep-pixels", is_flag=True, help="What is black in --mask is --image to the bit.")
@control_option
@ip_adapter_image_option
@click.option("--strength", type=float, help="Share of the steps redone on --image.  [default: 0.6; with a mask 1]")
@click.option("--image-guidance", type=float, help="Guidance towards --image of models that edit it.  [default: 1.5]")
@click.option("--size", default=None, metavar="HxW", help="In pixels; the model's own by default.")
@click.option(
    "--class-label", "class_labels", type=int, multiple=True, help="For class-conditional models; repeatable."
)
@click.option(
    "--count",
    type=click.IntRange(1, MOST_ITEMS),
    default=None,
    help="Pictures of each PROMPT, class or line.  [default: 1]",
)
@click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="FILE[=SCALE]",
    help="An adapter that ldm-export lora has made for BUNDLE; the scale is 1 by default; repeatable.",
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
    output: str,
    listing: Path | None,
    force: bool,
    sampler: str | None,
    steps: int | None,
    calls: int | None,
    guidance: float | None,
    negative: str | None,
    prompt_weights: bool,
    long_prompts: bool,
    seed: int,
    image: Path | None,
    mask: Path | None,
    outpaint: str | None,
    keep_pixels: bool,
    controls: tuple[str, ...],
    ip_adapter_image: str | None,
    strength: float | None,
    image_guidance: float | None,
    size: str | None,
    class_labels: tuple[int, ...],
    count: int | None,
    loras: tuple[str, ...],
    deepcache: int,
    whole: bool,
    backend: str,
    threads: int | None,
    latents: Path | None,
    as_json: bool,
) -> None:
    """Draw one picture a PROMPT from BUNDLE, or as many as --count says, without PyTorch."""
    height, width = (None, None) if size is None else size_from_text(size)
    names = names_from(output)
    _check_outputs(output, names, listing, latents)
    if listing is not None and (prompts or class_labels):
        raise InputError("-f was given with prompts or classes, which its lines have. Give one or the other.")
    margins = None if outpaint is None else margins_from_text(outpaint)
    if image is None and margins is not None:
        raise InputError(f"--outpaint {outpaint} was given without --image, around which it draws. Name the picture.")
    pipeline = Pipeline.open(bundle, backend=backend, threads=threads)
    given = _pictures(pipeline.bundle, image, mask, margins) | {"keep_pixels": keep_pixels, "whole": whole}
    given |= {"controls": controls_from(controls), **image_prompt_from(ip_adapter_image)}
    options: dict[str, Any] = {
        "sampler": sampler,
        "steps": steps,
        "calls": calls,
        "guidance": guidance,
        "negative_prompt": negative,
        "prompt_weights": prompt_weights,
        "long_prompts": long_prompts,
        "seed": seed,
        "height": height,
        "width": width,
        "strength": strength,
        "adapters": adapters_from(loras),
        "image_guidance": image_guidance,
        "deepcache": deepcache,
        **given,
    }
    if listing is None:
        wanted = pictures_from_prompts(prompts, class_labels, count or 1, options)
    else:
        wanted = pictures_from_file(listing, options, count or 1)
    requests = checked_requests(pipeline.bundle, wanted)
    if names is None:
        _draw_one_file(pipeline, requests, Path(output), latents, as_json, **given)
        return
    paths = paths_of(names, requests)
    with steps_bar("drawing") as advance:
        drawn = draw_files(pipeline, requests, paths, force=force, progress=advance, **given)
    if as_json:
        print_json(
            {
                "output": output,
                "files": [str(path) for path in paths],
                "drawn": [str(path) for path in drawn],
                "seeds": [request.seed for request in requests],
                "requested_backend": pipeline.requested_backend,
                "backend": pipeline.backend,
            }
        )
        return
    kept = f", {len(paths) - len(drawn)} were there" if len(drawn) < len(paths) else ""
    console.print(
        f"{output}: {len(drawn)} drawn{kept}, on {pipeline.backend} (asked for: {pipeline.requested_backend})"
    )


def _check_outputs(output: str, names: Names | None, listing: Path | None, latents: Path | None) -> None:
    """Refuse outputs that cannot be written, or that do not go together."""
    if names is None and listing is not None:
        raise InputError(f"{output} is one file, and -f draws one file a picture. Name a folder, such as out/.")
    if names is None:
        check_writable(Path(output))
    if latents is None:
        return
    if names is not None:
        raise InputError(
            f"--latents is one file, and {output} is one a picture. Name one picture file, or leave it out."
        )
    check_output(latents)
    if latents.resolve() == Path(output).resolve():
        raise InputError(f"--latents and --output both name {output}. Name two files.")


def _draw_one_file(
    pipeline: Pipeline,
    requests: Sequence[PictureRequest],
    output: Path,
    latents: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Draw all pictures at once into one file, and say so."""
    check_text(output, parameters_text(requests))
    with steps_bar("drawing") as advance:
        result = pipeline.generate(
            **options_of(requests), **options, callback=lambda step: advance(step.index + 1, step.count)
        )
    save_grid(result.images, output, requests)
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
