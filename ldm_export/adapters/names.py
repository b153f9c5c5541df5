"""Names of adapters' tensors: those of diffusers, PEFT and kohya's scripts, and whose layer each is.

A tensor's name is that of a layer, and an ending that says which factor it is. The layer's name is a path with dots,
behind its component's name (diffusers: ``unet.``, ``text_encoder_2.``) or behind ``base_model.model.`` (PEFT); or it is
flat, with underscores for dots (kohya: ``lora_unet_``, ``lora_te1_``; LyCORIS: ``lycoris_``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

PEFT = "base_model.model."
SOME_ADAPTER = r"(?:\.(?!weight\b)\w+)?"  # PEFT's own name of an adapter, such as "default"
ENDINGS = {
    rf"(?:\.lora_A{SOME_ADAPTER}|\.lora_down|[._]lora\.down|\.lora_linear_layer\.down)\.weight": "down",
    rf"(?:\.lora_B{SOME_ADAPTER}|\.lora_up|[._]lora\.up|\.lora_linear_layer\.up)\.weight": "up",
    r"\.lora_mid\.weight": "mid",
    r"(?:[._]lora|\.lora_linear_layer)?\.alpha": "alpha",
    r"\.dora_scale": "dora_scale",
    rf"\.lora_magnitude_vector{SOME_ADAPTER}(?:\.weight)?": "magnitude",
    **{
        rf"\.{name}{SOME_ADAPTER}": name
        for name in (
            *(f"{kind}_w{number}{half}" for kind in ("hada", "lokr") for number in (1, 2) for half in ("_a", "_b")),
            *("lokr_w1", "lokr_w2", "hada_t1", "hada_t2", "lokr_t2"),
        )
    },
}
"""Patterns of endings -> what such a tensor is: a factor, as `ldm_export.adapters.factors` names them, or a number."""
_PATTERNS = [(re.compile(rf"(.+?)(?:{pattern})"), role) for pattern, role in ENDINGS.items()]
FLAT = {
    "unet": ("lora_unet_", "lycoris_"),
    "transformer": ("lora_transformer_", "lora_unet_", "lycoris_"),
    "text_encoder": ("lora_te_", "lora_te1_", "lycoris_"),
    "text_encoder_2": ("lora_te2_", "lycoris_"),
    "text_encoder_3": ("lora_te3_", "lycoris_"),
}
"""How flat names of a component's layers begin."""
OLD_ATTENTION = {
    "to_out": ("to_out.0", "out_proj"),
    "to_q": ("q_proj",),
    "to_k": ("k_proj",),
    "to_v": ("v_proj",),
}
"""Last parts of names in old files of diffusers -> those of UNets and of text encoders."""


@dataclass(frozen=True)
class Layer:
    """A layer that an adapter may change.

    Attributes
    ----------
    shape : of its weight, (out, in) or (out, in, kh, kw)
    other_names : paths with dots that files have for it beside its own
    """

    shape: tuple[int, ...]
    other_names: tuple[str, ...] = ()


Networks = Mapping[str, Mapping[str, Layer]]
"""Layers by their names in a network, by component."""
Place = tuple[str, str]
"""A component and the name of one of its layers."""


def split(name: str) -> tuple[str, str] | None:
    """Name of a layer, and what the tensor is of it; None for an ending that is no adapter's."""
    for pattern, role in _PATTERNS:
        if match := pattern.fullmatch(name):
            return match[1], role
    return None


def places_of(networks: Networks) -> dict[str, list[Place]]:
    """Every spelling of every layer -> the layers that it may mean."""
    found: dict[str, list[Place]] = {}
    for component, layers in networks.items():
        for module, layer in layers.items():
            for path in {module, module.removeprefix("text_model."), *layer.other_names}:
                flat = path.replace(".", "_")
                for spelling in (path, f"{component}.{path}", *(start + flat for start in FLAT.get(component, ()))):
                    found.setdefault(spelling, []).append((component, module))
    return found


def spellings(name: str) -> Iterator[str]:
    """A layer's name in a file, and what it may be in files of today."""
    plain = name.replace(PEFT, "", 1).replace(".processor.", ".")
    yield plain
    start, dot, last = plain.rpartition(".")
    for other in OLD_ATTENTION.get(last, ()):
        yield f"{start}{dot}{other}"
