"""CenterSGD's update and the heads over the Triton kernels in the interpreter; see test_triton_interpreted.py."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed here")

from support.triton_cases import INTERPRETED, on_the_cpu

import fused_arcface as fa
from fused_arcface import backends, partial_fc
from fused_arcface.backends import cpu, triton
from fused_arcface.backends import torch as plain_torch
from fused_arcface.base.keyed_random import fold
from fused_arcface.base.permutation import Permutation
from fused_arcface.engine import ops
from fused_arcface.engine.shard import Shard
from fused_arcface.engine.terms import CenterStep, RowGradients
from fused_arcface.store import centers

pytestmark = INTERPRETED

FP64, FP32, BF16, INT8 = torch.float64, torch.float32, torch.bfloat16, torch.int8


@pytest.fixture(autouse=True)
def _triton_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with on_the_cpu(monkeypatch):
        yield


def _step(weight: Tensor, momentum_dtype: torch.dtype | None, classes: Tensor | None, active: bool) -> CenterStep:
    C, D = weight.shape
    buffer = units = None
    if momentum_dtype is not None:
        buffer = torch.randint(-127, 128, (C, D)).to(momentum_dtype)
        units = torch.rand(C, -(-D // 64)) * 1e-3 if momentum_dtype == INT8 else None
    return CenterStep(
        classes,
        buffer,
        units,
        0.3,
        0.0 if buffer is None else 0.9,
        0.02,
        -(2**62) - 12345,
        2**33 + 5,
        torch.tensor(active),
    )


def _updated(
    backend: object, arguments: tuple[Tensor, ...], coefficients: tuple[Tensor, ...], step: CenterStep
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Centers, momentum and its units after one step, all in memory of their own."""
    x, weight, target = arguments
    weight = weight.clone(memory_format=torch.preserve_format)
    buffer, units = (None if each is None else each.clone() for each in (step.momentum_buffer, step.momentum_scale))
    step = step._replace(momentum_buffer=buffer, momentum_scale=units)
    backend.update_centers(x, weight, target, RowGradients(20.0, *coefficients), step)  # type: ignore[attr-defined]
    return weight, buffer, units


CLASSES = {"all": None, "sampled": torch.tensor([0, 3, 4, 10]), "padded": torch.tensor([1, 2, 10, 11, 11])}


GRIDS = pytest.mark.parametrize("grid", ["few", pytest.param("all", marks=pytest.mark.full)])


@GRIDS
@pytest.mark.parametrize("chosen", CLASSES)
@pytest.mark.parametrize("momentum_dtype", [None, FP32, BF16, INT8])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64])
def test_step_of_the_same_gradient_is_the_same_to_the_bit(
    dtype: torch.dtype, momentum_dtype: torch.dtype | None, chosen: str, grid: str
) -> None:
    """Without coefficients the gradient is 0 in any arithmetic: the rest of the step is the reference's, bit by bit."""
    sizes = (70,)
    if chosen == "sampled" and dtype == BF16:
        sizes = (1, 64, 70, 513) if grid == "all" or momentum_dtype in (None, INT8) else (1, 64, 70)
    for D in sizes:
        x, weight, target = torch.randn(3, D).to(dtype), torch.randn(11, D).to(dtype), torch.tensor([0, 2, -1])
        none = torch.zeros(3, dtype=FP64 if dtype == FP64 else FP32)
        coefficients = torch.zeros(3, dtype=FP64), none, none
        for active in (True, False) if grid == "all" or D == 70 else (True,):
            step = _step(weight, momentum_dtype, CLASSES[chosen], active)
            right = _updated(plain_torch, (x, weight, target), coefficients, step)
            for name, mine, theirs in zip(
                ("weight", "momentum", "units"),
                _updated(triton, (x, weight, target), coefficients, step),
                right,
                strict=True,
            ):
                assert (mine is None) == (theirs is None)
                assert mine is None or torch.equal(mine, theirs), f"{name}, D = {D}"
            assert torch.equal(right[0], weight) != active


