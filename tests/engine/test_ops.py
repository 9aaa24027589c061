"""The torch.library operators: schemas, fakes, and torch.compile through the whole head."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.cases import BACKENDS, Case, make_inputs
from torch import Tensor

import fused_arcface as fa
from fused_arcface.engine import ops as ops_module
from fused_arcface.engine.terms import CenterStep

ops = torch.ops.fused_arcface


def arguments(case: Case) -> dict[str, tuple]:
    """Each operator's arguments but the backend's name, with labels that are absent."""
    x, w, target, upstream = make_inputs(case)
    dtype = torch.promote_types(torch.promote_types(x.dtype, w.dtype), torch.float32)
    target[1] = -1
    shift = torch.full((case.N,), 3.0, dtype=torch.float64)
    coefficients = (shift, upstream.to(dtype), upstream.to(dtype))
    return {
        "class_max": (x, w, target),
        "class_stats": (x, w, target, case.scale, shift, True),
        "class_stats without": (x, w, target, case.scale, None, False),
        "weight_grad": (x, w, target, case.scale, *coefficients),
    }


# Sub-centers, thresholds, and coefficients of what lies above them.
NEGATIVES = {
    "sub-centers": {"sub_centers": 2},
    "modulated": {
        "threshold": torch.linspace(-0.5, 0.5, 8),
        "coefficients": torch.tensor([1.0, 0.3, 0.1, 0.0], dtype=torch.float64),
    },
    "both": {
        "sub_centers": 4,
        "threshold": torch.full((8,), 0.1),
        "coefficients": torch.tensor([0.0, 1.2, 0.2, 0.4], dtype=torch.float64),
    },
    "logistic": {"sub_centers": 2, "logistic": torch.tensor([8.0, 3.0, 0.2, 0.1, -1.0], dtype=torch.float64)},
}


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("name", list(arguments(Case())))
def test_opcheck_with_other_negatives(name: str, negatives: str) -> None:
    operator, given = getattr(ops, name.split()[0]), arguments(Case(N=8, C=12, D=6, scale=8.0))[name]
    for backend in ("cpu", "torch"):
        torch.library.opcheck(operator.default, (*given, backend), NEGATIVES[negatives])
    got, right = (operator(*given, backend, **NEGATIVES[negatives]) for backend in ("cpu", "torch"))
    for mine, theirs in [(got, right)] if isinstance(got, Tensor) else zip(got, right, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(arguments(Case())))
@pytest.mark.parametrize(
    "case",
    [Case(N=5, C=11, D=6), Case(N=3, C=4, D=5, x_dtype="bfloat16", w_dtype="float64", layout="transposed")],
    ids=["plain", "mixed"],
)
def test_opcheck(case: Case, name: str, backend: str) -> None:
    torch.library.opcheck(getattr(ops, name.split()[0]).default, (*arguments(case)[name], backend))


def test_numbers_as_tensors_are_the_same_numbers() -> None:
    """The overloads that a compiled head calls for a scale or a margin that changes."""
    case = Case(scale=8.3)
    cosines = torch.linspace(-0.9, 0.9, 7, dtype=torch.float64)
    margin = (6 * cosines.flip(0), cosines, case.scale, 1.1, 0.5, 0.2, "hard", "exact")
    given = {name: each for name, each in arguments(case).items() if name != "class_max"} | {"margin_loss": margin}
    for name, numbers in given.items():
        operator = getattr(ops, name.split()[0])
        tensors = tuple(
            torch.tensor(each, dtype=torch.float64) if isinstance(each, float) else each for each in numbers
        )
        torch.library.opcheck(operator.tensor_numbers, (*tensors, "cpu"))
        got, right = operator.tensor_numbers(*tensors, "cpu"), operator.default(*numbers, "cpu")
        torch.testing.assert_close(got, right, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label", [97, -1, 10**12])
def test_invalid_label_where_labels_are_not_read(label: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: that row's loss is NaN, the other rows' losses and gradients are as if it were not there."""
    monkeypatch.setattr(ops_module, "check_target_range", lambda *_: None)
    x, w, target, _ = make_inputs(Case())
    right = fa.margin_softmax_loss(x, w, target, reduction="none", backend=backend)
    target[4] = label
    x.requires_grad_()
    loss, stats = fa.margin_softmax_loss(x, w, target, reduction="none", backend=backend, return_stats=True)
    others = torch.arange(9) != 4
    assert loss[4].isnan() and not stats.correct[4]
    torch.testing.assert_close(loss[others], right[others])
    assert loss[others].isfinite().all() and fa.margin_softmax_loss(x, w, target, backend=backend).isnan()
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert gradient[4].isnan().any() and gradient[others].isfinite().all()


def center_step(device: str, momentum_dtype: torch.dtype) -> tuple:
    """Arguments of update_centers but the backend's name: a sample of 6 from 11 classes of 70."""
    x, w, _, upstream = (each.to(device) for each in make_inputs(Case(N=5, C=11, D=70)))
    classes, target = torch.tensor([[0, 2, 3, 7, 8, 10], [0, 5, -1, 2, 2, 1]], device=device)
    is_int8 = momentum_dtype == torch.int8
    step = CenterStep(
        classes,
        torch.zeros(11, 70, dtype=momentum_dtype, device=device),
        torch.full((11, 2), 0.01, device=device) if is_int8 else None,
        lr=0.1,
        momentum=0.9,
        weight_decay=5e-4,
        rounding_key=3,
        class_start=0,
        active=torch.tensor(True, device=device),
    )
    shift = torch.full((5,), 3.0, dtype=torch.float64, device=device)
    upstream = upstream.float()
    return (x, w, target[:5], 8.0, shift, upstream, upstream, *step)


