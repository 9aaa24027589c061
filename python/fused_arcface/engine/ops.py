"""The leaf stages as ``torch.library`` operators: schemas and fakes once, implementations by backend name.

``torch.ops.fused_arcface.*`` is what :mod:`fused_arcface.engine.autograd` calls; the operators have no derivative of their
own. Shapes and meanings are those of :mod:`fused_arcface.backends.plain_torch`.
"""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..base.checks import check_target_range, check_written_in_place

IGNORED, INVALID = -1, -2
"""Targets of rows that take no part, or whose class is in another shard; and of rows whose label is no class."""

_ROWS = "Tensor embeddings, Tensor weight, Tensor target"
_COEFFICIENTS = "Tensor lse, Tensor negative_coefficient, Tensor target_coefficient"
_NEGATIVES = "*, int sub_centers=1, Tensor? threshold=None, Tensor? coefficients=None"
_SCHEMAS = {
    "local_target": "(Tensor target, int num_classes, int ignore_index) -> Tensor",
    # O(N·C·D), over the classes
    # class_count: 0-dim int64, the rows of weight from there on are padding; a tensor, so that nobody waits for a GPU
    "class_max": f"({_ROWS}, str backend, Tensor? class_count=None, {_NEGATIVES}) -> Tensor",
    "class_stats": f"({_ROWS}, Scalar scale, Tensor? shift, bool with_center_sum, str backend, "
    f"Tensor? class_count=None, {_NEGATIVES}) -> (Tensor, Tensor, Tensor)",
    "weight_grad": f"({_ROWS}, Scalar scale, {_COEFFICIENTS}, str backend, {_NEGATIVES}) -> Tensor",
    "update_centers": "(Tensor embeddings, Tensor(a!) weight, Tensor target, Scalar scale, "
    f"{_COEFFICIENTS}, Tensor? classes, Tensor(b!)? momentum_buffer, Tensor(c!)? momentum_scale, float lr, "
    "float momentum, float weight_decay, int rounding_key, int class_start, Tensor active, "
    f"str backend, {_NEGATIVES}) -> ()",
    # O(N·D) and O(N), over the rows
    "target_cosine": f"({_ROWS}, str backend) -> Tensor",
    "finish_negatives": "(Tensor negative_sum, Tensor? shift, Tensor center_sum, str backend) -> (Tensor, Tensor)",
    "margin_loss": "(Tensor negative_lse, Tensor target_cosine, Scalar scale, float m1, float m2, float m3,"
    " str boundary, str gradient, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    "unit_embedding_grad": "(Tensor weight, Tensor target, Tensor mean_center, Tensor negative_coefficient,"
    " Tensor target_coefficient, str backend) -> Tensor",
    "embedding_grad": "(Tensor d_unit, Tensor embeddings, str backend) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"fused_arcface::{_name}", _schema)


class Negatives(NamedTuple):
    """How a row's negatives enter its sum, where it is not by their cosines as they are: keyword arguments of the
    stages over the classes. Only backends for which :func:`fused_arcface.backends.has_negatives` take them."""

    sub_centers: int = 1
    """K rows of weight for each class, adjacent; a class's cosine is the greatest of theirs, and its gradient that
    row's. A target is the row of its class that is the greatest."""
    threshold: Tensor | None = None
    """(N,) or None: a cosine c above its row's threshold becomes ``a·c² + b·c + d``."""
    coefficients: Tensor | None = None
    """(3,) fp64: a, b, d."""

    @property
    def plain(self) -> bool:
        return self.sub_centers == 1 and self.threshold is None


PLAIN = Negatives()


def compute_dtype(embeddings: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that sums are kept in: fp64 if either input is, else fp32."""
    if embeddings.dtype == weight.dtype == torch.float32:
        return torch.float32
    return torch.promote_types(torch.promote_types(embeddings.dtype, weight.dtype), torch.float32)


@torch.library.impl("fused_arcface::local_target", "default")
def _local_target(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Labels (N,) of any integer dtype as int64, -1 for ignored rows, -2 for those out of range.

    An operator, since its check reads the values. On a GPU that would wait for the device: there an invalid label's
    loss is NaN (the backends' target_cosine), unless FUSED_ARCFACE_DEBUG=1 asks for the check.
    """
    target = target.long()
    on_cpu = target.device.type == "cpu"
    if on_cpu and target.numel() > 0:
        low, high = torch.aminmax(target)
        if low >= 0 and high < num_classes and not 0 <= ignore_index < num_classes:  # all rows count
            return target.clone()
    if on_cpu or os.environ.get("FUSED_ARCFACE_DEBUG") == "1":
        check_target_range(target, num_classes, ignore_index)
    valid = torch.where((target >= 0) & (target < num_classes), target, INVALID)
    return torch.where(target == ignore_index, IGNORED, valid)


@torch.library.register_fake("fused_arcface::local_target")
def _local_target_fake(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    return torch.empty_like(target, dtype=torch.int64)


def _run(name: str, *arguments: Any, class_count: Tensor | None = None, negatives: Negatives = PLAIN) -> Any:
    """The stage of that name by the backend that the last argument names. A backend without padding or other negatives
    (``backends.knows_padding``, ``backends.has_negatives``) need not know of them."""
    *inputs, backend = arguments
    rarer: dict[str, Any] = {} if class_count is None else {"class_count": class_count}
    if not negatives.plain:
        rarer["negatives"] = negatives
    return getattr(backends.load(backend), name)(*inputs, **rarer)


# The stages over the rows are the backend's own functions; those over the classes below know of a shard without any.
for _name in ("target_cosine", "finish_negatives", "margin_loss", "unit_embedding_grad", "embedding_grad"):
    torch.library.impl(f"fused_arcface::{_name}", "default", functools.partial(_run, _name))


@torch.library.register_fake("fused_arcface::target_cosine")
def _target_cosine_fake(embeddings: Tensor, weight: Tensor, target: Tensor, backend: str) -> Tensor:
    return embeddings.new_empty(embeddings.shape[0], dtype=compute_dtype(embeddings, weight))


@torch.library.register_fake("fused_arcface::finish_negatives")
def _finish_negatives_fake(
    negative_sum: Tensor, shift: Tensor | None, center_sum: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(negative_sum, dtype=torch.float64), torch.empty_like(center_sum)


@torch.library.register_fake("fused_arcface::margin_loss")
def _margin_loss_fake(
    negative_lse: Tensor, target_cosine: Tensor, *numbers: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, lse, d_lse, d_cosine = (torch.empty_like(negative_lse) for _ in range(4))
    return loss, lse, d_lse, d_cosine


@torch.library.register_fake("fused_arcface::unit_embedding_grad")
def _unit_embedding_grad_fake(weight: Tensor, target: Tensor, mean_center: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(mean_center)


@torch.library.register_fake("fused_arcface::embedding_grad")
def _embedding_grad_fake(d_unit: Tensor, embeddings: Tensor, backend: str) -> Tensor:
    return torch.empty_like(embeddings)


@torch.library.impl("fused_arcface::class_max", "default")
def _class_max(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    backend: str,
    class_count: Tensor | None = None,
    **negatives: Any,
) -> Tensor:
    if weight.shape[0] == 0:
        return embeddings.new_full(embeddings.shape[:1], -torch.inf, dtype=compute_dtype(embeddings, weight))
    arguments = embeddings, weight, target, backend
    result: Tensor = _run("class_max", *arguments, class_count=class_count, negatives=Negatives(**negatives))
    return result


@torch.library.register_fake("fused_arcface::class_max")
def _class_max_fake(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    backend: str,
    class_count: Tensor | None = None,
    **_: object,
) -> Tensor:
    return _target_cosine_fake(embeddings, weight, target, backend)


@torch.library.impl("fused_arcface::class_stats", "default")
def _class_stats(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    shift: Tensor | None,
    with_center_sum: bool,
    backend: str,
    class_count: Tensor | None = None,
    **negatives: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    if weight.shape[0] == 0:  # a shard whose step samples none of its classes; no backend need know of it
        rows = embeddings.new_zeros(embeddings.shape[0], dtype=compute_dtype(embeddings, weight))
        center_sum = rows.new_zeros(embeddings.shape if with_center_sum else (0,))
        return rows, torch.full_like(rows, -torch.inf), center_sum
    arguments = embeddings, weight, target, scale, shift, with_center_sum, backend
    result: tuple[Tensor, Tensor, Tensor] = _run(
        "class_stats", *arguments, class_count=class_count, negatives=Negatives(**negatives)
    )
    return result


@torch.library.register_fake("fused_arcface::class_stats")
def _class_stats_fake(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    shift: Tensor | None,
    with_center_sum: bool,
    backend: str,
    class_count: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(embeddings, weight)
    rows = embeddings.new_empty(embeddings.shape[0], dtype=dtype)
    center_sum = embeddings.new_empty(embeddings.shape if with_center_sum else (0,), dtype=dtype)
    return rows, torch.empty_like(rows), center_sum


@torch.library.impl("fused_arcface::weight_grad", "default")
def _weight_grad(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    lse: Tensor,
    negative_coefficient: Tensor,
    target_coefficient: Tensor,
    backend: str,
    **negatives: Any,
) -> Tensor:
    if weight.shape[0] == 0:
        return torch.empty_like(weight)
    arguments = embeddings, weight, target, scale, lse, negative_coefficient, target_coefficient, backend
    result: Tensor = _run("weight_grad", *arguments, negatives=Negatives(**negatives))
    return result


@torch.library.register_fake("fused_arcface::weight_grad")
def _weight_grad_fake(embeddings: Tensor, weight: Tensor, *rest: object, **_: object) -> Tensor:
    return torch.empty_like(weight)


MOMENTUM_BLOCK = 64
"""Columns of a row that share one unit of an int8 momentum: 1/16 byte an element for it."""


class CenterStep(NamedTuple):
    """What a step of SGD on the class centers needs beside what their gradient is made of. Row r of weight, with
    gradient g_r, becomes ``w_r - lr·m_r`` with the new momentum ``m_r = momentum·m_r + (g_r + weight_decay·w_r)``."""

    classes: Tensor | None
    """(K,) int64 ascending rows of weight that take part; None: all. The target indexes into them. Others are not
    touched. ``C``, for backends that know padding, is no row."""
    momentum_buffer: Tensor | None
    """Like weight, fp64, fp32, bf16 or int8; None without momentum."""
    momentum_scale: Tensor | None
    """(C, ceil(D / 64)) fp32: the units of an int8 momentum, one for 64 columns of a row."""
    lr: float
    momentum: float
    weight_decay: float
    rounding_key: int
    """Of seed and step, as int64: storage below fp32 is rounded by :func:`fused_arcface.base.keyed_random.rounding_bits`."""
    class_start: int
    """Global id of weight's first row."""
    active: Tensor
    """0-dim bool: where false nothing is changed. A tensor, so that nobody waits for a GPU to read it."""


def check_update(weight: Tensor, momentum_buffer: Tensor | None, momentum_scale: Tensor | None) -> None:
    """Check the memory that a step of SGD writes to: kernels get its raw addresses.

    Raises:
        ValueError: elements of weight share memory; a momentum of another shape than weight's, or not contiguous.
    """
    check_written_in_place("weight", weight)
    num_rows, dim = weight.shape
    shapes = {"momentum_buffer": (num_rows, dim), "momentum_scale": (num_rows, -(-dim // MOMENTUM_BLOCK))}
    for (name, shape), tensor in zip(shapes.items(), (momentum_buffer, momentum_scale), strict=True):
        if tensor is not None and (tensor.shape != shape or not tensor.is_contiguous()):
            raise ValueError(
                f"{name} must be contiguous and {shape} beside weight {(num_rows, dim)}; got {tuple(tensor.shape)} "
                f"with strides {tensor.stride()}"
            )


@torch.library.impl("fused_arcface::update_centers", "default")
def _update_centers(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    lse: Tensor,
    negative_coefficient: Tensor,
    target_coefficient: Tensor,
    *step_and_backend: Any,
    **negatives: Any,
) -> None:
    step, backend = CenterStep(*step_and_backend[:-1]), step_and_backend[-1]
    check_update(weight, step.momentum_buffer, step.momentum_scale)
    if step.classes is not None:
        step = step._replace(classes=step.classes.contiguous())
    if (weight if step.classes is None else step.classes).shape[0] > 0:
        arguments = embeddings, weight, target, scale, lse, negative_coefficient, target_coefficient, step, backend
        _run("update_centers", *arguments, negatives=Negatives(**negatives))


@torch.library.register_fake("fused_arcface::update_centers")
def _update_centers_fake(*_: object, **__: object) -> None:
    return None
