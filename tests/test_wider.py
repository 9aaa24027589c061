"""Tests that margins by row and by negatives, sub-centers and label smoothing have in common.

Gradients by finite differences, agreement with the reference over adversarial inputs, one process and two ranks,
torch.compile.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.cases import ARCFACES, GEOMETRIES, PUBLIC, Case, Inputs, Outcome, make_inputs, run
from support.distributed_helpers import run_ranks
from torch import Tensor

import fused_arcface as fa
from fused_arcface.app.agreement import norms_are_held
from fused_arcface.backends import cpu
from fused_arcface.margins import Margin, registry


@dataclass(frozen=True)
class Variant:
    """A margin, made anew for each test since it may have a state, and options of the loss."""

    make: Callable[[], Margin]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def backend(self) -> str:
        """The fastest backend on the CPU that has it."""
        return "torch" if hasattr(self.make(), "binary") else "cpu"

    def __str__(self) -> str:
        return "-".join([type(self.make()).__name__, *(f"{name}={value}" for name, value in self.options.items())])


SUB_CENTERS = [
    Variant(lambda: fa.ArcFace(0.5, "fold"), {"sub_centers": 3}),
    Variant(lambda: fa.CosFace(), {"sub_centers": 5}),
    Variant(lambda: registry.trained(fa.CurricularFace(), t=0.4), {"sub_centers": 2}),
]
SMOOTHED = [
    Variant(lambda: fa.ArcFace(), {"label_smoothing": 0.1}),
    Variant(lambda: fa.MagFace(lower_norm=1, upper_norm=6, boundary="hard"), {"label_smoothing": 1.0}),
]
BY_ROWS, MODULATED = (
    [Variant(partial(copy.deepcopy, margin)) for margin in registry.examples(kind)] for kind in ("row", "negatives")
)
BINARY = [Variant(partial(copy.deepcopy, margin)) for margin in registry.examples("binary")]
BINARY.append(Variant(lambda: fa.SphereFace2(0.2, kind="arc", bias=-3.0), {"sub_centers": 2}))
OTHER_ANGLES = [Variant(lambda m=m: m) for m in registry.examples("angular") if fa.margins.parameters(m) is None]
VARIANTS = [*OTHER_ANGLES, *BY_ROWS, *MODULATED, *BINARY, *SUB_CENTERS, *SMOOTHED]
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)


def with_sub_centers(case: Case, variant: Variant, seed: int = 0) -> Inputs:
    """Return inputs of the case's sizes, with a row of weight for each sub-center."""
    inputs = make_inputs(case, seed)
    count = variant.options.get("sub_centers", 1)
    if count == 1:
        return inputs
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(len(inputs.weight), count, inputs.weight.shape[1], dtype=torch.float64, generator=generator)
    weight = inputs.weight[:, None] + spread.to(inputs.weight.dtype) * inputs.weight.abs().mean()
    return inputs._replace(weight=weight.flatten(0, 1))


def to_differentiate(
    variant: Variant, case: Case, scale: float, function: Callable[..., Tensor], **options: str
) -> tuple[Callable[[Tensor, Tensor], Tensor], tuple[Tensor, Tensor]]:
    """Return ``function`` of embeddings and weight, and the two.

    A margin's state is held fixed. So are the norms if no gradient goes through them (AdaFace).
    """
    inputs = with_sub_centers(case, variant)
    margin = variant.make()
    if isinstance(margin, torch.nn.Module):
        margin.eval()
    norms, held_norms = inputs.embeddings.norm(dim=1, keepdim=True), norms_are_held(margin)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        if held_norms:
            x = norms * F.normalize(x)
        return function(x, w, inputs.target, margin=margin, scale=scale, **variant.options, **options)

    return loss, (inputs.embeddings.requires_grad_(), inputs.weight.requires_grad_())


@every_variant
@pytest.mark.parametrize("backend", ["torch", "cpu", "oracle"])
@pytest.mark.slow
def test_gradcheck(variant: Variant, backend: str) -> None:
    """In fp64."""
    if backend == "cpu":
        backend = variant.backend
    oracle = backend == "oracle"
    function = fa.reference.margin_softmax_loss if oracle else fa.margin_softmax_loss
    options = {"reduction": "none"} | ({} if oracle else {"backend": backend})
    case = Case(6, 5, 4, "float64", "float64")
    assert torch.autograd.gradcheck(*to_differentiate(variant, case, 8.0, function, **options))


