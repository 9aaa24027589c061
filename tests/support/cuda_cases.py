"""What the CUDA kernels must agree with the fp64 reference over, emulated and on a GPU: cases.py's grid. Used by
test_cuda.py."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

import fused_arcface as fa
from fused_arcface.engine.autograd import negatives_and_target
from fused_arcface.engine.tail import loss_of_rows
from fused_arcface.engine.terms import IGNORED
from fused_arcface.margins import Margin
from support.cases import ARCFACES, GEOMETRIES, LAYOUTS, Case, compare, inputs_on, run


@dataclass(frozen=True)
class Setting:
    """A case, torch's precision of fp32 products, and whether classes come in chunks of one tile."""

    case: Case
    precision: str = "highest"
    chunks: bool = True

    def __str__(self) -> str:
        return f"{self.case}{'' if self.precision == 'highest' else '-tf32'}{'' if self.chunks else '-at-once'}"


FP32, BF16, FP16 = ("float32",) * 2, ("bfloat16",) * 2, ("float16",) * 2
MIXED = (("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32"))


def _case(*shape: int, dtypes: tuple[str, str] = FP32, **options: object) -> Case:
    N, C, D = shape or (9, 97, 33)
    return Case(N, C, D, *dtypes, **options)  # type: ignore[arg-type]


def _holds(dtypes: tuple[str, str], geometry: str) -> bool:
    return not (geometry in ("tiny", "huge") and "float16" in dtypes)  # fp16 cannot hold such numbers


CORE = (
    *(Setting(_case(*s, dtypes=d)) for d in (FP32, BF16, FP16, *MIXED) for s in ((1, 1, 1), (3, 8, 7), (33, 150, 40))),
    *(Setting(_case(dtypes=d, geometry=g)) for d in (FP32, BF16, FP16) for g in GEOMETRIES if _holds(d, g)),
    *(
        Setting(_case(dtypes=d, scale=scale, geometry=geometry))
        for d in (FP32, BF16, FP16)
        for scale, geometry in ((1.0, "random"), (85.0, "collapsed"), (128.0, "random"), (1000.0, "late"))
    ),
    *(Setting(_case(dtypes=d, layout=layout)) for d in (FP32, BF16) for layout in LAYOUTS),
    # Past one tile of rows, with and without chunks; past one tile of columns, and widths that are aligned or not.
    *(Setting(_case(140, 300, 40, dtypes=d), chunks=chunks) for d in (FP32, BF16, FP16) for chunks in (True, False)),
    *(Setting(_case(4, 5, D, dtypes=d)) for d in (FP32, BF16) for D in (512, 513)),
    *(Setting(_case(dtypes=d, geometry=g), "high") for d in (FP32, MIXED[0]) for g in ("random", "late", "huge")),
    *(
        Setting(_case(margin=margin, geometry="late"))
        for margin in (*ARCFACES, fa.SphereFace(4.0), fa.CosFace(0.35), fa.NormSoftmax())
    ),
)

FULL = {
    shape: [
        Setting(_case(*shape, dtypes=dtypes, scale=scale, margin=margin, geometry=geometry, layout=layout), precision)
        for dtypes, scale, geometry in itertools.product((FP32, BF16, FP16, *MIXED), (16.0, 64.0, 128.0), GEOMETRIES)
        if _holds(dtypes, geometry)
        for precision in (("highest",) if dtypes in (BF16, FP16) else ("highest", "high"))
        for margin, layout in ((fa.ArcFace(), "contiguous"), (fa.CombinedMargin(1.2, 0.3, 0.1, "fold"), "transposed"))
    ]
    for shape in ((0, 7, 16), (1, 2, 7), (2, 513, 130), (129, 7, 9), (7, 9, 513))
}


def loss(
    x: Tensor, w: Tensor, target: Tensor, *, margin: Margin, scale: float, reduction: str, return_stats: bool = True
) -> tuple[Tensor, fa.MarginSoftmaxStats]:
    """``fa.margin_softmax_loss`` without its check of the device: emulated kernels take the CPU's tensors."""
    local = torch.ops.fused_arcface.local_target(target, w.shape[0], -100)
    *rows, _ = negatives_and_target(x, w, local, scale, "cuda")
    return loss_of_rows(*rows, local == IGNORED, margin, scale, reduction, "cuda")


def rounding(case: Case, precision: str) -> tuple[float, float, float]:
    """What products may cost a loss and the two gradients, beside what plain PyTorch in the same dtypes does.

    16-bit rows are scaled by powers of two, so their cosines are fp32's; exponentials, and fp16 rows beside them, are
    rounded to bf16 for the second products: 2⁻⁹ a term and a factor. Centers of another dtype beside 16-bit rows are
    rounded to theirs, 2⁻⁹ in bf16 and 2⁻¹² in fp16. tf32 rounds both fp32 operands to 2⁻¹². A logit has such an error
    times the scale, and so has each probability; tf32's second products round as little.
    """
    if case.x_dtype != "float32":
        mixed = case.x_dtype != case.w_dtype
        logit = case.scale * (2.0**-9 if case.x_dtype == "bfloat16" else 2.0**-12) if mixed else 0.0
        return logit, 2.0**-7 + 2 * logit, 2.0**-7 + 2 * logit
    logit = 0.0 if precision == "highest" else case.scale * 2.0**-11
    return logit, 2 * logit, 2 * logit


def check(setting: Setting, device: str, seed: int = 0) -> None:
    inputs = inputs_on(setting.case, device, seed)
    torch.set_float32_matmul_precision(setting.precision)
    try:
        got = run(loss, inputs, margin=setting.case.margin, scale=setting.case.scale)
    finally:
        torch.set_float32_matmul_precision("highest")
    compare(setting.case, inputs, got, rounding(setting.case, setting.precision))
