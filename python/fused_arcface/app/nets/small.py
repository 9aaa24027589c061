"""Embedding nets that come with the package, and how embeddings are taken from one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SmallNet(nn.Module):
    """Three strided convolutions and a linear map: an embedding net for small images that trains on a CPU in seconds.

    Args:
        embedding_dim: D, the length of an embedding.
        channels: number of channels of the images.
        width: number of channels of the first convolution; the others have twice and four times as many.

    Images ``(N, channels, height, width)`` of any size from 1×1 give embeddings ``(N, D)``, not normalized: heads do
    that.

    The activation is smooth (SiLU). With ReLU, two runs that differ by rounding diverge as soon as an activation near
    zero is cut in only one of them: within 50 steps their losses differed by 1e-2, with SiLU by 2e-6.

    >>> SmallNet(embedding_dim=64)(torch.zeros(2, 1, 32, 32)).shape
    torch.Size([2, 64])
    """

    def __init__(self, embedding_dim: int = 64, channels: int = 1, width: int = 16) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            _block(channels, width), _block(width, 2 * width), _block(2 * width, 4 * width), nn.AdaptiveAvgPool2d(4)
        )
        # The embedding is batch-normalized, so every dimension has its share of the angle.
        self.projection = nn.Sequential(
            nn.Flatten(), nn.Linear(64 * width, embedding_dim, bias=False), nn.BatchNorm1d(embedding_dim)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(self.convolutions(images))


def _block(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.SiLU(),
    )


@torch.no_grad()
def embed(net: nn.Module, images: Tensor, batch_size: int = 512, normalize: bool = True) -> Tensor:
    """Return embeddings ``(M, D)`` of images ``(M, channels, height, width)``.

    They have norm 1 unless ``normalize`` is false. The net is put into evaluation mode for the call.

    >>> embed(nn.Flatten(), torch.ones(1, 1, 2, 2))
    tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    was_training = net.training
    net.eval()
    try:
        embeddings = torch.cat([net(part) for part in images.split(batch_size)])
        return F.normalize(embeddings) if normalize else embeddings
    finally:
        net.train(was_training)
