"""Checks of what users pass in, before anything is computed. An error names the argument, the rule and what came."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable

import torch
from torch import Tensor

from .dtypes import FLOAT_DTYPES, INTEGER_DTYPES, WEIGHT_DTYPES, names
from .ranges import FROM_0_TO_1, POSITIVE, check_number, type_of_number

REDUCTIONS = ("mean", "sum", "none")


def _check_tensor(name: str, tensor: object, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """Return a tensor that is dense and has one of these dtypes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must have one of the dtypes {names(dtypes)}; got {names((tensor.dtype,))}")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor; got layout {tensor.layout}")
    return tensor


def _check_rows(name: str, values: Tensor, embeddings: Tensor, advice: Callable[..., str] = lambda *_: "") -> None:
    """Check that values are (N,), on the device of embeddings (N, D). ``advice`` takes the same arguments."""
    if values.shape != embeddings.shape[:1]:
        got = f"{tuple(values.shape)}{advice(name, values, embeddings)}"
        raise ValueError(f"{name} must be (N={embeddings.shape[0]},); got {got}")
    if values.device != embeddings.device:
        raise ValueError(f"{name} must be on embeddings' device {embeddings.device}; got {values.device}")


def check_embeddings(
    embeddings: object, weight: Tensor, device: torch.device | None = None, name: str = "embeddings"
) -> None:
    """Check embeddings ``(N, D)`` against class centers ``(C, D)``, whose device is weight's if ``device`` is None."""
    embeddings = _check_tensor(name, embeddings, FLOAT_DTYPES)
    if embeddings.dim() != 2 or embeddings.shape[1] != weight.shape[1]:
        got = f"{tuple(embeddings.shape)}{_as_rows(name, embeddings, weight)}"
        raise ValueError(f"{name} must be (N, D={weight.shape[1]}); got {got}")
    device = device or weight.device
    if embeddings.device != device:
        raise ValueError(f"{name} must be on weight's device {device}; got {embeddings.device}")


def _as_rows(name: str, embeddings: Tensor, weight: Tensor) -> str:
    """Return advice for embeddings (N, 1, D), (N, T, D) or (N, D, 1), as some nets return them; "" for others."""
    shape, embedding_dim = embeddings.shape, weight.shape[-1:].numel()
    if len(shape) > 2 and shape[-1] == embedding_dim:
        return f": pass {name}.flatten(0, -2), and a label for each of its rows"
    if len(shape) > 2 and shape[1:].numel() == embedding_dim:
        return f": pass {name}.flatten(1)"
    return ""


def _as_labels(name: str, labels: Tensor, embeddings: Tensor) -> str:
    """Return advice for labels of another shape or of floats."""
    if labels.dim() == 2 and labels.numel() != embeddings.shape[0]:
        return (
            f": for one-hot labels pass {name}.argmax(1); for two labels a row pass target=(first, second, share); for "
            "soft or multi-hot labels take torch.nn.functional.cross_entropy over head.logits(embeddings)"
        )
    changes = (".flatten()" if labels.dim() == 2 else "") + (".long()" if labels.is_floating_point() else "")
    return f": pass {name}{changes}" if changes else ""


def check_target(target: object, embeddings: Tensor, ignore_index: object) -> None:
    """Check labels ``(N,)`` of embeddings ``(N, D)``, or mixed labels ``(first, second, share)``; they are not read."""
    if not isinstance(target, (tuple, list)):
        check_labels(target, embeddings, ignore_index)
        return
    if len(target) != 3:
        raise ValueError(
            f"target must be labels (N,), or (first, second, share) for mixed labels; got {len(target)} items"
        )
    check_labels(target[0], embeddings, ignore_index, "target[0]")
    check_labels(target[1], embeddings, ignore_index, "target[1]")
    share = target[2]
    if isinstance(share, Tensor):
        share = share.expand(embeddings.shape[0]) if share.dim() == 0 else share
        check_row_tensor("target[2]", share, embeddings)
    else:
        check_number("target[2]", share, FROM_0_TO_1)


