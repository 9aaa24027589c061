"""The Triton stages with sub-centers and changed cosines against plain PyTorch, in the interpreter and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from fused_arcface.backends import triton
from support.cases import Case
from support.negatives_cases import check_stages
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


def check_negatives(setting: NegativesSetting, patch: pytest.MonkeyPatch, device: str = "cpu") -> None:
    """Compare the stages over the classes with plain PyTorch, see :func:`support.negatives_cases.check_stages`."""
    force(Setting(Case(), setting.algorithm, setting.panels), patch)
    classes = 400 if setting.panels else 31
    check_stages(triton, setting.dtype, setting.tolerance, setting.sub_centers, setting.changed, classes, device)
