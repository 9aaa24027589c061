"""Margins that differ from row to row: their formulas by hand, their state, what they refuse."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from support.distributed_helpers import run_ranks
from torch import Tensor

import fused_arcface as fa
from fused_arcface.margins.per_row import _by_difficulty

BOTH = torch.tensor([True, True])


def fixed_adaface(mean: float, std: float) -> fa.AdaFace:
    """Running statistics that stay."""
    margin = fa.AdaFace().eval()
    margin.norm_mean.fill_(mean)
    margin.norm_std.fill_(std)
    return margin


def test_adaface_by_hand() -> None:
    margin = fixed_adaface(20.0, 5.0)
    theta = (0.6, 1.0, 0.1, 3.1, 0.8)
    norms = torch.tensor([20.0, 27.0, 1000.0, 0.0, 14.0], dtype=torch.float64)
    quality = [0.333 * (norm - 20) / 5.001 for norm in (20.0, 27.0)] + [1.0, -1.0, 0.333 * -6 / 5.001]
    right = []
    for angle, z in zip(theta, quality, strict=True):
        shifted = min(max(angle - 0.4 * z, 1e-3), math.pi - 1e-3)
        right.append(math.cos(shifted) - (0.4 + 0.4 * z))
    # One row at the mean, two between, one of the greatest quality at the lower clip, one of the least at the upper.
    assert right[0] == pytest.approx(math.cos(0.6) - 0.4) and right[2] == pytest.approx(math.cos(1e-3) - 0.8)
    assert right[3] == pytest.approx(-math.cos(1e-3))
    got = margin.for_rows(norms, torch.ones(5, dtype=torch.bool)).modify(torch.tensor(theta).double().cos())
    # The statistics are fp32, and ε is a decimal there.
    torch.testing.assert_close(got, torch.tensor(right).double(), rtol=0, atol=1e-6)


def test_adaface_straight_through() -> None:
    """The value is that of the exact margin, the derivative 1, as in CVLface, the authors' later code."""
    cosine = torch.tensor([0.9, 0.1], dtype=torch.float64, requires_grad=True)
    norms = torch.tensor([27.0, 14.0], dtype=torch.float64)
    values = [
        fa.AdaFace(rate=1.0, gradient=gradient).for_rows(norms, BOTH).modify(cosine)
        for gradient in ("exact", "straight_through")
    ]
    assert torch.equal(*values)
    assert torch.autograd.grad(values[1].sum(), cosine)[0].tolist() == [1.0, 1.0]
    assert not torch.autograd.grad(values[0].sum(), cosine)[0].eq(1).any()


def test_adaface_that_an_earlier_version_pickled_has_the_exact_gradient() -> None:
    margin = fa.AdaFace()
    del margin.gradient
    cosine = torch.tensor([0.9, 0.1], dtype=torch.float64, requires_grad=True)
    right, got = (torch.autograd.grad(each(cosine).sum(), cosine)[0] for each in (fa.AdaFace(), margin))
    assert torch.equal(got, right) and repr(margin) == repr(fa.AdaFace())


def test_adaface_running_statistics_by_hand() -> None:
    margin = fa.AdaFace(rate=0.25)
    counted = torch.tensor([True, True, False, True, True])
    margin.for_rows(torch.tensor([10.0, 30.0, 1e3, 500.0, math.nan]), counted)
    batch = torch.tensor([10.0, 30.0, 100.0])  # clipped to 100; ignored and NaN rows do not count
    torch.testing.assert_close(margin.norm_mean, 0.75 * 20 + 0.25 * batch.mean())
    torch.testing.assert_close(margin.norm_std, 0.75 * 100 + 0.25 * batch.std())

    one, none = copy.deepcopy(margin), copy.deepcopy(margin)
    one.for_rows(torch.tensor([60.0]), torch.tensor([True]))
    torch.testing.assert_close(one.norm_mean, 0.75 * margin.norm_mean + 15)
    assert one.norm_std == margin.norm_std
    none.for_rows(torch.empty(0), torch.empty(0, dtype=torch.bool))
    none.for_rows(torch.tensor([1.0]), torch.tensor([False]))
    none.eval().for_rows(torch.tensor([1.0, 2.0]), BOTH)
    assert none.norm_mean == margin.norm_mean and none.norm_std == margin.norm_std


def test_adaface_gives_the_norm_no_gradient() -> None:
    norms = torch.tensor([10.0, 30.0], requires_grad=True)
    cosine = torch.tensor([0.5, 0.6], requires_grad=True)
    fixed_adaface(20.0, 5.0).for_rows(norms, BOTH).modify(cosine).sum().backward()
    assert norms.grad is None and (cosine.grad > 0).all()


