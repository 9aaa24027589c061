"""The stages in plain PyTorch: any device, and the definition of what a backend computes.

The stages over the classes take them by blocks, so that no more than some millions of cosines are stored at once.

Shapes, in every backend: embeddings (N, D), weight (C, D), target (N,) int64, an index into this weight, or negative
if the row's target is not among its rows (``ABSENT``, ``INVALID``). Results have the compute dtype: the promoted one
of both, at least fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.dtypes import compute_dtype
from ..base.keyed_random import rounding_bits
from ..base.normalize import stored_gradient, unit_gradient, unit_rows, without_autocast
from ..engine.terms import ABSENT, INVALID, MOMENTUM_BLOCK, PLAIN, CenterStep, Negatives, RowGradients
from ..margins.angular import SIN_FLOOR, CombinedMargin


def unavailable(device: torch.device | None = None) -> str | None:
    """Return why this backend cannot run here, or None."""
    return None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` in their dtype. Autocast is off here: it would round this product, but no other result."""
    with without_autocast(a.device):
        return a @ b


def _cosines(embeddings: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return unit embeddings (N, D), unit centers (C, D), and their cosines (N, C)."""
    dtype = compute_dtype(embeddings, weight)
    unit_x, unit_w = unit_rows(embeddings.to(dtype)), unit_rows(weight.to(dtype))
    return unit_x, unit_w, _product(unit_x, unit_w.T)


# Cosines of one block: 32 MiB in fp64 on a CPU; on a GPU, where each block is some launches, 16 times as many.
_CPU_BLOCK, _GPU_BLOCK = 1 << 22, 1 << 26


def _blocks(
    target: Tensor, num_rows: int, negatives: Negatives, class_count: Tensor | None = None
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Yield blocks of ``num_rows`` centers. Those of a class are in one block.

    With each block come the targets (N,) as indices into it, ``ABSENT`` for those outside, and the number of its
    centers that are no padding, None without padding.
    """
    limit, sub_centers = _CPU_BLOCK if target.device.type == "cpu" else _GPU_BLOCK, negatives.sub_centers
    size = max(limit // max(len(target), 1) // sub_centers, 1) * sub_centers
    for start in range(0, num_rows, size):
        stop = min(start + size, num_rows)
        within = torch.where((target >= start) & (target < stop), target - start, ABSENT)
        yield slice(start, stop), within, None if class_count is None else class_count - start


def _logistic(cosine: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``v = log(softplus(u))`` of cosines, ``dv/du`` and ``du/dcosine``.

    ``u = scale·(g(cos(θ - angle)) + offset) + bias`` with ``g(z) = 2·((z + 1)/2)^exponent - 1``. v ends where fp32
    does: a loss below e^-80 counts as e^-80 (in fp64 e^-600).
    """
    scale, exponent, angle, offset, bias = numbers.to(cosine.dtype)
    sine = ((1 - cosine) * (1 + cosine)).clamp(min=0).sqrt()
    half = ((cosine * angle.cos() + sine * angle.sin() + 1) / 2).clamp(min=0)
    u = scale * (2 * half**exponent - 1 + offset) + bias
    turned = angle.cos() - angle.sin() * cosine / sine.clamp(min=SIN_FLOOR)
    lowest = -600.0 if cosine.dtype == torch.float64 else -80.0
    loss = F.softplus(u, threshold=40)
    small = u < -36  # there log(1 + e^u) is e^u to the last bit
    value = torch.where(small, u.clamp(min=lowest), loss.log())
    by_u = torch.where(small, (u > lowest).to(u.dtype), u.sigmoid() / loss)
    return value, by_u, scale * exponent * half ** (exponent - 1) * turned


def _values(
    cosine: Tensor, target: Tensor, negatives: Negatives, class_count: Tensor | None = None
) -> tuple[Tensor, Tensor | float]:
    """Return the value of each row of weight among the negatives, (N, C), and its derivative by the cosine.

    The value is -inf for the target's class, for sub-centers that are not their class's nearest, and for padding.
    """
    sub_centers, threshold, coefficients, logistic = negatives
    own = torch.where(target < 0, target, target // sub_centers)
    rows = torch.arange(cosine.shape[1], device=target.device)
    left_out = own[:, None] == rows // sub_centers
    if class_count is not None:
        left_out |= rows >= class_count
    if sub_centers > 1:
        nearest = cosine.unflatten(1, (-1, sub_centers)).argmax(2)
        left_out |= ~F.one_hot(nearest, sub_centers).bool().flatten(1)
    if logistic is not None:
        value, by_u, by_cosine = _logistic(cosine, logistic)
        scale = logistic[0].to(cosine.dtype)
        return (value / scale).masked_fill(left_out, -torch.inf), by_u * by_cosine / scale
    if threshold is None or coefficients is None:
        return cosine.masked_fill(left_out, -torch.inf), 1.0
    a, b, d, e = coefficients.to(cosine.dtype)
    hard = cosine > threshold[:, None]
    sine = ((1 - cosine) * (1 + cosine)).clamp(min=0).sqrt()
    value = torch.where(hard, (a * cosine + b) * cosine + d + e * sine, cosine)
    slope = 2 * a * cosine + b - e * cosine / sine.clamp(min=SIN_FLOOR)
    return value.masked_fill(left_out, -torch.inf), torch.where(hard, slope, 1)


def class_max(
    embeddings: Tensor, weight: Tensor, target: Tensor, class_count: Tensor | None = None, negatives: Negatives = PLAIN
) -> Tensor:
    """Return the greatest cosine (N,) of each row with a class that is not its target, -inf if there is none.

    ``negatives`` may change the cosines. With ``class_count``, a 0-dim int64 tensor, the rows of weight from there on
    are padding: no classes.
    """
    maxima = []
    for block, within, count in _blocks(target, len(weight), negatives, class_count):
        _, _, cosine = _cosines(embeddings, weight[block])
        maxima.append(_values(cosine, within, negatives, count)[0].amax(1))
    return functools.reduce(torch.maximum, maxima)


def class_stats(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    shift: Tensor | None,
    with_center_sum: bool,
    class_count: Tensor | None = None,
    negatives: Negatives = PLAIN,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's sum over the negatives, their maximum, and the sum of the class centers weighted alike.

    With ``e_ij = exp(scale·cos_ij - shift_i)`` for ``j != target_i`` (shift ``(N,)`` fp64, none is zero), else 0:
    ``Σ_j e_ij`` (N,), ``max_j cos_ij`` (N,), ``Σ_j e_ij ŵ_j`` (N, D), the last empty unless asked for. ``class_count``
    as in :func:`class_max`. With ``negatives`` that turn a cosine c into f(c), the exponent is ``scale·f``, and the
    last sum has the factor f'(c).
    """
    parts = []
    for block, within, count in _blocks(target, len(weight), negatives, class_count):
        _, unit_w, cosine = _cosines(embeddings, weight[block])
        value, slope = _values(cosine, within, negatives, count)
        logits = scale * value.double() - (0 if shift is None else shift[:, None])
        exponentials = logits.exp().to(cosine.dtype)
        center_sum = _product(exponentials * slope, unit_w) if with_center_sum else exponentials.new_empty(0)
        maximum = cosine.masked_fill(value == -torch.inf, -torch.inf).amax(1)
        parts.append((exponentials.sum(1), maximum, center_sum))
    total, maximum, center_sum = parts[0]
    for other in parts[1:]:
        total, maximum = total + other[0], torch.maximum(maximum, other[1])
        center_sum = center_sum + other[2]
    return total, maximum, center_sum


def weight_grad(
    embeddings: Tensor, weight: Tensor, target: Tensor, gradients: RowGradients, negatives: Negatives = PLAIN
) -> Tensor:
    """Return the gradient (C, D) by the class centers, in weight's dtype.

    With ``negatives`` a derivative has the factor f' as well, see :func:`class_stats`.
    """
    result = torch.empty_like(weight)
    for block, within, _ in _blocks(target, len(weight), negatives):
        gradient = _exact_weight_grad(embeddings, weight[block], within, gradients, negatives)
        result[block] = stored_gradient(gradient, weight[block])
    return result


def bias_grad(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    d_lse: Tensor,
    class_count: Tensor | None = None,
    negatives: Negatives = PLAIN,
) -> Tensor:
    """Return the gradient, 0-dim fp64, by the bias of ``negatives.logistic``.

    ``lse`` (N,) is the logarithm of the negatives' losses, ``d_lse`` (N,) the gradient by it.
    """
    assert negatives.logistic is not None
    total = lse.new_zeros(())
    for block, within, count in _blocks(target, len(weight), negatives, class_count):
        _, _, cosine = _cosines(embeddings, weight[block])
        value, by_u, _ = _logistic(cosine, negatives.logistic)
        left_out = _values(cosine, within, negatives, count)[0] == -torch.inf
        share = (value.double() - lse[:, None]).exp().masked_fill(left_out, 0)
        total = total + (d_lse[:, None] * share * by_u).sum()
    return total


def _exact_weight_grad(
    embeddings: Tensor, weight: Tensor, target: Tensor, gradients: RowGradients, negatives: Negatives = PLAIN
) -> Tensor:
    """:func:`weight_grad` in the compute dtype."""
    scale, lse, negative_coefficient, target_coefficient = gradients
    unit_x, _, cosine = _cosines(embeddings, weight)
    value, slope = _values(cosine, target, negatives)
    probability = (scale * value.double() - lse[:, None]).exp().to(cosine.dtype).masked_fill(value == -torch.inf, 0)
    is_target = target[:, None] == torch.arange(len(weight), device=target.device)
    d_cosine = torch.where(is_target, target_coefficient[:, None], negative_coefficient[:, None] * probability * slope)
    return unit_gradient(_product(d_cosine.T, unit_x), weight.to(unit_x.dtype))


def update_centers(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    gradients: RowGradients,
    step: CenterStep,
    negatives: Negatives = PLAIN,
) -> None:
    """Make one step on the class centers in place of :func:`weight_grad`, which has the same other arguments."""
    classes = torch.arange(len(weight), device=weight.device) if step.classes is None else step.classes
    for block, within, _ in _blocks(target, len(classes), negatives):
        _update_block(embeddings, weight, within, gradients, step, classes[block], negatives)


def _update_block(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    gradients: RowGradients,
    step: CenterStep,
    classes: Tensor,
    negatives: Negatives,
) -> None:
    """:func:`update_centers` for these classes alone, which ``target`` is an index into."""
    num_classes, dim = weight.shape
    # Padding repeats the step of the first row: the same numbers are written once more, and no value decides a shape.
    is_row = classes < num_classes
    entry = torch.where(is_row, torch.arange(len(classes), device=weight.device), 0)
    rows = classes[entry].clamp(max=num_classes - 1)
    active = step.active & is_row[0]

    def write(tensor: Tensor, values: Tensor) -> None:
        tensor[rows] = torch.where(active, values, tensor[rows])

    centers = weight[rows]
    gradient = _exact_weight_grad(embeddings, centers, target, gradients, negatives)
    value = centers.to(gradient.dtype)
    velocity = gradient[entry] + step.weight_decay * value
    bits = rounding_bits(step.rounding_key, step.ids(rows), dim)
    if step.momentum_buffer is not None:
        buffer, scales = step.momentum_buffer, step.momentum_scale
        old = buffer[rows].to(value.dtype)
        if scales is not None:
            old *= scales[rows].to(value.dtype).repeat_interleave(MOMENTUM_BLOCK, 1)[:, :dim]
        velocity += step.momentum * old
        if scales is None:
            write(buffer, _round_stochastically(velocity, buffer.dtype, bits >> 16))
        else:
            integers, units = _quantize(velocity, bits >> 16)
            write(buffer, integers)
            write(scales, units)
    write(weight, _round_stochastically(value - step.lr * velocity, weight.dtype, bits & 0xFFFF))


def _round_stochastically(values: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Return values (R, D) in ``dtype``, rounded stochastically by 16 bits (R, D) each if that is bf16.

    A value is rounded up with the probability of its distance from the value below.
    """
    if dtype != torch.bfloat16:
        return values.to(dtype)
    words = values.float().view(torch.int32)
    return ((words + torch.where(values.isfinite(), bits.int(), 0)) & -65536).view(torch.float32).to(dtype)


def _quantize(values: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 (R, D), rounded by ``bits``, and the units (R, ceil(D / 64)) fp32.

    The unit of 64 columns is their largest magnitude over 127.
    """
    dim = values.shape[1]
    blocks = F.pad(values, (0, -dim % MOMENTUM_BLOCK)).unflatten(1, (-1, MOMENTUM_BLOCK))
    largest = blocks.abs().amax(2)
    units = torch.where(largest > 1e-35, largest.float() / 127, 0)
    inverse = torch.where(units > 0, 1 / units.to(values.dtype), 0).repeat_interleave(MOMENTUM_BLOCK, 1)[:, :dim]
    rounded = (values * inverse + (bits.to(values.dtype) + 0.5) / 65536).floor()
    return rounded.clamp(-127, 127).to(torch.int8), units


def _unit_targets(weight: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the unit centers of the rows' targets (N, D), zeros where the target is absent."""
    if weight.shape[0] == 0:
        return weight.new_zeros(target.shape[0], weight.shape[1], dtype=dtype)
    unit_w = unit_rows(weight.index_select(0, target.clamp(min=0)).to(dtype))
    return unit_w.masked_fill((target < 0)[:, None], 0)


def target_cosine(embeddings: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Return the cosine (N,) of each row with its target's center.

    It is 0 where target is ``ABSENT`` and NaN where it is ``INVALID``.
    """
    dtype = compute_dtype(embeddings, weight)
    cosine = (unit_rows(embeddings.to(dtype)) * _unit_targets(weight, target, dtype)).sum(1).clamp(-1, 1)
    return cosine.masked_fill(target == ABSENT, 0).masked_fill(target == INVALID, torch.nan)


def finish_negatives(negative_sum: Tensor, shift: Tensor | None, center_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows' log-sum-exps (N,) and softmax-weighted means of the unit centers.

    They come from the sums of :func:`class_stats` over all shards. The means have the shape and the dtype of
    ``center_sum``; a row without negatives has the mean 0. The log-sum-exps are fp64: at s = 1000 an fp32 rounding
    would cost 3e-5 of every probability in the backward pass.
    """
    lse = negative_sum.double().log()
    least = torch.finfo(negative_sum.dtype).tiny  # in place of 0
    mean = center_sum.clone() if center_sum.dim() == 1 else center_sum / negative_sum.clamp(min=least)[:, None]
    return lse if shift is None else lse + shift, mean


def unit_embedding_grad(
    weight: Tensor, target: Tensor, mean_center: Tensor, negative_coefficient: Tensor, target_coefficient: Tensor
) -> Tensor:
    """Return these classes' share of the gradient (N, D) by the unit embeddings, in mean_center's dtype.

    mean_center (N, D) is the softmax-weighted mean of the unit centers over the row's negatives; the coefficients
    (N,) are those of :func:`weight_grad`.
    """
    unit_w = _unit_targets(weight, target, mean_center.dtype)
    of_target = target_coefficient.masked_fill(target < 0, 0)[:, None] * unit_w
    return negative_coefficient[:, None] * mean_center + of_target


def embedding_grad(d_unit: Tensor, embeddings: Tensor) -> Tensor:
    """Return the gradient (N, D) by the embeddings, in their dtype, from that by the unit embeddings.

    In fp16 it overflows to infinity, but for rows of a norm below 1e-12, where finite numbers saturate; so does
    :func:`weight_grad`.
    """
    return stored_gradient(unit_gradient(d_unit, embeddings.to(d_unit.dtype)), embeddings)


def margin_loss(
    negative_lse: Tensor,
    target_cosine: Tensor,
    scale: float,
    m1: float,
    m2: float,
    m3: float,
    boundary: str,
    gradient: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return each row's loss and full log-sum-exp, and the loss's derivatives by negative_lse and target_cosine.

    All are (N,). The margin is given by its numbers (:func:`fused_arcface.margins.parameters`).
    """
    with torch.enable_grad():
        lse, cosine = negative_lse.detach().requires_grad_(), target_cosine.detach().requires_grad_()
        angular = None if boundary == "linear" else CombinedMargin(m1, m2, m3, boundary, gradient)  # type: ignore[arg-type]
        modified = cosine - m3 if angular is None else angular(cosine)
        loss = F.softplus(lse - scale * modified, threshold=40)
        d_lse, d_cosine = torch.autograd.grad(loss.sum(), (lse, cosine))
    return loss.detach(), torch.logaddexp(lse, scale * modified).detach(), d_lse, d_cosine