def check_labels(labels: object, embeddings: Tensor, ignore_index: object, name: str = "target") -> None:
    """Check labels ``(N,)`` of embeddings ``(N, D)``, which are not read, and the label of ignored rows."""
    if isinstance(labels, Tensor) and labels.is_floating_point():
        rule = f"{name} must have one of the dtypes {names(INTEGER_DTYPES)}"
        raise TypeError(f"{rule}; got {names((labels.dtype,))}{_as_labels(name, labels, embeddings)}")
    labels = _check_tensor(name, labels, INTEGER_DTYPES)
    _check_rows(name, labels, embeddings, _as_labels)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int; got {type(ignore_index).__name__}")
    if not -(1 << 63) <= ignore_index < 1 << 63:
        raise ValueError(f"ignore_index must be in [-2^63, 2^63); got {ignore_index}")


def check_weight(name: str, weight: object) -> None:
    """Check class centers ``(C, D)``."""
    weight = _check_tensor(name, weight, WEIGHT_DTYPES)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"{name} must be (C, D) with C >= 1 and D >= 1; got {tuple(weight.shape)}")


def check_margin(margin: object) -> None:
    """Check that a margin can be called and is not a class."""
    if isinstance(margin, type):
        name = margin.__name__
        raise TypeError(f"margin must be an instance, not the class {name}: write {name}(); got the class")
    if not callable(margin):
        raise TypeError(f"margin must be a margin of fused_arcface or a callable; got {type(margin).__name__}")


def check_scale(scale: object) -> None:
    """Check a scale: a positive number, a 0-dim floating-point tensor, or a module such as AdaCos."""
    if isinstance(scale, Tensor):
        if scale.dim() != 0 or scale.dtype not in FLOAT_DTYPES:
            raise ValueError(f"scale must be 0-dim and floating-point as a tensor; got {describe_tensor(scale)}")
    elif isinstance(scale, (int, float)):
        check_number("scale", scale, POSITIVE)
    elif isinstance(scale, type) or not hasattr(scale, "rescale"):
        got = f"the class {scale.__name__}" if isinstance(scale, type) else type_of_number(scale)
        raise TypeError(f"scale must be a number, a 0-dim parameter or AdaCos(); got {got}")


def check_size(name: str, value: object, least: int = 1) -> int:
    """Return a size as an int. It may be one of NumPy's, as ``labels.max() + 1`` is."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int; got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}; got {value}")
    return int(value)


def check_seed(seed: object, name: str = "seed") -> int:
    """Return a seed as an int in [0, 2^63)."""
    checked = check_size(name, seed, least=0)
    if checked >= 1 << 63:
        raise ValueError(f"{name} must be in [0, 2^63); got {checked}")
    return checked


def check_center_dtype(dtype: torch.dtype | None) -> None:
    """Check the dtype of class centers; None is torch's default dtype."""
    if (dtype or torch.get_default_dtype()) not in WEIGHT_DTYPES:
        raise TypeError(f"dtype must be a floating-point one; got {dtype}")


def describe_tensor(tensor: Tensor | None) -> str:
    """Return the shape and dtype of a tensor for error messages, "none" without one."""
    return "none" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"


MAX_SUB_CENTERS = 16


def check_sub_centers(sub_centers: object) -> None:
    """Check the number of centers of each class."""
    check_size("sub_centers", sub_centers)
    if isinstance(sub_centers, int) and sub_centers > MAX_SUB_CENTERS:
        raise ValueError(f"sub_centers must be in [1, {MAX_SUB_CENTERS}]; got {sub_centers}")


