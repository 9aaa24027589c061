"""MarginHead as a module: its loss, its logits and nearest classes, and that it lives as other modules do."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.cases import Case, make_inputs

import fused_arcface as fa
from fused_arcface.app.lab.heads import ReferenceHead
from fused_arcface.engine import nearest

PLAIN = Case()


def make_head(case: Case = PLAIN, **options: object) -> tuple[fa.MarginHead, torch.Tensor, torch.Tensor]:
    """A head with the case's class centers, embeddings and target."""
    x, w, target, _ = make_inputs(case)
    head = fa.MarginHead(case.D, case.C, dtype=w.dtype, **options)
    with torch.no_grad():
        head.weight.copy_(w)
    return head, x, target


def test_loss_is_the_functions() -> None:
    options = {"margin": fa.CosFace(0.2), "scale": 30}
    head, x, target = make_head(**options)
    assert torch.equal(head(x, target), fa.margin_softmax_loss(x, head.weight, target, **options))
    loss, stats = head(x, target, ignore_index=int(target[0]), return_stats=True)
    right = fa.margin_softmax_loss(x, head.weight, target, ignore_index=int(target[0]), return_stats=True, **options)
    assert torch.equal(loss, right[0])
    assert all(torch.equal(a, b) for a, b in zip(stats, right[1], strict=True))


def test_backend_is_used() -> None:
    head, x, target = make_head(backend="triton")
    with pytest.raises(RuntimeError, match="backend 'triton' is not available"):
        head(x, target)


def test_centers_at_first() -> None:
    head = fa.MarginHead(64, 1000)
    assert isinstance(head.weight, torch.nn.Parameter) and head.weight.shape == (1000, 64)
    assert head.weight.mean().abs() < 2e-4 and head.weight.std().item() == pytest.approx(0.01, rel=0.02)
    torch.manual_seed(7)
    head.reset_parameters()
    first = head.weight.detach().clone()
    torch.manual_seed(7)
    assert torch.equal(fa.MarginHead(64, 1000).weight, first)


def test_training_lowers_the_loss() -> None:
    head, x, target = make_head()
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = head(x, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")])
def test_logits(dtypes: tuple[str, str]) -> None:
    head, x, _ = make_head(Case(x_dtype=dtypes[0], w_dtype=dtypes[1]), scale=20.0)
    logits = head.logits(x)
    right = 20 * F.cosine_similarity(x.double()[:, None], head.weight.double()[None], dim=2)
    assert logits.shape == (9, 97)
    torch.testing.assert_close(logits.double(), right, rtol=0, atol=2e-5)
    (gradient,) = torch.autograd.grad(logits.sum(), head.weight)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("k", [1, 5, 40, 97])
@pytest.mark.parametrize("classes_at_once", [10, 97, 1000])
def test_topk_by_brute_force(k: int, classes_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "_CLASSES", classes_at_once)
    head, x, _ = make_head(Case(x_dtype="float64", w_dtype="float64"))
    cosines, classes = head.topk(x, k)
    right = F.cosine_similarity(x[:, None], head.weight[None], dim=2).sort(descending=True)
    assert classes.dtype == torch.int64 and not cosines.requires_grad
    assert torch.equal(classes, right.indices[:, :k])
    torch.testing.assert_close(cosines, right.values[:, :k], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_16_bit_heads_know_their_nearest_class(autocast: bool, dtype: torch.dtype) -> None:
    """Centers as close as late in training: cosines rounded to 16 bits would confuse them, and say otherwise than
    ``stats.correct``; a zero row has cosines of 0, not NaN."""
    head = fa.MarginHead(64, 3000, dtype=torch.float32 if autocast else dtype)
    with torch.no_grad():
        head.weight.copy_(1 + 0.3 * torch.randn(3000, 64))
    x = (1 + 0.3 * torch.randn(40, 64)).to(dtype)
    x[0] = 0
    right = F.normalize(x.double()) @ F.normalize(head.weight.double()).T
    given = x.float() if autocast else x  # which autocast rounds to the same again
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        logits, (cosines, classes) = head.logits(given), head.topk(given, 2)
        _, stats = head(given, classes[:, 0], return_stats=True)
    assert logits.dtype == cosines.dtype == torch.float32
    torch.testing.assert_close(logits.double(), 64 * right, rtol=0, atol=64 * 1e-6)
    torch.testing.assert_close(cosines.double(), right.topk(2).values, rtol=0, atol=1e-6)
    assert torch.equal(classes[1:, 0], right[1:].argmax(1))
    assert stats.correct[1:].all()


def test_topk_of_no_rows() -> None:
    head, x, _ = make_head()
    cosines, classes = head.topk(x[:0], 3)
    assert cosines.shape == classes.shape == (0, 3)


def test_state_dict() -> None:
    head, x, target = make_head()
    assert list(head.state_dict()) == ["weight"]
    other = fa.MarginHead(33, 97)
    assert not torch.equal(other(x, target), head(x, target))
    buffer = io.BytesIO()
    torch.save(head.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x, target), head(x, target))


def test_takes_the_weight_of_a_linear_layer() -> None:
    linear = torch.nn.Linear(33, 97, bias=False)
    head, x, target = make_head()
    head.load_state_dict(linear.state_dict())
    assert torch.equal(head(x, target), fa.margin_softmax_loss(x, linear.weight, target))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))])
