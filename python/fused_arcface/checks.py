"""Checks of what users pass in, before anything is computed. An error names the argument, the rule and what came."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGER_DTYPES = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
)
REDUCTIONS = ("mean", "sum", "none")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _check_tensor(name: str, tensor: object, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must have one of the dtypes {_names(dtypes)}; got {_names((tensor.dtype,))}")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor; got layout {tensor.layout}")


def check_embeddings(embeddings: object, weight: Tensor) -> None:
    """Embeddings ``(N, D)`` against class centres ``(C, D)``; the message calls the centres by the rule they set."""
    _check_tensor("embeddings", embeddings, FLOAT_DTYPES)
    assert isinstance(embeddings, Tensor)
    if embeddings.dim() != 2 or embeddings.shape[1] != weight.shape[1]:
        raise ValueError(f"embeddings must be (N, D={weight.shape[1]}); got {tuple(embeddings.shape)}")
    if embeddings.device != weight.device:
        raise ValueError(f"embeddings must be on weight's device {weight.device}; got {embeddings.device}")


def check_scale(scale: object) -> None:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number; got {type(scale).__name__}")
    if not 0 < scale < math.inf:  # not math.isfinite: under torch.compile a scale may be symbolic
        raise ValueError(f"scale must be finite and > 0; got {scale}")


def check_loss_weight(loss_weight: object) -> None:
    if isinstance(loss_weight, bool) or not isinstance(loss_weight, (int, float)):
        raise TypeError(f"loss_weight must be a number; got {type(loss_weight).__name__}")
    if not 0 <= loss_weight < math.inf:
        raise ValueError(f"loss_weight must be finite and >= 0; got {loss_weight}")


def check_sample_rate(sample_rate: object) -> None:
    if isinstance(sample_rate, bool) or not isinstance(sample_rate, (int, float)):
        raise TypeError(f"sample_rate must be a number; got {type(sample_rate).__name__}")
    if not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate must be in (0, 1]; got {sample_rate}")


def check_target(target: object, embeddings: Tensor, ignore_index: object) -> None:
    """Labels ``(N,)`` of embeddings ``(N, D)``, without reading them."""
    _check_tensor("target", target, INTEGER_DTYPES)
    assert isinstance(target, Tensor)
    if target.shape != embeddings.shape[:1]:
        raise ValueError(f"target must be (N={embeddings.shape[0]},); got {tuple(target.shape)}")
    if target.device != embeddings.device:
        raise ValueError(f"target must be on embeddings' device {embeddings.device}; got {target.device}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int; got {type(ignore_index).__name__}")
    if not -(1 << 63) <= ignore_index < 1 << 63:
        raise ValueError(f"ignore_index must be in [-2^63, 2^63); got {ignore_index}")


def check_margin(margin: object) -> None:
    if isinstance(margin, type):
        name = margin.__name__
        raise TypeError(f"margin must be an instance, not the class {name}: write {name}(); got the class")
    if not callable(margin):
        raise TypeError(f"margin must be a margin of fused_arcface or a callable; got {type(margin).__name__}")


def check_size(name: str, value: object, least: int = 1) -> int:
    """The size as an int: it may come as one of NumPy's, as ``labels.max() + 1`` does."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int; got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}; got {value}")
    return int(value)


MAX_SUB_CENTERS = 16


def check_sub_centers(sub_centers: object) -> None:
    check_size("sub_centers", sub_centers)
    if isinstance(sub_centers, int) and sub_centers > MAX_SUB_CENTERS:
        raise ValueError(f"sub_centers must be in [1, {MAX_SUB_CENTERS}]; got {sub_centers}")


