"""Margins with a state: casts, recomputation, and the ranks of a data-parallel head."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from support.distributed_helpers import run_ranks
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fused_arcface as fa
from fused_arcface.app.lab.heads import ReferenceHead
from fused_arcface.margins import RowMargin

D, C = 8, 10


class Own(torch.nn.Module):
    """A user's margin that counts its steps, with a gradient through the norm and a penalty."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, target_cosine: Tensor) -> Tensor:
        return target_cosine - 0.1

    def for_rows(self, norms: Tensor, counted: Tensor) -> RowMargin:
        if self.training:
            self.seen.add_(norms.detach().sum())
        share = norms / self.seen.clone()
        return RowMargin(lambda cosine: cosine - 0.3 * share, penalty=0.1 * share)


MARGINS: dict[str, Callable[[], torch.nn.Module]] = {
    "AdaFace": lambda: fa.AdaFace(rate=0.3),
    "ElasticFace": lambda: fa.ElasticFace(0.4, 0.1),
    "ElasticFace+": lambda: fa.ElasticFace(0.4, 0.1, "cos", plus=True),
    "CurricularFace": lambda: fa.CurricularFace(rate=0.3),
    "a user's own": Own,
}
HEADS = {"fused": fa.MarginHead, "reference": ReferenceHead}


def _head(name: str, kind: str = "fused") -> fa.MarginHead:
    torch.manual_seed(0)
    return HEADS[kind](D, C, margin=MARGINS[name](), scale=8)


def _batch(step: int, rows: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, D, generator=generator) * torch.linspace(1, 40, rows)[:, None]
    return x.requires_grad_(), torch.randint(C, (rows,), generator=generator)


def _state(head: torch.nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in head.buffers()]


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["AdaFace", "CurricularFace", "ElasticFace"])
def test_running_statistics_stay_in_fp32_through_a_cast(name: str, cast: torch.dtype) -> None:
    """The state follows from the batches alone: after 50 of them it is that of a head in fp32, to the rounding of its
    inputs.
    """
    heads = [_head(name), _head(name).to(cast)]
    with torch.no_grad():
        for step in range(50):
            x, y = _batch(step)
            for head in heads:
                head(x.to(head.weight.dtype), y)
    assert [buffer.dtype for buffer in heads[1].buffers()] == [buffer.dtype for buffer in heads[0].buffers()]
    for mine, right in zip(heads[1].buffers(), heads[0].buffers(), strict=True):
        torch.testing.assert_close(mine, right, rtol=2e-3, atol=2e-3)
    saved = {key: each.to(cast) if each.is_floating_point() else each for key, each in heads[0].state_dict().items()}
    heads[1].load_state_dict(saved, assign=True)
    assert [buffer.dtype for buffer in heads[1].buffers()] == [buffer.dtype for buffer in heads[0].buffers()]


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", MARGINS)
def test_a_recomputed_step_is_the_same_step(name: str, use_reentrant: bool, kind: str) -> None:
    """Three steps, the second of two batches whose losses are added, as without activation checkpointing."""
    heads = [_head(name, kind), _head(name, kind)]
    for numbers in ((0,), (1, 2), (3,)):
        results = []
        for head, recomputes in zip(heads, (False, True), strict=True):
            head.weight.grad = None
            xs, losses = [], []
            for number in numbers:
                x, y = _batch(number)
                xs.append(x)
                losses.append(checkpoint(head, x, y, use_reentrant=use_reentrant) if recomputes else head(x, y))
            before = _state(head)
            torch.stack(losses).sum().backward()
            assert all(map(torch.equal, _state(head), before))
            assert head.weight.grad is not None
            results.append([*losses, head.weight.grad.clone(), *(x.grad for x in xs), *before])
        for mine, right in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-6, atol=1e-7)
        with torch.no_grad():
            for head in heads:
                head.weight -= 0.1 * head.weight.grad


