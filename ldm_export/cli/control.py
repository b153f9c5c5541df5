"""Options for ControlNets: to export them, and to generate with them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

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
