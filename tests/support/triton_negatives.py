"""The Triton stages with sub-centers and changed cosines against plain PyTorch, in the interpreter and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fused_arcface.backends import torch as plain_torch
from fused_arcface.backends import triton
from fused_arcface.engine.terms import Negatives, RowGradients
from support.cases import Case
from support.triton_cases import Setting, force

FP64, FP32, FP16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class NegativesSetting:
    """An algorithm, the dtype of its operands, and the rule of the negatives."""

    algorithm: str
    dtype: torch.dtype
    tolerance: float
    sub_centers: int
    changed: bool
    panels: bool = False
    """If true, the host's loops take several turns of several tiles."""

    def __str__(self) -> str:
        flags = "".join(f"-{name}" for name in ("changed", "panels") if getattr(self, name))
        return f"{self.algorithm}-{self.dtype}-{self.sub_centers}{flags}".replace("torch.", "")


# Rows in 16 bits enter as they are. The exponentials of the second product are rounded, 2⁻⁹ a term.
_PRECISIONS = (("chunks", FP64, 1e-12), ("chunks", FP32, 2e-5), ("chunks", BF16, 2.0**-7), ("chunks", FP16, 2.0**-7))
NEGATIVES = (
    *(NegativesSetting(*each, *rule) for each in _PRECISIONS for rule in ((1, True), (3, False), (3, True))),
    *(NegativesSetting(*each, 3, True, True) for each in _PRECISIONS[1:3]),
    *(NegativesSetting(*_PRECISIONS[2], 1, True, panels) for panels in (False, True)),
    *(NegativesSetting("flash", BF16, 2.0**-7, 1, True, panels) for panels in (False, True)),
)


def _close(got: Tensor, right: Tensor, tolerance: float, name: str) -> None:
    """Compare with an error relative to the tensor's largest finite number."""
    finite = right[right.isfinite()].abs()
    size = finite.max().item() if finite.numel() else 1.0
    text = f"{name}: error above {tolerance:g} of {size:g}"
    torch.testing.assert_close(got.double(), right, rtol=0, atol=tolerance * size, msg=text)


def check_negatives(setting: NegativesSetting, patch: pytest.MonkeyPatch, device: str = "cpu") -> None:
    """Compare the stages over the classes, with targets here and elsewhere, padding, and equal sub-centers."""
    force(Setting(Case(), setting.algorithm, setting.panels), patch)
    sub_centers, tolerance = setting.sub_centers, setting.tolerance
    rows, classes = 9, 400 if setting.panels else 31
    x = torch.randn(rows, 24).to(device, setting.dtype)
    weight = torch.randn(classes * sub_centers, 24).to(device, setting.dtype)
    weight[sub_centers : 2 * sub_centers] = weight[sub_centers].clone()
    target = torch.randint(len(weight), (rows,), device=device)
    target[::4] = -1
    target[1] = len(weight) - 1
    compute = FP64 if setting.dtype == FP64 else FP32
    count, negatives = None, Negatives(sub_centers)
    if setting.changed:
        count = torch.tensor(len(weight) - sub_centers, device=device)
        threshold = torch.linspace(-0.2, 0.25, rows, dtype=compute, device=device)
        negatives = Negatives(sub_centers, threshold, torch.tensor([1.0, 0.3, 0.01, 0.0], dtype=FP64, device=device))
    exact = x.double(), weight.double(), target

    greatest = triton.class_max(x, weight, target, count, negatives)
    _close(greatest, plain_torch.class_max(*exact, count, negatives), min(tolerance, 1e-5), "class_max")
    for shift in (None, 20.0 * greatest.double()):
        got = triton.class_stats(x, weight, target, 20.0, shift, True, count, negatives)
        right = plain_torch.class_stats(*exact, 20.0, shift, True, count, negatives)
        limits = min(tolerance, 1e-4), min(tolerance, 1e-5), tolerance
        for name, mine, theirs, allowed in zip(("sum", "maximum", "center sum"), got, right, limits, strict=True):
            _close(mine, theirs, allowed, name)

    lse = plain_torch.class_stats(*exact, 20.0, None, False, None, negatives)[0].log()
    coefficients = torch.randn(2, rows, dtype=compute, device=device)
    gradient = triton.weight_grad(x, weight, target, RowGradients(20.0, lse, *coefficients), negatives)
    right = plain_torch.weight_grad(*exact, RowGradients(20.0, lse, *coefficients.double()), negatives)
    _close(gradient, right, tolerance, "weight_grad")