def check_label_smoothing(label_smoothing: object, margin: object, sub_centers: int) -> None:
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, (int, float)):
        raise TypeError(f"label_smoothing must be a number; got {type(label_smoothing).__name__}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1]; got {label_smoothing}")
    if label_smoothing > 0 and (sub_centers > 1 or hasattr(margin, "modulate")):
        what = f"sub_centers={sub_centers}" if sub_centers > 1 else type(margin).__name__
        raise ValueError(
            f"label_smoothing must be 0 with {what}: a row's logits are then no linear function of the class centres, "
            f"whose sum it is made of; got {label_smoothing}"
        )


def check_inputs(
    embeddings: object,
    weight: object,
    target: object,
    margin: object,
    scale: object,
    reduction: object,
    ignore_index: object,
    sub_centers: object = 1,
    label_smoothing: object = 0.0,
) -> None:
    """Everything about the arguments of ``margin_softmax_loss`` that can be told without reading a tensor's values."""
    _check_tensor("embeddings", embeddings, FLOAT_DTYPES)
    _check_tensor("weight", weight, FLOAT_DTYPES)
    _check_tensor("target", target, INTEGER_DTYPES)
    assert isinstance(embeddings, Tensor) and isinstance(weight, Tensor) and isinstance(target, Tensor)
    if embeddings.dim() != 2 or embeddings.shape[1] == 0:
        raise ValueError(f"embeddings must be (N, D) with D >= 1; got {tuple(embeddings.shape)}")
    if weight.dim() != 2 or weight.shape[1] != embeddings.shape[1]:
        raise ValueError(f"weight must be (C, D={embeddings.shape[1]}); got {tuple(weight.shape)}")
    if weight.shape[0] == 0:
        raise ValueError(f"weight must hold at least one class; got {tuple(weight.shape)}")
    if weight.device != embeddings.device:
        raise ValueError(f"weight must be on embeddings' device {embeddings.device}; got {weight.device}")
    check_target(target, embeddings, ignore_index)
    check_margin(margin)
    check_scale(scale)
    check_sub_centers(sub_centers)
    assert isinstance(sub_centers, int)
    if weight.shape[0] % sub_centers > 0:
        raise ValueError(f"weight must have a multiple of sub_centers={sub_centers} rows; got {tuple(weight.shape)}")
    check_label_smoothing(label_smoothing, margin, sub_centers)
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


def check_target_range(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Labels ``(N,)`` int64: each a class or ``ignore_index``. Reads the values: on a GPU this waits for it."""
    wrong = ((target < 0) | (target >= num_classes)) & (target != ignore_index)
    if not target.is_meta and wrong.any():
        row = int(wrong.nonzero()[0])
        rule = f"target must be in [0, C={num_classes}) or ignore_index={ignore_index}"
        raise ValueError(f"{rule}; got {int(target[row])} at row {row}")


def check_margin_rows(name: str, values: object, target: Tensor) -> None:
    """What a margin gives for each row besides: ``(N,)``, on the rows' device."""
    if not isinstance(values, Tensor):
        raise TypeError(f"margin's {name} must be a torch.Tensor; got {type(values).__name__}")
    if values.shape != target.shape:
        raise ValueError(f"margin's {name} must be (N={target.shape[0]},); got {tuple(values.shape)}")
    if values.device != target.device:
        raise ValueError(f"margin's {name} must be on {target.device}; got {values.device}")


def check_margin_output(modified: object, target_cosine: Tensor) -> None:
    """A margin's result: ``(N,)``, of the cosines' dtype and device."""
    if not isinstance(modified, Tensor):
        raise TypeError(f"margin must return a torch.Tensor; got {type(modified).__name__}")
    if modified.shape != target_cosine.shape:
        raise ValueError(f"margin must return (N={target_cosine.shape[0]},); got {tuple(modified.shape)}")
    if modified.dtype != target_cosine.dtype:
        rule = f"margin must return the target cosines' dtype {_names((target_cosine.dtype,))}"
        raise TypeError(f"{rule}; got {_names((modified.dtype,))}")
    if modified.device != target_cosine.device:
        raise ValueError(f"margin must return a tensor on {target_cosine.device}; got {modified.device}")
