"""Scales that are learned or adapt: cross_entropy over the stored logits, and AdaCos's formula, in fp64."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.cases import BACKENDS
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fused_arcface as fa
from fused_arcface.engine import ops as ops_module

N, C, D = 13, 17, 6
LOSSES: dict[str, Callable[..., Any]] = {
    **{name: partial(fa.margin_softmax_loss, backend=name) for name in BACKENDS},
    "oracle": fa.reference.margin_softmax_loss,
}


def inputs(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64).requires_grad_()
    w = torch.randn(C, D, generator=generator, dtype=torch.float64).requires_grad_()
    y = torch.randint(0, C, (N,), generator=generator)
    with torch.no_grad():
        x += w[y]
    y[3] = -100
    return x, w, y


def learned(value: float = 12.0, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value, dtype=dtype))


def by_formula(x: Tensor, w: Tensor, y: Tensor, scale: Tensor, smoothing: float = 0.0) -> Tensor:
    cosine = F.normalize(x) @ F.normalize(w).T
    return F.cross_entropy(scale * (cosine - 0.2 * F.one_hot(y.clamp(min=0), C).double()), y, label_smoothing=smoothing)


def same_gradients(got: Tensor, right: Tensor, mine: tuple[Any, ...], theirs: tuple[Any, ...]) -> None:
    for one, other in zip(torch.autograd.grad(got, mine), torch.autograd.grad(right, theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", LOSSES)
def test_a_learned_scale_has_its_exact_gradient(name: str, smoothing: float) -> None:
    x, w, y = inputs()
    scale = learned()
    got = LOSSES[name](x, w, y, margin=fa.CosFace(0.2), scale=scale, label_smoothing=smoothing)
    right = by_formula(x, w, y, scale, smoothing)
    torch.testing.assert_close(got, right, rtol=1e-10, atol=0)
    same_gradients(got, right, (x, w, scale), (x, w, scale))
    # The backbone and the centers are frozen: the scale alone has a gradient.
    right = by_formula(x, w, y, scale, smoothing)
    alone = LOSSES[name](x.detach(), w.detach(), y, margin=fa.CosFace(0.2), scale=scale, label_smoothing=smoothing)
    same_gradients(alone, right, (scale,), (scale,))


@pytest.mark.parametrize("value", [0.7, 64.0, 900.0])
def test_any_scale(value: float) -> None:
    x, w, y = inputs()
    scale = learned(value)
    got = fa.margin_softmax_loss(x, w, y, margin=fa.CosFace(0.2), scale=scale)
    right = by_formula(x, w, y, scale)
    torch.testing.assert_close(got, right, rtol=1e-10, atol=0)
    same_gradients(got, right, (x, w, scale), (x, w, scale))


def test_gradcheck() -> None:
    x, w, y = inputs()
    loss = lambda x, w, scale: fa.margin_softmax_loss(x, w, y, scale=scale)  # noqa: E731
    assert torch.autograd.gradcheck(loss, (x, w, learned()), atol=1e-6, rtol=1e-5)


def test_sub_centers_mixed_labels_and_weights() -> None:
    x, w, y = inputs()
    w = torch.cat([w.detach(), torch.randn(C, D, dtype=torch.float64)], 1).reshape(2 * C, D).requires_grad_()
    scale, options = learned(), {"sub_centers": 2, "sample_weight": torch.rand(N)}
    got, right = (
        loss(x, w, (y, y.roll(1), 0.3), scale=scale, **options)
        for loss in (fa.margin_softmax_loss, fa.reference.margin_softmax_loss)
    )
    torch.testing.assert_close(got, right, rtol=1e-10, atol=0)
    same_gradients(got, right, (x, w, scale), (x, w, scale))


def test_a_head_holds_the_scale_and_trains_it() -> None:
    x, _, y = inputs()
    for make in (fa.MarginHead, fa.PartialFC):
        head = make(D, C, scale=learned(12.0, torch.float32))
        assert dict(head.named_parameters()).keys() == {"weight", "scale"} and "scale" in head.state_dict()
        optimizer = torch.optim.SGD(head.parameters(), 0.1)
        head(x.float(), y).backward()
        assert head.scale.grad.isfinite() and head.scale.grad != 0
        optimizer.step()
        torch.testing.assert_close(head.logits(x.float()).amax() / head.scale, head.topk(x.float(), 1)[0].amax())
        with torch.no_grad():
            head.scale.fill_(-1)
        with pytest.raises(ValueError, match=r"scale must be finite and > 0; got -1\.0"):
            head(x.float(), y)


def adacos(x: Tensor, w: Tensor, y: Tensor, before: float) -> float:
    """Equations 15 to 17 of the paper, rows one by one."""
    cosine = (F.normalize(x) @ F.normalize(w).T).tolist()
    counted = [row for row in range(len(y)) if y[row] >= 0]
    sums = [sum(math.exp(before * cosine[row][j]) for j in range(C) if j != y[row]) for row in counted]
    angles = sorted(math.acos(cosine[row][y[row]]) for row in counted)
    median = angles[(len(angles) - 1) // 2]
    return math.log(sum(sums) / len(sums)) / math.cos(min(math.pi / 4, median))


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_adacos_follows_the_paper(name: str, delayed: bool) -> None:
    """Three steps; the loss and its gradients with the scale of the step, which has no gradient."""
    scale = fa.AdaCos(delayed=delayed)
    value = math.sqrt(2) * math.log(C - 1)
    for step in range(3):
        x, w, y = inputs(step)
        got = LOSSES[name](x, w, y, margin=fa.CosFace(0.2), scale=scale)
        new = adacos(x.detach(), w.detach(), y, value)
        right = by_formula(x, w, y, torch.tensor(value if delayed else new, dtype=torch.float64))
        torch.testing.assert_close(got, right, rtol=1e-10, atol=0)
        same_gradients(got, right, (x, w), (x, w))
        assert scale.scale.item() == pytest.approx(new, rel=1e-11) and abs(new - value) > 0.01
        value = new
    scale.eval()
    x, w, y = inputs(7)
    got = LOSSES[name](x, w, y, margin=fa.CosFace(0.2), scale=scale)
    torch.testing.assert_close(got, by_formula(x, w, y, torch.tensor(value, dtype=torch.float64)), rtol=1e-10, atol=0)
    assert scale.scale.item() == pytest.approx(value, rel=1e-11)


def test_adacos_by_hand() -> None:
    """Rows at 0°, 60° and 90°, negatives of exponentials 2 and 4: the median is 60°, so ln 3 is divided by cos 45°."""
    scale = fa.AdaCos()
    lse, cosine = torch.tensor([2.0, 4.0, 9.0, 3.0]).log(), torch.tensor([1.0, 0.5, 0.1, 0.0])
    counted = torch.tensor([True, True, False, True])
    new = scale.rescale(lse, cosine, counted, torch.tensor(5.0))
    assert new.item() == pytest.approx(math.log(3) * math.sqrt(2), rel=1e-6)
    assert scale.rescale(lse - 9, cosine, counted, torch.tensor(5.0)) == 5  # the formula would be below 0
    assert scale.rescale(lse, cosine, ~counted & counted, torch.tensor(5.0)) == 5  # no row counts


def test_adacos_is_saved_and_undone_with_the_head() -> None:
    """Its buffer is in the state_dict and stays fp64; a step that CenterSGD skips leaves it as it was."""
    x, _, y = inputs()
    head = fa.PartialFC(D, C, scale=fa.AdaCos(), center_optimizer=fa.CenterSGD(0.1))
    head(x.float(), y).backward()
    before = head.scale.scale.clone()
    other = fa.PartialFC(D, C, scale=fa.AdaCos(), center_optimizer=fa.CenterSGD(0.1))
    other.load_state_dict(head.bfloat16().state_dict())
    assert other.scale.scale.dtype == torch.float64 and torch.equal(other.scale.scale, before)
    wrong = x.float().detach().clone()
    wrong[0, 0] = math.nan
    other(2 * wrong.requires_grad_(), y).backward()
    assert torch.equal(other.scale.scale, before)
    other(x.float().detach().requires_grad_(), y.roll(1)).backward()
    assert not torch.equal(other.scale.scale, before)


@pytest.mark.parametrize("make", [learned, fa.AdaCos], ids=["learned", "AdaCos"])
def test_checkpoints_hold_the_scale_to_the_bit(make: Callable[[], Any], tmp_path: Path) -> None:
    x, _, y = inputs()
    head, other = (fa.PartialFC(D, C, scale=make(), margin=fa.AdaFace()) for _ in range(2))
    head(x.float(), y)
    if isinstance(head.scale, nn.Parameter):
        with torch.no_grad():
            head.scale.fill_(1 / 3)
    fa.checkpoint.save(tmp_path, head)
    fa.checkpoint.load(tmp_path, other)
    saved, loaded = head.state_dict(), other.state_dict()
    assert saved.keys() == loaded.keys() and any(name.startswith("scale") for name in saved)
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_adacos_in_a_checkpointed_step() -> None:
    """The recomputation has the scale of the first time."""
    x, _, y = inputs()
    head = fa.MarginHead(D, C, scale=fa.AdaCos(), dtype=torch.float64)
    plain = copy.deepcopy(head)
    for _ in range(2):
        one, other = x.detach().requires_grad_(), x.detach().requires_grad_()
        torch.utils.checkpoint.checkpoint(head, one, y, use_reentrant=False).backward()
        plain(other, y).backward()
        assert torch.equal(head.scale.scale, plain.scale.scale)
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [learned, fa.AdaCos], ids=["learned", "AdaCos"])
def test_compiled_once_for_all_values(make: Callable[[], Any], backend: str) -> None:
    """Inside a graph the scale is unknown: the path that is right for any of them runs."""
    torch._dynamo.reset()
    x, _, y = inputs()
    head = fa.MarginHead(D, C, scale=make(), dtype=torch.float64, backend=backend)
    plain = copy.deepcopy(head)
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(head, fullgraph=True, backend=count)
    for step in range(3):
        with torch.no_grad():
            for each in (head, plain):
                if isinstance(each.scale, nn.Parameter):
                    each.scale.fill_(5.0 + 300 * step)
        got, right = compiled(x, y), plain(x, y)
        torch.testing.assert_close(got, right, rtol=1e-9, atol=0)
        same_gradients(got, right, (x, *head.parameters()), (x, *plain.parameters()))
    assert count.frame_count == 1
    torch._dynamo.reset()


def test_a_scale_that_the_host_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, on the backend that takes a tensor as it is: no value is read, and the result is the same."""
    x, w, y = inputs()
    scale = learned()
    right = fa.margin_softmax_loss(x, w, y, scale=scale, backend="torch")
    monkeypatch.setattr(ops_module, "reads_for_free", lambda number: False)
    got = fa.margin_softmax_loss(x, w, y, scale=scale, backend="torch")
    torch.testing.assert_close(got, right, rtol=1e-12, atol=0)
    same_gradients(got, right, (x, w, scale), (x, w, scale))
    heads = [fa.PartialFC(D, C, scale=scale, center_optimizer=fa.CenterSGD(0.1), backend="torch") for _ in range(2)]
    for head in heads:
        head(x.float(), y).backward()
        monkeypatch.undo()
    torch.testing.assert_close(heads[0].weight, heads[1].weight, rtol=1e-5, atol=1e-6)