@every_variant
def test_reference_is_twice_differentiable(variant: Variant) -> None:
    case = Case(3, 4, 3, "float64", "float64")
    assert torch.autograd.gradgradcheck(*to_differentiate(variant, case, 4.0, fa.reference.margin_softmax_loss))


def outcomes(variant: Variant, inputs: Inputs, scale: float) -> tuple[Outcome, Outcome, Outcome]:
    """Return the results of the backend, of the reference in fp64 and of the reference in the inputs' dtypes."""
    exact = inputs._replace(embeddings=inputs.embeddings.double(), weight=inputs.weight.double())
    options = {"scale": scale, **variant.options}
    got = run(fa.margin_softmax_loss, inputs, margin=variant.make(), backend=variant.backend, **options)
    truth = run(fa.reference.margin_softmax_loss, exact, margin=variant.make(), **options)
    eager = run(fa.reference.margin_softmax_loss, inputs, margin=variant.make(), **options)
    return got, truth, eager


CASES = [
    *(Case(9, 97, 33, geometry=geometry) for geometry in GEOMETRIES if geometry not in ("tiny", "huge")),
    Case(0, 5, 7),
    Case(1, 1, 1),
    Case(1, 2, 513, geometry="late"),
    Case(130, 211, 7, geometry="late"),  # several blocks, whose size the number of sub-centers need not divide
    Case(5, 11, 512, scale=1.0),
    Case(9, 97, 33, scale=1000.0),
    Case(9, 97, 33, scale=1000.0, geometry="collapsed"),
    Case(9, 97, 33, layout="strided", geometry="late"),
]


def close(got: Tensor, right: Tensor, allowed: float, name: str) -> None:
    if right.numel() == 0:
        assert got.shape == right.shape
        return
    error = ((got - right).abs().max() / right.abs().max().clamp(min=1e-9)).item()
    assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def is_defined(variant: Variant, case: Case) -> bool:
    """Return false for ElasticFace+ where target cosines are equal: the order of its draws is then arbitrary."""
    return not (getattr(variant.make(), "plus", False) and case.geometry in ("aligned", "opposed", "duplicates"))


def check_fp64(variant: Variant, case: Case) -> None:
    exact = dataclasses.replace(case, x_dtype="float64", w_dtype="float64")
    inputs = with_sub_centers(exact, variant)
    got, truth, _ = outcomes(variant, inputs, case.scale)
    # The ends of the angle are known to 1e-8 where the cosine is to 1e-16.
    ends = case.geometry in ("aligned", "opposed") or case.N == 1
    allowed = (1e-6 if ends else 1e-11) * max(1.0, case.scale / 64)
    if case.D == 1:  # the gradients are 0 but for rounding
        allowed = 1e-5
    for name in ("loss", "d_embeddings", "d_weight"):
        close(getattr(got, name), getattr(truth, name), allowed, name)
    assert torch.equal(got.stats.correct, truth.stats.correct)
    counted = inputs.target != -100
    # Sums of logistic losses end at e^-600, the reference's where fp64 does.
    lse, right = (each.stats.lse[counted].clamp(min=-590) for each in (got, truth))
    torch.testing.assert_close(lse, right, rtol=1e-6, atol=1e-6)


IN_FP64 = [(v, case) for case in CASES for v in VARIANTS if is_defined(v, case)]
in_fp64 = {backend: [pair for pair in IN_FP64 if pair[0].backend == backend] for backend in ("cpu", "torch")}


@pytest.mark.parametrize(("variant", "case"), in_fp64["cpu"], ids=str)
def test_fp64_agrees_with_the_reference(variant: Variant, case: Case, poison: None) -> None:
    check_fp64(variant, case)


@pytest.mark.parametrize(("variant", "case"), in_fp64["torch"], ids=str)
def test_fp64_in_plain_torch_agrees_with_the_reference(variant: Variant, case: Case) -> None:
    check_fp64(variant, case)