def test_copies_are_independent(duplicate: object) -> None:
    head, x, target = make_head(margin=fa.SphereFace(1.5), scale=30.0, backend="cpu")
    before = head(x, target)
    other = duplicate(head)
    assert torch.equal(other(x, target), before) and repr(other) == repr(head)
    with torch.no_grad():
        other.weight.neg_()
    assert torch.equal(head(x, target), before) and not torch.equal(other(x, target), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_to(dtype: torch.dtype) -> None:
    head, x, target = make_head()
    right = head(x, target).double()
    head.to(dtype)
    assert head.weight.dtype == dtype
    loss = head(x, target)
    loss.backward()
    assert head.weight.grad.dtype == dtype
    torch.testing.assert_close(loss.double(), right, rtol=1e-2, atol=0)


def test_device_and_dtype() -> None:
    head = fa.MarginHead(4, 5, device="meta", dtype=torch.bfloat16)
    assert head.weight.device.type == "meta" and head.weight.dtype == torch.bfloat16
    head.to_empty(device="cpu").reset_parameters()
    assert head(torch.ones(2, 4), torch.tensor([0, 4])).isfinite()


def test_repr() -> None:
    assert repr(fa.MarginHead(4, 5, margin=fa.CosFace(0.2), scale=30)) == (
        "MarginHead(4, 5, margin=CosFace(margin=0.2), scale=30.0, backend='auto')"
    )


HEAD = fa.MarginHead(8, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fa.MarginHead(0, 5), ValueError, "embedding_dim must be >= 1; got 0"),
        (lambda: fa.MarginHead(8, -1), ValueError, "num_classes must be >= 1; got -1"),
        (lambda: fa.MarginHead(8.0, 5), TypeError, "embedding_dim must be an int; got float"),
        (lambda: fa.MarginHead(8, True), TypeError, "num_classes must be an int; got bool"),
        (lambda: fa.MarginHead(8, 5, scale=0), ValueError, "scale must be finite and > 0; got 0"),
        (
            lambda: fa.MarginHead(8, 5, margin="arcface"),
            TypeError,
            "margin must be a margin of fused_arcface or a callable; got str",
        ),
        *(
            (
                lambda head=head, margin=margin: head(8, 5, margin=margin),
                TypeError,
                f"margin must be an instance, not the class {name}: write {name}(); got the class",
            )
            for head in (fa.MarginHead, fa.PartialFC)
            for name, margin in (("ArcFace", fa.ArcFace), ("AdaFace", fa.AdaFace))
        ),
        (
            lambda: fa.MarginHead(8, 5, backend="gpu"),
            ValueError,
            f"backend must be one of 'auto', {', '.join(map(repr, fa.backends.available()))}; got 'gpu'",
        ),
        (
            lambda: fa.MarginHead(8, 5, dtype=torch.int64),
            TypeError,
            "dtype must be a floating-point one; got torch.int64",
        ),
        (lambda: HEAD.topk(torch.ones(2, 8), 6), ValueError, "k must be <= C=5; got 6"),
        (lambda: HEAD.topk(torch.ones(2, 8), 0), ValueError, "k must be >= 1; got 0"),
        (lambda: HEAD.topk(torch.ones(2, 8), 1.0), TypeError, "k must be an int; got float"),
        (lambda: HEAD.topk(torch.ones(2, 7), 1), ValueError, "embeddings must be (N, D=8); got (2, 7)"),
        (lambda: HEAD.logits(torch.ones(8)), ValueError, "embeddings must be (N, D=8); got (8,)"),
        (
            lambda: HEAD.logits(torch.ones(2, 8, device="meta")),
            ValueError,
            "embeddings must be on weight's device cpu; got meta",
        ),
        (lambda: HEAD(torch.ones(2, 7), torch.tensor([0, 1])), ValueError, "weight must be (C, D=7); got (5, 8)"),
    ],
)
def test_refused(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message


def test_sizes_of_numpy() -> None:
    """``labels.max() + 1`` is one."""
    labels = np.array([3, 9])
    head, sharded = fa.MarginHead(np.int32(8), labels.max() + 1), fa.PartialFC(np.int32(8), labels.max() + 1)
    assert head.weight.shape == sharded.weight.shape == (10, 8) and type(sharded.num_classes) is int
    assert head.topk(torch.randn(2, 8), np.int64(3))[1].shape == (2, 3)


def margins_and_scales() -> list[dict[str, Any]]:
    margins = [fa.AdaFace(), fa.ElasticFace(), fa.CurricularFace(), fa.SphereFace2(bias=-3.0), fa.UniFace(bias=2.0)]
    return [{"scale": fa.AdaCos()}, *({"margin": each} for each in margins)]


@pytest.mark.parametrize("where", ["head", "all", "cast"])
@pytest.mark.parametrize("make", [fa.MarginHead, fa.PartialFC])
def test_margin_and_scale_of_a_head_built_without_memory(make: Any, where: str) -> None:
    """They have their values again, of which ``to_empty()`` knows none; also those that they were given before."""
    for at, right in enumerate(margins_and_scales()):
        with torch.device("meta" if where == "all" else "cpu"):
            given = margins_and_scales()[at]
            (own,), (other,) = given.values(), right.values()
            if where == "head":
                for each in (own, other):
                    for tensor in (*each.buffers(), *each.parameters()):
                        tensor.data += 1
            head = make(8, 10, device="meta", **given)
        if where == "cast":
            head.to(torch.bfloat16)
        head.to_empty(device="cpu").reset_parameters()
        assert own is head.margin or own is head.scale
        values = [*own.buffers(), *own.parameters()]
        for mine, theirs in zip(values, [*other.buffers(), *other.parameters()], strict=True):
            torch.testing.assert_close(mine.to(theirs.dtype), theirs, rtol=0, atol=0)


@pytest.mark.parametrize("make", [fa.MarginHead, fa.PartialFC])
def test_reset_parameters_after_the_tensors_were_replaced(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """from_pretrained of transformers gives a head on the meta device other tensors, without values.

    Then ``_init_weights`` sets the tensors that the file did not have. The functions of ``nn.init`` skip the others.
    """
    of_the_file: list[torch.Tensor] = []
    fill = torch.nn.init.constant_

    def guarded(tensor: torch.Tensor, value: float) -> torch.Tensor:
        return tensor if any(tensor is each for each in of_the_file) else fill(tensor, value)

    monkeypatch.setattr("torch.nn.init.constant_", guarded)
    for at, right in enumerate(margins_and_scales()):
        with torch.device("meta"):
            head = make(8, 10, **margins_and_scales()[at])
        own, other = getattr(head, *right), *right.values()
        for tensors in (own._parameters, own._buffers):
            for name, tensor in tensors.items():
                memory = torch.full_like(tensor, 77, device="cpu")
                tensors[name] = torch.nn.Parameter(memory) if tensors is own._parameters else memory
        head.weight = torch.nn.Parameter(torch.full_like(head.weight, torch.nan, device="cpu"))
        of_the_file[:] = own.state_dict(keep_vars=True).values() if at % 2 else []
        for part in head.modules():
            part.reset_parameters()
        assert head.weight.isfinite().all() and 0.005 < head.weight.std() < 0.02
        for name, value in [*other.named_buffers(), *other.named_parameters()]:
            loaded = any(getattr(own, name) is each for each in of_the_file)
            expected = torch.full_like(value, 77) if loaded else value
            torch.testing.assert_close(getattr(own, name), expected, rtol=0, atol=0)


def test_another_default_device() -> None:
    """A step and the margins are on the tensors' device, whatever device is the default."""
    x, y, w = torch.randn(4, 8), torch.tensor([0, 3, 3, 9]), torch.randn(10, 8)
    for kind in ("cos", "arc"):
        margin = fa.SphereFace2(kind=kind)
        bias, loss = margin.bias_for(10, 32.0), fa.margin_softmax_loss(x, w, y, margin=margin)
        margins = fa.ClassMargin([0.1, 0.2]).margins
        with torch.device("meta"):
            assert fa.SphereFace2(kind=kind).bias_for(10, 32.0) == bias
            assert torch.equal(fa.margin_softmax_loss(x, w, y, margin=margin), loss)
            moved = fa.ClassMargin([0.1, 0.2])
        assert torch.equal(moved.to_empty(device="cpu").margins, margins)


@pytest.mark.parametrize("make", [fa.MarginHead, fa.PartialFC])
def test_exported_logits_take_any_number_of_rows(make: Any) -> None:
    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = make(8, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head.logits(x)
            return logits

    model = Logits()
    program = torch.export.export(model, (torch.randn(6, 8),), dynamic_shapes=({0: torch.export.Dim("n")},))
    for rows in (1, 3, 7):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("options", [{}, {"sub_centers": 2}, {"label_smoothing": 0.1}], ids=str)
def test_shapes_without_data(options: dict[str, Any]) -> None:
    """On the meta device: for those who count memory or plan a model before they have room for it."""
    head = fa.MarginHead(8, 10, device="meta", dtype=torch.bfloat16, **options)
    x = torch.empty(4, 8, device="meta", requires_grad=True)
    loss, stats = head(x, torch.empty(4, dtype=torch.int64, device="meta"), return_stats=True)
    loss.backward()
    assert loss.is_meta and loss.dtype == torch.float32 and stats.correct.shape == (4,)
    assert x.grad.shape == x.shape and head.weight.grad.shape == head.weight.shape
    assert head.logits(x).shape == (4, 10) and head.topk(x, 3)[1].shape == (4, 3)


@pytest.mark.parametrize("options", [{"sub_centers": 3}, {"label_smoothing": 0.2}, {"sub_centers": 2, "scale": 20.0}])
def test_the_reference_head_has_every_option(options: dict) -> None:
    """The heads take the same options to the same loss, and each option changes it."""
    losses = []
    for make, chosen in ((fa.MarginHead, options), (ReferenceHead, options), (ReferenceHead, {})):
        torch.manual_seed(0)
        head = make(8, 5, dtype=torch.float64, **chosen)
        losses.append(head(torch.linspace(-1, 1, 32, dtype=torch.float64).sin().view(4, 8), torch.tensor([0, 1, 2, 4])))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
    assert abs(losses[2] - losses[0]) > 0.1
