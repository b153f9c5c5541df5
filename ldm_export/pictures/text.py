"""The request of a picture as the ``parameters`` text that other tools read, and back.

The form is that of AUTOMATIC1111's stable-diffusion-webui, which most galleries and other tools read:

    a lighthouse at dusk
    Negative prompt: people
    Steps: 20, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 7, Size: 512x768, Model hash: 0123456789, Model: my-model,
    Plan: dpmpp-2m, Version: ldm_export 0.1.0                                                       (one line with that)

The prompt and the negative prompt have as many lines as they have; a model that reads no text has neither. Size is
WIDTHxHEIGHT. A value with other signs than letters, digits and a few is quoted as JSON. Model hash is the first 10 of
the 64 hex digits of the SHA-256 of the bundle's manifest.json, which lists the SHA-256 of every file of the bundle but
its targets. Beside the fields of that tool:

    Denoising strength, Init image hash    from a picture: the strength; SHA-256 of its pixels, shortened likewise
    Image CFG scale                        of a picture that was edited: the scale of the guidance towards it
    Mask hash, Keep pixels                 of a part drawn anew: SHA-256 of the mask's pixels; True if the rest was kept
    ControlNet 0, ControlNet 1, …          of each ControlNet in use its name, weight, start and end as shares of the
                                           steps, and SHA-256 of its picture, as that tool's extension has them
    IP-Adapter                             its weight, and SHA-256 of its picture, likewise
    Plan                                   the sampler's name here; Sampler is that tool's name for it where it has one
    Calls, DeepCache, Class label          as they were asked for; absent where they were not
    Adapters                               JSON array: file's name, strength and SHA-256 of each, shortened likewise
    Prompt weights, Long prompts           True if brackets in the prompts are weights, as that tool always has it; if
                                           long prompts were read in chunks, and not cut off
    Exact                                  JSON object of the prompts that the lines above do not give to the letter:
                                           those with spaces at an end of a line, control characters, or a line that
                                           begins with "Negative prompt:"
    Grid                                   JSON array, one object a further picture of a grid, row by row, of what it
                                           has otherwise than the first, whose request is the rest of the text
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count, takewhile
from typing import Any

from ldm_export import __version__
from ldm_export.errors import InputError

HASH_DIGITS = 10
"""Hex digits of a hash in the text, as many as AUTOMATIC1111 has."""
SAMPLER_NAMES: Mapping[str, str] = {
    "ddim": "DDIM",
    "plms": "PLMS",
    "lcm": "LCM",
    "euler": "Euler",
    "euler-ancestral": "Euler a",
    "heun": "Heun",
    "dpmpp-2m": "DPM++ 2M",
    "dpmpp-2m-sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
}
"""AUTOMATIC1111's name of each sampler that it has; others keep their name here."""
OWN: Mapping[str, tuple[type, ...]] = {
    "prompt": (str, type(None)),
    "negative_prompt": (str, type(None)),
    "seed": (int,),
    "class_label": (int,),
}
"""Fields that pictures of one grid may have each of their own, and their types."""
_NEGATIVE = "Negative prompt:"
_FEWEST_SETTINGS = 3
"""Settings without which the last line is taken for one of the prompt, as AUTOMATIC1111 does."""
_NAME = re.compile(r"\w[\w \-/]{0,60}")
_PLAIN = re.compile(r"[\w.+()#/-]([\w .+()#/-]*[\w.+()#/-])?")
_QUOTED = re.compile(r'"(?:\\.|[^\\"])*"')
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters but for tab and line feed, and halves of surrogate pairs, which no encoding has."""


@dataclass(frozen=True)
class AdapterUse:
    """An adapter that a picture is drawn with.

    Attributes
    ----------
    name : of its file, without folders
    strength : how strongly
    sha256 : of the file, first 10 hex digits
    path : the file; not written into pictures, and not compared
    """

    name: str
    strength: float
    sha256: str
    path: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class PictureRequest:
    """What decides the pixels of one picture, no default left open.

    Attributes
    ----------
    prompt : None for a model that reads no text
    negative_prompt : None where none was given, which is not the empty text
    seed, steps, height, width : of this picture; sizes in pixels
    sampler : name of the sampler or of the plan, such as ``ddim``
    guidance : the scale; 1 is off
    model_hash : first 10 hex digits of the SHA-256 of the bundle's manifest.json
    model : name of the checkpoint that was exported
    calls, class_label : None where they were not given
    strength, image_hash : None unless it starts from a picture, whose pixels have this SHA-256, shortened likewise
    image_guidance : None unless that picture is edited, which has no strength
    mask_hash : None unless a part of that picture alone is drawn anew; of the mask's pixels, likewise
    keep_pixels : whether the other pixels are that picture's
    deepcache : the whole denoiser ran in every so many steps
    controls : texts of the ControlNets in use (`control_text`), or None
    ip_adapter : text of the IP-Adapter's picture (`ip_adapter_text`), or None
    adapters : what changed the model, in the order in which they were given
    prompt_weights, long_prompts : whether brackets in the prompts are weights; whether long ones were read in chunks
    """

    prompt: str | None
    negative_prompt: str | None
    seed: int
    sampler: str
    steps: int
    guidance: float
    height: int
    width: int
    model_hash: str
    model: str
    calls: int | None = None
    class_label: int | None = None
    strength: float | None = None
    image_hash: str | None = None
    mask_hash: str | None = None
    keep_pixels: bool = False
    deepcache: int = 1
    controls: tuple[str, ...] | None = None
    ip_adapter: str | None = None
    adapters: tuple[AdapterUse, ...] = ()
    image_guidance: float | None = None
    prompt_weights: bool = False
    long_prompts: bool = False


@dataclass(frozen=True)
class Parameters:
    """A ``parameters`` text in its parts, whoever wrote it; the prompts are None where there is no line of theirs."""

    prompt: str | None
    negative_prompt: str | None
    settings: Mapping[str, str]


def options_of(requests: Sequence[PictureRequest]) -> dict[str, Any]:
    """Arguments of `ldm_export.runtime.Pipeline.generate` for pictures that differ in the fields of `OWN` alone, but
    for the image that they start from, its mask, whether the rest of its pixels is kept, and pictures that control."""
    first = requests[0]
    names = (
        *("sampler", "steps", "calls", "guidance", "height", "width", "strength", "image_guidance", "deepcache"),
        *("prompt_weights", "long_prompts"),
    )
    negatives = None if first.negative_prompt is None else [request.negative_prompt for request in requests]
    return {name: getattr(first, name) for name in names} | {
        "prompts": None if first.prompt is None else [request.prompt for request in requests],
        "negative_prompt": negatives,
        "seed": [request.seed for request in requests],
        "class_labels": None if first.class_label is None else [request.class_label for request in requests],
        "adapters": [(adapter.path or adapter.name, adapter.strength) for adapter in first.adapters] or None,
    }


def parameters_text(requests: Sequence[PictureRequest]) -> str:
    """The text of one picture, or of a grid of several, which differ in the fields of `OWN` alone."""
    first = requests[0]
    lines = [] if first.prompt is None else [_UNSAFE.sub("\ufffd", first.prompt)]
    if first.negative_prompt is not None:
        lines.append(f"{_NEGATIVE} " + _UNSAFE.sub("\ufffd", first.negative_prompt))
    settings = _settings_of(first)
    read = parameters_from("\n".join([*lines, _line(settings)]))
    prompts = {"prompt": first.prompt, "negative_prompt": first.negative_prompt}
    if exact := {name: text for name, text in prompts.items() if text != getattr(read, name)}:
        settings["Exact"] = json.dumps(exact)
    if len(requests) > 1:
        differing = [
            {name: getattr(other, name) for name in OWN if getattr(other, name) != getattr(first, name)}
            for other in requests[1:]
        ]
        settings["Grid"] = json.dumps(differing)
    return "\n".join([*lines, _line(settings | {"Version": f"ldm_export {__version__}"})])


def _settings_of(request: PictureRequest) -> dict[str, str]:
    found = {
        "Steps": request.steps,
        "Sampler": SAMPLER_NAMES.get(request.sampler, request.sampler),
        "CFG scale": _number(request.guidance),
        "Seed": request.seed,
        "Size": f"{request.width}x{request.height}",
        "Model hash": request.model_hash,
        "Model": request.model,
        "Denoising strength": None if request.strength is None else _number(request.strength),
        "Image CFG scale": None if request.image_guidance is None else _number(request.image_guidance),
        "Init image hash": request.image_hash,
        "Mask hash": request.mask_hash,
        "Keep pixels": request.keep_pixels or None,
        **{f"ControlNet {k}": text for k, text in enumerate(request.controls or ())},
        "IP-Adapter": request.ip_adapter,
        "Plan": request.sampler,
        "Calls": request.calls,
        "DeepCache": request.deepcache if request.deepcache > 1 else None,
        "Class label": request.class_label,
        "Adapters": json.dumps([[use.name, use.strength, use.sha256] for use in request.adapters])
        if request.adapters
        else None,
        "Prompt weights": request.prompt_weights or None,
        "Long prompts": request.long_prompts or None,
    }
    return {name: str(value) for name, value in found.items() if value is not None}


def control_text(name: str, scale: float, start: float, end: float, image_hash: str) -> str:
    """What the text says of a control, in the form of the extension sd-webui-controlnet."""
    numbers = {"Weight": scale, "Guidance Start": start, "Guidance End": end}
    said = {"Model": name} | {key: _number(value) for key, value in numbers.items()} | {"Image hash": image_hash}
    return ", ".join(f"{key}: {value}" for key, value in said.items())


def ip_adapter_text(scale: float, image_hash: str) -> str:
    """What the text says of an IP-Adapter's picture."""
    return f"Weight: {_number(scale)}, Image hash: {image_hash}"


