"""Trains a latent diffusion model, stage by stage, and writes it in diffusers layout.

In the checkpoint's folder: the model; ``alignment/`` where captions were learnt (see ``alignment.py``); ``logs/`` for
TensorBoard; ``samples/``, pictures as training went. What a resumed run needs is in ``training/`` until the model is
complete.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

from ldm_reference.alignment import FOLDER as ALIGNMENT
from ldm_reference.alignment import save_heads
from ldm_reference.config import ConfigError
from ldm_reference.data import CaptionedImages, batch_indices
from ldm_reference.fit import Progress, Run
from ldm_reference.layout import save_checkpoint, save_component
from ldm_reference.stages import train_autoencoder, train_denoiser, train_text_encoder
from ldm_reference.tokenizer import save_tokenizer, train_tokenizer
from ldm_reference.train_config import TrainConfig


def train(config: TrainConfig, data_folder: Path, output: Path, *, resume: bool, progress: Progress) -> None:
    """Run the stages and write the checkpoint ``output``. Under ``torchrun``, every process calls it.

    Raises
    ------
    ConfigError
        If the data or the config cannot be used, or ``output`` holds something and ``resume`` is false.
    """
    _check_output(output, resume=resume)
    run = Run.begin(output, config.mixed_precision, progress, sharded=config.sharded)
    data = _open_data(config, data_folder)
    for stage in (config.vae_stage, config.text_stage, config.unet_stage):
        if stage is not None:
            stage.rows(run.accelerator.num_processes, 0, 0)  # refuses what cannot be cut up
    run.accelerator.wait_for_everyone()  # before the first process writes what the others check
    run.state_folder.mkdir(parents=True, exist_ok=True)

    vae = train_autoencoder(run, config, data)
    tokenizer = text_encoder = heads = judge = None
    if config.tokenizer is not None:
        tokenizer = train_tokenizer((text for _, text in data.captions), config.tokenizer["vocab_size"])
        if config.text_stage is not None:
            text_encoder, heads = train_text_encoder(run, config, data, tokenizer)
            if config.unet_stage.text_encoder != "frozen":
                judge = copy.deepcopy(text_encoder)
    unet, text_encoder = train_denoiser(run, config, data, vae, tokenizer, text_encoder)

    if run.accelerator.is_main_process:
        if heads is not None:
            save_heads(heads, output)
        if judge is not None:
            save_component(judge.half(), output / ALIGNMENT / "text_encoder")
        length = (config.tokenizer or {}).get("model_max_length", 0)
        save_checkpoint(
            output,
            vae=vae,
            unet=unet,
            text_encoder=text_encoder,
            tokenizer=(lambda folder: save_tokenizer(tokenizer, folder, length)) if tokenizer is not None else None,
            scheduler=config.scheduler,
        )
        shutil.rmtree(run.state_folder)
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()


def _check_output(output: Path, *, resume: bool) -> None:
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; name a folder")
    if output.exists() and any(output.iterdir()):
        if not resume:
            raise ConfigError(f"{output} is not empty; use --resume to go on with it, or name another folder")
        if not (output / "training").is_dir():
            raise ConfigError(f"{output} holds no interrupted training; name another folder, or train without --resume")


def _open_data(config: TrainConfig, folder: Path) -> CaptionedImages:
    """The pictures, each opened once: one that cannot be read shows now, not hours from here."""
    condition = "text" if config.tokenizer else "label" if config.classes else None
    data = CaptionedImages.open(folder, config.resolution, config.channels, condition=condition, classes=config.classes)
    rows = len(data.captions) or len(data.files)
    for stage, count in ((config.vae_stage, len(data.files)), (config.text_stage, rows), (config.unet_stage, rows)):
        if stage is not None:
            batch_indices(count, stage.batch_size, 0, config.seed)  # refuses a batch that is larger than the data
    for index in range(len(data.files)):
        data.load([index])
    return data
