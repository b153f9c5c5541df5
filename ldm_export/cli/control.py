"""Options for ControlNets and IP-Adapters: to export them, and to generate with them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ldm_export.cli.options import folder as path_type
from ldm_export.cli.pictures import read_picture
from ldm_export.errors import InputError
from ldm_export.runtime.control import Control

Function = Callable[..., Any]
_CONTROL = re.compile(r"(?P<name>[^=]+)=(?P<file>.*?)(?P<options>(?:,(?:scale|start|end)=[^,]*)*)", re.DOTALL)


def controlnet_option(function: Function) -> Function:
    """Add ``--controlnet [NAME=]FOLDER``, as texts for `controlnets_from`."""
    return click.option(
        "--controlnet",
        "controlnets",
        multiple=True,
        metavar="[NAME=]FOLDER",
        help="A ControlNet for this model, in diffusers layout, named by its folder otherwise; repeatable.",
    )(function)


def controlnets_from(texts: tuple[str, ...]) -> list[tuple[str, Path]]:
    """Names and folders of ``--controlnet``."""
    found = []
    for text in texts:
        name, equals, folder = text.partition("=")
        if not equals or Path(text).exists():
            name, folder = Path(text).resolve().name, text
        found.append((name, Path(folder)))
    return found


def control_option(function: Function) -> Function:
    """Add ``--control NAME=PICTURE[,scale=…][,start=…][,end=…]``, as texts for `controls_from`."""
    return click.option(
        "--control",
        "controls",
        multiple=True,
        metavar="NAME=PICTURE[,scale=1][,start=0][,end=1]",
        help="A picture for one of the bundle's ControlNets; start and end are shares of the steps; repeatable.",
    )(function)


def controls_from(texts: tuple[str, ...]) -> dict[str, Control]:
    """Pictures of ``--control``, read, by the names of their ControlNets.

    Raises
    ------
    InputError
        If one is of another form or named twice, or a picture cannot be read.
    """
    found: dict[str, Control] = {}
    for text in texts:
        match = _CONTROL.fullmatch(text)
        if match is None or not match["file"]:
            raise InputError(f"--control {text[:80]} is none; give NAME=PICTURE, such as canny=edges.png,scale=0.8.")
        if match["name"] in found:
            raise InputError(f"--control {match['name']} was given twice. Give each ControlNet one picture.")
        options: dict[str, float] = {}
        for option in match["options"].split(",")[1:]:
            key, _, number = option.partition("=")
            try:
                options[key] = float(number)
            except ValueError:
                raise InputError(
                    f"--control {text[:80]}: {key} is {number[:40]!r}, which is no number. Give one such as {key}=0.8."
                ) from None
        found[match["name"]] = Control(read_picture(Path(match["file"])), **options)
    return found


def ip_adapter_options(function: Function) -> Function:
    """Add ``--ip-adapter FILE`` and ``--image-encoder FOLDER``, for `image_adapter_from`."""
    encoder = click.option(
        "--image-encoder",
        type=path_type,
        default=None,
        help="The image encoder of --ip-adapter; image_encoder/ beside it or in the checkpoint by default.",
    )
    adapter = click.option(
        "--ip-adapter", type=path_type, default=None, help="An IP-Adapter for this model, plain or plus, safetensors."
    )
    return adapter(encoder(function))


def image_adapter_from(file: Path | None, encoder: Path | None) -> tuple[Path, Path | None] | None:
    """File and encoder of ``--ip-adapter``; raises InputError for an encoder without one."""
    if file is None and encoder is not None:
        raise InputError("--image-encoder was given without --ip-adapter, which reads it. Give both, or neither.")
    return None if file is None else (file, encoder)


def ip_adapter_image_option(function: Function) -> Function:
    """Add ``--ip-adapter-image PICTURE[=SCALE]``, as text for `image_prompt_from`."""
    return click.option(
        "--ip-adapter-image",
        default=None,
        metavar="PICTURE[=SCALE]",
        help="A picture to be alike, for a bundle with an IP-Adapter; the scale is 1 by default.",
    )(function)


def image_prompt_from(text: str | None) -> dict[str, Any]:
    """Options of `Pipeline.generate` for ``--ip-adapter-image``; raises InputError if the picture cannot be read."""
    if text is None:
        return {}
    name, equals, scale = text.rpartition("=")
    if not equals or Path(text).exists():
        name, scale = text, "1"
    try:
        return {"ip_adapter_scale": float(scale), "ip_adapter_image": read_picture(Path(name))}
    except ValueError:
        raise InputError(
            f"--ip-adapter-image {text[:80]}: {scale[:40]!r} is no number. Give PICTURE=SCALE, such as {name[:80]}=0.6."
        ) from None