@every_variant
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("geometry", ["random", "late"])
def test_other_dtypes(variant: Variant, dtype: str, geometry: str, isa: str) -> None:
    """The error is at most twice that of plain PyTorch in the same dtypes plus the rounding of a logit.

    Beside bf16 embeddings the fp32 centers are rounded to bf16, where the processor multiplies it: 2⁻⁹ a number, and
    40 of them take turns in a cosine. A probability has that error of a logit, beside those of the loss's own.
    """
    case = Case(70, 203, 40, dtype, "float32", geometry=geometry)
    rounded = 64 * 2.0**-9 / 40**0.5 if dtype == "bfloat16" and cpu.multiplies_bf16() else 0.0
    got, truth, eager = outcomes(variant, with_sub_centers(case, variant), case.scale)
    for name in ("loss", "d_embeddings", "d_weight"):
        right = getattr(truth, name)
        of_eager = ((getattr(eager, name) - right).abs().max() / right.abs().max()).item()
        stored = 2.0**-8 if dtype == "bfloat16" and name == "d_embeddings" else 0.0
        centers = rounded if name == "loss" else 2 * rounded
        close(getattr(got, name), right, 2 * of_eager + 64 * 2.0**-21 + stored + centers, name)


def train_shard(variant: Variant, inputs: Inputs, counts: list[int], head_options: dict[str, Any]) -> dict[str, Tensor]:
    """Take two steps with this rank's rows; return the loss and gradients of the second, and the state after it."""
    world = len(counts)
    rank = torch.distributed.get_rank() if world > 1 else 0
    rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    classes = len(inputs.weight) // variant.options.get("sub_centers", 1)
    head = fa.PartialFC(
        inputs.weight.shape[1],
        classes,
        margin=variant.make(),
        scale=16.0,
        dtype=torch.float64,
        **variant.options,
        **head_options,
    )
    head.load_full_weight(inputs.weight)
    for _ in range(2):
        head.zero_grad()
        x = inputs.embeddings[rows].clone().requires_grad_()
        loss = head(x, inputs.target[rows])
        loss.backward()
    gradient = torch.zeros_like(head.weight) if head.weight.grad is None else head.weight.grad
    cosines, ids = head.topk(x, 3)
    return {
        "loss": loss.detach(),
        "d_embeddings": x.grad / world,
        "d_weight": gradient.to_dense(),
        "top_cosines": cosines,
        "top_ids": ids,
        "logits": head.logits(x),
        **head.state_dict(prefix="state."),
    }


def check_ranks(variant: Variant, head_options: dict[str, Any], counts: tuple[int, int] = (6, 3)) -> None:
    inputs = with_sub_centers(Case(9, 11, 6, "float64", "float64", geometry="ignored"), variant)
    alone = train_shard(variant, inputs, [9], head_options)
    parts = run_ranks(2, _train_shard_by_index, VARIANTS.index(variant), inputs, list(counts), head_options)
    for name, right in alone.items():
        # A loss, a step and settings are the same on every rank; of the others each rank has some rows.
        whole = right.ndim == 0 or name.endswith(".settings")
        got = parts[0][name] if whole else torch.cat([part[name] for part in parts])
        torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
        if whole:
            assert torch.equal(parts[0][name], parts[1][name])


def _train_shard_by_index(index: int, *args: Any) -> dict[str, Tensor]:
    """Call :func:`train_shard` with a variant's index: its function cannot be sent to another process."""
    return train_shard(VARIANTS[index], *args)


@pytest.mark.distributed
@every_variant
def test_two_ranks_equal_one_process(variant: Variant) -> None:
    check_ranks(variant, {})


@pytest.mark.distributed
@pytest.mark.parametrize("variant", [BY_ROWS[1], SMOOTHED[0], SUB_CENTERS[2]], ids=str)
def test_a_rank_without_rows(variant: Variant) -> None:
    check_ranks(variant, {}, (0, 9))


unsmoothed = pytest.mark.parametrize("variant", [v for v in VARIANTS if "label_smoothing" not in v.options], ids=str)


@pytest.mark.distributed
@unsmoothed
def test_two_ranks_with_samples_and_fused_optimizer(variant: Variant) -> None:
    check_ranks(variant, {"sample_rate": 0.5, "center_optimizer": fa.CenterSGD(lr=0.1)})


