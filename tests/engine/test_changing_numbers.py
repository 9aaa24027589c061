"""A scale and a margin that change from step to step: torch.compile makes no graph for each value."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest
import torch
from support.cases import Case, make_inputs
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import fused_arcface as fa
from fused_arcface.margins import at_strength

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("_fresh_compiler")]


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_right(
    compiled: object, head: fa.MarginHead, x: torch.Tensor, target: torch.Tensor, rtol: float = 1e-12
) -> None:
    """The oracle's loss and gradients, in fp64, where a number that was rounded to fp32 on its way would be seen."""
    loss = compiled(x, target)
    right = fa.reference.margin_softmax_loss(x, head.weight, target, margin=head.margin, scale=head.scale)
    torch.testing.assert_close(loss, right, rtol=rtol, atol=0)
    inputs = (x, head.weight)
    for mine, theirs in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(right, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def head_and_rows(backend: str) -> tuple[fa.MarginHead, torch.Tensor, torch.Tensor]:
    head, (x, _, target, _) = fa.MarginHead(33, 97, dtype=torch.float64, backend=backend), make_inputs(Case())
    return head, x.double().requires_grad_(), target


SHARES = [step / 20 for step in range(1, 21)]
MARGINS = {
    "ArcFace": lambda share: fa.ArcFace(0.5 * share),
    "CosFace": lambda share: fa.CosFace(0.35 * share),
    "SphereFace": lambda share: fa.SphereFace(1 + 0.7 * share),
    "CombinedMargin": lambda share: fa.CombinedMargin(1 + 0.1 * share, 0.3 * share, 0.2 * share, "fold"),
    "InterTopK": lambda share: at_strength(fa.InterTopK(fa.ArcFace(0.2, "continuous")), share),
    "MVSoftmax": lambda share: at_strength(fa.MVSoftmax(fa.ArcFace(0.5)), share),
    "InterclassFilter": lambda share: at_strength(fa.InterclassFilter(fa.ArcFace(0.5)), share),
}


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_margin_that_changes_does_not_make_a_graph_each(backend: str, name: str) -> None:
    """Two graphs: the first value's, and one for all others."""
    head, x, target = head_and_rows(backend)
    count = CompileCounter()
    compiled = torch.compile(head, fullgraph=True, backend=count)
    for share in SHARES:
        head.margin = MARGINS[name](share)
        # The kernels' fp64 exponentials of InterTopK's raised negatives differ by 1.1e-12 in the loss.
        assert_right(compiled, head, x, target, rtol=1e-11 if name == "InterTopK" else 1e-12)
    assert count.frame_count == 2


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_scale_that_changes_does_not_make_a_graph_each(backend: str) -> None:
    """Two graphs as well; a third where sums need a shift.

    A schema that says ``float`` would have each value traced anew, until torch.compile gives up at the ninth."""
    head, x, target = head_and_rows(backend)
    count = CompileCounter()
    compiled = torch.compile(head, fullgraph=True, backend=count)
    for scale in (14.1 + 50 * share for share in SHARES):
        head.scale = scale
        assert_right(compiled, head, x, target)
    assert count.frame_count == 2
    for scale in (700.3, 800.7):
        head.scale = scale
        assert_right(compiled, head, x, target)
    assert count.frame_count == 3


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_share_of_mixed_labels_that_changes_does_not_make_a_graph_each(dynamic: bool | None) -> None:
    """A number as mixup draws it in each step. With ``dynamic=True`` also global numbers are symbols."""
    head, x, target = head_and_rows("cpu")
    count = CompileCounter()
    compiled = torch.compile(head, fullgraph=True, backend=count, dynamic=dynamic)
    for share in SHARES[:12]:
        labels = (target, target.flip(0), share)
        loss, right = compiled(x, labels), fa.reference.margin_softmax_loss(x, head.weight, labels)
        torch.testing.assert_close(loss, right, rtol=1e-12, atol=0)
        mine, theirs = (torch.autograd.grad(each, x)[0] for each in (loss, right))
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    assert count.frame_count <= 2


@pytest.mark.skipif(" " in tempfile.gettempdir(), reason="torch's inductor hands g++ paths without quoting them")
def test_inductor_makes_one_graph_for_numbers_that_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with another compiler: inductor has no unknown numbers, so they reach the operators as tensors."""
    # Without a pool of processes, each of which imports torch.
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    head, x, target = head_and_rows("cpu")
    count = CompileCounterWithBackend("inductor")
    compiled = torch.compile(head, fullgraph=True, backend=count)
    for share in SHARES[:10]:
        head.margin, head.scale = fa.ArcFace(0.5 * share), 14.1 + 50 * share
        assert_right(compiled, head, x, target)
    assert count.frame_count == 2