def test_wrong_scales() -> None:
    x, w, y = inputs()
    wrong: dict[str, Any] = {
        "scale must be 0-dim and floating-point as a tensor; got (1,) torch.float32": torch.ones(1),
        "scale must be 0-dim and floating-point as a tensor; got () torch.int64": torch.tensor(3),
        "scale must be finite and > 0; got 0": 0,
        "scale must be on embeddings' device cpu; got meta": torch.tensor(3.0, device="meta"),
    }
    for loss in (fa.margin_softmax_loss, partial(fa.margin_softmax_loss, backend="torch")):
        for message, scale in wrong.items():
            with pytest.raises(ValueError, match="^" + re.escape(message)):
                loss(x, w, y, scale=scale)
    for scale in (fa.AdaCos, "64", True, nn.Linear(1, 1)):
        with pytest.raises(TypeError, match=r"^scale must be a number"):
            fa.MarginHead(D, C, scale=scale)
    with pytest.raises(ValueError, match=re.escape("scale=AdaCos() needs at least 3 classes; got C=2")):
        fa.MarginHead(D, 2, scale=fa.AdaCos())
    with pytest.raises(ValueError, match=re.escape("scale must be a number with the modulated negatives of MVSoftmax")):
        fa.MarginHead(D, C, margin=fa.MVSoftmax(), scale=learned())
    with pytest.raises(TypeError, match="AdaCos: delayed must be a bool; got int"):
        fa.AdaCos(delayed=1)
