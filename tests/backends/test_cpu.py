"""The compiled kernels, on each instruction set that this machine has, against the fp64 reference."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support.cases import ARCFACES, GEOMETRIES, LAYOUTS, MARGINS, Case, Inputs, check, make_inputs, named, run

import fused_arcface as fa

pytestmark = pytest.mark.usefixtures("isa", "poison")

DTYPES = (
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("float64", "float64"),
    ("bfloat16", "float32"),
    ("float32", "float16"),
    ("float16", "float64"),
)
SCALES = (1.0, 16.0, 85.0, 87.0, 128.0, 1000.0)
# Class blocks are 96 wide, row blocks 128, tiles 6 or 8 by up to 32, depth blocks 128.
SHAPES = (
    (0, 7, 16),
    (1, 1, 1),
    (1, 2, 7),
    (3, 8, 512),
    (7, 9, 513),
    (33, 95, 7),
    (64, 96, 33),
    (129, 97, 64),
    (17, 193, 512),
    (2, 1000, 1),
)
CORE = (
    *(Case(*shape, *dtypes) for shape in SHAPES for dtypes in DTYPES),
    *(Case(geometry=geometry, x_dtype=d, w_dtype=d) for geometry in GEOMETRIES for d in ("float32", "float64")),
    *(Case(geometry=geometry, x_dtype="bfloat16") for geometry in GEOMETRIES if geometry != "random"),
    *(Case(geometry=g, x_dtype="float16", w_dtype="float16") for g in GEOMETRIES if g not in ("tiny", "huge")),
    *(
        Case(geometry=g, margin=m)
        for g in ("aligned", "opposed")
        for m in (fa.NormSoftmax(), fa.CosFace(), ARCFACES[2])
    ),
    *(
        Case(scale=scale, geometry=geometry, x_dtype=dtype, w_dtype=dtype)
        for scale in SCALES
        for geometry in ("random", "late", "collapsed")
        for dtype in ("float32", "float64")
    ),
    # Few classes: here sums still need no shift, and exp(-scale) is close to the least fp32 number.
    *(
        Case(C=c, scale=scale, geometry="collapsed", margin=fa.NormSoftmax())
        for c, scale in ((7, 64.0), (7, 80.0), (7, 85.0), (2, 87.0))
    ),
    *(Case(layout=layout, w_dtype=dtype) for layout in LAYOUTS for dtype in ("float32", "float64", "bfloat16")),
)
FULL = {
    shape: [
        Case(*shape, *dtypes, scale, margin, geometry, layout)
        for dtypes, scale, geometry in itertools.product(DTYPES, (*SCALES, 64.0), GEOMETRIES)
        # fp16 cannot hold such numbers.
        if not (geometry in ("tiny", "huge") and "float16" in dtypes)
        for margin, layout in ((fa.ArcFace(), "contiguous"), (fa.CombinedMargin(1.2, 0.3, 0.1, "fold"), "transposed"))
    ]
    for shape in (*SHAPES, (150, 500, 40), (300, 96, 16))
}


@pytest.mark.parametrize("case", CORE, ids=str)
def test_against_fp64(case: Case) -> None:
    check(case, "cpu")


@pytest.mark.parametrize("margin", MARGINS, ids=named)
def test_every_margin(margin: object) -> None:
    check(Case(margin=margin, geometry="late"), "cpu")


@pytest.mark.full
@pytest.mark.parametrize("shape", FULL, ids=str)
def test_against_fp64_everywhere(shape: tuple[int, int, int]) -> None:
    for case in FULL[shape]:
        check(case, "cpu", seed=1)


def test_stride_zero_gradient_and_embeddings() -> None:
    inputs = make_inputs(Case())
    same = inputs._replace(embeddings=inputs.embeddings[:1].expand(9, -1), upstream=torch.tensor(0.5).expand(9))
    plain = inputs._replace(embeddings=same.embeddings.contiguous(), upstream=same.upstream.contiguous())
    got, right = (run(fa.margin_softmax_loss, each, backend="cpu") for each in (same, plain))
    for name in ("loss", "d_embeddings", "d_weight"):
        assert torch.equal(getattr(got, name), getattr(right, name)), name


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 4e-7), (torch.float64, 2e-15)], ids=["fp32", "fp64"])
def test_exponentials(dtype: torch.dtype, allowed: float) -> None:
    """Of one negative at cosine ±1, over every fraction of a power of two."""
    for scale in torch.linspace(0.01, 1.4, 140, dtype=torch.float64).tolist():
        x, w = torch.tensor([[1.0], [-1.0]], dtype=dtype), torch.ones(1, 1, dtype=dtype)
        total, _, _ = torch.ops.fused_arcface.class_stats(x, w, torch.tensor([-1, -1]), scale, None, False, "cpu")
        for got, right in zip(total.tolist(), (math.exp(scale), math.exp(-scale)), strict=True):
            assert got == pytest.approx(right, rel=allowed)


def test_a_class_of_no_probability_gets_no_gradient() -> None:
    """exp(-1500) is 0, not the least number there is."""
    x, w = torch.tensor([[1.0, 0.5]]), torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.5]])
    w.requires_grad_()
    loss = fa.margin_softmax_loss(x, w, torch.tensor([0]), scale=1000.0, backend="cpu")
    assert not torch.autograd.grad(loss, w)[0][2].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1e3, 1.0], ids=["normal", "subnormal in fp16"])
def test_16_bit_gradients_are_rounded_to_nearest_even(size: float, dtype: torch.dtype) -> None:
    """The fp32 gradient by the same centers, stored: half a million numbers, ties among them."""
    x, w = torch.randn(4, 512), torch.randn(1000, 512).to(dtype)
    gradients = []
    for centers in (w, w.float()):
        centers.requires_grad_()
        loss = fa.margin_softmax_loss(x, centers, torch.arange(4), scale=4.0, reduction="sum", backend="cpu")
        gradients.append(torch.autograd.grad(loss, centers, torch.tensor(size))[0])
    assert torch.equal(gradients[0], gradients[1].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_of_every_dtype(bad: float, dtype: torch.dtype) -> None:
    inputs = make_inputs(Case())
    for name in ("embeddings", "weight"):
        spoilt = getattr(inputs, name).to(dtype)
        spoilt[5, 3] = bad
        got = run(fa.margin_softmax_loss, inputs._replace(**{name: spoilt}), backend="cpu")
        assert got.loss[5].isnan() and got.d_embeddings[5].isnan().all() and got.d_weight.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_nan_of_any_bits_stays_nan_in_16_bits(dtype: torch.dtype) -> None:
    """The NaN that is all ones: rounded like a number it would become -0."""
    x, w, target, _ = make_inputs(Case(w_dtype=str(dtype).removeprefix("torch.")))
    x[:] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    w.requires_grad_()
    (gradient,) = torch.autograd.grad(fa.margin_softmax_loss(x, w, target, backend="cpu"), w)
    assert gradient.isnan().all()


@pytest.mark.parametrize("wanted", [1e-6, 1e-8, 1e-12, 1e-20, 1e-30])
def test_tiny_losses(wanted: float) -> None:
    """ln(exp z + Z) - z would be off by 11 % for the first and 0 for the others."""
    # A target at cosine 1 and one negative at 0: the loss is ln(1 + exp(-s)).
    x, w, scale = torch.tensor([[1.0, 0.0]]), torch.eye(2), -math.log(math.expm1(wanted))
    loss = fa.margin_softmax_loss(
        x, w, torch.tensor([0]), margin=fa.NormSoftmax(), scale=scale, reduction="none", backend="cpu"
    )
    assert loss.item() == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("scale", [128.0, 500.3, 611.1, 777.7, 888.8, 999.7])
def test_probabilities_at_a_large_scale(scale: float) -> None:
    """Cosines that fp32 holds exactly: what rounding offsets near s·cos would cost, 3e-5, must not be lost."""
    x, flipped = torch.ones(1, 16), 1 - 2 * torch.eye(16)
    w = torch.cat([-x, flipped[:2], flipped[2:3] * flipped[3:4]])  # cosines -1, 7/8, 7/8 and, of no weight, 3/4
    inputs = Inputs(x, w, torch.tensor([0]), torch.ones(1))
    options = {"margin": fa.NormSoftmax(), "scale": scale}
    got = run(fa.margin_softmax_loss, inputs, backend="cpu", **options)
    right = run(fa.reference.margin_softmax_loss, inputs._replace(embeddings=x.double(), weight=w.double()), **options)
    for name in ("d_embeddings", "d_weight"):
        mine, theirs = getattr(got, name), getattr(right, name)
        assert (mine - theirs).abs().max() <= 2e-6 * theirs.abs().max(), name


def test_all_negatives_opposite_at_128() -> None:
    """exp(-128) is no fp32 number; the loss is ln(C - 1) for a target that is opposite too."""
    x, w = torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[-1.0, 0.0]] * 101)
    loss = fa.margin_softmax_loss(
        x, w, torch.tensor([0, 1, 100]), margin=fa.NormSoftmax(), scale=128.0, reduction="none", backend="cpu"
    )
    torch.testing.assert_close(loss, torch.full((3,), 101.0).log(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zero_rows_get_finite_gradients(dtype: torch.dtype) -> None:
    x, w = torch.ones(2, 8, dtype=dtype), torch.eye(8, dtype=dtype)
    x[0] = 0
    w[3] = 0
    x.requires_grad_()
    w.requires_grad_()
    fa.margin_softmax_loss(x, w, torch.tensor([1, 3]), backend="cpu").backward()
    for gradient, zero_row in ((x.grad, 0), (w.grad, 3)):
        assert gradient.isfinite().all() and gradient[zero_row].abs().max() > 1e4