def check_inputs(
    embeddings: object,
    weight: object,
    target: object,
    sub_centers: int,
    reduction: object,
    ignore_index: object,
    sample_weight: object = None,
) -> None:
    """Check the tensors of ``margin_softmax_loss`` and the arguments beside its options, without reading values."""
    embeddings = _check_tensor("embeddings", embeddings, FLOAT_DTYPES)
    weight = _check_tensor("weight", weight, WEIGHT_DTYPES)
    if embeddings.dim() != 2 or embeddings.shape[1] == 0:
        got = f"{tuple(embeddings.shape)}{_as_rows('embeddings', embeddings, weight)}"
        raise ValueError(f"embeddings must be (N, D) with D >= 1; got {got}")
    if weight.dim() != 2 or weight.shape[1] != embeddings.shape[1]:
        raise ValueError(f"weight must be (C, D={embeddings.shape[1]}); got {tuple(weight.shape)}")
    if weight.shape[0] == 0:
        raise ValueError(f"weight must hold at least one class; got {tuple(weight.shape)}")
    if weight.device != embeddings.device:
        raise ValueError(f"weight must be on embeddings' device {embeddings.device}; got {weight.device}")
    check_target(target, embeddings, ignore_index)
    if weight.shape[0] % sub_centers > 0:
        raise ValueError(f"weight must have a multiple of sub_centers={sub_centers} rows; got {tuple(weight.shape)}")
    check_reduction(reduction)
    if sample_weight is not None:
        check_row_tensor("sample_weight", sample_weight, embeddings)


def check_row_tensor(name: str, values: object, embeddings: Tensor) -> None:
    """Check numbers for each row of embeddings ``(N, D)``: floats ``(N,)`` without a gradient. They are not read."""
    values = _check_tensor(name, values, FLOAT_DTYPES)
    _check_rows(name, values, embeddings)
    if values.requires_grad:
        raise ValueError(
            f"{name} must not require a gradient, as the loss has none by it: pass {name}.detach(), or multiply the "
            "row losses of reduction='none'; got requires_grad=True"
        )


def check_row_factors(name: str, values: Tensor, greatest: float) -> None:
    """Check that each of the factors ``(N,)`` is finite, >= 0 and <= ``greatest``. On a GPU this waits for them."""
    wrong = ~((values >= 0) & (values <= greatest) & values.isfinite())
    if not values.is_meta and wrong.any():
        row = int(wrong.nonzero()[0])
        rule = "finite and >= 0" if greatest == math.inf else f"in [0, {greatest:g}]"
        raise ValueError(f"{name} must be {rule}; got {values[row].item():g} at row {row}")


def check_reduction(reduction: object) -> None:
    """Check the name of a reduction."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}; got {reduction!r}")


def check_written_in_place(name: str, tensor: Tensor) -> None:
    """Check that no two elements of a matrix share memory. The strides themselves may be any."""
    span = 0
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride <= span:
            raise ValueError(
                f"{name} must not share memory between its elements, as it is updated in place: use "
                f"{name}.contiguous(); got strides {tensor.stride()} for {tuple(tensor.shape)}"
            )
        span += (size - 1) * stride


def check_target_range(target: Tensor, num_classes: int, ignore_index: int | None, name: str = "target") -> None:
    """Check that each label (N,) int64 is a class or ``ignore_index``, if not None. This waits for a GPU."""
    wrong = (target < 0) | (target >= num_classes)
    if ignore_index is not None:
        wrong &= target != ignore_index
    if not target.is_meta and wrong.any():
        row = int(wrong.nonzero()[0])
        ignored = "" if ignore_index is None else f" or ignore_index={ignore_index}"
        raise ValueError(f"{name} must be in [0, C={num_classes}){ignored}; got {int(target[row])} at row {row}")


def check_margin_rows(name: str, values: object, target: Tensor) -> None:
    """Check the numbers that a margin returns for each row: ``(N,)``, on the rows' device."""
    _check_of_margin(f"margin's {name} must be", values, target)


def check_margin_output(modified: object, target_cosine: Tensor) -> None:
    """Check a margin's result: ``(N,)``, of the cosines' dtype and device."""
    modified = _check_of_margin("margin must return", modified, target_cosine)
    if modified.dtype != target_cosine.dtype:
        rule = f"margin must return the target cosines' dtype {names((target_cosine.dtype,))}"
        raise TypeError(f"{rule}; got {names((modified.dtype,))}")


def _check_of_margin(must: str, values: object, rows: Tensor) -> Tensor:
    if not isinstance(values, Tensor):
        raise TypeError(f"{must} a torch.Tensor; got {type(values).__name__}")
    if values.shape != rows.shape:
        raise ValueError(f"{must} (N={rows.shape[0]},); got {tuple(values.shape)}")
    if values.device != rows.device:
        raise ValueError(f"{must} a tensor on {rows.device}; got {values.device}")
    return values
