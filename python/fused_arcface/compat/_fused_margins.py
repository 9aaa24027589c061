"""Find the margin modules of insightface that the fused kernels can replace, and read their margin and scale.

:mod:`fused_arcface.compat.insightface` does this in each step. Its own margins compute logits with the functions here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..base.ranges import POSITIVE, check_number
from ..margins.angular import CombinedMargin, CosFace
from ..margins.hard_negatives import InterclassFilter

_NAMES = {
    "CombinedMarginLoss": ("s", "m1", "m2", "m3", "interclass_filtering_threshold"),
    "ArcFace": ("s", "margin"),
    "CosFace": ("s", "m"),
}
"""The attributes of each class with its scale and margin."""


class Fused(NamedTuple):
    """The margin and scale for the fused kernels, which then compute the same as a margin module."""

    margin: Callable[[Tensor], Tensor]
    scale: float


def combined(m2: float, m3: float) -> Callable[[Tensor], Tensor]:
    """Return insightface's margin for these numbers: CosFace if ``m3 > 0``, else ArcFace, straight-through."""
    return CosFace(m3) if m3 > 0 else CombinedMargin(1.0, m2, 0.0, boundary="none", gradient="straight_through")


def filtered(logits: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Return logits (N, C) whose negatives above a threshold are 0."""
    if threshold <= 0:
        return logits
    is_target = labels == torch.arange(logits.shape[1], device=logits.device)
    return logits.masked_fill((logits.detach() > threshold) & ~is_target, 0)


def with_margin(logits: Tensor, labels: Tensor, margin: Callable[[Tensor], Tensor]) -> Tensor:
    """Return logits (N, C) with a margin on the targets, labels (N, 1) or (N,); -1 if one is in another shard."""
    rows = (labels.flatten() != -1).nonzero().squeeze(1)
    columns = labels.flatten()[rows]
    return logits.index_put((rows, columns), margin(logits[rows, columns]))


def find_fused(margin_loss: Callable[..., Tensor], known: Mapping[type[nn.Module], Any]) -> Fused | None:
    """Return the current margin and scale of a margin module, or None if the fused kernels can't replace it.

    ``known`` has the classes that they replace, each with its ``forward``. A class of another file with one of their
    names is a version of insightface's class. It is replaced if it computes the same values and derivatives.
    """
    if not isinstance(margin_loss, nn.Module) or not _is_plain(margin_loss):
        return None
    own, numbers = known.get(type(margin_loss)), _numbers(margin_loss)
    is_known = own is not None and type(margin_loss).forward is own
    return numbers if numbers is not None and (is_known or _computes(margin_loss, numbers)) else None


def _is_plain(margin_loss: nn.Module) -> bool:
    """Return whether the instance has only numbers and texts: no tensor, submodule, hook or own forward."""
    filled = [each for each in vars(margin_loss).values() if not (isinstance(each, (dict, set)) and len(each) == 0)]
    return all(isinstance(each, (int, float, str, type(None))) for each in filled)


def _numbers(margin_loss: nn.Module) -> Fused | None:
    """Return margin and scale, read from the attributes of a class with this name.

    The result is None if an attribute is missing or the fused kernels don't take its value.
    """
    name = next((each.__name__ for each in type(margin_loss).__mro__ if each.__name__ in _NAMES), "")
    values: list[Any] = [getattr(margin_loss, each, None) for each in _NAMES.get(name, ("",))]
    if not all(isinstance(value, (int, float)) for value in values):
        return None
    scale, *rest = map(float, values)
    if name == "CombinedMarginLoss":
        m1, m2, m3, threshold = rest
    else:
        m1, m2, m3, threshold = (1.0, rest[0], 0.0, 0.0) if name == "ArcFace" else (1.0, 0.0, rest[0], 0.0)
    if m3 <= 0 and m1 != 1.0:
        return None
    try:
        check_number("scale", scale, POSITIVE)
        margin = combined(m2, m3)
    except ValueError:
        return None
    return Fused(InterclassFilter(margin, threshold) if 0 < threshold < 1 else margin, scale)


def _computes(margin_loss: nn.Module, numbers: Fused) -> bool:
    """Return whether the module has these values and derivatives on a grid of cosines, also past θ + m = π."""
    fp64 = {"dtype": torch.float64, "device": "cpu"}
    grid = torch.linspace(-0.999, 0.999, 67, **fp64)  # type: ignore[call-overload]
    cosines = torch.stack([grid, grid.flip(0), grid.roll(20)], 1)  # (67, 3): each value as target and as negative
    labels = (torch.arange(67, device="cpu") % 4 - 1)[:, None]  # -1: the class is in another shard
    upstream = torch.linspace(-1, 2, 201, **fp64).reshape(67, 3)  # type: ignore[call-overload]
    margin, threshold = numbers.margin, 0.0
    if isinstance(numbers.margin, InterclassFilter):
        margin, threshold = numbers.margin.margin, numbers.margin.threshold

    def run(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            given = cosines.clone().requires_grad_()
            logits = function(given * 1, labels.clone())  # not a leaf: theirs works in place
            (gradient,) = torch.autograd.grad(logits, given, upstream.to(logits.dtype))
        return logits.detach().double(), gradient

    def ours(given: Tensor, labels: Tensor) -> Tensor:
        return with_margin(filtered(given, labels, threshold), labels, margin) * numbers.scale

    try:  # on a copy, and with the generator restored: the module may draw numbers or count calls
        with torch.random.fork_rng(devices=[]):
            found = run(copy.deepcopy(margin_loss))
    except Exception:  # a module that refuses this input is another function
        return False
    tolerance = 1e-5 * numbers.scale
    return all(torch.allclose(a, b, rtol=1e-5, atol=tolerance) for a, b in zip(found, run(ours), strict=True))


def state_key(margin_loss: Callable[..., Tensor]) -> Any:
    """Return a value that changes whenever the result of :func:`find_fused` may change; None if that is unknown."""
    if not isinstance(margin_loss, nn.Module) or not _is_plain(margin_loss):
        return None
    forward = type(margin_loss).forward
    return id(forward), _numbers(margin_loss), repr(sorted(vars(margin_loss).items()))