def _number(value: float) -> str:
    """Shortest text that is read as the same float64: ``4`` of 4.0."""
    return repr(float(value)).removesuffix(".0")


def _line(settings: Mapping[str, str]) -> str:
    return ", ".join(
        f"{name}: {value if _PLAIN.fullmatch(value) else json.dumps(value)}" for name, value in settings.items()
    )


def parameters_from(text: str) -> Parameters:
    """Take a ``parameters`` text apart; one without a line of settings is all prompt.

    Lines lose the spaces at their ends, and quoted settings their quotes. Takes time in proportion to the text.
    """
    *lines, last = text.rstrip().split("\n")
    settings = _settings_from(last)
    if len(settings) < _FEWEST_SETTINGS:
        lines, settings = [*lines, last], {}
    lines = [line.strip() for line in lines]
    start = next((k for k, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    negative = lines[start:]
    if negative:
        negative[0] = negative[0].removeprefix(_NEGATIVE).strip()
    return Parameters(
        prompt="\n".join(lines[:start]) if start else None,
        negative_prompt="\n".join(negative) if negative else None,
        settings=settings,
    )


def _settings_from(line: str) -> dict[str, str]:
    """``Steps: 20, Model: "a, b"`` as names and values, up to what is none."""
    settings: dict[str, str] = {}
    position = 0
    while (colon := line.find(":", position)) >= 0:
        name = line[position:colon].strip()
        if not _NAME.fullmatch(name):
            break
        position = colon + 1 + (len(line[colon + 1 : colon + 2]) - len(line[colon + 1 : colon + 2].lstrip()))
        quoted = _QUOTED.match(line, position)
        comma = line.find(",", quoted.end() if quoted else position)
        end = len(line) if comma < 0 else comma
        settings[name] = _unquoted(quoted[0]) if quoted else line[position:end].strip()
        position = end + 1
    return settings


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(text))
    except ValueError:
        return text


def requests_from(text: str) -> tuple[PictureRequest, ...]:
    """The requests that `parameters_text` was given.

    Raises
    ------
    InputError
        If the text is not of this package, or was changed so that it says no request.
    """
    found = parameters_from(text)
    try:
        first = _request_from(found)
        further = _json(found.settings.get("Grid", "[]"))
        if not isinstance(further, list):
            raise ValueError("Grid is no JSON array")
        return first, *(replace(first, **_own(values, "Grid")) for values in further)
    except KeyError as error:
        raise _no_request(f"it lacks {error.args[0]}") from error
    except ValueError as error:
        raise _no_request(str(error)) from error


def _no_request(why: str) -> InputError:
    return InputError(f"The text in this picture is not a request of ldm_export ({why[:200]}). Type the request anew.")


def _request_from(found: Parameters) -> PictureRequest:
    settings = found.settings
    width, _, height = settings["Size"].partition("x")
    strength, calls, label = (settings.get(name) for name in ("Denoising strength", "Calls", "Class label"))
    image_guidance = settings.get("Image CFG scale")
    request = PictureRequest(
        prompt=found.prompt,
        negative_prompt=found.negative_prompt,
        seed=int(settings["Seed"]),
        sampler=settings["Plan"],
        steps=int(settings["Steps"]),
        guidance=_finite(settings["CFG scale"]),
        height=int(height),
        width=int(width),
        model_hash=settings["Model hash"],
        model=settings["Model"],
        calls=None if calls is None else int(calls),
        class_label=None if label is None else int(label),
        strength=None if strength is None else _finite(strength),
        image_hash=settings.get("Init image hash"),
        mask_hash=settings.get("Mask hash"),
        keep_pixels=settings.get("Keep pixels") == "True",
        deepcache=int(settings.get("DeepCache", "1")),
        controls=tuple(takewhile(bool, (settings.get(f"ControlNet {k}", "") for k in count()))) or None,
        ip_adapter=settings.get("IP-Adapter"),
        adapters=_adapters_from(settings.get("Adapters", "[]")),
        image_guidance=None if image_guidance is None else _finite(image_guidance),
        prompt_weights=settings.get("Prompt weights") == "True",
        long_prompts=settings.get("Long prompts") == "True",
    )
    return replace(request, **_own(_json(settings.get("Exact", "{}")), "Exact"))


def _adapters_from(text: str) -> tuple[AdapterUse, ...]:
    found = _json(text)
    kinds = (str, float, str)
    if not isinstance(found, list) or not all(
        isinstance(each, list) and [type(part) for part in each] == list(kinds) for each in found
    ):
        raise ValueError("Adapters is no list of names, strengths and hashes")
    return tuple(AdapterUse(name, _finite(str(strength)), sha256) for name, strength, sha256 in found)


def _json(text: str) -> Any:
    """JSON, in which texts may have halves of surrogate pairs, as prompts may; raises ValueError."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deep") from error


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number


def _own(values: Any, where: str) -> dict[str, Any]:
    """What a JSON object says of one picture; raises ValueError unless it has fields of `OWN` of their types."""
    if not isinstance(values, dict) or not all(type(value) in OWN.get(name, ()) for name, value in values.items()):
        raise ValueError(f"{where} has something else than {', '.join(OWN)}")
    return values


def request_document(request: PictureRequest) -> dict[str, Any]:
    """A request as a JSON object, without what is None."""
    found = {name: value for name, value in asdict(request).items() if value is not None}
    found["adapters"] = [{key: each[key] for key in ("name", "strength", "sha256")} for each in found["adapters"]]
    return found
