import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support import distributed_helpers
from torch import nn

import fused_arcface as fa
from fused_arcface.compat import insightface

D, CLASSES = 8, 21


class TheirArcFace(nn.Module):
    """The operations of insightface's ArcFace in their order, in this test's own words: arccos and cos outside
    autograd.
    """

    def __init__(self, s: float = 64.0, m2: float = 0.5) -> None:
        super().__init__()
        self.s, self.m2 = s, m2

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rows = torch.where(labels != -1)[0]
        with torch.no_grad():
            angles = logits.detach().arccos()
            angles[rows, labels[rows].view(-1)] += self.m2
            shifted = angles.cos()
        return (logits + (shifted - logits).detach()) * self.s


class TheirArcFaceInPlace(TheirArcFace):
    """The same on the logits that it is given, as losses.py writes it."""

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rows = torch.where(labels != -1)[0]
        with torch.no_grad():
            logits.arccos_()
            logits[rows, labels[rows].view(-1)] += self.m2
            logits.cos_()
        return logits * self.s


def their_loss(margin, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """One rank of insightface's head with full logits."""
    cosines = F.linear(F.normalize(x), F.normalize(weight)).clamp(-1, 1)
    return F.cross_entropy(margin(cosines, y[:, None]), y)


def inputs(rows: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, D, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (rows,), generator=generator)


MARGINS = {
    "combined arcface": insightface.CombinedMarginLoss(64.0, 1.0, 0.5, 0.0),
    "combined cosface": insightface.CombinedMarginLoss(64.0, 1.0, 0.5, 0.4),
    "arcface": insightface.ArcFace(30.0, 0.3),
    "cosface": insightface.CosFace(),
    "filtered": insightface.CombinedMarginLoss(64.0, 1.0, 0.5, 0.0, interclass_filtering_threshold=0.3),
    "callable": TheirArcFace(),
    "in place": TheirArcFaceInPlace(),
}


def train(name: str, sample_rate: float) -> dict:
    head = insightface.PartialFC_V2(MARGINS[name], D, CLASSES, sample_rate)
    head.double()
    x, y = inputs()
    rows = slice(len(y) * head.rank // head.world_size, len(y) * (head.rank + 1) // head.world_size)
    x = x[rows].requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = head(x, y[rows, None])
    loss.backward()
    return {
        "loss": loss.detach(),
        "d_embeddings": x.grad / head.world_size,
        "d_weight": torch.cat(head.ranks.gather_rows(head.weight.grad, head.sharding.counts())),
        "weight": head.full_weight(),
    }


@pytest.mark.parametrize("name", MARGINS)
def test_one_rank_equals_the_operations_of_insightface(name):
    ours = train(name, 1.0)
    x, y = inputs()
    x, weight = x.requires_grad_(), ours["weight"].requires_grad_()
    margin = {"combined arcface": TheirArcFace(), "arcface": TheirArcFace(30.0, 0.3)}.get(name, MARGINS[name])
    loss = their_loss(margin, x, weight, y)
    loss.backward()
    torch.testing.assert_close(ours["loss"], loss.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours["d_embeddings"], x.grad, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(ours["d_weight"], weight.grad, rtol=1e-8, atol=1e-7)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "sample_rate"), [("arcface", 1.0), ("filtered", 0.5), ("callable", 1.0), ("in place", 0.5)]
)
def test_ranks_together_equal_one(name, sample_rate):
    expected = train(name, sample_rate)
    results = distributed_helpers.run_ranks(3, train, name, sample_rate)
    for result in results:
        torch.testing.assert_close(result["loss"], expected["loss"], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(result["d_weight"], expected["d_weight"], rtol=1e-8, atol=1e-7)
    together = torch.cat([result["d_embeddings"] for result in results])
    torch.testing.assert_close(together, expected["d_embeddings"], rtol=1e-8, atol=1e-9)


def test_past_pi_there_is_no_boundary():
    """cos(θ + m) itself, where the published heads' continuation would be cos θ - m·sin m."""
    cosine = torch.tensor([-0.99], dtype=torch.float64, requires_grad=True)
    margin = insightface.PartialFC_V2(insightface.ArcFace(), D, CLASSES).margin
    value = margin(cosine)
    value.backward()
    assert value.item() == pytest.approx(math.cos(math.acos(-0.99) + 0.5))
    assert cosine.grad.item() == 1


class CombinedMarginLoss(nn.Module):
    """The operations of insightface's class in their order, in this test's own words."""

    exact_gradient = False
    """The version of early 2022: arithmetic that autograd sees, and cos θ - m·sin m past θ + m = π."""

    def __init__(self, s=64.0, m1=1.0, m2=0.5, m3=0.0, interclass_filtering_threshold=0) -> None:
        super().__init__()
        self.s, self.m1, self.m2, self.m3 = s, m1, m2, m3
        self.interclass_filtering_threshold = interclass_filtering_threshold

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rows = torch.where(labels != -1)[0]
        if self.interclass_filtering_threshold > 0:
            dirty = (logits.detach() > self.interclass_filtering_threshold).float()
            dirty[rows] *= torch.ones(len(rows), logits.shape[1]).scatter_(1, labels[rows], 0)
            logits = (1 - dirty) * logits
        columns = labels[rows].view(-1)
        target = logits[rows, columns]
        if self.m3 > 0:
            logits[rows, columns] = target - self.m3
        elif self.exact_gradient:
            shifted = target * math.cos(self.m2) - (1 - target**2).sqrt() * math.sin(self.m2)
            past = target - self.m2 * math.sin(self.m2)
            logits[rows, columns] = torch.where(target > math.cos(math.pi - self.m2), shifted, past)
        else:
            with torch.no_grad():
                logits.arccos_()
                logits[rows, columns] += self.m2
                logits.cos_()
        return logits * self.s


def early() -> nn.Module:
    return type("CombinedMarginLoss", (CombinedMarginLoss,), {"exact_gradient": True})()


class OwnOfOurs(insightface.CombinedMarginLoss):
    """A user's subclass with a forward of its own."""

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return super().forward(logits, labels) + 0.1 * logits


def loss_and_gradients(head: insightface.PartialFC_V2) -> tuple[torch.Tensor, ...]:
    x, y = inputs()
    x.requires_grad_()
    loss = head(x, y)
    return loss.detach(), *torch.autograd.grad(loss, (x, head.weight))


def expect_theirs(head: insightface.PartialFC_V2, fused: bool) -> None:
    """Equality with one rank of insightface's head and the margin module's own forward; slow ones are warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = loss_and_gradients(head)
    assert not (fused and caught)
    x, y = inputs()
    x.requires_grad_()
    theirs = their_loss(head.margin_softmax, x, head.weight, y)
    for a, b in zip(ours, (theirs.detach(), *torch.autograd.grad(theirs, (x, head.weight))), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


SCHEDULES = {
    "m2": (lambda: insightface.CombinedMarginLoss(64.0, 1.0, 0.0, 0.0), {"m2": 0.5}, True),
    "m3": (lambda: insightface.CombinedMarginLoss(64.0, 1.0, 0.3, 0.0), {"m3": 0.4}, True),
    "s": (lambda: insightface.CombinedMarginLoss(16.0, 1.0, 0.3, 0.0), {"s": 64.0}, True),
    "filter": (
        lambda: insightface.CombinedMarginLoss(16.0, 1.0, 0.3, 0.0),
        {"interclass_filtering_threshold": 0.2},
        True,
    ),
    "arcface": (lambda: insightface.ArcFace(64.0, 0.1), {"margin": 0.5, "s": 32.0}, True),
    "cosface": (lambda: insightface.CosFace(64.0, 0.1), {"m": 0.4}, True),
    "theirs": (lambda: CombinedMarginLoss(m2=0.0), {"m2": 0.5, "interclass_filtering_threshold": 0.2}, True),
    "early": (early, {"m2": 0.3}, False),
    "a subclass": (lambda: OwnOfOurs(64.0, 1.0, 0.1, 0.0), {"m2": 0.5}, False),
    "a negative angle": (CombinedMarginLoss, {"m2": -0.2}, False),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_margin_that_changes_between_steps(name: str) -> None:
    make, changes, fused = SCHEDULES[name]
    head = insightface.PartialFC_V2(make(), D, CLASSES).double()
    expect_theirs(head, fused)
    before = loss_and_gradients(head)[0]
    for attribute, value in changes.items():
        setattr(head.margin_softmax, attribute, value)
    expect_theirs(head, fused)
    assert loss_and_gradients(head)[0] != before


def test_a_forward_of_the_instance_and_hooks_are_heard() -> None:
    head = insightface.PartialFC_V2(insightface.ArcFace(), D, CLASSES).double()
    handle = head.margin_softmax.register_forward_hook(lambda module, given, result: result * 0.5)
    expect_theirs(head, fused=False)
    handle.remove()
    head.margin_softmax.forward = lambda logits, labels: logits * 3.0
    expect_theirs(head, fused=False)


def test_a_look_at_the_margin_leaves_no_trace() -> None:
    """A margin of a known name that draws and counts is asked in a copy, and its generator is put back."""

    class CosFace(nn.Module):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.s, self.m = 64.0, 0.4

        def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return logits * self.s * torch.rand(())

    margin, before = CosFace(), torch.get_rng_state()
    insightface._fused(margin)
    assert margin.calls == 0 and torch.equal(torch.get_rng_state(), before)


def test_m1_set_later_is_refused_as_at_construction() -> None:
    head = insightface.PartialFC_V2(insightface.CombinedMarginLoss(64.0, 1.0, 0.5, 0.0), D, CLASSES)
    head.margin_softmax.m1 = 1.35
    x, y = inputs()
    with pytest.warns(UserWarning, match="stored"), pytest.raises(ValueError, match=r"m1 must be 1\.0 unless m3 > 0"):
        head(x.float(), y)


def test_a_fused_head_is_copied_and_pickled() -> None:
    head = insightface.PartialFC_V2(insightface.CombinedMarginLoss(64.0, 1.0, 0.5, 0.0), D, CLASSES).double()
    expected = loss_and_gradients(head)
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        for a, b in zip(loss_and_gradients(other), expected, strict=True):
            assert torch.equal(a, b)


def test_their_own_margin_objects_take_the_fused_path():
    head = insightface.PartialFC_V2(CombinedMarginLoss(), D, CLASSES)
    x, y = inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = head(x.float(), y)
    expected = fa.margin_softmax_loss(
        x.float(), head.weight, y, margin=fa.ArcFace(boundary="none", gradient="straight_through")
    )
    torch.testing.assert_close(loss, expected)


def test_the_filter_takes_the_fused_path():
    head = insightface.PartialFC_V2(MARGINS["filtered"], D, CLASSES)
    assert isinstance(head.margin, fa.InterclassFilter) and head.margin.threshold == 0.3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head(inputs()[0].float(), inputs()[1])


def test_other_callables_are_warned_of():
    head = insightface.PartialFC_V2(TheirArcFace(), D, CLASSES)
    x, y = inputs()
    with pytest.warns(UserWarning, match="TheirArcFace is no margin that the fused kernels know"):
        head(x.float(), y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head(x.float(), y)  # once


def test_attributes_state_and_dense_gradient():
    head = insightface.PartialFC_V2(insightface.ArcFace(), D, CLASSES, sample_rate=0.5, fp16=True)
    assert (head.rank, head.world_size, head.num_local, head.class_start) == (0, 1, CLASSES, 0)
    assert (head.num_sample, head.embedding_size, head.sample_rate, head.fp16) == (10, D, 0.5, True)
    assert isinstance(head.margin_softmax, insightface.ArcFace)
    assert not hasattr(head, "weight_index")
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    x, y = inputs()
    head(x.float(), y).backward()
    assert not head.weight.grad.is_sparse and torch.equal(head.weight_index, head.sampled)
    optimizer.step()
    state = head.state_dict()
    assert list(state) == ["weight"] and state["weight"].shape == (CLASSES, D)
    insightface.PartialFC_V2(insightface.ArcFace(), D, CLASSES).load_state_dict(state)


def uneven() -> float:
    head = insightface.PartialFC_V2(insightface.CosFace(), D, CLASSES)
    x, y = inputs(3)
    rows = slice(0, 3) if dist.get_rank() == 0 else slice(0, 0)
    return head(x[rows].float(), y[rows]).item()


@pytest.mark.distributed
def test_batches_of_any_size():
    losses = distributed_helpers.run_ranks(2, uneven)
    assert losses[0] == losses[1] and math.isfinite(losses[0])


def test_bad_arguments():
    with pytest.raises(TypeError, match="margin_loss must be callable; got float"):
        insightface.PartialFC_V2(0.5, D, CLASSES)
    with pytest.raises(ValueError, match=r"m1 must be 1\.0 unless m3 > 0"):
        insightface.CombinedMarginLoss(64.0, 1.35, 0.5, 0.0)


def test_exports_what_is_insightfaces_alone() -> None:
    own = {
        name
        for name, value in vars(insightface).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("fused_arcface")
    }
    older = {"PartialFC", "PartialFCAdamW"}
    assert own == set(insightface.__all__) == {"ArcFace", "CombinedMarginLoss", "CosFace", "PartialFC_V2"} | older


def test_logits_of_an_unknown_margin_are_exact_under_autocast() -> None:
    """At s = 64 a cosine in bf16 would be off by a quarter of a logit; the embeddings alone are rounded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        head = insightface.PartialFC_V2(lambda cosines, labels: 64 * cosines, D, CLASSES)
        x, y = torch.randn(6, D, generator=torch.Generator().manual_seed(1)), torch.arange(6)
        with torch.autocast("cpu", torch.bfloat16):
            loss = head(x, y)
    rows, centers = x.bfloat16().double(), head.weight.detach().double()
    right = F.cross_entropy(64 * F.normalize(rows) @ F.normalize(centers).T, y)
    torch.testing.assert_close(loss.double(), right, rtol=1e-5, atol=0)
