"""MobileFaceNet: a small net of separable convolutions (Chen et al., MobileFaceNets, arXiv:1804.07573).

Widths and names of parameters are those of insightface's ``mbf`` and ``mbf_large``, so their ``backbone.pth`` loads.
"""

from __future__ import annotations

from torch import Tensor, nn

SIZES: dict[str, tuple[int, tuple[int, int, int, int]]] = {"mbf": (2, (1, 4, 6, 2)), "mbf_large": (4, (2, 8, 12, 4))}
"""Width (times 64 channels) and residual blocks of each of the four stages, by name."""

_FEATURES = 512


class _Wrapped(nn.Module):
    """A chain of modules called ``layers``: insightface's names of parameters have this word at every level."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class _Residual(_Wrapped):
    """A chain whose input is added to its output."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class MobileFaceNet(nn.Module):
    """Images ``(N, channels, size, size)`` to embeddings ``(N, D)``, not normalized.

    Args:
        name: key of :data:`SIZES`.
        embedding_dim: D, the length of an embedding.
        size: side of the images in pixels; insightface's nets have 112.
        channels: number of channels of the images.

    >>> import torch
    >>> MobileFaceNet("mbf", 8).eval()(torch.zeros(2, 3, 112, 112)).shape
    torch.Size([2, 8])
    """

    def __init__(self, name: str = "mbf", embedding_dim: int = 512, size: int = 112, channels: int = 3) -> None:
        super().__init__()
        scale, blocks = SIZES[name]
        narrow, wide = 64 * scale, 128 * scale
        # With one block the first stage is a plain depthwise convolution, in 64 groups at every width.
        first = _stage(narrow, blocks[0], 128) if blocks[0] > 1 else _convolution(narrow, narrow, 3, groups=64)
        self.layers = nn.Sequential(
            _convolution(channels, narrow, 3, stride=2),
            first,
            _separable(narrow, narrow, 128, stride=2),
            _stage(narrow, blocks[1], 128),
            _separable(narrow, wide, 256, stride=2),
            _stage(wide, blocks[2], 256),
            _separable(wide, wide, 512, stride=2),
            _stage(wide, blocks[3], 256),
        )
        self.conv_sep = _convolution(wide, _FEATURES, 1)
        self.features = _Wrapped(
            # A weight for each place of the last map, not their mean: the middle of a face says more than its border.
            _convolution(_FEATURES, _FEATURES, -(-size // 16), groups=_FEATURES, padding=0, activation=False),
            nn.Flatten(),
            nn.Linear(_FEATURES, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim),
        )
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return self.features(self.conv_sep(self.layers(images)))


def _convolution(
    channels_in: int,
    channels_out: int,
    kernel: int,
    *,
    stride: int = 1,
    groups: int = 1,
    padding: int | None = None,
    activation: bool = True,
) -> _Wrapped:
    """Return convolution and batch normalization, and PReLU unless ``activation`` is false."""
    padding = kernel // 2 if padding is None else padding
    layers: list[nn.Module] = [
        nn.Conv2d(channels_in, channels_out, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(channels_out),
    ]
    return _Wrapped(*layers, *([nn.PReLU(channels_out)] if activation else []))


def _separable(
    channels_in: int, channels_out: int, width: int, stride: int = 1, kind: type[_Wrapped] = _Wrapped
) -> _Wrapped:
    """Return a bottleneck: to ``width`` channels, a depthwise 3×3 convolution there, and back without activation."""
    return kind(
        _convolution(channels_in, width, 1),
        _convolution(width, width, 3, stride=stride, groups=width),
        _convolution(width, channels_out, 1, activation=False),
    )


def _stage(channels: int, blocks: int, width: int) -> _Wrapped:
    return _Wrapped(*(_separable(channels, channels, width, kind=_Residual) for _ in range(blocks)))
