"""Margins that change the negatives: their formulas by hand, their state, their refusals."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from support.cases import Case, everywhere, make_inputs, run
from torch import Tensor

import fused_arcface as fa
from fused_arcface.engine.autograd import needs_shift
from fused_arcface.margins import Margin

# Angles in radians between the embedding (1, 0) and the centers; the first is the target's.
ANGLES = (0.6, 0.3, 0.9, 1.05, 1.3, 2.0, 2.9)


def one_row(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    angles = torch.tensor(ANGLES, dtype=torch.float64)
    weight = 2 * torch.stack([angles.cos(), angles.sin()], 1)
    return torch.tensor([[3.0, 0.0]], dtype=dtype), weight.to(dtype), torch.tensor([0])


def right_loss(target: float, change: Callable[[float], float], threshold: float) -> float:
    """-log softmax at scale 8, every negative above the threshold changed."""
    cosines = [math.cos(angle) for angle in ANGLES[1:]]
    changed = [change(c) if c > threshold else c for c in cosines]
    assert 0 < sum(c > threshold for c in cosines) < len(cosines)
    return math.log1p(math.fsum(math.exp(8 * (c - target)) for c in changed))


def started(t: float, margin: float = 0.5) -> fa.CurricularFace:
    curricular = fa.CurricularFace(margin).eval()
    curricular.t.fill_(t)
    return curricular


@everywhere
@pytest.mark.parametrize("t", [0.0, 0.25, -0.5])
def test_curricularface_by_hand(loss: Callable[..., Tensor], options: dict[str, str], t: float) -> None:
    target = math.cos(0.6 + 0.5)  # harder are the negatives at 0.3, 0.9 and 1.05
    right = right_loss(target, lambda c: c * (t + c), target)
    got = loss(*one_row(), margin=started(t), scale=8.0, **options)
    assert got.item() == pytest.approx(right, rel=1e-12)


@everywhere
@pytest.mark.parametrize("boundary", ["none", "hard", "fold", "clip", "easy", "continuous"])
def test_curricularface_past_pi(loss: Callable[..., Tensor], options: dict[str, str], boundary: str) -> None:
    """The target's center is at 175°, so θ + m lies past π by 23.6°: cos(θ + m) = -0.916. The negatives at 168°
    (-0.978) and 150° (-0.866) are compared with that: the first is easy, the second is hard.
    """
    theta, m, t, s = math.radians(175), 0.5, 0.25, 64.0
    angles = torch.tensor([theta, math.radians(168), math.radians(150)], dtype=torch.float64)
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    w = torch.stack([angles.cos(), angles.sin()], 1).requires_grad_()
    margin = fa.CurricularFace(m, boundary=boundary).eval()
    margin.t.fill_(t)
    got = loss(x, w, torch.tensor([0]), margin=margin, scale=s, **options)

    # The formula once more, over a full row of logits, differentiated by autograd.
    cosine = (x / x.norm()) @ (w / w.norm(dim=1, keepdim=True)).T
    target, easy, hard = cosine[0]
    modified = {
        "none": (target.acos() + m).cos(),
        "hard": target - m * math.sin(m),
        "fold": -(target.acos() + m).cos() - 2,
        "clip": torch.tensor(-1.0, dtype=torch.float64),
        "easy": target,
        "continuous": target - (1 - math.cos(m)),
    }[boundary]
    right = -(s * torch.stack([modified, easy, hard * (t + hard)])).log_softmax(0)[0]
    assert got.item() == pytest.approx(right.item(), rel=1e-9)
    for mine, theirs in zip(torch.autograd.grad(got, (x, w)), torch.autograd.grad(right, (x, w)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


@everywhere
def test_curricularface_at_the_authors_number(loss: Callable[..., Tensor], options: dict[str, str]) -> None:
    """x = (-1, 0), centers at 5° and -12°, t = 0, s = 64. The target's logit is 64·(-cos 5° - 0.5·sin 0.5) = -79.098,
    the negative's 64·(-cos 12°) = -62.601: their code's cross-entropy is 16.497. Compared with the target's own
    -1.236, the negative would be hard and the loss 140.33.
    """
    angles = torch.deg2rad(torch.tensor([5.0, -12.0], dtype=torch.float64))
    x, w = torch.tensor([[-1.0, 0.0]], dtype=torch.float64), torch.stack([angles.cos(), angles.sin()], 1)
    got = loss(x, w, torch.tensor([0]), margin=started(0.0), scale=64.0, **options)
    assert got.item() == pytest.approx(16.497, abs=1e-3)


@everywhere
@pytest.mark.parametrize(
    ("margin", "target"),
    [(fa.ArcFace(0.5), math.cos(0.6 + 0.5)), (fa.CosFace(0.35), math.cos(0.6) - 0.35)],
    ids=["arc", "am"],
)
def test_mv_softmax_by_hand(
    loss: Callable[..., Tensor], options: dict[str, str], margin: Margin, target: float
) -> None:
    right = right_loss(target, lambda c: 1.12 * c + 1.12 - 1, target)
    got = loss(*one_row(), margin=fa.MVSoftmax(margin, t=1.12), scale=8.0, **options)
    assert got.item() == pytest.approx(right, rel=1e-12)


# Angles of targets where the margin is on and where FaceX-Zoo leaves it off; 175° is past θ + m = π as well.
@everywhere
@pytest.mark.parametrize("degrees", [30, 80, 100, 175])
@pytest.mark.parametrize("is_am", [True, False])
def test_mv_softmax_is_the_authors_code(
    loss: Callable[..., Tensor], options: dict[str, str], degrees: int, is_am: bool
) -> None:
    """FaceX-Zoo's MV_Softmax in this test's words: the target keeps its cosine where that is at most m (is_am) or 0,
    but negatives are compared with cos θ - m or cos(θ + m) everywhere.
    """
    m, t, s = 0.35, 1.12, 32.0
    angles = torch.deg2rad(torch.tensor([degrees, 20, 60, 95, 120, 160, 179], dtype=torch.float64))
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    w = torch.stack([angles.cos(), angles.sin()], 1).requires_grad_()
    margin = fa.MVSoftmax(fa.CosFace(m) if is_am else fa.ArcFace(m, boundary="easy"), t=t)
    got = loss(x, w, torch.tensor([0]), margin=margin, scale=s, **options)

    cosine = (x / x.norm()) @ (w / w.norm(dim=1, keepdim=True)).T
    target, negatives = cosine[0, 0], cosine[0, 1:]
    shifted = target - m if is_am else (target.acos() + m).cos()
    modified = shifted if target > (m if is_am else 0) else target
    changed = torch.where(negatives > shifted, t * negatives + t - 1, negatives)
    right = (s * changed).logsumexp(0).logaddexp(s * modified) - s * modified
    assert got.item() == pytest.approx(right.item(), rel=1e-9)
    for mine, theirs in zip(torch.autograd.grad(got, (x, w)), torch.autograd.grad(right, (x, w)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("form", "target"), [("code", 0.2), ("paper", -0.15)])
def test_mv_softmax_forms_by_hand(form: str, target: float) -> None:
    """The numbers of the docstring: the negative's logit is 32·(1.12·0.1 + 0.12) in both."""
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    w = torch.tensor([[0.2, 0.96**0.5], [0.1, 0.99**0.5]], dtype=torch.float64)
    margin = fa.MVSoftmax(fa.CosFace(0.35), form=form)
    got = fa.margin_softmax_loss(x, w, torch.tensor([0]), margin=margin, scale=32.0)
    right = math.log1p(math.exp(32 * (1.12 * 0.1 + 0.12 - target)))
    assert got.item() == pytest.approx(right, rel=1e-9)
    assert right == pytest.approx({"code": 1.33, "paper": 12.22}[form], abs=0.005)


