"""Margins that differ from row to row: their formulas by hand, their gradients, their state, in one process and two."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from cases import Case, Inputs, make_inputs, run
from distributed_helpers import run_ranks
from torch import Tensor

import fused_arcface as fa

COUNTED = torch.tensor([True, True])


def fixed_adaface(mean: float = 20.0, std: float = 5.0) -> fa.AdaFace:
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
    none.eval().for_rows(torch.tensor([1.0, 2.0]), COUNTED)
    assert none.norm_mean == margin.norm_mean and none.norm_std == margin.norm_std


def test_adaface_state_belongs_to_the_head() -> None:
    head = fa.MarginHead(4, 5, margin=fa.AdaFace())
    x, y = 30 * torch.randn(6, 4), torch.arange(6) % 5
    head(x, y)
    assert set(head.state_dict()) == {"weight", "margin.norm_mean", "margin.norm_std"}
    other = fa.MarginHead(4, 5, margin=fa.AdaFace())
    other.load_state_dict(head.state_dict())
    assert other.margin.norm_mean == head.margin.norm_mean != 20
    head.eval()(x, y)
    assert other.margin.norm_mean == head.margin.norm_mean


ADAPTIVE = [fixed_adaface(2.0, 1.0)]


@pytest.mark.parametrize("margin", ADAPTIVE, ids=repr)
@pytest.mark.parametrize("backend", ["reference", "cpu", "oracle"])
def test_gradcheck(margin: fa.AdaFace, backend: str) -> None:
    """In fp64, the norms held: they have no gradient in AdaFace's margin."""
    inputs = make_inputs(Case(6, 7, 5, "float64", "float64"))
    norms = inputs.embeddings.norm(dim=1, keepdim=True)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        if isinstance(margin, fa.AdaFace):
            x = norms * F.normalize(x)
        options = {"margin": margin, "scale": 8.0, "reduction": "none"}
        if backend == "oracle":
            return fa.reference.margin_softmax_loss(x, w, inputs.target, **options)
        return fa.margin_softmax_loss(x, w, inputs.target, backend=backend, **options)

    leaves = inputs.embeddings.requires_grad_(), inputs.weight.requires_grad_()
    assert torch.autograd.gradcheck(loss, leaves)


def _train_shard(margin: fa.AdaFace, inputs: Inputs, counts: list[int], steps: int) -> dict[str, Tensor]:
    """A few steps of this rank's rows; the loss, gradients and state after the last."""
    world = len(counts)
    rank = torch.distributed.get_rank() if world > 1 else 0
    first = sum(counts[:rank])
    rows = slice(first, first + counts[rank])
    head = fa.PartialFC(inputs.weight.shape[1], len(inputs.weight), margin=copy.deepcopy(margin), scale=16.0)
    head.to(inputs.weight.dtype)
    head.load_full_weight(inputs.weight)
    for _ in range(steps):
        head.zero_grad()
        x = inputs.embeddings[rows].clone().requires_grad_()
        loss = head(x, inputs.target[rows])
        loss.backward()
    return {
        "loss": loss.detach(),
        "d_embeddings": x.grad / world,
        "d_weight": head.weight.grad,
        **head.state_dict(prefix="state."),
    }


TRAINED = [fa.AdaFace(rate=0.5)]


@pytest.mark.parametrize("margin", TRAINED, ids=repr)
def test_two_ranks_equal_one_process(margin: fa.AdaFace) -> None:
    inputs = make_inputs(Case(9, 11, 6, "float64", "float64", geometry="ignored"))
    alone = _train_shard(margin, inputs, [9], 2)
    parts = run_ranks(2, _train_shard, margin, inputs, [6, 3], 2)
    for name, right in alone.items():
        sharded = name in ("d_embeddings", "d_weight", "state.weight")
        got = torch.cat([part[name] for part in parts]) if sharded else parts[0][name]
        torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-9)
        assert sharded or torch.equal(parts[0][name], parts[1][name])


@pytest.mark.parametrize("margin", TRAINED, ids=repr)
def test_trains_as_the_reference_does(margin: fa.AdaFace) -> None:
    ours, theirs = copy.deepcopy(margin), copy.deepcopy(margin)
    for step in range(3):
        inputs = make_inputs(Case(9, 23, 6, "float64", "float64", geometry="late"), seed=step)
        got = run(fa.margin_softmax_loss, inputs, margin=ours, backend="cpu")
        right = run(fa.reference.margin_softmax_loss, inputs, margin=theirs)
        for name in ("loss", "d_embeddings", "d_weight"):
            torch.testing.assert_close(getattr(got, name), getattr(right, name), rtol=1e-9, atol=1e-9)
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, theirs.get_buffer(name))


@pytest.mark.parametrize("margin", TRAINED, ids=repr)
def test_compiles(margin: fa.AdaFace) -> None:
    head = fa.MarginHead(5, 7, margin=copy.deepcopy(margin))
    other = copy.deepcopy(head)
    x, y = torch.randn(6, 5), torch.randint(7, (6,))
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), other(x, y))
    for name, buffer in head.named_buffers():
        torch.testing.assert_close(buffer, other.get_buffer(name))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fa.AdaFace("0.4"), TypeError, "AdaFace: margin must be a number; got str"),
        (lambda: fa.AdaFace(4), ValueError, "AdaFace: margin must be in [0, π) radians; got 4"),
        (lambda: fa.AdaFace(h=-1), ValueError, "AdaFace: h must be in [0, inf); got -1"),
        (lambda: fa.AdaFace(rate=0), ValueError, "AdaFace: rate must be in (0, 1]; got 0"),
    ],
)
def test_refused(make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        make()
    assert str(raised.value) == message


@pytest.mark.parametrize("margin", [fa.AdaFace(0.3, 0.5, 1.0)], ids=repr)
def test_readable(margin: fa.AdaFace) -> None:
    assert repr(eval(repr(margin), vars(fa))) == repr(margin)
    assert repr(copy.deepcopy(margin)) == repr(margin)