def test_class_centers_in_host_memory_train_as_those_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU: a padded sample, whose rows are fetched ahead into a buffer of their own."""
    monkeypatch.setattr(partial_fc, "_is_waited_for", lambda _: True)
    monkeypatch.setattr(centers, "waits", lambda _: True)
    recipe = fa.CenterSGD(0.1, momentum_dtype=INT8)
    heads = [
        fa.PartialFC(
            40, 60, sample_rate=0.2, center_optimizer=recipe, dtype=BF16, backend="triton", center_storage=storage
        )
        for storage in ("device", "host")
    ]
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(3, 40, generator=generator).to(BF16), torch.randint(0, 60, (3,), generator=generator)
        losses = []
        for head in heads:
            losses.append(head(x.requires_grad_(), y))
            losses[-1].backward()
        assert torch.equal(*losses)
    for name, tensor in heads[0]._held().items():
        assert torch.equal(tensor, heads[1]._held()[name])


def test_copies_of_rows_are_rounded_as_the_rows_themselves() -> None:
    """Rounding is keyed by the ids that come with the copies, not by their place."""
    x, weight, target = torch.randn(3, 70).to(BF16), torch.randn(11, 70).to(BF16), torch.tensor([0, 2, -1])
    none = torch.zeros(3)
    coefficients = torch.zeros(3, dtype=FP64), none, none
    rows = torch.tensor([7, 0, 10, 3])
    whole = _step(weight, INT8, rows.sort().values, True)
    assert whole.momentum_buffer is not None and whole.momentum_scale is not None
    copies = whole._replace(
        classes=None,
        momentum_buffer=whole.momentum_buffer[rows],
        momentum_scale=whole.momentum_scale[rows],
        row_ids=rows + whole.class_start,
    )
    for backend in (triton, plain_torch, cpu):
        right = _updated(backend, (x, weight, target), coefficients, whole)
        for mine, theirs in zip(_updated(backend, (x, weight[rows], target), coefficients, copies), right, strict=True):
            assert mine is not None and theirs is not None and torch.equal(mine, theirs[rows])


@pytest.mark.parametrize("chosen", CLASSES)
@pytest.mark.parametrize(
    ("algorithm", "dtype", "tolerance"), [("chunks", FP32, 1e-5), ("chunks", FP64, 1e-12), ("flash", BF16, 2e-2)]
)
def test_step_equals_the_reference(
    algorithm: str, dtype: torch.dtype, tolerance: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Centers in fp32 under embeddings of each algorithm's dtype, whose rounding the tolerance allows for."""
    monkeypatch.setenv("FUSED_ARCFACE_TRITON_ALGORITHM", algorithm)
    x, weight = torch.randn(5, 40).to(dtype), torch.randn(11, 40).to(torch.promote_types(dtype, FP32))
    weight = torch.cat([weight, weight], 1)[:, :40]  # rows with a gap between them
    target = torch.tensor([0, 1, -1, 2, 2])
    rows = torch.randn(2, 5).to(torch.promote_types(dtype, FP32))
    step = _step(weight, FP32 if dtype != FP64 else FP64, CLASSES[chosen], True)
    coefficients = torch.full((5,), 6.0, dtype=FP64), *rows
    right = _updated(plain_torch, (x, weight, target), coefficients, step)
    for mine, theirs in zip(_updated(triton, (x, weight, target), coefficients, step)[:2], right[:2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * 10)
    no_rows = (x[:0], weight, target[:0]), tuple(each[:0] for each in coefficients)
    for mine, theirs in zip(_updated(triton, *no_rows, step), _updated(plain_torch, *no_rows, step), strict=True):
        assert mine is None or torch.equal(mine, theirs)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100, 1001, 20_000, 10**9 + 7])
def test_permutation_equals_that_of_tables(size: int) -> None:
    """In both directions, for keys of 64 bits; more ids than a block has, and none."""
    ids = torch.arange(size) if size < 2000 else torch.randint(size, (300,))
    for key in (fold(1, size), (1 << 63) + 5, 0):
        mine, tables = triton.Permutation(size, key, ids.device), Permutation(size, key, ids.device)
        images = tables(ids)
        assert torch.equal(mine(ids), images)
        assert torch.equal(mine.inverse(images), ids)
        assert len(mine(ids[:0])) == 0


HEADS = {
    "full rate": {"scale": 64.0},
    "range of exponentials": {"scale": 89.0},
    "s = 1000": {"scale": 1000.0, "margin": fa.ArcFace(0.3, "fold")},
    "sampled": {"sample_rate": 0.2},
    "optimizer": {"center_optimizer": fa.CenterSGD(lr=0.1, weight_decay=1e-3)},
    "sampled optimizer": {"sample_rate": 0.2, "center_optimizer": fa.CenterSGD(lr=0.1, momentum_dtype=INT8)},
    "sampled optimizer, s = 1000": {"sample_rate": 0.2, "scale": 1000.0, "center_optimizer": fa.CenterSGD(lr=0.01)},
}


