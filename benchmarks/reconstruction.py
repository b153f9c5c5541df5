"""How well emoji64's autoencoder redraws the pictures that were held out of its training: PSNR in dB.

reconstruction.py [FOLDER]        as made by `make emoji-data` (build/emoji/test)
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import torch
from ldm_reference.data import CaptionedImages

from ldm_export.bench.parity import psnr_db
from ldm_export.checkpoint import LatentDiffusion


@torch.no_grad()
def main(folder: Path) -> None:
    data = CaptionedImages.open(folder, 64)
    vae = LatentDiffusion.open("emoji64").load("vae")
    pictures = data.load(range(len(data.files)))
    redrawn = vae.decode(vae.encode(pictures).chunk(2, dim=1)[0])
    before, after = (
        ((sample / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy() for sample in (pictures, redrawn)
    )
    values = [psnr_db(ours, theirs) for ours, theirs in zip(after, before, strict=True)]
    print(f"{len(values)} held-out pictures: PSNR {statistics.mean(values):.1f} dB on average, {min(values):.1f} worst")
    print(json.dumps({"psnr_db": {"mean": statistics.mean(values), "min": min(values), "count": len(values)}}))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/emoji/test"))
