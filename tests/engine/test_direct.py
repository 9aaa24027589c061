"""Plain tensors on a CPU skip the dispatcher. Everything that could notice gets the operators, and equal numbers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.cases import Case, make_inputs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fused_arcface as fa
from fused_arcface.engine import direct
from fused_arcface.engine.direct import goes_straight, is_readable, stages

FORWARD = {"class_stats", "target_cosine", "finish_negatives", "margin_loss"}
BACKWARD = {"unit_embedding_grad", "weight_grad", "embedding_grad"}


def ours(name: object) -> list[str]:
    """Return the name of an operator of the package, in a list; no item for any other."""
    text = str(name).replace("::", ".")
    return [text.split(".")[1]] if text.startswith("fused_arcface.") else []


class Recorder:
    """What a mode does with each call: it keeps the names of the package's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.update(ours(function))
        return function(*args, **(kwargs or {}))

    __torch_function__ = __torch_dispatch__


class Dispatched(Recorder, TorchDispatchMode):
    pass


class Called(Recorder, TorchFunctionMode):
    pass


def inputs(**options: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, w, target, _ = make_inputs(Case(N=6, C=5, D=8), **options)
    return x.requires_grad_(), w.requires_grad_(), target


def profiler() -> torch.profiler.profile:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


def loss_of(x: Tensor, w: Tensor, target: Tensor, **options: Any) -> Tensor:
    loss = fa.margin_softmax_loss(x, w, target, backend="cpu", **options)
    assert isinstance(loss, Tensor)
    return loss


def test_plain_tensors_go_straight(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, target = inputs()
    assert goes_straight(x, torch.nn.Parameter(w.detach()), target, None, x.bfloat16(), x.detach()[:, ::2])
    stage = stages(x, w, target)
    assert stage is not torch.ops.fused_arcface
    assert all(hasattr(stage, name) for name in FORWARD | BACKWARD)
    assert not hasattr(stage, "update_centers")  # the operator also notes that the centers were changed
    called: set[str] = set()

    def recorded(name: str) -> SimpleNamespace:
        function = getattr(stage, name).default
        return SimpleNamespace(default=lambda *args, **options: (called.add(name), function(*args, **options))[1])

    monkeypatch.setattr(direct, "_FUNCTIONS", SimpleNamespace(**{name: recorded(name) for name in vars(stage)}))
    loss_of(x, w, target).backward()
    assert called == FORWARD | BACKWARD
    with torch.inference_mode():
        assert goes_straight(torch.zeros(2), x)
        assert loss_of(*inputs()).isfinite()


def test_a_mode_sees_the_operators() -> None:
    with Dispatched() as recorder:
        loss = loss_of(*inputs())
    assert recorder.seen == FORWARD
    with Dispatched() as recorder:
        loss.backward()
    assert recorder.seen == BACKWARD
    with Called() as called:  # such a mode is off in a backward pass
        loss = loss_of(*inputs())
    assert called.seen == FORWARD
    assert goes_straight(loss)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "margin", [fa.ArcFace(), fa.MagFace(), pytest.param(lambda cosine: cosine - 0.1, id="a function")], ids=repr
)
@pytest.mark.parametrize("ignore_index", [-100, 1])
def test_numbers_are_those_of_the_operators(margin: Any, reduction: str, weighted: bool, ignore_index: int) -> None:
    found = []
    for mode in (None, Dispatched()):
        x, w, target = inputs()
        weights = torch.linspace(0, 2, 6) if weighted else None
        options = {"margin": margin, "reduction": reduction, "sample_weight": weights, "ignore_index": ignore_index}
        if mode is not None:
            mode.__enter__()
        loss = loss_of(x, w, target, **options)
        target.fill_(0)  # a loader may reuse its buffer
        loss.sum().backward()
        _, stats = fa.margin_softmax_loss(*inputs(), backend="cpu", return_stats=True, **options)
        if mode is not None:
            mode.__exit__(None, None, None)
            assert "class_stats" in mode.seen
        found.append((loss, x.grad, w.grad, *stats))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-7)


def test_a_recomputed_step_saves_the_same_tensors() -> None:
    """A mode or a profiler around the forward pass alone, with torch.utils.checkpoint."""
    x, w, target = inputs()
    (right,) = torch.autograd.grad(loss_of(x, w, target), x)
    for around in (Dispatched, Called, profiler):
        with around():
            loss = checkpoint(loss_of, x, w, target, use_reentrant=False)
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0], right)
        loss = checkpoint(loss_of, x, w, target, use_reentrant=False)
        with around():
            torch.testing.assert_close(torch.autograd.grad(loss, x)[0], right)


class Without:
    """torch, or a part of it, without a private name that a later version may drop."""

    def __init__(self, part: Any, path: list[str]) -> None:
        self._part, self._path = part, path

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._part, name)
        if name != self._path[0]:
            return found
        if len(self._path) == 1:
            raise AttributeError(f"torch has no {name}")
        return Without(found, self._path[1:])


