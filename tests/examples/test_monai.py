"""The family of MONAI's networks, against MONAI's own inferer; in an environment of its own, by ``make test-monai``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from ldm_export.cli import main
from ldm_export.runtime import Pipeline
from ldm_export.verify.metrics import psnr_db

pytestmark = pytest.mark.monai
FAMILY = Path(__file__).parents[2] / "examples" / "monai" / "family.py"
UNET: dict[str, Any] = {
    "spatial_dims": 2,
    "in_channels": 3,
    "out_channels": 3,
    "channels": (8, 16),
    "num_res_blocks": 1,
    "attention_levels": (False, True),
    "norm_num_groups": 4,
    "num_head_channels": 8,
}
AUTOENCODER: dict[str, Any] = {
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 1,
    "channels": (8, 16, 16),
    "num_res_blocks": 1,
    "attention_levels": (False, False, True),
    "latent_channels": 3,
    "norm_num_groups": 4,
}
SCHEDULER = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False}
SEEDS, STEPS, SCALE_FACTOR = (1, 2), 7, 0.9


@pytest.mark.parametrize("classes", [None, 3])
@torch.no_grad()
def test_the_pictures_are_those_of_the_inferer(classes: int | None, tmp_path: Path) -> None:
    inferers = pytest.importorskip("monai.inferers")
    nets, schedulers = sys.modules["monai.networks.nets"], sys.modules["monai.networks.schedulers"]
    torch.manual_seed(0)
    arguments = {**UNET, **({"with_conditioning": True, "cross_attention_dim": 1} if classes else {})}
    unet, autoencoder = nets.DiffusionModelUNet(**arguments).eval(), nets.AutoencoderKL(**AUTOENCODER).eval()
    for network in (unet, autoencoder):  # the last convolutions are zeros at first
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    sys.path.insert(0, str(FAMILY.parent))
    from family import save

    save(tmp_path / "model", (unet, arguments), (autoencoder, AUTOENCODER), SCHEDULER, 8, SCALE_FACTOR, classes)
    command = ["export", str(tmp_path / "model"), "-o", str(tmp_path / "bundle"), "--family", str(FAMILY)]
    exported = CliRunner().invoke(main, command)
    assert exported.exit_code == 0, exported.output

    scheduler = schedulers.DDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(STEPS)
    noise = torch.cat([torch.randn((1, 3, 12, 8), generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    guided = {"conditioning": torch.tensor([[[0.0]], [[2.0]]]), "cfg": 2.5} if classes else {}
    inferer = inferers.LatentDiffusionInferer(scheduler, scale_factor=SCALE_FACTOR)
    pictures = inferer.sample(noise, autoencoder, unet, scheduler, verbose=False, **guided)
    expected = (pictures.clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy().astype(np.uint8)

    asked: dict[str, Any] = {"class_labels": [0, 2], "guidance": 2.5} if classes else {}
    pipeline = Pipeline.open(tmp_path / "bundle", backend="cpu")
    drawn = pipeline.generate(steps=STEPS, seed=list(SEEDS), height=48, width=32, **asked)
    assert expected.std() > 20
    assert psnr_db(drawn.images, expected) >= 80
