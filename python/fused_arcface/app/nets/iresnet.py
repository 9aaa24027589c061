"""IResNet: the residual nets that face recognition is trained with.

See Deng et al., ArcFace, arXiv:1801.07698, and Duta et al., Improved Residual Networks, arXiv:2004.04989. Parameters
are named as in insightface's ``iresnet.py``, so its ``backbone.pth`` and ``model.pt`` load.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3), 200: (6, 26, 60, 6)}
"""Blocks of each of the four stages, by depth."""

_WIDTHS = (64, 128, 256, 512)
_EPS = 1e-5


class IResNetBlock(nn.Module):
    """A residual block: BN, 3×3 convolution, BN, PReLU, strided 3×3 convolution, BN, and a shortcut."""

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inplanes, eps=_EPS)
        self.conv1 = nn.Conv2d(inplanes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes, eps=_EPS)
        self.prelu = nn.PReLU(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes, eps=_EPS)
        self.downsample: nn.Module | None = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes, 1, stride=stride, bias=False), nn.BatchNorm2d(planes, eps=_EPS)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.bn1(x))
        y = self.bn3(self.conv2(self.prelu(self.bn2(y))))
        shortcut: Tensor = x if self.downsample is None else self.downsample(x)
        return y + shortcut


class IResNet(nn.Module):
    """Images ``(N, channels, size, size)`` to embeddings ``(N, D)``, not normalized.

    Args:
        depth: number of layers: 18, 34, 50, 100 or 200.
        embedding_dim: D, the length of an embedding.
        size: side of the images in pixels; insightface's nets have 112.
        channels: number of channels of the images.

    Raises:
        ValueError: if the depth is not one of these.

    >>> IResNet(18, embedding_dim=512)(torch.zeros(2, 3, 112, 112)).shape
    torch.Size([2, 512])
    """

    def __init__(self, depth: int, embedding_dim: int = 512, size: int = 112, channels: int = 3) -> None:
        super().__init__()
        if depth not in LAYERS:
            raise ValueError(f"depth must be one of {', '.join(map(str, LAYERS))}; got {depth}")
        self.conv1 = nn.Conv2d(channels, _WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0], eps=_EPS)
        self.prelu = nn.PReLU(_WIDTHS[0])
        blocks = LAYERS[depth]
        self.layer1 = _stage(_WIDTHS[0], _WIDTHS[0], blocks[0])
        self.layer2 = _stage(_WIDTHS[0], _WIDTHS[1], blocks[1])
        self.layer3 = _stage(_WIDTHS[1], _WIDTHS[2], blocks[2])
        self.layer4 = _stage(_WIDTHS[2], _WIDTHS[3], blocks[3])
        side = -(-size // 16)
        self.bn2 = nn.BatchNorm2d(_WIDTHS[3], eps=_EPS)
        self.fc = nn.Linear(_WIDTHS[3] * side * side, embedding_dim)
        self.features = nn.BatchNorm1d(embedding_dim, eps=_EPS)
        # Every dimension of the embedding keeps its share of the angle.
        nn.init.ones_(self.features.weight)
        self.features.weight.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.prelu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.bn2(x).flatten(1)
        # A sum over 25 088 inputs: in half precision it would be the net's least accurate one.
        with torch.autocast(x.device.type, enabled=False):
            return self.features(self.fc(x.float()))


def _stage(inplanes: int, planes: int, blocks: int) -> nn.Sequential:
    """Return a stage of blocks; the first one halves the image."""
    first = IResNetBlock(inplanes, planes, 2)
    return nn.Sequential(first, *(IResNetBlock(planes, planes, 1) for _ in range(blocks - 1)))