# Private names of torch, and which of the two questions needs them.
PRIVATE = {
    "DispatchKeySet": (goes_straight, is_readable),
    "DispatchKey": (goes_straight, is_readable),
    "DispatchKey.AutocastCPU": (goes_straight, is_readable),
    "_dispatch_keys": (goes_straight, is_readable),
    "_dispatch_tls_local_include_set": (goes_straight, is_readable),
    "_autograd._profiler_enabled": (goes_straight,),
    "_TorchDispatchModeKey.PROXY": (is_readable,),
    "_get_dispatch_mode": (is_readable,),
}


@pytest.mark.parametrize("name", PRIVATE)
def test_a_torch_without_a_private_name_gets_the_operators(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = loss_of(*inputs())
    monkeypatch.setattr(direct, "torch", Without(torch, ["_C", *name.split(".")]))
    for known, keys in zip(("_PLAIN_TENSOR", "_PLAIN_THREAD"), direct._plain_keys(), strict=True):
        monkeypatch.setattr(direct, known, keys)
    x, w, target = inputs()
    assert goes_straight(x, w, target) == (goes_straight not in PRIVATE[name])
    with Dispatched() as recorder:
        loss = loss_of(x, w, target)
        assert is_readable(target) == (is_readable not in PRIVATE[name])
    assert recorder.seen == FORWARD | ({"local_target"} if is_readable in PRIVATE[name] else set())
    loss.backward()
    torch.testing.assert_close(loss, right)


def test_labels_are_read_where_they_have_values() -> None:
    labels = torch.tensor([0, 1])
    fake = FakeTensorMode()
    with Dispatched():
        assert is_readable(labels)
    with fake:
        assert not is_readable(labels)
    assert not any(map(is_readable, (fake.from_tensor(labels), labels.to("meta"))))
    seen: list[bool] = []
    torch.vmap(lambda each: (seen.append(is_readable(each)), each)[1])(labels)
    make_fx(lambda each: (seen.append(is_readable(each)), each)[1])(labels)
    assert seen == [False, False]


def test_no_statistics_of_mixed_labels_either() -> None:
    x, w, target = inputs()
    assert loss_of(x, w, (target, target.flip(0), 0.3)).shape == ()


class Subclass(Tensor):
    pass


def test_tensors_that_are_not_plain_get_the_operators() -> None:
    x, _, _ = inputs()
    batched: list[bool] = []
    torch.vmap(lambda row: (batched.append(goes_straight(row)), row)[1])(x.detach())
    torch.func.grad(lambda row: (batched.append(goes_straight(row)), row.sum())[1])(x.detach())
    assert batched == [False, False]
    imaginary = torch.complex(x.detach(), x.detach()).conj().imag
    others = [x.as_subclass(Subclass), x.to("meta"), imaginary, torch._efficientzerotensor(2), x.detach().to_sparse()]
    mode = FakeTensorMode()
    others.append(mode.from_tensor(x.detach()))
    with mode:
        assert not goes_straight(x)
    assert [goes_straight(each) for each in others] == [False] * len(others)
    assert stages(x, others[0]) is torch.ops.fused_arcface


def test_negated_views_are_read_as_numbers() -> None:
    """Their memory holds other numbers than they have, which the dispatcher puts right."""
    x, w, target = inputs()
    imaginary = torch.complex(x.detach(), x.detach()).conj().imag
    assert imaginary.is_neg()
    torch.testing.assert_close(loss_of(imaginary, w, target), loss_of(-x.detach(), w, target), rtol=0, atol=0)


def test_fake_tensors() -> None:
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        x, w, target = (mode.from_tensor(each.detach()) for each in inputs())
        loss = loss_of(x.requires_grad_(), w, target, reduction="none")
        loss.sum().backward()
    assert loss.shape == (6,) and isinstance(x.grad, torch._subclasses.FakeTensor)


def test_a_batch_of_gradients_gets_the_operators() -> None:
    """The older vmap of torch.autograd.grad: each loss's gradient by the embeddings is its own row's."""
    x, w, target = inputs()
    losses = loss_of(x, w, target, reduction="none")
    (each,) = torch.autograd.grad(losses, x, torch.eye(6), is_grads_batched=True, retain_graph=True)
    (together,) = torch.autograd.grad(losses.sum(), x)
    torch.testing.assert_close(each.sum(1), together)
    off_diagonal = each * (1 - torch.eye(6))[:, :, None]
    assert off_diagonal.abs().max() == 0


def test_a_profiler_sees_the_operators() -> None:
    with profiler() as profile:
        loss_of(*inputs()).backward()
    assert {name for event in profile.events() for name in ours(event.name)} >= FORWARD | BACKWARD


@pytest.mark.slow
def test_a_compiler_sees_the_operators() -> None:
    seen: set[str] = set()

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        for module in graph.modules():
            if isinstance(module, torch.fx.GraphModule):
                seen.update(name for node in module.graph.nodes for name in ours(node.target))
        return graph.forward

    torch.compile(loss_of, backend=backend, fullgraph=True)(*inputs())
    assert seen >= FORWARD
