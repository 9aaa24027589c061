"""The functional head: statistics, labels, what a NaN reaches, autocast."""

from __future__ import annotations

import math

import pytest
import torch
from support import scalar
from support.cases import BACKENDS, MARGINS, Case, Inputs, make_inputs, named, run

import fused_arcface as fa

FUNCTIONS = {
    "reference": fa.reference.margin_softmax_loss,
    "fused": lambda *args, **options: fa.margin_softmax_loss(*args, backend="cpu", **options),
    "fused on reference": lambda *args, **options: fa.margin_softmax_loss(*args, backend="torch", **options),
}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


@every_function
@pytest.mark.parametrize("scale", [16.0, 128.0])
@pytest.mark.parametrize("geometry", ["late", "aligned"])
def test_stats_by_brute_force(function: object, geometry: str, scale: float) -> None:
    margin = fa.CombinedMargin(1.1, 0.3, 0.1)
    case = Case(N=24, C=7, D=5, geometry=geometry, x_dtype="float64", w_dtype="float64")
    x, w, target, _ = make_inputs(case)
    x[1], x[2] = w[(target[1] + 1) % 7], 0.3 * x[2] - 5 * w[target[2]]  # rows that are not classified correctly
    target[5::6] = -100
    loss, stats = function(x, w, target, margin=margin, scale=scale, reduction="none", return_stats=True)
    assert isinstance(stats, fa.MarginSoftmaxStats)
    assert stats._fields == ("loss", "lse", "target_cosine", "correct")
    assert torch.equal(loss, stats.loss)
    hits = []
    for i, y in enumerate(target.tolist()):
        assert stats.loss[i].shape == stats.lse[i].shape == stats.target_cosine[i].shape == stats.correct[i].shape == ()
        if y == -100:
            assert stats.loss[i] == 0 and not stats.correct[i]
            continue
        cosines = [scalar.cosine(x[i].tolist(), row) for row in w.tolist()]
        logits = [scale * c for c in cosines]
        logits[y] = scale * scalar.value(margin, cosines[y])
        lse = max(logits) + math.log(math.fsum(math.exp(z - max(logits)) for z in logits))
        allowed = 1e-6 if geometry == "aligned" else 1e-11  # an angle of 0 is known to 2e-8
        assert stats.lse[i].item() == pytest.approx(lse, abs=scale * allowed, rel=1e-12)
        assert stats.target_cosine[i].item() == pytest.approx(cosines[y], abs=1e-14)
        hits.append(cosines[y] > max(c for j, c in enumerate(cosines) if j != y))
        assert stats.correct[i].item() == hits[-1]
    assert stats.correct.dtype == torch.bool and any(hits) and not all(hits)
    assert not any(field.requires_grad for field in stats)


@every_function
def test_a_tie_is_not_correct(function: object) -> None:
    x, w = torch.tensor([[1.0, 0.0]] * 2), torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    _, stats = function(x, w, torch.tensor([0, 1]), return_stats=True)
    assert stats.correct.tolist() == [False, False]


@every_function
def test_an_ignored_row_is_not_correct(function: object) -> None:
    """Not even one that is far from all classes, nor one whose label is a class."""
    x, w = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([[-1.0, 0.0], [-1.0, 0.5]])
    for label in (-100, 0):
        _, stats = function(x, w, torch.tensor([label] * 2), ignore_index=label, return_stats=True)
        assert stats.correct.tolist() == [False, False] and stats.loss.tolist() == [0, 0]


@every_function
def test_stats_change_neither_loss_nor_gradient(function: object) -> None:
    x, w, target, _ = make_inputs(Case())
    w.requires_grad_()
    with_stats, _ = function(x, w, target, return_stats=True)
    without = function(x, w, target)
    assert torch.equal(with_stats, without)
    assert torch.equal(*(torch.autograd.grad(loss, w)[0] for loss in (with_stats, without)))


@every_function
@pytest.mark.parametrize(
    "dtype",
    [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)],
    ids=str,
)
def test_labels_of_any_integer_dtype(function: object, dtype: torch.dtype) -> None:
    x, w, target, _ = make_inputs(Case())
    ignore_index = int(target[0])
    loss = function(x, w, target.to(dtype), reduction="none", ignore_index=ignore_index)
    assert torch.equal(loss, function(x, w, target, reduction="none", ignore_index=ignore_index))
    assert loss[0] == 0 and (loss[target != ignore_index] > 0).all()


@every_function
def test_margin_that_works_in_place(function: object) -> None:
    """It changes a copy: statistics, loss and gradients are those of the same margin written otherwise."""
    inputs = make_inputs(Case(geometry="late"))
    got = run(function, inputs, margin=lambda cosine: cosine.sub_(0.35))
    right = run(function, inputs, margin=lambda cosine: cosine - 0.35)
    for name in ("loss", "d_embeddings", "d_weight"):
        assert torch.equal(getattr(got, name), getattr(right, name)), name
    assert all(torch.equal(a, b) for a, b in zip(got.stats, right.stats, strict=True))
    assert right.stats.correct.any()


@every_function
def test_labels_in_any_memory(function: object) -> None:
    x, w, target, _ = make_inputs(Case())
    strided = torch.full((len(target), 2), -7).index_copy_(1, torch.tensor([1]), target[:, None])[:, 1]
    assert not strided.is_contiguous()
    assert torch.equal(function(x, w, strided), function(x, w, target))
    one = target[:1].expand(len(target))
    assert torch.equal(function(x, w, one), function(x, w, one.contiguous()))


