"""Families of latent diffusion models: one file each says what a checkpoint consists of and which graphs it becomes.

A family's file may be a user's own (`read_family`), or an installed package's, which names its class as an entry point
of the group ``ldm_export.families``. ``docs/families.md`` says how to write one.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from ldm_export.checkpoint import LatentDiffusion
from ldm_export.checkpoint.kind import CheckpointKind, UnknownFamilyError
from ldm_export.errors import CheckpointError
from ldm_export.families.base import Family
from ldm_export.families.controlnets import with_controls
from ldm_export.families.dit import DiT
from ldm_export.families.ip_adapter import with_image_adapter
from ldm_export.families.pixart import PixArt
from ldm_export.families.prx import PRX
from ldm_export.families.sd3 import StableDiffusion3
from ldm_export.families.stable_diffusion import StableDiffusion

FAMILIES: tuple[type[Family], ...] = (StableDiffusion, StableDiffusion3, PixArt, DiT, PRX)
ENTRY_POINTS = "ldm_export.families"
NAME = "FAMILY"
"""What a file of a family calls its class."""
_read: dict[str, type[Family]] = {}


def open_checkpoint(
    checkpoint: str | Path,
    *,
    sampler: str | None = None,
    prediction_type: str | None = None,
    adapters: Sequence[tuple[Path, float]] = (),
    controls: Sequence[tuple[str, Path]] = (),
    image_adapter: tuple[Path, Path | None] | None = None,
    embeddings: Sequence[tuple[Path, str | None]] = (),
) -> LatentDiffusion:
    """Open a checkpoint of any family: a folder, a single file, or a shipped one by its name.

    Parameters
    ----------
    sampler, prediction_type : in place of what its files say, as :class:`LatentDiffusion` has them
    adapters : files of LoRA and its kin, each with its strength, to merge into the networks
    controls : names and folders of ControlNets, to export beside them
    image_adapter : file of an IP-Adapter and folder of its image encoder, None for that beside it or the checkpoint's
    embeddings : files of textual inversions, each with its token, or None for the one that the file has

    Raises
    ------
    CheckpointError
        If there is no such checkpoint, it is a pickle, of a family that is not known, or a component is missing.
    InputError
        If an adapter or a textual inversion cannot be used with it.
    """
    families = [*_read.values(), *FAMILIES]
    try:
        model = LatentDiffusion.open(checkpoint, _kinds(families), sampler=sampler, prediction_type=prediction_type)
    except UnknownFamilyError:
        families += installed_families()
        model = LatentDiffusion.open(checkpoint, _kinds(families), sampler=sampler, prediction_type=prediction_type)
    model = model.with_adapters(adapters) if adapters else model
    model = with_controls(model, controls) if controls else model
    model = with_image_adapter(model, *image_adapter) if image_adapter else model
    return model.with_embeddings(embeddings) if embeddings else model


def family_of(checkpoint: LatentDiffusion) -> Family:
    """The family of a checkpoint."""
    found = [family for family in (*_read.values(), *FAMILIES) if family.kind is checkpoint.kind]
    return (found or [family for family in installed_families() if family.kind is checkpoint.kind])[0](checkpoint)


def installed_families() -> list[type[Family]]:
    """Families of other installed packages, which are imported."""
    return [_of_entry_point(point) for point in entry_points(group=ENTRY_POINTS)]


def _kinds(families: Sequence[type[Family]]) -> list[CheckpointKind]:
    return [family.kind for family in families]


def read_family(file: Path) -> type[Family]:
    """Run a Python file that has a family, the class that it calls ``FAMILY``; its checkpoints can be opened then.

    Raises
    ------
    CheckpointError
        If the file cannot be run, or has no such class.
    """
    path = str(file.resolve())
    if path in _read:
        return _read[path]
    spec = importlib.util.spec_from_file_location(f"ldm_export_family_{file.stem}", path)
    if spec is None or spec.loader is None or not file.is_file():
        raise CheckpointError(f"{file} is no Python file. Name the file of a family, as docs/families.md describes it.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's code raises
        raise CheckpointError(f"{file} cannot be run ({type(error).__name__}: {error}). Mend it.") from error
    _read[path] = _checked(getattr(module, NAME, None), str(file))
    return _read[path]


def read_files() -> list[str]:
    """The files that families were read from, for another process to read."""
    return [*_read]


def _of_entry_point(point: EntryPoint) -> type[Family]:
    try:
        found = point.load()
    except Exception as error:  # whatever another package's code raises
        raise CheckpointError(
            f"The family {point.name} of an installed package ({point.value}) cannot be imported "
            f"({type(error).__name__}: {error}). Mend or uninstall that package."
        ) from error
    return _checked(found, point.value)


def _checked(found: object, place: str) -> type[Family]:
    members = ("kind", "check", "notes", "roles", "tokenizers", "graphs", "facts")
    missing = next((name for name in members if not hasattr(found, name)), None)
    if not isinstance(found, type) or missing:
        what = f"the class {found.__name__} without {missing}" if isinstance(found, type) else f"no class {NAME}"
        raise CheckpointError(f"{place} has {what}; docs/families.md lists what a family has. Mend it.")
    return found
