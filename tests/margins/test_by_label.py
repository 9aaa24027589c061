"""Margins that know the label: cross_entropy over logits that have each class's own margin, in fp64."""

from __future__ import annotations

import math
import re
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_arcface as fa
from fused_arcface.margins import Boundary, LabelMargin

N, C, D, S = 12, 17, 6, 20.0
MARGINS = torch.linspace(0.05, 0.6, C, dtype=torch.float64)
FORMULAS = {
    "cos": (fa.ClassMargin(MARGINS), lambda cosine, margin: cosine - margin),
    "arc": (
        fa.ClassMargin(MARGINS.tolist(), kind="arc"),
        lambda cosine, margin: torch.where(
            cosine.acos() + margin <= math.pi, (cosine.acos() + margin).cos(), cosine - margin * margin.sin()
        ),
    ),
    "function": (
        LabelMargin(lambda cosine, labels: cosine - 0.01 * labels * cosine**2),
        lambda cosine, margin: cosine - 0.01 * torch.arange(C) * cosine**2,
    ),
}


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64).requires_grad_()
    w = torch.randn(C, D, generator=generator, dtype=torch.float64).requires_grad_()
    y = torch.randint(0, C, (N,), generator=generator)
    y[3] = -100
    with torch.no_grad():
        x[0] = -w[y[0]] + 0.1 * x[0]  # past π
    return x, w, y