def test_a_step_of_long_ago_cannot_be_recomputed() -> None:
    head = _head("ElasticFace")
    loss = checkpoint(head, *_batch(0), use_reentrant=False)
    for step in range(1, 9):
        head(*_batch(step))
    with pytest.raises(RuntimeError, match=r"keep the head outside of torch\.utils\.checkpoint"):
        loss.backward()


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", [*MARGINS, "AdaCos"])
def test_a_compiled_step_is_not_recomputed(name: str, whole: bool) -> None:
    """A compiled recomputation would draw or update again: ElasticFace's gradient by x was 3.6 % off."""
    torch._dynamo.reset()
    head = fa.MarginHead(D, C, scale=fa.AdaCos()) if name == "AdaCos" else _head(name)

    def recomputed(x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = checkpoint(step, x, y, use_reentrant=False)
        return loss

    step = head if whole else torch.compile(head, backend="aot_eager")
    loss = (torch.compile(recomputed, backend="aot_eager") if whole else recomputed)(*_batch(0))
    before = _state(head)
    with pytest.raises(RuntimeError, match=r"keep the head outside of torch\.utils\.checkpoint"):
        loss.backward()
    assert all(map(torch.equal, _state(head), before))


def test_a_head_in_eval_changes_nothing() -> None:
    for name in MARGINS:
        head = _head(name).eval()
        before = _state(head)
        checkpoint(head, *_batch(0), use_reentrant=False).backward()
        assert all(map(torch.equal, _state(head), before))


def _train(head: torch.nn.Module, own: slice, use_reentrant: bool | None = None) -> list[Tensor]:
    """Three steps on these rows of each batch; the centers and the state afterwards, and each step's gradient by x."""
    optimizer, gradients = torch.optim.SGD(head.parameters(), 0.1), []
    for step in range(3):
        x, y = _batch(step)
        mine = x.detach()[own].double().requires_grad_()
        if use_reentrant is None:
            loss = head(mine, y[own])
        else:
            loss = checkpoint(head, mine, y[own], use_reentrant=use_reentrant)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert mine.grad is not None
        gradients.append(mine.grad)
    return [*(each.detach() for each in head.parameters()), *_state(head), *gradients]


def _on_ranks() -> dict[str, list[Tensor]]:
    rank = torch.distributed.get_rank()
    own, results = slice(3 * rank, 3 * rank + 3), {}
    for name in MARGINS:
        for kind in HEADS:
            head = DistributedDataParallel(_head(name, kind).double(), broadcast_buffers=False)
            results[f"{name}, {kind}"] = _train(head, own)
        recomputing = DistributedDataParallel(_head(name).double(), broadcast_buffers=False)
        results[f"{name}, recomputed"] = _train(recomputing, own, use_reentrant=False)
    # Other numbers of rows, and rows that do not count: the state alone is compared.
    head = _head("AdaFace")
    x, y = _batch(0)
    y[1] = -100
    head(*((x[:2], y[:2]) if rank == 0 else (x[2:], y[2:])))
    results["uneven"] = _state(head)
    return results


@pytest.mark.distributed
def test_ranks_train_as_one_process_does() -> None:
    first, second = run_ranks(2, _on_ranks)
    for name in MARGINS:
        for kind in HEADS:
            right = _train(_head(name, kind).double(), slice(None))
            *shared, d0, d1, d2 = right
            for case in (f"{name}, {kind}", f"{name}, recomputed"):
                for results, own in ((first, slice(0, 3)), (second, slice(3, 6))):
                    # A rank's loss is the mean over its rows, half of all.
                    expected = [*shared, *(2 * each[own] for each in (d0, d1, d2))]
                    for mine, theirs in zip(results[case], expected, strict=True):
                        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=f"{case}: {mine}, {theirs}")
    head = _head("AdaFace")
    x, y = _batch(0)
    y[1] = -100
    head(x, y)
    for results in (first, second):
        torch.testing.assert_close(results["uneven"], _state(head), rtol=1e-6, atol=0)


def test_copies_have_a_state_of_their_own() -> None:
    head = _head("ElasticFace")
    other = copy.deepcopy(head)
    loss = checkpoint(other, *_batch(0), use_reentrant=False)
    head(*_batch(1))
    loss.backward()
    assert [int(each.margin.step) for each in (head, other)] == [1, 1]


def test_the_default_dtype_changes_no_state():
    def state() -> dict[str, torch.dtype]:
        optimizer = fa.CenterSGD(0.1, momentum_dtype=torch.int8)
        head = fa.PartialFC(D, C, dtype=torch.float32, margin=fa.AdaFace(), center_optimizer=optimizer)
        modules = [head, fa.CurricularFace(), fa.SphereFace2(), fa.UniFace(), fa.AdaCos()]
        return {f"{at} {name}": each.dtype for at, one in enumerate(modules) for name, each in one.state_dict().items()}

    expected = state()
    torch.set_default_dtype(torch.float64)
    try:
        assert state() == expected
    finally:
        torch.set_default_dtype(torch.float32)