@everywhere
@pytest.mark.parametrize(("kind", "hard"), [("adaptive", 5.2), ("fixed", 4.0)])
def test_mv_softmax_at_a_published_point(
    loss: Callable[..., Tensor], options: dict[str, str], kind: str, hard: float
) -> None:
    """With cosines 0.6 of the target, 0.8 and 0 of the negatives, f = 0.6 - 0.3 = 0.3, s = 5, t = 1.3: the first
    negative is misclassified, the second is not. Its e^(5·0.8) is multiplied by h = e^(5·0.3·1.8) = e^2.7 or by
    e^(5·0.3) = e^1.5: over e^(5·0.3) of the target e^(4 + 2.7 - 1.5) = e^5.2 or e^(4 + 1.5 - 1.5) = e^4.
    """
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    w = torch.tensor([[0.6, 0.8], [0.8, 0.6], [0.0, 1.0]], dtype=torch.float64)
    right = math.log(1 + math.exp(hard) + math.exp(-1.5))
    margin = fa.MVSoftmax(fa.CosFace(0.3), t=1.3, kind=kind)
    got = loss(x, w, torch.tensor([0]), margin=margin, scale=5.0, **options)
    assert got.item() == pytest.approx(right, rel=1e-12)


@everywhere
def test_interclass_filter_by_hand(loss: Callable[..., Tensor], options: dict[str, str]) -> None:
    right = right_loss(math.cos(0.6 + 0.5), lambda c: 0.0, 0.4)
    got = loss(*one_row(), margin=fa.InterclassFilter(fa.ArcFace(0.5), 0.4), scale=8.0, **options)
    assert got.item() == pytest.approx(right, rel=1e-12)