@every_function
@pytest.mark.parametrize("scale", [64.0, 1000.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_in_a_row_of_embeddings(function: object, bad: float, scale: float) -> None:
    """That row's loss and gradient are NaN, and the weight gradient; the other rows are as if it were not there."""
    inputs = make_inputs(Case())
    clean = run(function, inputs, scale=scale)
    inputs.embeddings[4, 7] = bad
    got = run(function, inputs, scale=scale)
    assert got.loss[4].isnan() and got.stats.loss[4].isnan() and got.d_embeddings[4].isnan().all()
    assert got.d_weight.isnan().all()
    others = torch.arange(9) != 4
    for name in ("loss", "d_embeddings"):
        torch.testing.assert_close(getattr(got, name)[others], getattr(clean, name)[others], rtol=1e-5, atol=1e-6)
    x = inputs.embeddings
    assert function(x, inputs.weight, inputs.target).isnan()


@every_function
@pytest.mark.parametrize("scale", [64.0, 1000.0])
def test_nan_in_a_class_center(function: object, scale: float) -> None:
    """Every row has that class for its target or as a negative: nothing is silently clean."""
    inputs = make_inputs(Case())
    inputs.weight[inputs.target[0], 3] = torch.nan
    got = run(function, inputs, scale=scale)
    assert got.loss.isnan().all() and got.d_embeddings.isnan().all() and got.d_weight.isnan().all()


@every_function
def test_nan_in_an_ignored_row(function: object) -> None:
    inputs = make_inputs(Case())
    inputs.embeddings[4] = torch.nan
    inputs.target[4] = -100
    assert function(inputs.embeddings, inputs.weight, inputs.target).isfinite()


@every_function
def test_ignored_rows_have_no_gradient(function: object) -> None:
    inputs = make_inputs(Case(geometry="ignored"))
    got = run(function, inputs)
    counted = inputs.target != -100
    assert torch.equal(got.d_embeddings[~counted], torch.zeros_like(got.d_embeddings[~counted]))
    assert (got.d_embeddings[counted].abs().amax(1) > 0).all()
    alone = Inputs(*(tensor[counted] if i != 1 else tensor for i, tensor in enumerate(inputs)))
    torch.testing.assert_close(got.d_weight, run(function, alone).d_weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str) -> None:
    """Embeddings are rounded as for a matrix product, and with them only what enters a product beside them."""
    x, w, target, _ = make_inputs(Case())
    x.requires_grad_()
    w.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fa.margin_softmax_loss(x, w, target, backend=backend)
    right = fa.margin_softmax_loss(x.bfloat16(), w, target, backend=backend)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, right, rtol=1e-5, atol=0)
    for got, theirs in zip(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(right, (x, w)), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_autocast_leaves_other_dtypes_alone() -> None:
    x, w, target, _ = make_inputs(Case(x_dtype="float64"))
    right = fa.margin_softmax_loss(x, w, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fa.margin_softmax_loss(x, w, target), right)
    with torch.autocast("cpu", enabled=False):
        assert torch.equal(fa.margin_softmax_loss(x, w, target), right)


@pytest.mark.parametrize("margin", MARGINS, ids=named)
def test_backends_agree(margin: object) -> None:
    inputs = make_inputs(Case(geometry="late", x_dtype="float64", w_dtype="float64"))
    one, other = (run(function, inputs, margin=margin) for function in list(FUNCTIONS.values())[1:])
    for name in ("loss", "d_embeddings", "d_weight"):
        a, b = getattr(one, name), getattr(other, name)
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11 * b.abs().max().item())
    torch.testing.assert_close(one.stats, other.stats, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("geometry", ["aligned", "opposed"])
def test_target_cosines_are_cosines(geometry: str, dtype: str, backend: str) -> None:
    """Dots of rounded unit vectors come out beyond 1; a user's own margin may take the arccos of what it is given."""
    x, w, target, _ = make_inputs(Case(N=500, geometry=geometry, x_dtype=dtype, w_dtype=dtype))
    loss, stats = fa.margin_softmax_loss(
        x, w, target, margin=lambda c: (c.acos() + 0.3).cos(), backend=backend, return_stats=True
    )
    assert loss.isfinite()
    assert stats.target_cosine.abs().max() <= 1 and stats.target_cosine.abs().min() > 0.9999


@every_function
def test_inputs_stay_as_they_are(function: object) -> None:
    inputs = make_inputs(Case())
    before = [tensor.clone() for tensor in inputs]
    run(function, inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@every_function
def test_no_rows(function: object) -> None:
    x, w = torch.empty(0, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    target = torch.empty(0, dtype=torch.int64)
    assert function(x, w, target).isnan()
    assert function(x, w, target, reduction="none").shape == (0,)
    total, stats = function(x, w, target, reduction="sum", return_stats=True)
    total.backward()
    assert total == 0 and all(field.shape == (0,) for field in stats)
    assert x.grad.shape == (0, 8) and torch.equal(w.grad, torch.zeros(5, 8))


@every_function
def test_one_class(function: object) -> None:
    """No negatives: the loss is 0 and so are the gradients, whatever the margin."""
    inputs = make_inputs(Case(C=1, scale=1000.0))
    got = run(function, inputs)
    assert not got.loss.any() and not got.d_embeddings.any() and not got.d_weight.any()
    assert got.stats.correct.all()
