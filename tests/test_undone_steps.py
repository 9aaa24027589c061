"""A step that is skipped or refused leaves centers, momentum and the margin's state as they were, to the bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fused_arcface as fa
from fused_arcface import loss_factor

D, C = 8, 12
MARGINS: dict[str, Callable[[], object]] = {
    "ArcFace": fa.ArcFace,
    "AdaFace": lambda: fa.AdaFace(rate=0.3),
    "ElasticFace": fa.ElasticFace,
    "CurricularFace": lambda: fa.CurricularFace(rate=0.3),
}
STORAGE = {"fp32": {}, "int8 and bf16": {"momentum_dtype": torch.int8, "dtype": torch.bfloat16}}


def _batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return (7 * torch.randn(6, D, generator=generator)).requires_grad_(), torch.arange(6) * 2


def _head(margin: str, storage: str = "fp32", sample_rate: float = 1.0, **options: object) -> fa.PartialFC:
    stored = dict(STORAGE[storage])
    recipe = fa.CenterSGD(0.1, weight_decay=1e-3, momentum_dtype=stored.pop("momentum_dtype", None))
    head = fa.PartialFC(
        D, C, margin=MARGINS[margin](), scale=8, center_optimizer=recipe, sample_rate=sample_rate, **stored, **options
    )  # type: ignore[arg-type]
    for step in range(2):
        head(*_batch(step)).backward()
    return head


def _state(head: fa.PartialFC) -> list[Tensor]:
    momentum = [] if head.center_optimizer is None else head.center_optimizer.state[head.weight].values()
    return [each.detach().clone() for each in (head.weight, *momentum, *head.buffers())]


def _nan_row(head: fa.PartialFC) -> None:
    x, y = _batch(7)
    head(x.detach().index_fill(0, torch.tensor([2]), torch.nan), y).backward()


def _inf_row(head: fa.PartialFC) -> None:
    x, y = _batch(7)
    head(x.detach().index_fill(0, torch.tensor([2]), torch.inf), y).backward()


def _nothing_counts(head: fa.PartialFC) -> None:
    x, y = _batch(7)
    head(x, y.fill_(-100)).backward()


def _overflow(head: fa.PartialFC) -> None:
    (torch.tensor(torch.inf) * head(*_batch(7))).backward()


def _nan_center(head: fa.PartialFC) -> None:
    with torch.no_grad():
        head.weight[3] = torch.nan
    head(*_batch(7)).backward()


def _small_factor(head: fa.PartialFC) -> None:
    with pytest.raises(fa.CenterUpdateError, match=r"multiplied by 0\.5 before backward.*argument loss_weight"):
        (0.5 * head(*_batch(7))).backward()


def _label(head: fa.PartialFC) -> None:
    x, y = _batch(7)
    with pytest.raises(ValueError, match="target must be in"):
        head(x, y.index_fill(0, torch.tensor([1]), C))


def _shape(head: fa.PartialFC) -> None:
    with pytest.raises(ValueError, match=r"must be .*D="):
        head(torch.randn(6, D + 1), _batch(7)[1])


def _weight(head: fa.PartialFC) -> None:
    for wrong, error in ((-1.0, ValueError), (torch.nan, ValueError), (torch.inf, ValueError), ("2", TypeError)):
        with pytest.raises(error, match="loss_weight must be"):
            head(*_batch(7), loss_weight=wrong)


STEPS = (_nan_row, _inf_row, _nothing_counts, _overflow, _nan_center, _small_factor, _label, _shape, _weight)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__[1:])
def test_a_step_that_is_skipped_or_refused_leaves_everything(
    step: Callable[[fa.PartialFC], None], margin: str, storage: str, backend: str
) -> None:
    head = _head(margin, storage, 0.9, backend=backend)
    if step is _nan_center:
        with torch.no_grad():
            head.weight[3] = torch.nan
    before = _state(head)
    step(head)
    for mine, right in zip(_state(head), before, strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=0, equal_nan=True)
    if step is not _nan_center:
        head(*_batch(8)).backward()
        assert not torch.equal(head.weight, before[0]), "the next step trains again"


@pytest.mark.parametrize("step", [_label, _shape], ids=["label", "shape"])
@pytest.mark.parametrize("margin", MARGINS)
def test_refused_arguments_of_a_margin_head(step: Callable[[fa.PartialFC], None], margin: str) -> None:
    head = fa.MarginHead(D, C, margin=MARGINS[margin](), scale=8)  # type: ignore[arg-type]
    head(*_batch(0))
    before = [each.clone() for each in (head.weight.detach(), *head.buffers())]
    step(head)  # type: ignore[arg-type]
    assert all(map(torch.equal, (head.weight.detach(), *head.buffers()), before))


class _FromDevice:
    """Stands for a GPU, whose numbers arrive when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.arrived = False
        monkeypatch.setattr(loss_factor, "read_later", self._read_later)
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: tensor.dim() == 0))

    def _read_later(self, factor: Tensor) -> Callable[[], float | None]:
        return lambda: float(factor) if self.arrived else None