@everywhere
def test_filtered_negatives_have_no_gradient(loss: Callable[..., Tensor], options: dict[str, str]) -> None:
    x, w, y = one_row()
    w.requires_grad_()
    loss(x, w, y, margin=fa.InterclassFilter(fa.ArcFace(), 0.4), scale=8.0, **options).backward()
    filtered = torch.tensor([math.cos(angle) > 0.4 for angle in ANGLES])
    filtered[0] = False
    assert (w.grad[filtered] == 0).all() and (w.grad[~filtered] != 0).all()


def test_curricularface_running_mean_by_hand() -> None:
    margin = fa.CurricularFace(rate=0.1)
    counted = torch.tensor([True, True, False, True])
    margin.modulate(torch.tensor([0.5, 0.1, 1.0, math.nan]), counted)
    assert margin.t.item() == pytest.approx(0.1 * 0.3)
    modulation = margin.modulate(torch.tensor([0.5, 0.1, 1.0, 0.6]), counted)
    assert margin.t.item() == pytest.approx(0.9 * 0.03 + 0.1 * 0.4)  # before the batch is judged
    assert modulation.coefficients.tolist() == pytest.approx([1.0, margin.t.item(), 0.0])
    before = margin.t.clone()
    margin.modulate(torch.tensor([0.5]), torch.tensor([False]))
    margin.modulate(torch.empty(0), torch.empty(0, dtype=torch.bool))
    margin.eval().modulate(torch.tensor([1.0]), torch.tensor([True]))
    assert margin.t == before


@pytest.mark.parametrize(
    "margin",
    [
        started(-0.9),
        started(0.9),
        fa.MVSoftmax(t=4.0),
        fa.MVSoftmax(t=4.0, kind="fixed"),
        fa.InterclassFilter(),
        fa.InterTopK(penalty=3.0),
    ],
    ids=repr,
)
def test_bounds_hold(margin: Margin) -> None:
    """What needs_shift relies on: f lies in [-1, greatest] where it is applied, |f'| under steepest."""
    cosine = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    hardest = [cosine[:, None].expand(-1, margin.num_hardest)] if isinstance(margin, fa.InterTopK) else []
    _, (a, b, d, *rest), greatest, steepest = margin.modulate(cosine, torch.ones(2001, dtype=torch.bool), *hardest)
    e = rest[0] if rest else 0
    sine = (1 - cosine**2).sqrt()
    value = (a * cosine + b) * cosine + d + e * sine
    slope = 2 * a * cosine + b - e * cosine / sine.clamp(min=fa.margins.SIN_FLOOR)
    assert value.min() >= -1 - 1e-12 and value.max() <= greatest + 1e-6
    assert slope.abs().max() <= steepest + 1e-6


def test_needs_shift_knows_the_bounds() -> None:
    assert not needs_shift(64.0, 1000, torch.float32)
    assert not needs_shift(64.0, 1000, torch.float32, 1.2, 2.2)
    assert needs_shift(64.0, 1000, torch.float32, 1.3, 2.3)
    assert not needs_shift(64.0, 1000, torch.float64, 2.0, 3.0)
    # What the sum of exponentials may hold, the sum with their factors may not.
    assert not needs_shift(40.0, 10**18, torch.float32) and needs_shift(40.0, 10**18, torch.float32, 1.0, 1e3)


