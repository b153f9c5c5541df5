"""Configs of the networks: one frozen dataclass each, read from the ``config.json`` of diffusers or transformers.

A key that a network has is a field. A key that diffusers has for features that these networks do not have is listed as
*inert* with the value, or the set of values, that switches the feature off: any other value is refused, since ignoring
it would load the weights into a different network. `ANY` stands for keys that change nothing, whatever they say.
"""

from __future__ import annotations

import dataclasses
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar


class ConfigError(ValueError):
    """A config value that the reference networks or the trainer cannot use."""


MOST_TEXT_BYTES = 256 << 20


def read_text(path: Path) -> str:
    """Content of a regular file of UTF-8 text, at most `MOST_TEXT_BYTES` long.

    Raises
    ------
    ConfigError
        Naming the file and why it cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError(f"{path} is not a regular file")
        if path.stat().st_size > MOST_TEXT_BYTES:
            raise ConfigError(f"{path} is larger than {MOST_TEXT_BYTES:,} bytes; cut it")
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from error


class UnsupportedError(ConfigError):
    """A config value of a network that these classes are not."""


Config = TypeVar("Config")
ANY = object()
"""The inert value of a key that changes nothing."""
MOST_LAYERS = 2000
"""Most layers of a network; ten times those of the largest in use. More would take minutes to build before the weights
are looked at."""


def config_from_dict(
    cls: type[Config], values: Mapping[str, Any], inert: Mapping[str, Any], *, strict: bool = True
) -> Config:
    """Build ``cls`` from the content of a ``config.json``.

    Parameters
    ----------
    cls : a dataclass whose field names are config keys
    values : the parsed JSON object; keys that start with ``_`` are bookkeeping and are skipped
    inert : keys without a field, with the value or the set of values that each may have, or `ANY`
    strict : refuse unknown keys, as for what a user writes; files that other tools wrote have keys that nobody reads

    Raises
    ------
    ConfigError
        For an unknown key, an inert key that is switched on, or a value that ``cls`` refuses.
    """
    fields = {field.name: str(field.type) for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    taken: dict[str, Any] = {}
    for key, value in values.items():
        if key.startswith("_"):
            continue
        value = _as_tuple(value)
        if key in fields:
            _check_type(f"{cls.__name__}: {key}", value, fields[key])
            taken[key] = value
        elif key not in inert:
            if strict:
                raise ConfigError(
                    f"{cls.__name__}: unknown key {key!r} = {value!r}; known are {', '.join(sorted(fields))}"
                )
        elif inert[key] is not ANY:
            allowed = inert[key] if isinstance(inert[key], set) else {inert[key]}
            if not any(value == one for one in allowed):
                words = " or ".join(sorted(map(repr, allowed)))
                raise UnsupportedError(f"{cls.__name__}: {key} = {value!r} is not supported; only {words} is")
    try:
        return cls(**taken)
    except TypeError as error:  # a value of the wrong kind met an operation in the constructor's checks
        raise ConfigError(f"{cls.__name__}: a value has the wrong type ({error})") from error


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value


TYPES: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "tuple": (tuple,),
    "None": (type(None),),
}
"""What a JSON value may be, by the outer name of each alternative of an annotation."""


def _check_type(name: str, value: Any, annotation: str) -> None:
    kinds = [kind.partition("[")[0].strip() for kind in annotation.split("|")]
    allowed = tuple(kind for key in kinds for kind in TYPES.get(key, (object,)))
    if not isinstance(value, allowed) or (isinstance(value, bool) and not {bool, object} & {*allowed}):
        words = " or ".join({"tuple": "a list", "None": "null"}.get(kind, kind) for kind in kinds)
        raise ConfigError(f"{name} = {value!r} must be {words}")


def per_block(name: str, value: Any, blocks: int) -> tuple[Any, ...]:
    """One value per block: a scalar is repeated, a sequence must have ``blocks`` items."""
    if not isinstance(value, tuple):
        return (value,) * blocks
    if len(value) != blocks:
        raise ConfigError(f"{name} has {len(value)} values {value!r}; there are {blocks} blocks")
    return value


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise UnsupportedError(f"{name} = {value!r} is not supported; allowed are {', '.join(map(repr, allowed))}")


def check_positive(**values: Any) -> None:
    """Every value, or every item of a tuple, must be an integer of at least 1."""
    check_counts(1, **values)


def check_counts(least: int = 0, /, **values: Any) -> None:
    """Every value, or every item of a tuple, must be an integer of at least ``least``."""
    for name, value in values.items():
        for item in value if isinstance(value, tuple) else (value,):
            if not isinstance(item, int) or isinstance(item, bool) or item < least:
                raise ConfigError(f"{name} = {value!r} must hold integers of at least {least}")


def check_layers(count: int) -> None:
    if count > MOST_LAYERS:
        raise ConfigError(f"the network has {count:,} layers; at most {MOST_LAYERS:,} are built")


def check_groups(groups: int, channels: tuple[int, ...]) -> None:
    for width in channels:
        if width % groups:
            raise ConfigError(f"norm_num_groups = {groups} does not divide the {width} channels of a block")