def test_magface_by_hand() -> None:
    """Margins 0.45, 0.625 and 0.8 at norms 10, 60 and 110; outside they stay."""
    norms = torch.tensor([2.0, 10.0, 60.0, 110.0, 500.0, 60.0], dtype=torch.float64, requires_grad=True)
    clipped, margins = (10, 10, 60, 110, 110, 60), (0.45, 0.45, 0.625, 0.8, 0.8, 0.625)
    theta = (0.3, 1.0, 1.5, 2.0, 0.7, 3.0)
    modify, penalty = fa.MagFace(penalty=20.0, boundary="hard").for_rows(norms, torch.ones(6, dtype=torch.bool))
    right = [math.cos(t + m) for t, m in zip(theta, margins, strict=True)]
    right[5] = math.cos(3.0) - 0.625 * math.sin(0.625)  # past π
    got = modify(torch.tensor(theta, dtype=torch.float64).cos())
    torch.testing.assert_close(got, torch.tensor(right, dtype=torch.float64), rtol=0, atol=1e-12)
    regularizer = [20 * (a / 110**2 + 1 / a) for a in clipped]
    torch.testing.assert_close(penalty, torch.tensor(regularizer, dtype=torch.float64))

    (of_penalty,) = torch.autograd.grad(penalty.sum(), norms, retain_graph=True)
    (of_margin,) = torch.autograd.grad(got.sum(), norms)
    slope = 0.35 / 100
    assert of_penalty[2] == pytest.approx(20 * (1 / 110**2 - 1 / 60**2))
    assert of_margin[2] == pytest.approx(-math.sin(1.5 + 0.625) * slope)
    assert of_margin[5] == pytest.approx(-(math.sin(0.625) + 0.625 * math.cos(0.625)) * slope)
    assert torch.equal(of_penalty[[0, 4]], torch.zeros(2).double()) and torch.equal(
        of_margin[[0, 4]], of_penalty[[0, 4]]
    )


def test_magface_is_the_authors_code() -> None:
    """Their default is the easy margin: at a norm of 60 the margin is 0.625 up to 90°, and none from there on."""
    degrees = torch.tensor([40.0, 89.0, 91.0, 100.0, 175.0], dtype=torch.float64)
    cosine = degrees.deg2rad().cos().requires_grad_()
    modify, _ = fa.MagFace().for_rows(torch.full_like(degrees, 60.0), torch.ones(5, dtype=torch.bool))
    right = [math.cos(math.radians(40) + 0.625), math.cos(math.radians(89) + 0.625)]
    right += [math.cos(math.radians(each)) for each in (91, 100, 175)]
    got = modify(cosine)
    torch.testing.assert_close(got, torch.tensor(right, dtype=torch.float64))
    (slope,) = torch.autograd.grad(got.sum(), cosine)
    of_first = math.sin(math.radians(40) + 0.625) / math.sin(math.radians(40))
    assert slope[0].item() == pytest.approx(of_first) and slope[2:].tolist() == [1, 1, 1]
    hard = fa.MagFace(boundary="hard").for_rows(torch.tensor([60.0]), BOTH[:1]).modify(cosine[3:4].float())
    assert hard.item() == pytest.approx(-0.717, abs=5e-4)  # the docstring's


def test_magface_penalty_is_in_the_loss() -> None:
    x, w, y = 40 * torch.randn(4, 6), torch.randn(5, 6), torch.tensor([0, 1, -100, 2])
    plain = fa.MagFace(penalty=0.0)
    without, with_it = (
        fa.margin_softmax_loss(x, w, y, margin=margin, reduction="none") for margin in (plain, fa.MagFace(penalty=20.0))
    )
    a = x.norm(dim=1).clamp(10, 110)
    right = (20 * (a / 110**2 + 1 / a)).masked_fill(y == -100, 0)
    torch.testing.assert_close(with_it - without, right)


