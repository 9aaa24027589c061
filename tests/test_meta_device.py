"""Steps on the meta device, which stands in for a GPU: it is not the CPU, and none of its values can be read.

A step that waits for a GPU, or that mixes tensors of the host with those of a GPU, is an error here. No kernel runs.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fused_arcface as fa
from fused_arcface.engine.loss_factor import RefusedFactors
from fused_arcface.margins import registry

N, C, D = 8, 30, 16


class _NoNumbers(TorchFunctionMode):
    """Raises where numbers of Python become a tensor on a device: the host waits for that copy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ("as_tensor", "tensor", "new_tensor") and result.device.type != "cpu":
            assert isinstance(args[-1], torch.Tensor), f"{name} waits for the device"
        return result


class _NoCopies(TorchDispatchMode):
    """Raises where a tensor of the host is copied to the device, but for numbers beside which an operator runs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            assert args[-1].device.type == result.device.type, f"{func} waits for the device"
        return result


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    with _NoNumbers(), _NoCopies():
        yield


def _inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.empty(N, D, dtype=dtype, device="meta", requires_grad=True)
    w = torch.empty(C, D, dtype=dtype, device="meta", requires_grad=True)
    return x, w, torch.empty(N, dtype=torch.int64, device="meta")


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: torch.as_tensor(0.5, device=x.device),
        lambda x: torch.tensor([0.5], device=x.device),
        lambda x: x.new_tensor([0.5]),
        lambda x: torch.zeros(3).to(x.device),
        lambda x: x.copy_(torch.zeros(3)),
        lambda x: x + torch.zeros(3),
        lambda x: x.sum().item(),
        lambda x: bool(x[0] > 0),
        lambda x: x[x > 0],
    ],
)
def test_what_waits_for_a_device_is_an_error(waits: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), no_waiting():
        waits(torch.empty(3, device="meta"))


def test_numbers_as_they_are_made_on_a_device_are_none() -> None:
    x = torch.empty(3, device="meta")
    with no_waiting():
        assert (x * torch.full((), 0.5, device=x.device) + 1.0).device == x.device


@pytest.mark.parametrize("margin", registry.examples(), ids=str)
def test_every_margin(margin: Any) -> None:
    x, w, target = _inputs()
    margin = margin.to("meta") if isinstance(margin, torch.nn.Module) else margin
    fa.margin_softmax_loss(x, w, target, margin=margin, backend="torch")  # tables are copied once and kept
    with no_waiting():
        loss, stats = fa.margin_softmax_loss(x, w, target, margin=margin, backend="torch", return_stats=True)
        loss.backward()
    assert x.grad is not None and {each.device.type for each in (loss, *stats, x.grad)} == {"meta"}


OPTIONS: list[dict[str, Any]] = [
    {"scale": 1000.0},
    {"scale": fa.AdaCos()},
    {"label_smoothing": 0.1},
    {"sub_centers": 3},
    {"reduction": "none"},
    {"reduction": "sum", "sample_weight": torch.empty(N, device="meta")},
    {"sub_centers": 3, "margin": fa.CurricularFace(), "scale": 128.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option(options: dict[str, Any]) -> None:
    x, w, target = _inputs(torch.bfloat16)
    options = {name: each.to("meta") if isinstance(each, torch.nn.Module) else each for name, each in options.items()}
    with no_waiting():
        fa.margin_softmax_loss(x, w, target, backend="torch", **options).sum().backward()


def test_mixed_labels() -> None:
    x, w, target = _inputs()
    with no_waiting():
        mixed = (target, target, torch.empty(N, device="meta"))
        fa.margin_softmax_loss(x, w, mixed, backend="torch").backward()
        fa.margin_softmax_loss(x, w, (target, target, 0.3), backend="torch").backward()


@pytest.mark.parametrize(
    ("rate", "momentum_dtype"),
    # Without CenterSGD a sampled step has a sparse gradient, whose size is waited for.
    [(1.0, None), *itertools.product((1.0, 0.1), (torch.float32, torch.int8))],
)
@pytest.mark.parametrize("margin", [fa.ArcFace(), fa.AdaFace(), fa.CurricularFace()], ids=str)
def test_steps_of_partial_fc(
    margin: Any, rate: float, momentum_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RefusedFactors, "see", lambda self, factor: None)  # read when the GPU has got there
    recipe = None if momentum_dtype is None else fa.CenterSGD(0.1, momentum_dtype=momentum_dtype)
    head = fa.PartialFC(D, C, margin=margin, sample_rate=rate, center_optimizer=recipe, device="meta", backend="torch")
    x, _, target = _inputs()
    with no_waiting():
        loss, _ = head(x, target, return_stats=True)
        loss.backward()
