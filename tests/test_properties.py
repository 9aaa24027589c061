"""What must hold for any inputs, tried by hypothesis on the fused head."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import GEOMETRIES, LAYOUTS, MARGINS, Case, Inputs, Outcome, check, make_inputs, run

import fused_arcface as fa

# fp64, so that what should be equal is so to 1e-9; sizes around the kernels' tiles.
cases = st.builds(
    Case,
    N=st.integers(1, 40),
    C=st.integers(2, 130),
    D=st.integers(2, 40),
    x_dtype=st.just("float64"),
    w_dtype=st.just("float64"),
    scale=st.floats(1, 200),
    margin=st.sampled_from([margin for margin in MARGINS if getattr(margin, "boundary", "") not in ("hard", "easy")]),
    geometry=st.sampled_from(["random", "late", "ignored", "duplicates"]),
)
seeds = st.integers(0, 2**32 - 1)


def compute(case: Case, inputs: Inputs) -> Outcome:
    return run(fa.margin_softmax_loss, inputs, margin=case.margin, scale=case.scale, backend="cpu")


def assert_close(got: torch.Tensor, right: torch.Tensor, scale: float = 1.0) -> None:
    size = right.abs().max().item() if right.numel() else 0.0
    torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-9 * scale * max(size, 1e-30))


def permutation(size: int, seed: int) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


DTYPES = st.sampled_from(["float32", "bfloat16", "float16", "float64"])
any_case = st.builds(
    dataclasses.replace,
    cases,
    x_dtype=DTYPES,
    w_dtype=DTYPES,
    # The others hold numbers that fp16 does not.
    geometry=st.sampled_from([name for name in GEOMETRIES if name not in ("tiny", "huge")]),
    layout=st.sampled_from(list(LAYOUTS)),
)


@given(case=any_case, seed=seeds)
@pytest.mark.slow
def test_anything_against_fp64(case: Case, seed: int) -> None:
    check(case, "cpu", seed)


@pytest.mark.full
@settings(max_examples=3000, derandomize=False)
@given(case=any_case, seed=seeds)
def test_many_more_against_fp64(case: Case, seed: int) -> None:
    check(case, "cpu", seed)


@given(case=cases, seed=seeds)
def test_order_of_classes_does_not_matter(case: Case, seed: int) -> None:
    inputs = make_inputs(case, seed)
    order = permutation(case.C, seed)
    place = order.argsort()
    target = torch.where(inputs.target == -100, -100, place[inputs.target.clamp(min=0)])
    right, got = compute(case, inputs), compute(case, inputs._replace(weight=inputs.weight[order], target=target))
    assert_close(got.loss, right.loss)
    assert_close(got.d_embeddings, right.d_embeddings)
    assert_close(got.d_weight, right.d_weight[order])


@given(case=cases, seed=seeds)
def test_order_of_rows_does_not_matter(case: Case, seed: int) -> None:
    inputs = make_inputs(case, seed)
    order = permutation(case.N, seed)
    permuted = inputs._replace(
        embeddings=inputs.embeddings[order], target=inputs.target[order], upstream=inputs.upstream[order]
    )
    right, got = compute(case, inputs), compute(case, permuted)
    assert_close(got.loss, right.loss[order])
    assert_close(got.d_embeddings, right.d_embeddings[order])
    assert_close(got.d_weight, right.d_weight)


@given(case=cases, seed=seeds, factor=st.floats(1e-6, 1e6))
def test_norms_do_not_matter(case: Case, seed: int, factor: float) -> None:
    """A row k times as long: the same loss, and a gradient 1/k as large."""
    inputs = make_inputs(case, seed)
    right = compute(case, inputs)
    got = compute(case, inputs._replace(embeddings=factor * inputs.embeddings, weight=inputs.weight / factor))
    assert_close(got.loss, right.loss)
    assert_close(got.d_embeddings * factor, right.d_embeddings)
    assert_close(got.d_weight / factor, right.d_weight)


@given(case=cases, seed=seeds)
def test_gradient_is_orthogonal_to_its_row(case: Case, seed: int) -> None:
    inputs = make_inputs(case, seed)
    got = compute(case, inputs)
    for gradient, row in ((got.d_embeddings, inputs.embeddings), (got.d_weight, inputs.weight)):
        # The terms that the projection takes away are at most scale · |ψ'| / norm.
        terms = case.scale * inputs.upstream.abs().sum() * 4 / fa.margins.SIN_FLOOR
        assert ((gradient * row).sum(1).abs() <= 1e-14 * terms).all()


@given(case=cases, seed=seeds)
def test_losses_are_not_negative_and_reduce_as_said(case: Case, seed: int) -> None:
    x, w, target, _ = make_inputs(case, seed)
    options = {"margin": case.margin, "scale": case.scale, "backend": "cpu"}
    none, total, mean = (
        fa.margin_softmax_loss(x, w, target, reduction=reduction, **options) for reduction in ("none", "sum", "mean")
    )
    counted = int((target != -100).sum())
    assert (none >= 0).all()
    assert_close(none.sum(), total)
    if counted:
        assert_close(mean * counted, total)
    else:
        assert mean.isnan()


@given(case=cases, seed=seeds)
def test_batch_is_the_sum_of_its_parts(case: Case, seed: int) -> None:
    inputs = make_inputs(case, seed)
    whole, cut = compute(case, inputs), case.N // 3
    parts = [
        compute(case, Inputs(*(t if i == 1 else t[rows] for i, t in enumerate(inputs))))
        for rows in (slice(0, cut), slice(cut, None))
    ]
    assert_close(torch.cat([part.loss for part in parts]), whole.loss)
    assert_close(torch.cat([part.d_embeddings for part in parts]), whole.d_embeddings)
    assert_close(parts[0].d_weight + parts[1].d_weight, whole.d_weight, scale=100)


@given(case=cases, seed=seeds)
def test_one_more_class_makes_it_harder(case: Case, seed: int) -> None:
    x, w, target, _ = make_inputs(case, seed)
    options = {"margin": case.margin, "scale": case.scale, "reduction": "none", "backend": "cpu"}
    more = torch.cat([w, torch.ones(1, case.D, dtype=w.dtype)])
    assert (
        fa.margin_softmax_loss(x, more, target, **options)
        >= fa.margin_softmax_loss(x, w, target, **options) * (1 - 1e-12)
    ).all()


@given(case=cases, seed=seeds, low=st.floats(0, 1.5), high=st.floats(0, 1.5))
def test_larger_margin_makes_it_harder(case: Case, seed: int, low: float, high: float) -> None:
    x, w, target, _ = make_inputs(case, seed)
    low, high = sorted((low, high))
    for margin in (fa.CosFace, lambda m: fa.ArcFace(m, "fold"), lambda m: fa.SphereFace(1 + m)):
        easy, hard = (
            fa.margin_softmax_loss(x, w, target, margin=margin(m), scale=case.scale, reduction="none", backend="cpu")
            for m in (low, high)
        )
        assert (hard >= easy * (1 - 1e-9)).all()


@given(case=cases, seed=seeds)
def test_duplicated_batch_has_the_same_mean(case: Case, seed: int) -> None:
    x, w, target, _ = make_inputs(case, seed)
    options = {"margin": case.margin, "scale": case.scale, "backend": "cpu"}
    if (target == -100).all():
        target[0] = 0
    w.requires_grad_()
    once = fa.margin_softmax_loss(x, w, target, **options)
    twice = fa.margin_softmax_loss(x.repeat(2, 1), w, target.repeat(2), **options)
    assert_close(twice.detach(), once.detach())
    assert_close(torch.autograd.grad(twice, w)[0], torch.autograd.grad(once, w)[0], scale=100)


@given(case=cases, seed=seeds)
def test_rotation_does_not_matter(case: Case, seed: int) -> None:
    inputs = make_inputs(case, seed)
    square = torch.randn(case.D, case.D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rotation = torch.linalg.qr(square).Q
    right = compute(case, inputs)
    turned = inputs._replace(embeddings=inputs.embeddings @ rotation, weight=inputs.weight @ rotation)
    got = compute(case, turned)
    torch.testing.assert_close(got.loss, right.loss, rtol=1e-6, atol=1e-9)