def test_elasticface_by_hand() -> None:
    """cos(θ + m) or cos θ - m of whatever was drawn; in eval() of the mean."""
    cosine = torch.linspace(-0.6, 0.9, 7, dtype=torch.float64)
    counted, norms = torch.ones(7, dtype=torch.bool), torch.ones(7, dtype=torch.float64)
    for kind in ("arc", "cos"):
        margin = fa.ElasticFace(0.4, 0.1, kind=kind)
        modified = margin.for_rows(norms, counted).modify(cosine)
        drawn = modified.acos() - cosine.acos() if kind == "arc" else cosine - modified
        assert (drawn - 0.4).abs().max() < 0.5 and drawn.std() > 0.01
        again = fa.ElasticFace(0.4, 0.1, kind="cos").for_rows(norms, counted).modify(cosine)
        torch.testing.assert_close(drawn, cosine - again)  # the same draw, whatever it is used for
        assert margin.step == 1
        mean = margin.eval().for_rows(norms, counted).modify(cosine)
        right = [math.cos(math.acos(c) + 0.4) if kind == "arc" else c - 0.4 for c in cosine.tolist()]
        torch.testing.assert_close(mean, torch.tensor(right, dtype=torch.float64))
        assert margin.step == 1


def test_elasticface_draws_are_normal_and_keyed() -> None:
    def draws(seed: int = 0, steps: int = 1, rows: int = 20000) -> Tensor:
        margin = fa.ElasticFace(0.5, 0.05, kind="cos", seed=seed)
        for _ in range(steps):
            modify = margin.for_rows(torch.ones(rows), torch.ones(rows, dtype=torch.bool)).modify
        return -modify(torch.zeros(rows))

    drawn = draws()
    assert drawn.mean() == pytest.approx(0.5, abs=0.002) and drawn.std() == pytest.approx(0.05, rel=0.03)
    within = ((drawn - 0.5).abs() < 0.05).float().mean()
    assert within == pytest.approx(0.683, abs=0.015)
    assert torch.equal(drawn[:100], draws(rows=100))  # a row's place decides, not the batch's size
    for other in (draws(seed=1), draws(steps=2)):
        assert torch.corrcoef(torch.stack([drawn, other]))[0, 1].abs() < 0.03


def test_elasticface_plus_gives_more_to_the_harder() -> None:
    cosine = torch.tensor([0.9, -0.2, 0.5, 0.1, 0.3])
    counted = torch.tensor([True, True, True, False, True])
    plain, plus = (fa.ElasticFace(0.5, 0.1, "cos", plus) for plus in (False, True))
    without = cosine - plain.for_rows(torch.ones(5), counted).modify(cosine)
    with_it = cosine - plus.for_rows(torch.ones(5), counted).modify(cosine)
    order = [0, 2, 4, 1]  # of falling cosine
    torch.testing.assert_close(with_it[order], without[counted].sort().values)
    assert with_it[3] == without[3]


@pytest.mark.parametrize("ignored", [None, 1])
def test_elasticface_plus_forms(ignored: int | None) -> None:
    """The paper's assignment, and the authors' code's: ``sorted(margins)[argsort(-cosines)]`` over the rows that
    count. The numbers without an ignored row are the docstring's.
    """
    cosine, draws, counted = [0.1, 0.9, 0.5], [0.5, 0.4, 0.6], [True, True, True]
    if ignored is not None:
        for values, value in ((cosine, 0.7), (draws, 0.45), (counted, False)):
            values.insert(ignored, value)
    arguments = torch.tensor(draws), torch.tensor(cosine), torch.tensor(counted)
    for form, right in (("paper", [0.6, 0.4, 0.5]), ("code", [0.5, 0.6, 0.4])):
        got = _by_difficulty(*arguments, form)
        assert got[arguments[2]].tolist() == pytest.approx(right)
        assert torch.equal(got[~arguments[2]], arguments[0][~arguments[2]])


def test_elasticface_plus_takes_the_form() -> None:
    cosine, counted = torch.tensor([0.1, 0.9, 0.5, -0.3, 0.2]), torch.ones(5, dtype=torch.bool)
    of = {}
    for form in ("paper", "code"):
        margin = fa.ElasticFace(0.5, 0.1, "cos", plus=True, form=form)
        of[form] = cosine - margin.for_rows(torch.ones(5), counted).modify(cosine)
    ascending = of["paper"].sort().values
    torch.testing.assert_close(of["code"], ascending[cosine.argsort(descending=True)])
    assert not torch.equal(of["code"], of["paper"])


def test_state_belongs_to_the_head() -> None:
    x, y = 30 * torch.randn(6, 4), torch.arange(6) % 5
    for make, names in ((fa.AdaFace, {"norm_mean", "norm_std"}), (fa.ElasticFace, {"step"})):
        head = fa.MarginHead(4, 5, margin=make())
        head(x, y)
        assert set(head.state_dict()) == {"weight"} | {f"margin.{name}" for name in names}
        other = fa.MarginHead(4, 5, margin=make())
        other.load_state_dict(head.state_dict())
        states = [{name: float(buffer) for name, buffer in each.named_buffers()} for each in (head, other)]
        assert states[0] == states[1]
        head.eval()(x, y)
        assert {name: float(buffer) for name, buffer in head.named_buffers()} == states[1]


