"""The cases in which the kernels for Hopper must agree with the fp64 reference: the CUDA kernels' grid at D = 512, for
bf16 embeddings. Used by test_hopper.py."""

from __future__ import annotations

import itertools

import fused_arcface as fa
from support.cases import ARCFACES, GEOMETRIES, LAYOUTS, Case, bf16_rounding, compare, inputs_on, run
from support.cuda_cases import loss

PAIRS = (("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "float16"))


def _case(N: int = 9, C: int = 97, pair: tuple[str, str] = PAIRS[0], **options: object) -> Case:
    return Case(N, C, 512, *pair, **options)  # type: ignore[arg-type]


def _holds(case: Case) -> bool:
    return not (case.geometry in ("tiny", "huge") and "float16" in (case.x_dtype, case.w_dtype))


# Blocks of 64 rows on either side, one row more and one less; two tiles and more in a slice; chunks of 256 classes.
SHAPES = ((1, 1), (3, 8), (64, 64), (65, 129), (63, 320), (130, 300))
CORE = tuple(
    filter(
        _holds,
        (
            *(_case(*shape) for shape in SHAPES),
            *(_case(70, 330, pair) for pair in PAIRS[1:]),
            *(_case(geometry=geometry) for geometry in GEOMETRIES),
            *(_case(scale=scale, geometry=g) for scale, g in ((1.0, "random"), (85.0, "collapsed"), (1000.0, "late"))),
            *(_case(layout=layout) for layout in LAYOUTS),
        ),
    )
)
FULL = {
    shape: tuple(
        filter(
            _holds,
            (
                _case(*shape, pair, scale=scale, margin=margin, geometry=geometry, layout=layout)
                for pair, scale, geometry in itertools.product(PAIRS, (16.0, 64.0, 128.0), GEOMETRIES)
                for margin, layout in (
                    (fa.ArcFace(), "contiguous"),
                    (fa.CombinedMargin(1.2, 0.3, 0.1, "fold"), "transposed"),
                    (ARCFACES[-1], "sliced"),
                )
            ),
        )
    )
    for shape in ((1, 7), (2, 513), (129, 66))
}


def check(case: Case, device: str, seed: int = 0) -> None:
    """The loss and both gradients by the backend ``cuda``. 16-bit rows enter a product as they are; centers of another
    dtype are rounded to bf16, and exponentials for the second products."""
    inputs = inputs_on(case, device, seed)
    got = run(loss, inputs, margin=case.margin, scale=case.scale)
    compare(case, inputs, got, bf16_rounding(case))