@pytest.mark.parametrize("found_by", ["the next forward pass", "step"])
@pytest.mark.parametrize("margin", MARGINS)
def test_a_factor_below_1_on_a_device_is_found_later(
    margin: str, found_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = _head(margin)
    device = _FromDevice(monkeypatch)
    before = _state(head)
    (0.5 * head(*_batch(7))).backward()
    assert all(map(torch.equal, _state(head), before))
    head(*_batch(8)).backward()  # nobody waits
    trained = _state(head)
    assert not torch.equal(trained[0], before[0])
    device.arrived = True
    assert head.center_optimizer is not None
    finds = head.center_optimizer.step if found_by == "step" else lambda: head(*_batch(9))
    with pytest.raises(fa.CenterUpdateError, match=r"in an earlier step, .* the loss was multiplied by 0\.5"):
        finds()
    assert all(map(torch.equal, _state(head), trained))
    head(*_batch(10)).backward()  # it is said once
    (1024 * head(*_batch(11))).backward()
    head(*_batch(12)).backward()


@pytest.mark.parametrize("factor", [1.0, 1024.0])
def test_the_centers_follow_the_weighted_loss(factor: float) -> None:
    """A multi-task weight by ``loss_weight`` is in the step, a GradScaler's factor is not: as torch.optim.SGD on the
    weighted loss."""
    head = fa.PartialFC(D, C, scale=8, center_optimizer=fa.CenterSGD(0.1, weight_decay=1e-3), dtype=torch.float64)
    weight = head.weight.detach().clone().requires_grad_()
    sgd = torch.optim.SGD([weight], 0.1, 0.9, weight_decay=1e-3)
    for step, loss_weight in enumerate((2.0, 0.25, 0, 1.0)):
        x, y = _batch(step)
        loss = head(x, y, loss_weight=loss_weight)
        (factor * loss).backward()
        mine, x.grad = x.grad, None
        right = loss_weight * fa.margin_softmax_loss(x, weight, y, scale=8)
        sgd.zero_grad()
        right.backward()
        sgd.step()
        torch.testing.assert_close(loss, right, rtol=1e-12, atol=0)
        assert mine is not None and x.grad is not None
        torch.testing.assert_close(mine, factor * x.grad, rtol=1e-5, atol=1e-6 * factor)
        torch.testing.assert_close(head.weight.detach(), weight.detach(), rtol=1e-10, atol=1e-12)


def test_loss_weight_without_a_fused_optimizer() -> None:
    head = fa.PartialFC(D, C, scale=8)
    x, y = _batch(0)
    plain, weighted = head(x, y), head(x, y, loss_weight=0.5)
    torch.testing.assert_close(weighted, 0.5 * plain)
    (gradient,), (half,) = (torch.autograd.grad(loss, head.weight) for loss in (plain, weighted))
    torch.testing.assert_close(half, 0.5 * gradient)
