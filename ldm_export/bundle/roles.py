"""The part of ``manifest.json`` that says which graph fills which role (:class:`ldm_export.contract.Roles`)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from typing import Any

from ldm_export.contract import GUIDANCE_KINDS, GraphSpec, Guidance, Roles, TextEncoder
from ldm_export.reading.documents import MalformedError
from ldm_export.reading.json_fields import check_path, check_type, field

LARGEST_SIZE = 1 << 20
"""Largest size, count or factor that a manifest may say."""
LEAST_TOKENS = 2
"""Fewest token ids of a text: start and end."""

CONTROL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,59}")
"""Names that controls are asked for by."""
OPTIONAL = ("controls", "image_encoder")
"""Keys of ``roles`` that are left out where there is nothing in them."""


def roles_document(roles: Roles) -> dict[str, Any]:
    """What a manifest says of roles."""
    return {key: value for key, value in asdict(roles).items() if value or key not in OPTIONAL}


def roles_of(found: Any, graphs: Mapping[str, GraphSpec]) -> Roles | None:
    """The field ``roles`` of a manifest with these graphs, checked; None where it is null.

    Raises
    ------
    MalformedError
        If it is missing, or a key, a type or a value is none that may be, or a graph is not there.
    """
    if "roles" in found and found["roles"] is None:
        return None
    roles = field(found, "roles", dict)
    _check_keys(roles, Roles, "roles", OPTIONAL)
    guidance = field(roles, "guidance", dict, "roles")
    _check_keys(guidance, Guidance, "roles.guidance")
    kind, scale = field(guidance, "kind", str, "roles.guidance"), guidance.get("scale")
    if kind not in GUIDANCE_KINDS:
        raise MalformedError(f"roles.guidance.kind is {kind[:60]!r}; there are {', '.join(GUIDANCE_KINDS)}")
    if type(scale) not in (int, float) or not 0 <= scale <= LARGEST_SIZE:
        raise MalformedError(f"roles.guidance.scale is {str(scale)[:40]}; a number from 0 to {LARGEST_SIZE} is needed")
    encoders = []
    for number, entry in enumerate(field(roles, "text_encoders", list, "roles")):
        at = f"roles.text_encoders[{number}]"
        check_type(entry, dict, at)
        _check_keys(entry, TextEncoder, at)
        length = field(entry, "length", int, at)
        if not LEAST_TOKENS <= length <= LARGEST_SIZE:
            raise MalformedError(f"{at}.length is {str(length)[:40]}; {LEAST_TOKENS} to {LARGEST_SIZE} is needed")
        graph, tokenizer, kind_of_it = (field(entry, key, str, at) for key in ("graph", "tokenizer", "kind"))
        encoders.append(TextEncoder(graph, tokenizer, kind_of_it, length))
        check_path(encoders[-1].tokenizer)
    conditions = field(roles, "conditions", dict, "roles")
    for name in conditions:
        field(conditions, name, str, "roles.conditions")
    controls = field(roles, "controls", dict, "roles") if "controls" in roles else {}
    for name in controls:
        field(controls, name, str, "roles.controls")
        if not CONTROL_NAME.fullmatch(name):
            raise MalformedError(f"roles.controls has the name {name[:60]!r}, which is none that can be asked for")
    conditioner = roles["conditioner"]
    denoiser, decoder, encoder = (field(roles, key, str, "roles") for key in ("denoiser", "vae_decoder", "vae_encoder"))
    made = Roles(
        denoiser,
        decoder,
        encoder,
        Guidance(kind, float(scale)),
        tuple(encoders),
        None if conditioner is None else field(roles, "conditioner", str, "roles"),
        conditions,
        controls,
        field(roles, "image_encoder", str, "roles") if "image_encoder" in roles else None,
    )
    for name in made.graphs:
        if name not in graphs or "/" in name:
            raise MalformedError(f"roles has the graph {name[:60]!r}, which there is not")
        if graphs[name].path != f"{name}/model.onnx":
            raise MalformedError(f"graphs[{name!r}] has the path {graphs[name].path!r}; it must be {name}/model.onnx")
    if len(set(made.graphs)) < len(made.graphs):
        raise MalformedError("roles has one graph in two roles")
    return made


def _check_keys(entry: Mapping[str, Any], kind: type[Any], where: str, optional: Collection[str] = ()) -> None:
    known = {known.name for known in fields(kind)}
    if entry.keys() | {*optional} != known:
        raise MalformedError(
            f"{where} has the keys {', '.join(sorted(entry))[:200]}; {', '.join(sorted(known))} are needed"
        )
