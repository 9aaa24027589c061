"""Logits with a gradient: with the margin their cross-entropy is the loss, over ranks too; great ones are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.distributed_helpers import run_ranks
from torch import Tensor

import fused_arcface as fa
from fused_arcface import stored_centers
from fused_arcface.engine import logits as logits_module
from fused_arcface.margins import registry
from fused_arcface.store.centers import CenterView


def _is_in_the_logits(margin: Any) -> bool:
    """Return false for a margin whose loss has more than the logits' cross-entropy: a penalty, or binary losses."""
    rows = torch.ones(1), torch.tensor([True])
    penalty = copy.deepcopy(margin).for_rows(*rows).penalty if hasattr(margin, "for_rows") else None
    return penalty is None and not hasattr(margin, "binary")


MARGINS = [margin for margin in registry.examples() if _is_in_the_logits(margin)]


def problem(sub_centers: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, dtype=torch.float64, generator=generator)
    w = torch.randn(9 * sub_centers, 5, dtype=torch.float64, generator=generator)
    return x, w, torch.tensor([0, 8, 3, -100, 3, 5])


@pytest.mark.parametrize("sub_centers", [1, 2])
@pytest.mark.parametrize("margin", MARGINS, ids=repr)
def test_their_cross_entropy_is_the_loss(margin: Any, sub_centers: int) -> None:
    x, w, y = problem(sub_centers)
    results = []
    for through_logits in (False, True):
        own = copy.deepcopy(margin)
        head = fa.MarginHead(5, 9, margin=own, scale=12.0, sub_centers=sub_centers, dtype=torch.float64)
        head.weight.data.copy_(w)
        state = {name: each.clone() for name, each in head.state_dict().items()}
        if not through_logits:
            head.eval()
        leaf = x.clone().requires_grad_()
        loss = F.cross_entropy(head.logits(leaf, y), y) if through_logits else head(leaf, y)
        loss.backward()
        results.append((loss.detach(), leaf.grad, head.weight.grad))
        assert all(torch.equal(each, head.state_dict()[name]) for name, each in state.items())
        assert head.training == through_logits and getattr(own, "training", through_logits) == through_logits
    for mine, right in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-10)


def _over_ranks(with_target: bool) -> dict[str, Tensor]:
    distributed = torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    x, w, y = problem()
    head = fa.PartialFC(5, 9, margin=fa.CosFace(0.2), scale=12.0, dtype=torch.float64)
    head.load_full_weight(w)
    rows = slice(0, 2) if rank == 0 and world == 2 else slice(2 if world == 2 else 0, 6)
    leaf = x[rows].clone().requires_grad_()
    logits = head.logits(leaf, y[rows] if with_target else None)
    (logits.sin() * torch.arange(1.0, 10.0)).sum().backward()
    return {"logits": logits.detach(), "d_x": leaf.grad, "d_w": head.weight.grad}


@pytest.mark.distributed
@pytest.mark.parametrize("with_target", [False, True])
def test_two_ranks_equal_one_process(with_target: bool) -> None:
    alone, parts = _over_ranks(with_target), run_ranks(2, _over_ranks, with_target)
    assert alone["d_x"].abs().max() > 0
    for name, right in alone.items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), right, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("make", [fa.MarginHead, fa.PartialFC])
def test_a_margin_of_each_class_and_a_scale_that_adapts(make: Any) -> None:
    x, w, y = problem()
    margin = fa.ClassMargin(torch.arange(9) / 20)
    head = make(5, 9, margin=margin, scale=fa.AdaCos(), dtype=torch.float64).eval()
    head.weight.data.copy_(w)
    torch.testing.assert_close(F.cross_entropy(head.logits(x, y), y), head(x, y), rtol=1e-9, atol=0)


@pytest.mark.parametrize("make", [fa.MarginHead, fa.PartialFC])
def test_a_learned_scale(make: Any) -> None:
    """One head alone gives the scale a gradient: over ranks it would be another one on each."""
    x, w, _ = problem()
    scale = torch.nn.Parameter(torch.tensor(12.0, dtype=torch.float64))
    head = make(5, 9, scale=scale, dtype=torch.float64)
    head.weight.data.copy_(w)
    logits = head.logits(x)
    logits.sum().backward()
    torch.testing.assert_close(logits, 12 * F.normalize(x) @ F.normalize(w).T, rtol=1e-12, atol=1e-12)
    if make is fa.PartialFC:
        assert scale.grad is None
    else:
        torch.testing.assert_close(scale.grad, logits.detach().sum() / 12)


def test_class_centers_in_host_memory_give_the_embeddings_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The centers are read in pieces, here of two classes."""
    monkeypatch.setattr(stored_centers, "_CLASSES_AT_ONCE", 2)
    x, w, y = problem(sub_centers=2)
    results = []
    for storage in ("device", "host"):
        head = fa.PartialFC(
            5, 9, margin=fa.CosFace(0.2), sub_centers=2, sample_rate=0.5, center_optimizer=fa.CenterSGD(lr=0.1),
            dtype=torch.float64, center_storage=storage,
        )  # fmt: skip
        head.load_full_weight(w)
        if storage == "host":  # as on a GPU, where weight is elsewhere
            view = CenterView(head.weight.shape, head.weight.dtype, head.device, lambda a, b, own=head.weight: own[a:b])
            monkeypatch.setattr(head, "_view", lambda view=view: view)
        leaf = x.clone().requires_grad_()
        logits = head.logits(leaf, y)
        logits.square().sum().backward()
        assert head.weight.grad is None
        results.append((logits.detach(), leaf.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def test_center_sgd_gets_no_gradient_from_them() -> None:
    head = fa.PartialFC(5, 9, center_optimizer=fa.CenterSGD(lr=0.1), dtype=torch.float64)
    x, before = problem()[0].requires_grad_(), head.weight.detach().clone()
    head.logits(x).square().sum().backward()
    assert x.grad.abs().max() > 0 and head.weight.grad is None and torch.equal(head.weight, before)


@pytest.mark.parametrize("make", [fa.MarginHead, fa.PartialFC])
def test_refused(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, y = problem()
    with pytest.raises(ValueError, match=r"target must be None with UniFace: its losses are no softmax"):
        make(5, 9, margin=fa.UniFace(), dtype=torch.float64).logits(x, y)
    with pytest.raises(ValueError, match=r"target must be in \[0, C=9\)"):
        make(5, 9, dtype=torch.float64).logits(x, y + 9)
    monkeypatch.setattr(logits_module, "GREATEST", 53)
    with pytest.raises(ValueError, match=r"got \(N=6, C=9\), 54 numbers: take fewer rows, topk\(\), or the loss"):
        make(5, 9, dtype=torch.float64).logits(x)
