"""How many pictures that a class-conditional bundle draws look like the class that was asked for.

class_agreement.py BUNDLE FOLDER [--count 200] [--steps 20] [--neighbours 5]     FOLDER: labelled pictures, held out

A picture is given the class that most of its nearest held-out pictures have, by cosine distance of EfficientNet-Lite0
features and, apart, by Euclidean distance of pixels. What the same rule says of the held-out pictures themselves (each
without itself among its neighbours), and of them once they went through the bundle's autoencoder, bounds what a perfect
sampler could reach.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from ldm_reference.data import CaptionedImages
from ldm_reference.features import picture_features
from torch import Tensor

from ldm_export.runtime import Pipeline
from ldm_export.runtime.backends import open_backend

BATCH = 50


def drawn_pictures(pipeline: Pipeline, labels: list[int], steps: int) -> Tensor:
    """One picture a label, seed k for the k-th: (N, C, H, W) in [-1, 1]."""
    images = [
        pipeline.generate(seed=list(range(i, i + len(part))), class_labels=part, steps=steps).images
        for i in range(0, len(labels), BATCH)
        for part in [labels[i : i + BATCH]]
    ]
    return torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def redrawn_pictures(pipeline: Pipeline, pictures: Tensor) -> Tensor:
    """Pictures through the bundle's encoder and decoder."""
    backend = open_backend(pipeline.bundle, "cpu", None)
    encoder, decoder = backend.load("vae_encoder"), backend.load("vae_decoder")
    redrawn = []
    for part in pictures.split(BATCH):
        parameters = encoder.run({"sample": part.numpy()})["latent_parameters"]
        mean = np.ascontiguousarray(np.split(parameters, 2, axis=1)[0])
        redrawn.append(torch.from_numpy(decoder.run({"latent_sample": mean})["sample"]).clamp(-1, 1))
    return torch.cat(redrawn)


def classes_of(rows: Tensor, held_out: Tensor, labels: Tensor, neighbours: int, *, itself: bool = False) -> Tensor:
    """The commonest class of each row's nearest held-out rows; the nearest of them decides where two are as common."""
    distances = torch.cdist(rows, held_out)
    if itself:
        distances.fill_diagonal_(torch.inf)
    nearest = labels[distances.topk(neighbours, largest=False).indices]  # (N, neighbours)
    weights = torch.linspace(1.01, 1.0, neighbours).expand(len(rows), -1)
    votes = torch.zeros(len(rows), int(labels.max()) + 1).scatter_add_(1, nearest, weights)
    return votes.argmax(dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--neighbours", type=int, default=5)
    arguments = parser.parse_args()

    pipeline = Pipeline.open(arguments.bundle, backend="cpu")
    model = pipeline.bundle.manifest.model
    count, classes = arguments.count, model["class_count"]
    channels = int(pipeline.bundle.manifest.graphs["vae_encoder"].inputs[0].shape[1])
    data = CaptionedImages.open(arguments.folder, model["height"], channels, condition="label", classes=classes)
    held_out, labels = data.load(range(len(data.files))), torch.tensor(data.labels)
    asked = torch.arange(count) % classes
    drawn, redrawn = drawn_pictures(pipeline, asked.tolist(), arguments.steps), redrawn_pictures(pipeline, held_out)
    psnr = 10 * torch.log10(4 / (redrawn - held_out).square().mean(dim=(1, 2, 3)))

    spaces = {
        "features": lambda pictures: F.normalize(picture_features(pictures)),
        "pixels": lambda pictures: pictures.flatten(1),
    }
    shares = {}
    by_class = {}
    for name, space in spaces.items():
        known = space(held_out)
        found = classes_of(space(drawn), known, labels, arguments.neighbours)
        agree = (found == asked).float()
        shares[name] = {
            "drawn": agree.mean().item(),
            "held out": _share(classes_of(known, known, labels, arguments.neighbours, itself=True), labels),
            "held out, redrawn": _share(
                classes_of(space(redrawn), known, labels, arguments.neighbours, itself=True), labels
            ),
        }
        by_class[name] = [agree[asked == k].mean().item() for k in range(classes)]
        print(f"by {name}: " + ", ".join(f"{key} {share:.1%}" for key, share in shares[name].items()))
        print("  drawn, by class: " + " ".join(f"{k}:{share:.0%}" for k, share in enumerate(by_class[name])))
    print(f"autoencoder: PSNR {psnr.mean():.1f} dB on average of {len(psnr)} held-out pictures, {psnr.min():.1f} worst")
    document = {
        "count": count,
        "steps": arguments.steps,
        "neighbours": arguments.neighbours,
        "held_out": len(labels),
        "agreement": shares,
        "by_class": by_class,
        "psnr_db": {"mean": psnr.mean().item(), "min": psnr.min().item()},
    }
    print(json.dumps(document))


def _share(found: Tensor, labels: Tensor) -> float:
    return (found == labels).float().mean().item()


if __name__ == "__main__":
    main()
