"""The drop-in losses against pytorch-metric-learning's own, and against that library's expectations of them."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_arcface as fa

theirs = pytest.importorskip("pytorch_metric_learning.losses")
from pytorch_metric_learning import distances, miners, reducers, regularizers  # noqa: E402

from fused_arcface.compat import pytorch_metric_learning as ours  # noqa: E402

LOSSES: dict[str, dict[str, Any]] = {
    "ArcFaceLoss": {"margin": 28.6, "scale": 64},
    "CosFaceLoss": {"margin": 0.35, "scale": 64},
    "NormalizedSoftmaxLoss": {"temperature": 0.05},
    "SubCenterArcFaceLoss": {"margin": 30, "scale": 32, "sub_centers": 3},
    "SphereFaceLoss": {"margin": 4, "scale": 1},
}
every_loss = pytest.mark.parametrize("name", LOSSES)
TRIPLETS = (torch.tensor([0, 0, 3]), torch.tensor([6, 6, 5]), torch.tensor([1, 2, 2]))


def pair(name: str, **options: Any) -> tuple[Any, Any]:
    """Return their loss and ours with the same W, in fp64."""
    built = []
    for module in (theirs, ours):
        torch.manual_seed(0)
        loss_func = getattr(module, name)(num_classes=7, embedding_size=6, **LOSSES[name], **copy.deepcopy(options))
        built.append(loss_func.double())
    return built[0], built[1]


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(9, 6, dtype=torch.float64, generator=generator)
    return x, torch.tensor([0, 1, 2, 3, 4, 3, 0, 6, 6])


def outcome(loss_func: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, y = batch()
    x.requires_grad_()
    loss = loss_func(x, y, *arguments)
    loss.backward()
    return loss.detach(), x.grad, loss_func.W.grad


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reducer": {"reducer": reducers.ThresholdReducer(low=1.0)},
    "weight regularizer": {"weight_regularizer": regularizers.RegularFaceRegularizer(), "weight_reg_weight": 0.3},
    "embedding regularizer": {"embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 0.1},
}


@every_loss
@pytest.mark.parametrize("indices", [None, TRIPLETS], ids=["all", "triplets"])
@pytest.mark.parametrize("options", OPTIONS)
def test_equal_to_theirs(name: str, options: str, indices: tuple[Tensor, ...] | None) -> None:
    old, new = pair(name, **OPTIONS[options])
    assert isinstance(new, type(old)) and new.W.shape == old.W.shape
    torch.testing.assert_close(new.W, old.W, rtol=0, atol=0)
    for mine, right in zip(outcome(new, indices), outcome(old, indices), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-8, atol=1e-10)


@every_loss
def test_a_miner_goes_with_it(name: str) -> None:
    old, new = pair(name)
    x, y = batch()
    found = miners.MultiSimilarityMiner()(x, y)
    assert len(found) == 4 and len(found[0])
    for mine, right in zip(outcome(new, found), outcome(old, found), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-8, atol=1e-10)


@every_loss
def test_logits_records_and_state(name: str) -> None:
    old, new = pair(name, collect_stats=True)
    x, y = batch()
    torch.testing.assert_close(new.get_logits(x), old.get_logits(x), rtol=1e-12, atol=1e-12)
    old(x, y), new(x, y)
    if name != "NormalizedSoftmaxLoss":
        assert new.avg_angle == pytest.approx(old.avg_angle, rel=1e-9)
    assert list(new.state_dict()) == list(old.state_dict()) == ["W"]
    with torch.no_grad():
        old.W.mul_(2).add_(0.1)
    new.load_state_dict(old.state_dict())
    torch.testing.assert_close(new(x, y), old(x, y))
    with torch.no_grad():
        new.W.sub_(0.3)
    old.load_state_dict(new.state_dict())
    torch.testing.assert_close(new(x, y), old(x, y))
    assert new.W.T.is_contiguous() and copy.deepcopy(new).W.T.is_contiguous()


@every_loss
def test_refuses_reference_embeddings_as_theirs(name: str) -> None:
    x, y = batch()
    for loss_func in pair(name):
        with pytest.raises(ValueError, match="ref_emb"):
            loss_func(x, y, None, x, y + 0)
        with pytest.raises(ValueError, match="label"):
            loss_func(x)


@every_loss
def test_optimizer_steps_are_theirs(name: str) -> None:
    old, new = pair(name)
    x, y = batch()
    for loss_func in (old, new):
        optimizer = torch.optim.Adam(loss_func.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            loss_func(x, y).backward()
            optimizer.step()
    torch.testing.assert_close(new.W, old.W, rtol=1e-6, atol=1e-8)


# That library's own expectations: 180 rows at 0 to 179 degrees, ten classes in the plane.
ANGLES = torch.deg2rad(torch.arange(180, dtype=torch.float64))
CIRCLE = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)


def on_the_circle(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    labels = torch.randint(10, (180,), generator=torch.Generator().manual_seed(4))
    return CIRCLE.to(dtype, copy=True).requires_grad_(), labels


def unit_logits(loss_func: Any, embeddings: Tensor) -> Tensor:
    return F.normalize(embeddings.double().detach()) @ F.normalize(loss_func.W.double().detach(), dim=0)


def close(loss: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    assert loss.item() == pytest.approx(right.item(), rel=1e-2 if dtype == torch.float16 else 1e-5)


@dtypes
def test_arcface_on_the_circle(dtype: torch.dtype) -> None:
    loss_func = ours.ArcFaceLoss(margin=30, scale=64, num_classes=10, embedding_size=2)
    x, y = on_the_circle(dtype)
    loss = loss_func(x, y)
    loss.backward()
    cosine = unit_logits(loss_func, x)
    angle = cosine.gather(1, y[:, None]).clamp(-1, 1).acos()
    margin = math.radians(30)
    modified = torch.where(angle <= math.pi - margin, (angle + margin).cos(), angle.cos() - margin * math.sin(margin))
    close(loss, F.cross_entropy(64 * cosine.scatter(1, y[:, None], modified), y), dtype)
    assert x.grad.isfinite().all() and loss_func.W.grad.isfinite().all()


@dtypes
def test_cosface_on_the_circle(dtype: torch.dtype) -> None:
    loss_func = ours.CosFaceLoss(margin=0.5, scale=64, num_classes=10, embedding_size=2)
    x, y = on_the_circle(dtype)
    close(loss_func(x, y), F.cross_entropy(64 * (unit_logits(loss_func, x) - 0.5 * F.one_hot(y, 10)), y), dtype)


@dtypes
@pytest.mark.parametrize("normalized", [True, False])
def test_normalized_softmax_on_the_circle(dtype: torch.dtype, normalized: bool) -> None:
    distance = distances.DotProductSimilarity(normalize_embeddings=normalized)
    loss_func = ours.NormalizedSoftmaxLoss(10, 2, temperature=0.1, distance=distance)
    x, y = on_the_circle(dtype)
    x = (3 * x).detach().requires_grad_()
    loss = loss_func(x, y)
    loss.backward()
    close(loss, F.cross_entropy((1 if normalized else 3) * unit_logits(loss_func, x) / 0.1, y), dtype)


@dtypes
def test_subcenters_of_random_rows(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    loss_func = ours.SubCenterArcFaceLoss(num_classes=10, embedding_size=32, margin=30, scale=64, sub_centers=3)
    assert loss_func.W.shape == (32, 30)
    x, y = torch.randn(64, 32).to(dtype), torch.randint(10, (64,))
    cosine = unit_logits(loss_func, x).unflatten(1, (10, 3)).amax(2)
    modified = (cosine.gather(1, y[:, None]).acos() + math.radians(30)).cos()
    close(loss_func(x, y), F.cross_entropy(64 * cosine.scatter(1, y[:, None], modified), y), dtype)
    logits = loss_func.get_logits(x)
    assert logits.shape == (64, 10)
    torch.testing.assert_close(logits.double(), 64 * cosine, rtol=1e-3, atol=1e-3)


@dtypes
def test_sphereface_on_the_circle(dtype: torch.dtype) -> None:
    """Margin 10, embeddings of norm 10: cos(10·θ), continued by (-1)^k·cos(10·θ) - 2k."""
    loss_func = ours.SphereFaceLoss(margin=10, scale=2, num_classes=10, embedding_size=2)
    x, y = on_the_circle(dtype)
    x = (10 * x).detach().requires_grad_()
    loss = loss_func(x, y)
    loss.backward()
    cosine = unit_logits(loss_func, x)
    angle = cosine.gather(1, y[:, None]).clamp(-1, 1).acos()
    k = (10 * angle / math.pi).floor()
    modified = (-1) ** k * (10 * angle).cos() - 2 * k
    norms = x.detach().double().norm(dim=1, keepdim=True)
    close(loss, F.cross_entropy(2 * norms * cosine.scatter(1, y[:, None], modified), y), dtype)


def test_sphereface_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    right = outcome(pair("SphereFaceLoss")[0])
    monkeypatch.setattr(ours, "_CLASSES", 3)
    for mine, expected in zip(outcome(pair("SphereFaceLoss")[1]), right, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("threshold", [30, 75])
def test_outliers(threshold: float) -> None:
    old, new = (
        module.SubCenterArcFaceLoss(num_classes=10, embedding_size=2, sub_centers=3).double()
        for module in (theirs, ours)
    )
    new.load_state_dict(old.state_dict())
    x, y = on_the_circle(torch.float64)
    found, centers = new.get_outliers(x, y, threshold=threshold)
    right, right_centers = old.get_outliers(x, y, threshold=threshold)
    assert 0 < len(found) < 180 and torch.equal(found, right)
    torch.testing.assert_close(centers, right_centers)
    # The rows within the threshold are the others.
    cosine = (x.detach() @ F.normalize(centers, dim=0)).gather(1, y[:, None]).squeeze(1)
    far = (cosine < math.cos(math.radians(threshold))).nonzero().squeeze(1)
    assert torch.equal(far, found.sort().values)
    assert torch.equal(new.get_outliers(x, y, threshold=threshold, return_dominant_centers=False), found)


def test_the_differences() -> None:
    """A target at cosine 1: their gradient is NaN before torch 2.14, whose clamp gives 0 at its bounds; ours is finite.
    W keeps its dtype. A wrong label is an error."""
    old, new = (module.ArcFaceLoss(3, 4) for module in (theirs, ours))
    x = torch.zeros(1, 4)
    x[0, 0] = 1
    of_clamp = torch.ones((), requires_grad=True)
    of_clamp.clamp(-1, 1).backward()
    for loss_func, finite in ((old, of_clamp.grad == 0), (new, True)):
        with torch.no_grad():
            loss_func.W.copy_(torch.eye(4)[:, :3])
        leaf = x.clone().requires_grad_()
        loss_func(leaf, torch.tensor([0])).backward()
        assert leaf.grad.isfinite().all() == finite
    for loss_func, dtype in ((old, torch.bfloat16), (new, torch.float32)):
        loss_func(x.bfloat16(), torch.tensor([0]))
        assert loss_func.W.dtype == dtype
    assert new.get_logits(x.bfloat16()).dtype == torch.float32
    for wrong in (ours.ArcFaceLoss(3, 4), ours.SphereFaceLoss(3, 4)):
        with pytest.raises(ValueError, match=r"must be in \[0, "):
            wrong(x, torch.tensor([3]))


def test_another_distance_is_theirs() -> None:
    with pytest.warns(UserWarning, match="pytorch-metric-learning computes the loss, as distance=LpDistance"):
        loss_func = ours.NormalizedSoftmaxLoss(7, 6, distance=distances.LpDistance()).double()
    x, y = batch()
    other = theirs.NormalizedSoftmaxLoss(7, 6, distance=distances.LpDistance()).double()
    other.load_state_dict(loss_func.state_dict())
    torch.testing.assert_close(loss_func(x, y), other(x, y))


def test_a_margin_that_changes_counts() -> None:
    loss_func = ours.ArcFaceLoss(7, 6).double()
    x, y = batch()
    loss_func.margin = math.radians(10)
    right = fa.margin_softmax_loss(x, loss_func.W.T, y, margin=fa.ArcFace(math.radians(10)))
    torch.testing.assert_close(loss_func(x, y), right)


def test_sphereface_is_exact_under_autocast() -> None:
    """The products keep fp32: in bf16 a logit of 64 would be off by a quarter."""
    torch.manual_seed(0)
    loss_func = ours.SphereFaceLoss(num_classes=7, embedding_size=6, margin=1, scale=64)
    x, y = F.normalize(torch.randn(12, 6)), torch.arange(12) % 7
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_func(x, y)
    right = F.cross_entropy(64 * x.double() @ F.normalize(loss_func.W.detach().double(), dim=0), y)
    torch.testing.assert_close(loss.double(), right, rtol=1e-5, atol=0)
