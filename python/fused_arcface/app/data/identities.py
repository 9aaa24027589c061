"""Procedural identities: drawings to recognize, as many as are asked for, made on the spot and the same everywhere.

An identity is a prototype: a few cubic strokes. A sample of it is that prototype with its control points moved, under
an affine map, drawn with a pen of its own width and contrast, in noise. Every number comes from a hash of (seed,
identity, sample), so an image depends on nothing else: not on the batch it is made in, the number of identities, or
PyTorch's generators.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_arcface.base.keyed_random import fold_each

from .images import LabeledImages

_POINTS_PER_STROKE = 16
# The streams of numbers that one key is split into; a prototype's key has no sample in it.
_PROTOTYPE, _DEFORMATION, _NOISE = 1, 2, 3


def keyed_uniform(count: int, *key: int | Tensor) -> Tensor:
    """Return uniform fp32 numbers in (0, 1), ``(B, count)``, for keys that are ints, or ``(B,)`` int64 for B rows.

    >>> keyed_uniform(2, 7, torch.tensor([3, 4]))[1].equal(keyed_uniform(2, 7, torch.tensor([4]))[0])
    True
    """
    zero = state = torch.zeros(1, dtype=torch.int64)
    for part in key:
        state = fold_each(state + torch.as_tensor(part, dtype=torch.int64), zero)
    bits = (fold_each(state[:, None], torch.arange(count)) >> 41) & (2**23 - 1)
    return (bits.to(torch.float32) + 0.5) / 2**23


def keyed_normal(count: int, *key: int | Tensor) -> Tensor:
    """Return standard normal fp32 numbers, ``(B, count)``, keyed as in :func:`keyed_uniform` (Box-Muller)."""
    radius, turn = keyed_uniform(2 * count, *key).chunk(2, dim=1)
    return (-2 * radius.log()).sqrt() * (2 * math.pi * turn).cos()


@dataclass(frozen=True)
class Style:
    """The look of identities, and how much their samples differ. Coordinates run from -1 to 1 over the image's side.

    The defaults make a problem on which a small net errs: pairs of unseen identities are told apart far better than by
    chance and far from always, so that training criteria can be compared.
    """

    size: int = 32
    """Side of the square image in pixels."""
    strokes: int = 3
    jitter: float = 0.08
    """Standard deviation of a control point."""
    rotation: float = 0.15
    """Standard deviation in radians."""
    stretch: float = 0.10
    """Standard deviation of each entry of the linear map's distance to a rotation."""
    shift: float = 0.08
    """Standard deviation of the translation."""
    pen: tuple[float, float] = (0.05, 0.09)
    """Least and greatest radius of the pen."""
    noise: float = 0.10
    """Standard deviation of each pixel."""


def draw(identity: Tensor, sample: Tensor, *, seed: int = 0, style: Style = Style()) -> Tensor:
    """Return images ``(B, 1, size, size)`` fp32, about 0 (paper) to 1 (ink).

    Args:
        identity: (B,) int64, any numbers >= 0.
        sample: (B,) int64, any numbers >= 0; two samples of an identity differ.
        seed: seed of all identities.
        style: style of the drawings.

    >>> draw(torch.tensor([5, 5]), torch.tensor([0, 1])).shape
    torch.Size([2, 1, 32, 32])
    """
    rows, controls = len(identity), style.strokes * 4
    prototype = keyed_uniform(2 * controls, seed, _PROTOTYPE, identity) * 1.6 - 0.8
    deform = keyed_normal(2 * controls + 7, seed, _DEFORMATION, identity, sample)
    control = (prototype + style.jitter * deform[:, 7:]).view(rows, controls, 2)

    angle = style.rotation * deform[:, 0]
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(rows, 2, 2)
    linear = turn + style.stretch * deform[:, 1:5].view(rows, 2, 2)
    control = control @ linear + style.shift * deform[:, None, 5:7]

    # Cubic Bézier curves, each sampled at even parameters: (rows, strokes·points, 2).
    t = torch.linspace(0, 1, _POINTS_PER_STROKE)
    basis = torch.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], dim=1)
    points = (basis @ control.view(rows, style.strokes, 4, 2)).flatten(1, 2)

    # A round pen is a product of one function of x and one of y, so a drawing is a batched matrix product.
    pen, contrast = keyed_uniform(2, seed, _DEFORMATION, identity, sample).unbind(1)
    pen = style.pen[0] + (style.pen[1] - style.pen[0]) * pen
    pixel = torch.linspace(-1.1, 1.1, style.size)
    across, down = (torch.exp(-(((pixel - p[..., None]) / pen[:, None, None]) ** 2) / 2) for p in points.unbind(2))
    ink = 1 - torch.exp(-1.5 * down.mT @ across)  # strokes that cross do not add up
    noise = keyed_normal(style.size**2, seed, _NOISE, identity, sample).view_as(ink)
    return ((0.6 + 0.4 * contrast)[:, None, None] * ink + style.noise * noise)[:, None]


def identity_images(
    num_identities: int, samples: int, *, first: int = 0, seed: int = 0, style: Style = Style()
) -> LabeledImages:
    """Return all of ``samples`` samples of the identities ``first`` to ``first + num_identities - 1``.

    Returns:
        Images ``(num_identities·samples, 1, size, size)`` fp32, an identity's samples together, and labels, as many,
        int64 from 0 to ``num_identities - 1``. Disjoint ranges are disjoint people: train on one, verify on another.

    >>> people = identity_images(3, 2)
    >>> people.images.shape, people.labels
    (torch.Size([6, 1, 32, 32]), tensor([0, 0, 1, 1, 2, 2]))
    """
    labels = torch.arange(num_identities).repeat_interleave(samples)
    sample = torch.arange(samples).repeat(num_identities)
    parts = [
        draw(first + i, s, seed=seed, style=style) for i, s in zip(labels.split(1024), sample.split(1024), strict=True)
    ]
    return LabeledImages(torch.cat(parts), labels)