@unsmoothed
def test_fused_optimizer_is_sgd(variant: Variant) -> None:
    """CenterSGD's step equals torch.optim.SGD's on the dense gradient."""
    inputs = with_sub_centers(Case(9, 40, 6, "float64", "float64"), variant)
    options = {"margin": variant.make(), "scale": 16.0, "sample_rate": 0.5, "dtype": torch.float64, **variant.options}
    heads = []
    for center_optimizer in (fa.CenterSGD(lr=0.3, momentum=0.0), None):
        head = fa.PartialFC(6, 40, center_optimizer=center_optimizer, dense_grad=True, **copy.deepcopy(options))
        head.load_full_weight(inputs.weight)
        head(inputs.embeddings, inputs.target).backward()
        if center_optimizer is None:
            torch.optim.SGD([head.weight], lr=0.3).step()
        heads.append(head)
    assert not torch.equal(heads[1].weight, inputs.weight)
    torch.testing.assert_close(heads[0].weight, heads[1].weight, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("error:Dynamo")
@every_variant
def test_compiles(variant: Variant) -> None:
    """fullgraph: nothing falls back to eager."""
    head = fa.MarginHead(5, 7, margin=variant.make(), scale=16.0, **variant.options)
    other = copy.deepcopy(head)
    x, y = 3 * torch.randn(6, 5), torch.randint(7, (6,))
    torch._dynamo.reset()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    results = []
    for each in (compiled, other):
        leaf = x.clone().requires_grad_()
        loss = each(leaf, y)
        loss.backward()
        results.append((loss, leaf.grad))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(head.weight.grad, other.weight.grad)
    for name, buffer in head.named_buffers():
        torch.testing.assert_close(buffer, other.get_buffer(name))


@every_variant
def test_autocast(variant: Variant) -> None:
    """Embeddings as autocast casts them, all else in full precision: as with these embeddings and without it."""
    inputs = with_sub_centers(Case(9, 23, 16, geometry="late"), variant)
    rounded = inputs._replace(embeddings=inputs.embeddings.bfloat16())
    right = run(fa.margin_softmax_loss, rounded, margin=variant.make(), **variant.options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(fa.margin_softmax_loss, inputs, margin=variant.make(), **variant.options)
    torch.testing.assert_close(got.loss, right.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got.d_weight, right.d_weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.d_embeddings, right.d_embeddings, rtol=1e-5, atol=1e-6)


@every_variant
def test_margins_are_readable(variant: Variant) -> None:
    margin = variant.make()
    assert repr(eval(repr(margin), PUBLIC)) == repr(margin)
    assert repr(copy.deepcopy(margin)) == repr(margin)
    hash(margin)


@every_variant
def test_nan_row_poisons_itself_alone(variant: Variant) -> None:
    inputs = with_sub_centers(Case(5, 9, 6, "float64", "float64"), variant)
    poisoned = inputs._replace(embeddings=inputs.embeddings.clone())
    poisoned.embeddings[2] = torch.nan
    margin = variant.make()
    got = run(fa.margin_softmax_loss, poisoned, margin=margin, backend=variant.backend, **variant.options)
    others = torch.arange(5) != 2
    assert got.loss[2].isnan() and got.d_embeddings[2].isnan().all()
    assert got.loss[others].isfinite().all() and got.d_embeddings[others].isfinite().all()
    assert got.d_weight.isnan().any()
    if isinstance(margin, torch.nn.Module):
        assert all(buffer.isfinite().all() for buffer in margin.buffers())


def test_plain_arcface_is_unchanged() -> None:
    """With sub_centers=1 and label_smoothing=0 the result is the same, to the bit."""
    inputs = make_inputs(Case(9, 97, 33))
    plain = run(fa.margin_softmax_loss, inputs, margin=ARCFACES[1], backend="cpu")
    same = run(fa.margin_softmax_loss, inputs, margin=ARCFACES[1], backend="cpu", sub_centers=1, label_smoothing=0)
    for name in ("loss", "d_embeddings", "d_weight"):
        assert torch.equal(getattr(plain, name), getattr(same, name))