def loss_by_formula(name: str, x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    cosine = F.normalize(x) @ F.normalize(w).T
    changed = FORMULAS[name][1](cosine, MARGINS)
    return F.cross_entropy(S * torch.where(F.one_hot(y.clamp(min=0), C).bool(), changed, cosine), y)


@pytest.mark.parametrize("backend", ["cpu", "torch", "oracle"])
@pytest.mark.parametrize("name", FORMULAS)
def test_the_loss_and_its_gradients(name: str, backend: str) -> None:
    x, w, y = inputs()
    margin = FORMULAS[name][0]
    if backend == "oracle":
        got = fa.reference.margin_softmax_loss(x, w, y, margin=margin, scale=S)
    else:
        got = fa.margin_softmax_loss(x, w, y, margin=margin, scale=S, backend=backend)
    right = loss_by_formula(name, x, w, y)
    torch.testing.assert_close(got, right, rtol=1e-10, atol=0)
    for mine, truth in zip(torch.autograd.grad(got, (x, w)), torch.autograd.grad(right, (x, w)), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FORMULAS)
def test_gradcheck(name: str) -> None:
    x, w, y = inputs()
    loss = lambda x, w: fa.margin_softmax_loss(x, w, y, margin=FORMULAS[name][0], scale=S)  # noqa: E731
    assert torch.autograd.gradcheck(loss, (x, w), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.slow
def test_compiled(name: str) -> None:
    torch._dynamo.reset()
    x, w, y = inputs()
    head = fa.MarginHead(D, C, margin=FORMULAS[name][0], scale=S, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(w)
    got, right = torch.compile(head, fullgraph=True, backend="aot_eager")(x, y), loss_by_formula(name, x, w, y)
    torch.testing.assert_close(got, right, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(got, (x, head.weight)), torch.autograd.grad(right, (x, w)), rtol=1e-9, atol=1e-12
    )
    torch._dynamo.reset()


def test_margins_by_class_frequency() -> None:
    """LDAM's code: ``m = 1 / sqrt(sqrt(n))``, times what makes the largest 0.5."""
    counts = torch.tensor([500.0, 20.0, 3.0, 81.0], dtype=torch.float64)
    raw = 1 / counts.sqrt().sqrt()
    expected = raw * (0.5 / raw.max())
    torch.testing.assert_close(fa.ClassMargin.from_counts(counts).margins, expected, rtol=1e-12, atol=0)
    assert fa.ClassMargin.from_counts([0, 1, 16]).margins.tolist() == [0.5, 0.5, 0.25]
    assert fa.ClassMargin.from_counts([4, 9], largest=0.3, power=0).margins.tolist() == [0.3, 0.3]


def test_margins_are_options_and_no_state() -> None:
    """They follow the head to a device, stay fp64 when it is cast, and are not in its state_dict."""
    head = fa.MarginHead(D, C, margin=fa.ClassMargin(MARGINS))
    head.bfloat16()
    assert head.weight.dtype == torch.bfloat16 and torch.equal(head.margin.margins, MARGINS)
    assert list(head.state_dict()) == ["weight"]
    assert list(head.margin.buffers()) == []
    assert head.to("meta").margin.margins.is_meta


@pytest.mark.parametrize("make", [fa.MarginHead, fa.PartialFC])
def test_margins_of_a_head_whose_tensors_were_replaced(make: Any) -> None:
    """from_pretrained of transformers does so with a head that it built on the meta device. It moves no module."""
    x, w, y = inputs()
    with torch.device("meta"):
        head = make(D, C, margin=fa.ClassMargin(MARGINS))
    for tensors in (head._parameters, head.margin._buffers):
        for name in tensors:
            tensors[name] = torch.nn.Parameter(torch.zeros_like(tensors[name], device="cpu"))
    head.weight.data.copy_(w)
    expected = fa.margin_softmax_loss(x, w, y, margin=fa.ClassMargin(MARGINS))
    torch.testing.assert_close(head(x, y).item(), expected.item(), rtol=1e-6, atol=0)
    assert head.margin.margins.device == x.device


def test_a_margin_that_an_earlier_version_pickled() -> None:
    """The margins of such a margin are a buffer."""
    margin = fa.ClassMargin(MARGINS)
    state = margin.__dict__.copy()
    del state["margins"], state["_values"]
    state["_buffers"], state["_non_persistent_buffers_set"] = {"margins": MARGINS.clone()}, {"margins"}
    loaded = fa.ClassMargin.__new__(fa.ClassMargin)
    loaded.__setstate__(state)
    assert torch.equal(loaded.bfloat16().margins, MARGINS) and list(loaded.buffers()) == []
    assert torch.equal(loaded.to("meta").to_empty(device="cpu").margins, MARGINS)


def test_wrong_arguments() -> None:
    for given, message in {
        (-0.1, 0.2): "ClassMargin: margins must be in [0, 2); got -0.1 for class 0",
        (0.1, math.nan): "ClassMargin: margins must be in [0, 2); got nan for class 1",
        (): "ClassMargin: margins must be (C,), one for each class; got (0,)",
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            fa.ClassMargin(given)
    with pytest.raises(ValueError, match=re.escape("margins must be in [0, π) radians; got 3.2 for class 0")):
        fa.ClassMargin([3.2], kind="arc")
    with pytest.raises(ValueError, match=re.escape("ClassMargin: counts must be >= 0; got -1")):
        fa.ClassMargin.from_counts([3, -1])
    with pytest.raises(TypeError, match="ClassMargin: margins must be a tensor or a sequence of numbers; got str"):
        fa.ClassMargin("0.5")
    with pytest.raises(TypeError, match="LabelMargin: function must be callable; got float"):
        LabelMargin(0.5)
    with pytest.raises(TypeError, match="needs the labels of the rows"):
        LabelMargin(lambda cosine, labels: cosine)(torch.zeros(2))
    x, w, y = inputs()
    message = re.escape("ClassMargin: margins must be one for each of the C=17 classes; got 3")
    three = fa.ClassMargin([0.1, 0.2, 0.3])
    for call in (
        lambda: fa.margin_softmax_loss(x, w, y, margin=three),
        lambda: fa.reference.margin_softmax_loss(x, w, y, margin=three),
        lambda: fa.MarginHead(D, C, margin=three),
        lambda: fa.PartialFC(D, C, margin=three),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_cosines_alone_have_the_mean_margin() -> None:
    cosine = torch.tensor([0.9, -0.2], dtype=torch.float64)
    torch.testing.assert_close(fa.ClassMargin([0.1, 0.3])(cosine), cosine - 0.2)


@pytest.mark.parametrize("boundary", get_args(Boundary))
def test_every_boundary_is_that_of_the_angular_margins(boundary: Boundary) -> None:
    """Angles up to 170°, where θ + 2.5 is past π; "continuous" there is cos θ - (1 - cos m)."""
    margins, labels = [0.5, 2.5], torch.tensor([0, 1]).repeat(18)
    cosines = torch.linspace(0.01, 2.967, 36, dtype=torch.float64).cos()
    modify, _ = fa.ClassMargin(margins, "arc", boundary).for_labels(labels, labels >= 0)
    each = torch.stack([fa.ArcFace(margin, boundary)(cosines) for margin in margins])
    torch.testing.assert_close(modify(cosines), each.gather(0, labels[None]).squeeze(0), rtol=1e-12, atol=1e-12)
    if boundary == "continuous":
        past = cosines.arccos() + 2.5 > math.pi
        right = (cosines - (1 - math.cos(2.5)))[past & (labels == 1)]
        torch.testing.assert_close(modify(cosines)[past & (labels == 1)], right, rtol=1e-12, atol=1e-12)
