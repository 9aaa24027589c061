"""The cases over which the Triton kernels must agree with the fp64 reference, in the interpreter and on a GPU.

Used by test_triton_interpreted*.py (CPU tensors, TRITON_INTERPRET=1) and by test_triton.py (a GPU).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import triton
from packaging.version import Version  # pytest needs it too
from torch import Tensor

import fused_arcface as fa
from fused_arcface import backends
from fused_arcface.engine.autograd import negatives_and_target
from fused_arcface.engine.tail import loss_of_rows
from fused_arcface.engine.terms import IGNORED
from fused_arcface.margins import Margin
from support.cases import ARCFACES, GEOMETRIES, LAYOUTS, Case, compare, inputs_on, run

INTERPRETED = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"),
        reason="Triton's interpreter before 3.7 makes numbers of arrays, which NumPy 2.4 refuses: "
        f"Triton {triton.__version__} and NumPy {np.__version__} are here",
    ),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),
]
"""The marks of a module whose tests run in the interpreter."""


@dataclass(frozen=True)
class Setting:
    """A case, the algorithm that is to compute it, and whether the host's loops take several turns for it."""

    case: Case
    algorithm: str = "chunks"
    panels: bool = False

    def __str__(self) -> str:
        return f"{self.algorithm}{'-panels' if self.panels else ''}-{self.case}"


def _case(*shape: int, dtypes: tuple[str, str], **options: object) -> Case:
    N, C, D = shape or (9, 97, 33)
    return Case(N, C, D, *dtypes, **options)  # type: ignore[arg-type]


BF16 = ("bfloat16", "bfloat16")
# Each runs kernels of its own: products in the library, in the kernel, with bf16 copies; a copy of the centers in bf16.
_CHUNKS = (("float32", "float32"), BF16, ("float16", "float16"), ("bfloat16", "float32"), ("float64", "float64"))
_FLASH = (BF16, ("bfloat16", "float32"))
_BOTH = (*(("chunks", dtypes) for dtypes in _CHUNKS), *(("flash", dtypes) for dtypes in _FLASH))
_NO_TINY = ("tiny", "huge")  # fp16 cannot hold such numbers

CORE = (
    *(
        Setting(_case(*shape, dtypes=dtypes), algorithm)
        for algorithm, dtypes in _BOTH
        for shape in ((1, 1, 1), (3, 8, 7), (33, 95, 40))
    ),
    *(
        Setting(_case(dtypes=dtypes, geometry=geometry), algorithm)
        for algorithm, dtypes in (*_BOTH[:3], _BOTH[5])
        for geometry in GEOMETRIES
        if not (geometry in _NO_TINY and "float16" in dtypes)
    ),
    *(
        Setting(_case(dtypes=dtypes, scale=scale, geometry=geometry), algorithm)
        for algorithm, dtypes in (_BOTH[0], _BOTH[1], _BOTH[5])
        for scale, geometry in ((1.0, "random"), (85.0, "collapsed"), (1000.0, "late"))
    ),
    *(Setting(_case(dtypes=dtypes, layout=layout), a) for a, dtypes in (_BOTH[1], _BOTH[5]) for layout in LAYOUTS),
    # Past one tile of rows and of classes.
    *(Setting(_case(140, 600, 40, dtypes=dtypes), algorithm, True) for algorithm, dtypes in _BOTH[:6]),
    *(Setting(_case(4, 5, 513, dtypes=dtypes)) for dtypes in (("float32", "float32"), BF16)),
    Setting(_case(4, 5, 512, dtypes=BF16), "flash"),
    *(Setting(_case(dtypes=dtypes)) for dtypes in (("float32", "bfloat16"), ("float16", "bfloat16"))),
    *(
        Setting(Case(margin=margin, geometry="late"))
        for margin in (*ARCFACES, fa.SphereFace(4.0), fa.CosFace(0.35), fa.NormSoftmax())
    ),
)

FULL = tuple(
    Setting(_case(*shape, dtypes=dtypes, scale=scale, margin=margin, geometry=geometry, layout=layout), algorithm, True)
    for algorithm, dtypes in _BOTH
    for shape, scale, geometry in itertools.product(((2, 513, 130), (129, 7, 9)), (16.0, 64.0, 128.0), GEOMETRIES)
    if not (geometry in _NO_TINY and "float16" in dtypes)
    for margin, layout in ((fa.CombinedMargin(1.2, 0.3, 0.1, "fold"), "transposed"),)
)


def loss(
    x: Tensor, w: Tensor, target: Tensor, *, margin: Margin, scale: float, reduction: str, return_stats: bool = True
) -> tuple[Tensor, fa.MarginSoftmaxStats]:
    """``fa.margin_softmax_loss`` without its check of the device: interpreted kernels take the CPU's tensors."""
    local = torch.ops.fused_arcface.local_target(target, w.shape[0], -100)
    *rows, _ = negatives_and_target(x, w, local, scale, "triton")
    return loss_of_rows(*rows, local == IGNORED, margin, scale, reduction, "triton")


def rounding(case: Case) -> tuple[float, float, float]:
    """What 16-bit operands may cost a loss and the two gradients, beside what plain PyTorch in the same dtypes does.

    Rows in 16 bits are scaled by powers of two, so their cosines are fp32's, unless centers are rounded to the
    embeddings' dtype: by 2⁻⁹ (bf16) or 2⁻¹² (fp16), which a logit has times the scale, and so has each probability.
    The exponentials of the second products are rounded to bf16, 2⁻⁹ a term, and fp16 rows there as well.
    """
    if case.x_dtype in ("float32", "float64") or case.fp64:
        return 0.0, 0.0, 0.0
    cosine = {"bfloat16": 2.0**-9, "float16": 2.0**-12}[case.x_dtype]
    logit = 0.0 if case.w_dtype == case.x_dtype else case.scale * cosine
    return logit, 2 * logit + 2.0**-7, 2 * logit + 2.0**-7


def check(setting: Setting, device: str = "cpu") -> None:
    inputs = inputs_on(setting.case, device)
    got = run(loss, inputs, margin=setting.case.margin, scale=setting.case.scale)
    compare(setting.case, inputs, got, rounding(setting.case))


def force(setting: Setting, patch: pytest.MonkeyPatch) -> None:
    """Makes its algorithm the one that runs, and its panels one tile wide with blocks of 64 rows if it asks for it."""
    from fused_arcface.backends.triton import chunks, configs, flash

    patch.setenv("FUSED_ARCFACE_TRITON_ALGORITHM", setting.algorithm)
    if setting.panels:
        small = configs.PanelConfig(exponential_bytes=0, center_bytes=0, max_rows=64)
        patch.setattr(chunks, "CHUNKS", small)
        patch.setattr(flash, "FLASH_PANEL", small)
        patch.setattr(flash, "FLASH_STORED_PANEL", small)


@contextlib.contextmanager
def on_the_cpu(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The public names take ``backend="triton"`` for tensors on the CPU, and torch.empty gives NaN."""
    patch.setattr(backends.load("triton"), "unavailable", lambda *_: None)
    row = dataclasses.replace(backends.registry._ROWS["triton"], device_type="cpu")
    patch.setitem(backends.registry._ROWS, "triton", row)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