@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize(
    "backend", ["cpu", "torch", *(pytest.param(name, id=f"{name}_on_a_gpu") for name in ("triton", "cuda"))]
)
def test_opcheck_update_centers(backend: str, momentum_dtype: torch.dtype) -> None:
    reason = fa.backends.available()[backend]
    if reason is not None:
        pytest.skip(f"backend {backend!r} cannot run here: {reason}")
    device = "cuda" if backend in ("triton", "cuda") else "cpu"
    torch.library.opcheck(ops.update_centers.default, (*center_step(device, momentum_dtype), backend))


@pytest.mark.parametrize("name", list(arguments(Case())))
def test_operators_of_the_backends_agree(name: str) -> None:
    operator, given = getattr(ops, name.split()[0]), arguments(Case(scale=8.0))[name]
    got, right = operator(*given, "cpu"), operator(*given, "torch")
    pairs = [(got, right)] if isinstance(got, Tensor) else zip(got, right, strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-6)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


compiles = pytest.mark.usefixtures("_fresh_compiler")


def assert_compiles(compiled: object, plain: object, x: Tensor, w: Tensor) -> None:
    """The same loss and gradients, whichever way."""
    loss, right = compiled(), plain()
    torch.testing.assert_close(loss, right, rtol=1e-6, atol=0)
    upstream = torch.rand_like(right)
    for a, b in zip(
        torch.autograd.grad(loss, (x, w), upstream), torch.autograd.grad(right, (x, w), upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


OPTIONS = {
    "default": {},
    "none": {"reduction": "none", "margin": fa.CosFace(0.2)},
    "shift": {"scale": 128.0, "margin": fa.CombinedMargin(1.1, 0.3, 0.1, "fold", "straight_through")},
    "own margin": {"margin": lambda cosine: cosine - 0.2 * cosine**2, "ignore_index": 2},
}


@pytest.mark.slow
@compiles
@pytest.mark.parametrize("name", OPTIONS)
def test_compile_function(name: str) -> None:
    x, w, target, _ = make_inputs(Case())
    x.requires_grad_()
    w.requires_grad_()
    compiled = torch.compile(fa.margin_softmax_loss, fullgraph=True, backend="aot_eager")
    assert_compiles(
        lambda: compiled(x, w, target, **OPTIONS[name]),
        lambda: fa.margin_softmax_loss(x, w, target, **OPTIONS[name]),
        x,
        w,
    )


@compiles
@pytest.mark.slow
def test_compile_head_after_a_backbone() -> None:
    backbone, head = torch.nn.Linear(33, 16), fa.MarginHead(16, 97)
    x, _, target, _ = make_inputs(Case())
    x.requires_grad_()
    compiled = torch.compile(lambda x: head(backbone(x), target), fullgraph=True, backend="aot_eager")
    assert_compiles(lambda: compiled(x), lambda: head(backbone(x), target), x, head.weight)


@pytest.mark.slow
@compiles
def test_compile_with_statistics() -> None:
    x, w, target, _ = make_inputs(Case())
    compiled = torch.compile(fa.margin_softmax_loss, fullgraph=True, backend="aot_eager")
    loss, stats = compiled(x, w, target, return_stats=True)
    right = fa.margin_softmax_loss(x, w, target, return_stats=True)
    torch.testing.assert_close(loss, right[0])
    for name in fa.MarginSoftmaxStats._fields:
        torch.testing.assert_close(getattr(stats, name), getattr(right[1], name))


@pytest.mark.slow
@compiles
def test_compile_once_for_other_sizes_and_scales() -> None:
    """Batches and scales that change are traced as symbols at their second value: no break in the graph there."""
    compiled = torch.compile(fa.margin_softmax_loss, fullgraph=True, backend="aot_eager")
    for n, c, scale in ((9, 97, 64.0), (5, 50, 32.0), (7, 40, 16.0)):
        x, w, target, _ = make_inputs(Case(N=n, C=c))
        torch.testing.assert_close(
            compiled(x, w, target, scale=scale), fa.margin_softmax_loss(x, w, target, scale=scale), rtol=1e-6, atol=0
        )


@compiles
def test_compiled_function_still_checks_labels() -> None:
    x, w, target, _ = make_inputs(Case())
    compiled = torch.compile(fa.margin_softmax_loss, fullgraph=True, backend="aot_eager")
    target[3] = 97
    with pytest.raises(ValueError, match="got 97 at row 3"):
        compiled(x, w, target)


@pytest.mark.full
@compiles
@pytest.mark.parametrize("name", OPTIONS)
def test_compile_with_inductor(name: str) -> None:
    x, w, target, _ = make_inputs(Case())
    x.requires_grad_()
    w.requires_grad_()
    compiled = torch.compile(fa.margin_softmax_loss, fullgraph=True)
    assert_compiles(
        lambda: compiled(x, w, target, **OPTIONS[name]),
        lambda: fa.margin_softmax_loss(x, w, target, **OPTIONS[name]),
        x,
        w,
    )
