"""Training with ``ldm_reference``, from pictures to a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ldm_reference.config import ConfigError
from safetensors import SafetensorError

from ldm_export.errors import InputError


def train_checkpoint(
    data: Path, output: Path, config: Path | None, *, resume: bool, progress: Callable[[str, int, int, float], None]
) -> None:
    """Train with ``ldm_reference``, by the recipe of emoji64 where ``config`` is None.

    Raises
    ------
    InputError
        If the data or the config cannot be used, the loss stops being a number, or the disk is full.
    """
    from ldm_reference import train
    from ldm_reference.train_config import TrainConfig

    recipe = config or Path(train.__file__).parent / "recipes" / "emoji64.toml"
    try:
        train.train(TrainConfig.read(recipe), data, output, resume=resume, progress=progress)
    except ConfigError as error:
        raise InputError(f"{error}.") from error
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{output} cannot be written ({error}). Free some space; --resume goes on from there."
        ) from error
