"""Random changes of training images, each a function of a key alone: a resumed run draws the same."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = ("none", "light", "strong")

_SHIFT = {"light": 0.04, "strong": 0.08}  # of the side
_ZOOM = {"light": 0.04, "strong": 0.12}
_TURN = {"light": 0.05, "strong": 0.17}  # radians
_LIGHT = {"light": 0.15, "strong": 0.3}
_RARE = 0.2  # probability of each coarse change of "strong"


def augment(image: Tensor, level: str, key: int) -> Tensor:
    """Return an image changed at random, of the same shape and in [-1, 1].

    Args:
        image: (channels, size, size) fp32 in [-1, 1].
        level: ``"none"``; ``"light"``: small shifts, turns, zooms and changes of brightness and contrast;
            ``"strong"``: larger ones, and for a fifth of the images each: low resolution, no color, an erased part.
        key: key of the random numbers, in [0, 2^63).

    >>> image = torch.zeros(1, 4, 4)
    >>> augment(image, "none", 7) is image, torch.equal(augment(image, "light", 7), augment(image, "light", 7))
    (True, True)
    """
    if level == "none":
        return image
    generator = torch.Generator().manual_seed(key)
    draw = torch.rand(13, generator=generator).tolist()
    image = _move(image, level, draw[:4])
    brightness, contrast = (_LIGHT[level] * (2 * each - 1) for each in draw[4:6])
    mean = image.mean()
    image = (image - mean) * (1 + contrast) + mean + brightness
    if level == "strong":
        size = image.shape[-1]
        if draw[6] < _RARE:
            small = F.interpolate(image[None], scale_factor=0.25 + 0.5 * draw[7], mode="bilinear", antialias=True)
            image = F.interpolate(small, (size, size), mode="bilinear")[0]
        if draw[8] < _RARE:
            image = image.mean(0, keepdim=True).expand_as(image).clone()
        if draw[9] < _RARE:
            side = max(1, int(size * (0.1 + 0.2 * draw[10])))
            top, left = (int(each * (size - side + 1)) for each in draw[11:13])
            image[:, top : top + side, left : left + side] = 0
    return image.clamp(-1, 1)


def _move(image: Tensor, level: str, draw: list[float]) -> Tensor:
    """Shift, zoom and turn; pixels from outside repeat the border."""
    across, down, zoom, turn = (2 * each - 1 for each in draw)
    angle = torch.tensor(_TURN[level] * turn)
    scale, shift = 1 + _ZOOM[level] * zoom, 2 * _SHIFT[level]
    cos, sin = (scale * angle.cos()).item(), (scale * angle.sin()).item()
    theta = torch.tensor([[cos, -sin, shift * across], [sin, cos, shift * down]])
    grid = F.affine_grid(theta[None], [1, *image.shape], align_corners=False)
    return F.grid_sample(image[None], grid, padding_mode="border", align_corners=False)[0]
