"""How well a picture and a caption agree: CLIP's two towers (Radford et al., 2103.00020) over a locked image tower.

The image tower is EfficientNet-Lite0 with its ImageNet weights, which stay as they are, under a learned projection; the
text tower learns to read them out (LiT, Zhai et al., 2111.07991). A few thousand captions can train that, and not a
whole image tower. A checkpoint keeps the heads in ``alignment/``, and there too the text encoder as it was after this
stage, if it went on to be trained with the UNet: a judge must not change with what it judges.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm_reference.features import FEATURES

FOLDER, FILE = "alignment", "model.safetensors"


class AlignmentHeads(nn.Module):
    """Projections of both towers into one space, with CLIP's names; ``logit_scale`` begins at log(1/0.07)."""

    def __init__(self, text_width: int, width: int):
        super().__init__()
        self.visual_projection = nn.Linear(FEATURES, width, bias=False)
        self.text_projection = nn.Linear(text_width, width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor([2.6593]))  # (1,): shards have no scalars

    def pictures(self, features: Tensor) -> Tensor:
        """``picture_features`` (B, 1280) -> unit vectors (B, D)."""
        return F.normalize(self.visual_projection(features), dim=-1)

    def text(self, pooled: Tensor) -> Tensor:
        """Pooled states of the text encoder (B, H) -> unit vectors (B, D)."""
        return F.normalize(self.text_projection(pooled), dim=-1)


def save_heads(heads: AlignmentHeads, checkpoint: Path) -> None:
    """Write ``checkpoint/alignment/model.safetensors``, float16."""
    folder = checkpoint / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.half() for key, tensor in heads.state_dict().items()}, folder / FILE, {"format": "pt"})


def load_heads(checkpoint: Path) -> AlignmentHeads:
    """The heads of a checkpoint, float32, in evaluation mode; raises FileNotFoundError where it has none."""
    tensors = load_file(checkpoint / FOLDER / FILE)
    width, text_width = tensors["text_projection.weight"].shape
    heads = AlignmentHeads(text_width, width)
    heads.load_state_dict({key: tensor.float() for key, tensor in tensors.items()})
    return heads.requires_grad_(False).eval()
