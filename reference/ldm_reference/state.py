"""The state of an interrupted stage on disk: weights, averages and AdamW's moments, as safetensors, never pickle.

A tensor that is sharded over processes (FSDP) is gathered before it is written and cut again when it is read, so a run
may go on with another number of processes than it began with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from ldm_reference.config import ConfigError

MOMENTS = {"first_moment": "exp_avg", "second_moment": "exp_avg_sq"}


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of one that is sharded; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(tensor: Tensor, goal: Tensor) -> Tensor:
    if isinstance(goal, DTensor):
        return distribute_tensor(tensor.to(goal.device), goal.device_mesh, goal.placements)
    return tensor.to(goal.device)


def save_state(
    file: Path,
    recipe: str,
    step: int,
    parameters: Mapping[str, Tensor],
    average: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
    scaler: Mapping[str, Any],
    *,
    writes: bool,
) -> None:
    """Write the state after ``step`` steps; the file that was there stays until the new one is whole.

    Every process calls it, and the one with ``writes`` writes. ``scaler`` is the state of the fp16 loss scaler, or
    empty.
    """
    tensors = {}
    for key, parameter in parameters.items():
        tensors[f"weight.{key}"] = whole(parameter.detach())
        tensors[f"average.{key}"] = whole(average[key])
        for name, moment in MOMENTS.items():
            tensors[f"{name}.{key}"] = whole(optimiser.state[parameter][moment])
    if not writes:
        return
    tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    metadata = {"step": json.dumps(step), "recipe": recipe, "scaler": json.dumps(dict(scaler))}
    write_tensors(file, tensors, metadata)


def write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file; what was there stays until the new one is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".partial")
    try:
        safetensors.torch.save_file(tensors, temporary, metadata)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def restore_state(
    file: Path,
    recipe: str,
    parameters: Mapping[str, Tensor],
    average: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
) -> tuple[int, dict[str, Any]]:
    """Steps already done, 0 if there is no file, and the loss scaler's state.

    Raises
    ------
    ConfigError
        If the file is damaged or belongs to another recipe.
    """
    if not file.is_file():
        return 0, {}
    try:
        opened = safetensors.safe_open(file, "pt")
    except safetensors.SafetensorError as error:
        raise ConfigError(f"{file} is damaged ({error}); delete it to begin this stage again") from error
    with opened as state, torch.no_grad():
        metadata = state.metadata() or {}
        if metadata.get("recipe") != recipe:
            raise ConfigError(f"{file} was made with another config; use that one, or train into another folder")
        step = int(json.loads(metadata["step"]))
        for key, parameter in parameters.items():
            parameter.copy_(_like(state.get_tensor(f"weight.{key}"), parameter))
            average[key].copy_(_like(state.get_tensor(f"average.{key}"), parameter))
            moments = {moment: _like(state.get_tensor(f"{name}.{key}"), parameter) for name, moment in MOMENTS.items()}
            optimiser.state[parameter] = {"step": torch.tensor(float(step)), **moments}
        return step, json.loads(metadata.get("scaler", "{}"))
