"""The shapes that are measured, and inputs for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One shape: N rows, C classes, D dimensions, dtypes by name (``"float32"``) of embeddings and of class centers."""

    N: int
    C: int
    D: int = 512
    dtype: str = "float32"
    weight_dtype: str = "float32"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def torch_weight_dtype(self) -> torch.dtype:
        return getattr(torch, self.weight_dtype)

    @property
    def weight_bytes(self) -> int:
        """Size of the class centers, and of their gradient."""
        return self.C * self.D * self.torch_weight_dtype.itemsize

    def __str__(self) -> str:
        dtypes = self.dtype if self.dtype == self.weight_dtype else f"{self.dtype} × {self.weight_dtype}"
        return f"N={self.N} C={self.C:_} D={self.D} {dtypes}".replace("_", " ")


PASSES = {"fwd": False, "fwd+bwd": True}
"""The passes that are measured, by a row's ``pass``, and whether they take gradients."""

HEADLINE = Case(256, 100_000)

BF16 = ("bfloat16", "bfloat16")
"""Dtypes of embeddings and class centers, as the last two arguments of :class:`Case`."""
BF16_BESIDE_FP32 = ("bfloat16", "float32")
"""The dtypes under autocast."""
FP32 = ("float32", "float32")

SMALL = tuple(
    Case(*shape)
    for shape in (
        (16, 2, 64),
        (64, 7, 64),
        (32, 100, 128),
        (128, 500, 64),
        (16, 5000, 512),
        (64, 1000, 256),
        (128, 1000, 512),
        (256, 1000, 128),
        (256, 5000, 512),
    )
)
"""Small cases: the time of a call is spent on work that does not grow with the number of logits."""

# Shapes at which the slowest provider takes about a second on two cores.
_CPU_QUICK = (Case(64, 10_000), Case(64, 30_000))
_CPU: dict[str, tuple[Case, ...]] = {
    "quick": _CPU_QUICK,
    "full": (
        *_CPU_QUICK,
        Case(64, 100_000),
        Case(64, 30_000, 512, "float32", "bfloat16"),
        *(Case(N, 30_000) for N in (16, 256)),
        HEADLINE,
        *(Case(HEADLINE.N, HEADLINE.C, HEADLINE.D, *dtypes) for dtypes in (BF16, BF16_BESIDE_FP32)),
    ),
    "small": SMALL,
    "scaling": (
        *(Case(64, C) for C in (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)),
        *(Case(N, 30_000) for N in (16, 256, 1024)),
    ),
}

# On a GPU: batches of a training on several ranks, and the dtypes that training uses.
_GPU_DTYPES = (BF16, BF16_BESIDE_FP32, FP32)
_CUDA_QUICK = tuple(Case(1024, 100_000, 512, *dtypes) for dtypes in _GPU_DTYPES)
_CUDA: dict[str, tuple[Case, ...]] = {
    "quick": _CUDA_QUICK,
    "full": (
        *_CUDA_QUICK,
        *(Case(N, 1_000_000, 512, *dtypes) for dtypes in _GPU_DTYPES for N in (1024, 4096)),
    ),
    "small": SMALL,
    "scaling": (
        *(
            Case(1024, C, 512, *dtypes)
            for dtypes in _GPU_DTYPES
            for C in (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)
        ),
        *(Case(N, 300_000, 512, *BF16) for N in (128, 512, 4096)),
    ),
}

NAMES = ("quick", "full", "small", "scaling")


def cases_named(name: str, device_type: str) -> tuple[Case, ...]:
    """Return the cases of a name in :data:`NAMES` for a type of device, fewest classes first.

    A provider that runs out of memory is then not tried with more classes.

    Raises:
        ValueError: if the name is unknown.

    >>> [str(case) for case in cases_named("quick", "cpu")]
    ['N=64 C=10 000 D=512 float32', 'N=64 C=30 000 D=512 float32']
    """
    if name not in NAMES:
        raise ValueError(f"cases must be one of {', '.join(NAMES)}, start; got {name!r}")
    cases = (_CUDA if device_type == "cuda" else _CPU)[name]
    return tuple(sorted(cases, key=lambda case: (case.C, case.N)))


class Inputs(NamedTuple):
    """The tensors that every provider is given. Leaves for autograd are made from them."""

    embeddings: Tensor
    """(N, D)"""
    weight: Tensor
    """(C, D)"""
    target: Tensor
    """(N,) int64"""


# On a CPU at most this many elements are drawn, and then repeated: drawing 10⁷ × 512 takes a minute.
_DRAWN_ELEMENTS = 2**28
REPEATED = 65536
"""Number of class centers that are drawn and then repeated if only memory is measured."""


@torch.no_grad()
def draw_centers(weight: Tensor, rows: int, generator: torch.Generator | None = None) -> None:
    """Fill class centers (C, D) with N(0, 0.01²). The first ``rows`` are drawn, the others repeat them."""
    weight[:rows].normal_(std=0.01, generator=generator)
    for start in range(rows, weight.shape[0], rows):
        stop = min(start + rows, weight.shape[0])
        weight[start:stop] = weight[: stop - start]


def make_inputs(case: Case, device: torch.device | str, distinct: bool = True) -> Inputs:
    """Make inputs as in mid-training: embeddings at about 53° from their class center, norms between 5 and 25.

    Random embeddings would all be at 90°. There no margin reaches past π, and every provider agrees. On one type of
    device a case always has the same inputs. If ``distinct`` is false, :data:`REPEATED` of the class centers are drawn,
    and the others repeat them.
    """
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.empty(case.C, case.D, dtype=case.torch_weight_dtype, device=device)
    most = max(1, _DRAWN_ELEMENTS // case.D) if device.type == "cpu" else case.C
    draw_centers(weight, most if distinct else REPEATED, generator)
    target = torch.randint(case.C, (case.N,), device=device, generator=generator)
    noise = torch.randn(case.N, case.D, device=device, generator=generator)
    direction = 0.6 * F.normalize(weight[target].float()) + 0.8 * F.normalize(noise)
    norm = torch.empty(case.N, 1, device=device).uniform_(5, 25, generator=generator)
    return Inputs((direction * norm).to(case.torch_dtype), weight, target)