def test_state_is_checkpointed(tmp_path: object) -> None:
    head = fa.PartialFC(4, 5, margin=fa.AdaFace())
    head(30 * torch.randn(6, 4), torch.arange(6) % 5)
    fa.checkpoint.save(tmp_path, head)
    other = fa.PartialFC(4, 5, margin=fa.AdaFace())
    fa.checkpoint.load(tmp_path, other)
    assert other.margin.norm_mean == head.margin.norm_mean != 20 and other.margin.norm_std == head.margin.norm_std
    fa.checkpoint.load(tmp_path, fa.PartialFC(4, 5, margin=fa.ElasticFace()))  # another margin: its state is its own


def test_a_margin_of_ones_own() -> None:
    """The extension point: a margin that sees norms, and a penalty."""

    class Own:
        def __call__(self, target_cosine: Tensor) -> Tensor:
            return target_cosine

        def for_rows(self, norms: Tensor, counted: Tensor) -> fa.margins.RowMargin:
            return fa.margins.RowMargin(lambda cosine: cosine - 0.1 * norms, norms**2)

    x, w = torch.randn(4, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    y = torch.arange(4)
    got = fa.margin_softmax_loss(x, w, y, margin=Own(), scale=4.0, reduction="none")
    cosine, norms = F.normalize(x) @ F.normalize(w).T, x.norm(dim=1)
    logits = 4 * (cosine - 0.1 * norms[:, None] * F.one_hot(y, 5))
    torch.testing.assert_close(got, F.cross_entropy(logits, y, reduction="none") + norms**2)


def _options_differ() -> None:
    fa.PartialFC(4, 5, margin=fa.AdaFace(0.3 + 0.1 * torch.distributed.get_rank()))


@pytest.mark.distributed
def test_ranks_must_agree_on_the_options() -> None:
    with pytest.raises(ValueError, match=r"margin must be the same on every rank; got rank 0: AdaFace\(margin=0.3"):
        run_ranks(2, _options_differ)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fa.AdaFace("0.4"), TypeError, "AdaFace: margin must be a number; got str"),
        (lambda: fa.AdaFace(4), ValueError, "AdaFace: margin must be in [0, π) radians; got 4"),
        (lambda: fa.AdaFace(h=-1), ValueError, "AdaFace: h must be in [0, inf); got -1"),
        (lambda: fa.AdaFace(rate=0), ValueError, "AdaFace: rate must be in (0, 1]; got 0"),
        (
            lambda: fa.AdaFace(gradient="one"),
            ValueError,
            "AdaFace: gradient must be one of 'exact', 'straight_through'; got 'one'",
        ),
        (lambda: fa.MagFace(0.5, 0.4), ValueError, "MagFace: upper_margin must be in [lower_margin, π); got 0.4"),
        (lambda: fa.MagFace(lower_norm=0), ValueError, "MagFace: lower_norm must be in (0, inf); got 0"),
        (lambda: fa.MagFace(upper_norm=10.0), ValueError, "MagFace: upper_norm must be in (lower_norm, inf); got 10.0"),
        (lambda: fa.MagFace(penalty=None), TypeError, "MagFace: penalty must be a number; got NoneType"),
        (lambda: fa.ElasticFace(std=-0.1), ValueError, "ElasticFace: std must be in [0, inf); got -0.1"),
        (lambda: fa.ElasticFace(kind="sin"), ValueError, "ElasticFace: kind must be one of 'arc', 'cos'; got 'sin'"),
        (lambda: fa.ElasticFace(2.5, kind="cos"), ValueError, "ElasticFace: margin must be in [0, 2); got 2.5"),
        (lambda: fa.ElasticFace(form="a"), ValueError, "ElasticFace: form must be one of 'paper', 'code'; got 'a'"),
        (lambda: fa.ElasticFace(seed=-1), ValueError, "ElasticFace: seed must be >= 0; got -1"),
        (lambda: fa.ElasticFace(seed=2**63), ValueError, f"ElasticFace: seed must be in [0, 2^63); got {2**63}"),
    ],
)
def test_refused(make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        make()
    assert str(raised.value) == message


def test_magface_is_frozen_and_hashable() -> None:
    assert fa.MagFace() == fa.MagFace() and hash(fa.MagFace()) == hash(fa.MagFace())
    with pytest.raises(AttributeError):
        fa.MagFace().penalty = 1.0