@pytest.mark.parametrize("scale", [16.0, 64.0, 128.0, 1000.0])
@pytest.mark.parametrize("margin", [started(0.9), fa.MVSoftmax(t=4.0)], ids=repr)
def test_great_values_are_exact(scale: float, margin: Margin, isa: str) -> None:
    """Modulated cosines up to 1.9 and 7: past exp's range unless shifted by the greatest of them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 16, generator=generator)
    w = torch.cat([torch.randn(40, 16, generator=generator), x + 0.05 * torch.randn(5, 16, generator=generator)])
    y = torch.arange(5)  # far from their own centers, on top of another's
    inputs = make_inputs(Case(5, 45, 16))._replace(embeddings=x, weight=w, target=y)
    exact = inputs._replace(embeddings=x.double(), weight=w.double())
    got = run(fa.margin_softmax_loss, inputs, margin=margin, scale=scale, backend="cpu")
    right = run(fa.reference.margin_softmax_loss, exact, margin=margin, scale=scale)
    for name in ("loss", "d_embeddings", "d_weight"):
        a, b = getattr(got, name), getattr(right, name)
        assert a.isfinite().all()
        # A cosine is known to 2^-22 at best, a logit to scale·steepest times that.
        assert (a - b).abs().max() <= b.abs().max() * (1e-6 + scale * 4 * 2.0**-22)


@pytest.mark.parametrize("sub_centers", [1, 7, 16])
def test_any_number_of_threads(sub_centers: int) -> None:
    """Slices of the classes, and groups of rows within them, hold whole classes."""
    inputs = make_inputs(Case(150, 300 * sub_centers, 64))
    inputs = inputs._replace(target=inputs.target % 300)
    options = {"margin": started(0.4), "scale": 64.0, "backend": "cpu", "sub_centers": sub_centers}
    one = run(fa.margin_softmax_loss, inputs, **options)
    torch.set_num_threads(5)
    five = run(fa.margin_softmax_loss, inputs, **options)
    for name in ("loss", "d_embeddings", "d_weight"):
        torch.testing.assert_close(getattr(five, name), getattr(one, name), rtol=1e-5, atol=1e-5)


def test_state_belongs_to_the_head() -> None:
    head = fa.MarginHead(4, 5, margin=fa.CurricularFace())
    x, y = torch.randn(6, 4), torch.arange(6) % 5
    head(x, y)
    assert set(head.state_dict()) == {"weight", "margin.t"} and head.margin.t != 0
    before = head.margin.t.clone()
    head.eval()(x, y)
    assert head.margin.t == before


OF_COSINE = "must be a function of the target's cosine alone, such as ArcFace or CosFace"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fa.CurricularFace(4), ValueError, "CurricularFace: margin must be in [0, π) radians; got 4"),
        (lambda: fa.CurricularFace(rate=2), ValueError, "CurricularFace: rate must be in (0, 1]; got 2"),
        (lambda: fa.MVSoftmax(t=0.9), ValueError, "MVSoftmax: t must be in [1, 4]; got 0.9"),
        (lambda: fa.MVSoftmax(kind="a"), ValueError, "MVSoftmax: kind must be one of 'adaptive', 'fixed'; got 'a'"),
        (lambda: fa.MVSoftmax(form="a"), ValueError, "MVSoftmax: form must be one of 'paper', 'code'; got 'a'"),
        (lambda: fa.MVSoftmax(t="1"), TypeError, "MVSoftmax: t must be a number; got str"),
        (lambda: fa.MVSoftmax(fa.AdaFace()), TypeError, f"MVSoftmax: margin {OF_COSINE}; got AdaFace"),
        (lambda: fa.InterclassFilter(0.4), TypeError, f"InterclassFilter: margin {OF_COSINE}; got float"),
        (lambda: fa.InterTopK(k=0), ValueError, "InterTopK: k must be >= 1; got 0"),
        (lambda: fa.InterTopK(penalty=-1), ValueError, "InterTopK: penalty must be in [0, π) radians; got -1"),
        (lambda: fa.InterTopK(fa.AdaFace()), TypeError, f"InterTopK: margin {OF_COSINE}; got AdaFace"),
        (lambda: fa.InterclassFilter(threshold=1), ValueError, "InterclassFilter: threshold must be in (-1, 1); got 1"),
    ],
)
def test_refused(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        make()
    assert str(raised.value) == message


def test_a_margin_of_ones_own_is_checked() -> None:
    """A threshold or penalty of a wrong shape would be read past its end."""

    class Own(fa.NormSoftmax):
        def modulate(self, target_cosine: Tensor, counted: Tensor) -> fa.margins.Modulation:
            return fa.margins.Modulation(target_cosine[:1], torch.zeros(3, dtype=torch.float64), 1.0, 1.0)

    class OwnSine(fa.NormSoftmax):
        def modulate(self, target_cosine: Tensor, counted: Tensor) -> fa.margins.Modulation:
            return fa.margins.Modulation(target_cosine, torch.zeros(4, dtype=torch.float64), 1.0, 1.0)

    class OwnPenalty(fa.NormSoftmax):
        def for_rows(self, norms: Tensor, counted: Tensor) -> fa.margins.RowMargin:
            return fa.margins.RowMargin(self, norms[:1])

    x, w, y, _ = make_inputs(Case())
    for loss in (fa.margin_softmax_loss, fa.reference.margin_softmax_loss):
        with pytest.raises(ValueError, match=r"margin's threshold must be \(N=9,\); got \(1,\)"):
            loss(x, w, y, margin=Own())
        with pytest.raises(
            ValueError, match=r"^OwnSine: modulate must return 3 coefficients, or turns_negatives must be"
        ):
            loss(x, w, y, margin=OwnSine())
        with pytest.raises(ValueError, match=r"margin's penalty must be \(N=9,\); got \(1,\)"):
            loss(x, w, y, margin=OwnPenalty())


def test_frozen_and_hashable() -> None:
    for make in (fa.MVSoftmax, fa.InterclassFilter):
        assert make() == make() and hash(make()) == hash(make())
        with pytest.raises(AttributeError):
            make().margin = fa.CosFace()
