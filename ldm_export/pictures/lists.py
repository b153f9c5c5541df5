"""What is asked for, picture by picture: from a file with one JSON object a line, or from prompts.

    {"prompt": "a red apple", "seed": 7, "steps": 30}
    {"prompt": "a black cat", "negative_prompt": "people", "count": 4}
    {"prompt": "a black cat", "adapters": {"style.ldma": 0.8}}

A line is one picture, or with ``count`` several, whose seeds count up from the line's seed. Picture k of the file, from
0 on, has the default seed + k where its line has none. What else a line lacks is as the defaults say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm_export.bundle import Bundle
from ldm_export.bundle.manifest import MANIFEST
from ldm_export.contract import INPUT, THREE_ROWS, TWO_ROWS
from ldm_export.errors import InputError
from ldm_export.pictures.text import HASH_DIGITS, AdapterUse, PictureRequest, control_text, ip_adapter_text
from ldm_export.reading.documents import MalformedError, parsed, read_text
from ldm_export.reading.hashes import sha256_of
from ldm_export.runtime.control import CheckedControl, Control
from ldm_export.runtime.request import Request, checked_request
from ldm_export.runtime.values import MOST_ITEMS, shown, text_of, whole_number

FIELDS = (
    *("prompt", "negative_prompt", "seed", "sampler", "steps", "calls", "guidance", "height", "width", "class_label"),
    *("adapters", "prompt_weights", "long_prompts", "count"),
)
"""Keys of a line."""
MOST_PICTURES = 100_000
"""Pictures of one list."""


@dataclass(frozen=True)
class Wanted:
    """One picture that is asked for.

    Attributes
    ----------
    where : what messages begin with, such as ``prompts.jsonl, line 3``, or nothing
    options : of `ldm_export.runtime.options.Options`, with ``prompt`` and ``class_label`` of this picture, and its seed
    """

    where: str
    options: Mapping[str, Any]


def pictures_from_prompts(
    prompts: Sequence[str], class_labels: Sequence[int], count: int, options: Mapping[str, Any]
) -> list[Wanted]:
    """``count`` pictures of each prompt or class, or of neither; picture k has the seed of the options + k.

    Raises
    ------
    InputError
        If both are given and are not as many.
    """
    if prompts and class_labels and len(prompts) != len(class_labels):
        raise InputError(f"{len(prompts)} prompts and {len(class_labels)} class labels were given. Give one each.")
    given = max(len(prompts), len(class_labels), 1)
    if given * count > MOST_PICTURES:
        raise _too_many(f"{given} times {count}")
    return [
        Wanted(
            "",
            {
                **options,
                "prompt": prompts[k] if prompts else None,
                "class_label": class_labels[k] if class_labels else None,
                "seed": options["seed"] + k * count + j,
            },
        )
        for k in range(given)
        for j in range(count)
    ]


def pictures_from_file(path: Path, defaults: Mapping[str, Any], count: int = 1) -> list[Wanted]:
    """What the lines of a file ask for, in their order; the module's docstring has the form.

    Parameters
    ----------
    defaults : options of every picture that its line does not have, with ``seed``
    count : pictures of a line that does not say how many

    Raises
    ------
    InputError
        If the file is not such a list; names the line.
    """
    try:
        lines = read_text(path).split("\n")
    except (OSError, MalformedError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} cannot be read ({why}). Give a file with one JSON object a line.") from error
    found: list[Wanted] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            found += _pictures_of_line(line, f"{path}, line {number}", defaults, count, len(found))
        if len(found) > MOST_PICTURES:
            raise _too_many(str(path))
    if not found:
        raise InputError(f"{path} asks for no picture. Give a file with one JSON object a line.")
    return found


def _pictures_of_line(line: str, where: str, defaults: Mapping[str, Any], count: int, before: int) -> list[Wanted]:
    try:
        values = parsed(line)
    except MalformedError as error:
        raise InputError(f"{where} is {error}. Write one JSON object a line.") from error
    if not isinstance(values, dict):
        raise InputError(f'{where} is no JSON object. Write one a line, such as {{"prompt": "a red apple"}}.')
    if unknown := values.keys() - set(FIELDS):
        raise InputError(f"{where} has the unknown key {min(unknown)[:60]!r}; known are {', '.join(FIELDS)}.")
    try:
        if "adapters" in values:
            values["adapters"] = _pairs(values["adapters"])
        times = whole_number("count", values.pop("count", count), 1, MOST_ITEMS)
        first = whole_number("seed", values.get("seed", defaults["seed"] + before), -(2**63), 2**64 - 1)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return [Wanted(where, {**defaults, **values, "seed": first + k}) for k in range(times)]


def _pairs(adapters: Any) -> list[tuple[str, Any]]:
    """Adapters of a line, as `ldm_export.runtime.options.Options` has them."""
    if not isinstance(adapters, dict):
        raise InputError(f'adapters is {shown(adapters)}; give strengths by file, such as {{"style.ldma": 0.8}}.')
    return list(adapters.items())


def _too_many(what: str) -> InputError:
    return InputError(f"{what} is more than {MOST_PICTURES:,} pictures. Ask for fewer at a time.")


def checked_requests(bundle: Bundle, wanted: Iterable[Wanted]) -> list[PictureRequest]:
    """The request of each picture, every default filled in, checked against the bundle before anything is drawn.

    Raises
    ------
    InputError
        For the first that this bundle cannot draw.
    BundleError
        If a plan of the bundle cannot be read.
    """
    model = {
        "model_hash": sha256_of(bundle.path / MANIFEST)[:HASH_DIGITS],
        "model": str(bundle.manifest.source.get("checkpoint", bundle.path.resolve().name)),
    }
    found = []
    for picture in wanted:
        try:
            found.append(_checked_request(bundle, model, **picture.options))
        except InputError as error:
            if not picture.where:
                raise
            raise InputError(f"{picture.where}: {error}") from error
    return found


def _checked_request(
    bundle: Bundle, model: Mapping[str, str], *, prompt: Any = None, class_label: Any = None, seed: Any, **options: Any
) -> PictureRequest:
    if options.get("negative_prompt") is not None:
        text_of("negative_prompt", options["negative_prompt"])
    if class_label is not None and type(class_label) is not int:
        raise InputError(f"class_label is {shown(class_label)}; give a whole number.")
    checked = checked_request(
        bundle,
        None if prompt is None else [text_of("prompt", prompt)],
        class_labels=None if class_label is None else [class_label],
        seed=[seed],
        **options,
    )
    facts, guidance = bundle.manifest.model, bundle.roles.guidance
    sampler, steps = options.get("sampler"), options.get("steps")
    return PictureRequest(
        prompt=prompt,
        negative_prompt=options.get("negative_prompt"),
        seed=checked.seeds[0],
        sampler=facts["default_sampler"] if sampler is None else sampler,
        steps=facts["default_steps"] if steps is None else steps,
        guidance=checked.guidance if guidance.kind in (THREE_ROWS, TWO_ROWS, INPUT) else guidance.scale,
        height=checked.height,
        width=checked.width,
        calls=options.get("calls"),
        class_label=class_label,
        strength=checked.strength,
        image_guidance=checked.image_guidance,
        image_hash=_image_hash(options.get("image")),
        mask_hash=_image_hash(options.get("mask")),
        keep_pixels=checked.keep_pixels,
        deepcache=options.get("deepcache", 1),
        ip_adapter=_ip_adapter_text(checked, options.get("ip_adapter_image")),
        controls=_control_texts(checked.controls, options.get("controls")),
        adapters=tuple(
            AdapterUse(adapter.path.name, strength, adapter.sha256[:HASH_DIGITS], str(adapter.path))
            for adapter, strength in checked.mixtures[0]
        ),
        prompt_weights=checked.reading.weights,
        long_prompts=checked.reading.chunks,
        **model,
    )


def _control_texts(controls: Sequence[CheckedControl], given: Any) -> tuple[str, ...] | None:
    texts = []
    for control in controls:
        value = given[control.name]
        image_hash = _image_hash(value.image if isinstance(value, Control) else value)
        texts.append(control_text(control.name, control.scale, control.start, control.end, image_hash or ""))
    return tuple(texts) or None


def _ip_adapter_text(checked: Request, image: Any) -> str | None:
    if checked.image_prompt is None:
        return None
    return ip_adapter_text(checked.image_prompt.scale, _image_hash(image) or "")


def _image_hash(image: Any) -> str | None:
    """SHA-256 of a picture's pixels, uint8 (H, W, C), or of a mask's (H, W), row by row, shortened; None of none."""
    if image is None:
        return None
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()[:HASH_DIGITS]
