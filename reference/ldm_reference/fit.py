"""The optimisation loop that all stages share: AdamW, a learning-rate schedule, clipping, EMA, logs, states, resume.

A batch is a pure function of the step, so a resumed run goes on exactly where the interrupted one stopped. Processes
and gradient accumulation only cut the batch into equal parts, whose gradients are averaged: neither changes the
losses. Devices, processes and mixed precision are accelerate's part; start with ``torchrun`` or ``accelerate
launch``. Every process holds all weights (DDP), or its shard of them (torch's ``fully_shard``, FSDP2, which runs on
processors too).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from tensorboardX import SummaryWriter
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.checkpoint import checkpoint

from ldm_reference.blocks import ResnetBlock2D, Transformer2DModel
from ldm_reference.config import ConfigError
from ldm_reference.optimisation import Optimisation
from ldm_reference.state import restore_state, save_state, whole
from ldm_reference.text_encoder import EncoderLayer

LOG_EVERY = 10
BLOCKS = (ResnetBlock2D, Transformer2DModel, EncoderLayer)
"""What is recomputed, and what is sharded, as one."""

Progress = Callable[[str, int, int, float], None]
"""Called with the stage's name, the steps done, the steps in all and the loss."""

Rows = Mapping[str, Tensor]
"""The arguments of an objective, one row a sample."""


@dataclass(frozen=True)
class Run:
    """Where and how the stages of one training run happen.

    Attributes
    ----------
    folder : the checkpoint to be; states go to ``training/``, TensorBoard's events to ``logs/``, pictures to
    ``samples/``
    """

    accelerator: Accelerator
    folder: Path
    progress: Progress
    sharded: bool = False

    @classmethod
    def begin(cls, folder: Path, mixed_precision: str, progress: Progress, *, sharded: bool = False) -> Run:
        """Join the other processes, if there are any.

        Raises
        ------
        ConfigError
            If this machine has not the precision.
        """
        processor = not torch.accelerator.is_available()
        if processor and mixed_precision == "fp16":  # accelerate would silently compute in float32
            raise ConfigError("mixed_precision = 'fp16' needs a GPU; use 'bf16' or 'no' on a processor")
        AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
        try:
            accelerator = Accelerator(mixed_precision=mixed_precision, cpu=processor)
        except ValueError as error:
            raise ConfigError(f"mixed_precision = {mixed_precision!r} cannot be had here ({error})") from error
        return cls(accelerator, folder, progress, sharded and accelerator.num_processes > 1)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def state_folder(self) -> Path:
        return self.folder / "training"


@dataclass(frozen=True)
class Stage:
    """One objective and how it is minimised.

    Attributes
    ----------
    objective : gives the terms of the loss for some rows of a batch; its parameters with a gradient are trained
    batch_at : the whole batch of a step, on the CPU; a pure function
    recipe : all that the stage depends on, as text; a state that was made with another one is refused
    sample : pictures of the present weights, uint8 (H, W, 3), for ``samples/``
    """

    name: str
    objective: nn.Module
    batch_at: Callable[[int], Rows]
    settings: Optimisation
    recipe: str
    seed: int
    sample: Callable[[], Tensor] | None = None


def fit(run: Run, stage: Stage) -> dict[str, Tensor]:
    """Minimise the stage's objective; gives the averaged (EMA) weights, whole, on the CPU, by parameter name.

    Raises
    ------
    ConfigError
        If the state belongs to another recipe, the batch cannot be cut up, or the loss stops being a number: the last
        state on disk is then older than the step that is named.
    """
    accelerator, settings = run.accelerator, stage.settings
    processes, process = accelerator.num_processes, accelerator.process_index
    parts = [settings.rows(processes, process, part) for part in range(settings.gradient_accumulation)]
    stage.objective.train()
    if settings.gradient_checkpointing:
        recompute_activations(stage.objective)
    if settings.compile:
        stage.objective.compile()
    objective = shard(stage.objective) if run.sharded else accelerator.prepare(stage.objective)
    named = accelerator.unwrap_model(objective).named_parameters()
    parameters = {key: parameter for key, parameter in named if parameter.requires_grad}
    average = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    optimiser = accelerator.prepare(
        torch.optim.AdamW(
            parameters.values(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay
        )
    )
    state_file = run.state_folder / f"{stage.name}.safetensors"
    start, scaler_state = restore_state(state_file, stage.recipe, parameters, average, optimiser.optimizer)
    if scaler_state and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(scaler_state)

    with _log(run, stage, start) as log, ThreadPoolExecutor(1) as loader:
        coming = loader.submit(stage.batch_at, start) if start < settings.steps else None
        for step in range(start, settings.steps):
            assert coming is not None
            batch = coming.result()
            coming = loader.submit(stage.batch_at, step + 1) if step + 1 < settings.steps else None
            torch.manual_seed((stage.seed * 1_000_003 + step) * processes + process)  # for dropout
            for group in optimiser.param_groups:
                group["lr"] = settings.learning_rate_at(step)
            values = _backward(run, objective, batch, parts)
            norm = whole(accelerator.clip_grad_norm_(list(parameters.values()), settings.max_grad_norm)).item()
            if accelerator.scaler is None or not np.isfinite(values["loss"]):  # the scaler skips steps that overflow
                _check_finite(stage.name, step, values["loss"], norm, state_file)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            decay = min(settings.ema_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.values()), list(parameters.values()), 1.0 - decay)
            done = step + 1
            if done % LOG_EVERY == 0 or done == settings.steps:
                scalars = {**values, "learning_rate": settings.learning_rate_at(step), "gradient_norm": norm}
                for key, value in scalars.items():
                    log(key, value, done)
            if done % settings.save_every == 0 or done == settings.steps:
                scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
                writes = accelerator.is_main_process
                moments = optimiser.optimizer
                save_state(state_file, stage.recipe, done, parameters, average, moments, scaler, writes=writes)
            if settings.sample_every and (done % settings.sample_every == 0 or done == settings.steps):
                _sample(run, stage, done, parameters, average)
            if accelerator.is_main_process:
                run.progress(stage.name, done, settings.steps, values["loss"])
    averages = {key: whole(tensor).cpu() for key, tensor in average.items()}
    accelerator.free_memory()
    return averages