@GRIDS
@pytest.mark.parametrize("name", HEADS)
def test_partial_fc_trains_as_the_reference_does(name: str, grid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step by step from the same centers, with an ignored and an invalid label, statistics, N = 1 and N = 0."""
    monkeypatch.setattr(ops, "check_target_range", lambda *_: None)  # on a GPU nobody waits for it
    monkeypatch.setattr(partial_fc, "_is_waited_for", lambda _: True)
    for D, rows in ((70, 9), (1, 3), (513, 1), (7, 0)):
        heads = [fa.PartialFC(D, 60, backend=backend, seed=D, **HEADS[name]) for backend in ("triton", "torch")]
        for invalid in (60, 5) if grid == "all" or rows > 3 else (5,):
            x, y = torch.randn(rows, D), torch.randint(0, 60, (rows,))
            if rows > 3:
                y[0], y[1] = -100, invalid
            results = []
            for head in heads:
                mine = x.clone().requires_grad_()
                loss, stats = head(mine, y, return_stats=True)
                loss.backward()
                gradient = head.weight.grad
                state = {} if head.center_optimizer is None else head.center_optimizer.state[head.weight]
                results.append(
                    [loss, *stats, mine.grad, head.weight.detach(), *state.values(), head.sampled]
                    + ([] if gradient is None else [gradient.to_dense()])
                )
                head.weight.grad = None
            # In one dimension the centers' projected gradient is nothing but rounding.
            compared = 6 if D == 1 else None
            for mine, theirs in zip(*(result[:compared] for result in results), strict=True):
                size = 1 if mine.numel() == 0 else max(1.0, theirs.double().nan_to_num(0, 0, 0).abs().max().item())
                atol = 2e-6 * heads[0].scale * size if mine.is_floating_point() else 0
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=atol, equal_nan=True)
            assert rows < 4 or results[0][1].isnan().tolist() == [False, invalid == 60] + [False] * (rows - 2)


@pytest.mark.parametrize("recipe", [None, fa.CenterSGD(lr=0.1, momentum_dtype=INT8)], ids=["ordinary", "fused"])
@pytest.mark.parametrize("scale", [64.0, 1000.0])
def test_a_sampled_step_copies_no_centers(
    scale: float, recipe: fa.CenterSGD | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels gather the sample's rows in every stage, also with both flash passes and with a pass for maxima."""
    results = []
    for gathers in (True, False):
        with monkeypatch.context() as patch:
            if gathers:
                patch.setattr(Shard, "centers", lambda *_: pytest.fail("the centers are copied"))
            else:
                row = backends.registry._ROWS["triton"]
                row = dataclasses.replace(row, features=row.features - {"gathering"})
                patch.setitem(backends.registry._ROWS, "triton", row)
            head = fa.PartialFC(
                32, 60, scale=scale, sample_rate=0.3, center_optimizer=recipe, dtype=BF16, backend="triton"
            )
            x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).to(BF16).requires_grad_()
            loss = head(x, torch.tensor([0, 7, -100, 59, 7]))
            loss.backward()
            gradient = None if head.weight.grad is None else head.weight.grad.to_dense()
            results.append((loss, x.grad, head.weight.detach(), gradient))
    for mine, theirs in zip(*results, strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)


@pytest.mark.parametrize(("storage", "rate"), list(itertools.product([(FP32, INT8), (BF16, BF16)], [1.0, 0.3])))
def test_training_with_center_sgd(storage: tuple[torch.dtype, torch.dtype], rate: float) -> None:
    """Ten steps of bf16 embeddings bring the loss where the reference brings it; rows outside the sample stay, to the
    bit."""
    recipe = fa.CenterSGD(lr=0.5, momentum_dtype=storage[1])
    x, y = torch.randn(12, 32).bfloat16(), torch.arange(12) * 3
    losses = []
    for backend in ("triton", "torch"):
        head = fa.PartialFC(
            32, 40, scale=16, sample_rate=rate, center_optimizer=recipe, dtype=storage[0], backend=backend
        )
        first = last = head(x, y).item()
        for _ in range(10):
            before = head.weight.detach().clone()
            loss = head(x, y)
            loss.backward()
            last = loss.item()
            changed = (head.weight != before).any(1).nonzero().squeeze(1)
            assert set(changed.tolist()) <= set(head.sampled.tolist())
        losses.append((first, last))
    assert losses[0][1] < 0.8 * losses[0][0]
    # A rounding of 2⁻⁷ in each gradient, of a loss that starts at 14.
    assert losses[0] == pytest.approx(losses[1], abs=5e-3)


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    head = fa.PartialFC(16, 20, center_optimizer=fa.CenterSGD(lr=0.1), backend="triton")
    before = head.weight.detach().clone()
    x = torch.randn(4, 16)
    x[1, 2] = torch.nan
    head(x, torch.arange(4)).backward()
    assert torch.equal(head.weight, before)