def _backward(run: Run, objective: nn.Module, batch: Rows, parts: list[slice]) -> dict[str, float]:
    """Add up the gradients of this process's rows, part by part; gives the terms of the loss, over all processes."""
    accelerator = run.accelerator
    sums: dict[str, Tensor] = {}
    for rows in parts:
        share = {key: value[rows].to(run.device) for key, value in batch.items()}
        with _synchronised(accelerator, objective, rows is parts[-1]):
            with accelerator.autocast():
                terms = objective(**share)
            accelerator.backward(terms["loss"] / len(parts))
        for key, value in terms.items():
            sums[key] = sums.get(key, 0.0) + value.detach().float() / len(parts)
    return {key: accelerator.reduce(value, "mean").item() for key, value in sums.items()}


def _check_finite(stage: str, step: int, loss: float, norm: float, state_file: Path) -> None:
    what = "loss" if not np.isfinite(loss) else "gradient"
    if not np.isfinite(loss) or not np.isfinite(norm):
        kept = f"{state_file} keeps an earlier state" if state_file.is_file() else "no state was written yet"
        raise ConfigError(
            f"the {what} of stage {stage!r} is not a number at step {step} ({kept}); lower learning_rate, "
            "or look at the data, and start again in another folder"
        )


def shard(objective: nn.Module) -> nn.Module:
    """Cut the parameters over all processes, gathered block by block when they are needed (ZeRO-3, 1910.02054)."""
    for module in objective.modules():
        if isinstance(module, BLOCKS):
            fully_shard(module)
    return fully_shard(objective)


@contextmanager
def _synchronised(accelerator: Accelerator, objective: nn.Module, now: bool) -> Iterator[None]:
    """Average the gradients over the processes after this backward pass, or not yet."""
    if isinstance(objective, FSDPModule):
        objective.set_requires_gradient_sync(now)
        yield
    else:
        with nullcontext() if now else accelerator.no_sync(objective):
            yield


def recompute_activations(network: nn.Module) -> None:
    """Let every block forget its activations and compute them again in the backward pass (1604.06174)."""
    for module in network.modules():
        if isinstance(module, BLOCKS):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]


@contextmanager
def _log(run: Run, stage: Stage, start: int) -> Iterator[Callable[[str, float, int], None]]:
    """Writes scalars for TensorBoard; what an interrupted run wrote after its last state is overwritten."""
    if not run.accelerator.is_main_process:
        yield lambda key, value, step: None
        return
    folder, purge = run.folder / "logs" / stage.name, start + 1 if start else None
    writer = SummaryWriter(str(folder), purge_step=purge, filename_suffix=f".from{start}")  # one second, one name, else
    try:
        yield writer.add_scalar
    finally:
        writer.close()


def _sample(run: Run, stage: Stage, step: int, parameters: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> None:
    """Write pictures drawn with the averaged weights. Sharded weights (FSDP) cannot draw outside the objective."""
    if stage.sample is None or run.sharded or not run.accelerator.is_main_process:
        return
    with torch.no_grad():
        present = {key: parameter.detach().clone() for key, parameter in parameters.items()}
        for key, parameter in parameters.items():
            parameter.copy_(average[key])
        stage.objective.eval()
        try:
            pixels = stage.sample()
        finally:
            stage.objective.train()
            for key, parameter in parameters.items():
                parameter.copy_(present[key])
    folder = run.folder / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.cpu().numpy()).save(folder / f"{stage.name}-{step:06d}.png")
