"""The kernels for compute capability 9.0 (csrc/cuda/hopper): their source on emulated clusters on any machine, and on
such a GPU where there is one. Emulated, each cluster runs under another schedule of copies, products and warps.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import cuda_emulated
from support.cases import Case, inputs_on
from support.cuda_cases import loss
from support.cuda_places import in_place, needs_emulation, places
from support.hopper_cases import CORE, FULL, check

import fused_arcface as fa
from fused_arcface.app import cli
from fused_arcface.app.cli import doctor
from fused_arcface.backends import cuda, hopper, native
from fused_arcface.backends import torch as plain_torch
from fused_arcface.base import keyed_random
from fused_arcface.engine.terms import CenterStep, Negatives, RowGradients


def _no_gpu() -> str | None:
    if cuda.unavailable() is not None:
        return f"backend 'cuda' cannot run here: {cuda.unavailable()}"
    capability = torch.cuda.get_device_capability()
    return None if cuda._kernels.HOPPER and capability == hopper.CAPABILITY else cuda.describe()


needs_gpu = pytest.mark.skipif(_no_gpu() is not None, reason=str(_no_gpu()))


class Recording:
    """Kernels that note which precision each pass was asked for."""

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels
        self.precisions: list[str] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._kernels, name)
        if name not in ("class_stats", "weight_grad", "update_centers"):
            return function

        def recorded(precision: str, *arguments: object) -> object:
            self.precisions.append(precision)
            return function(precision, *arguments)

        return recorded


@pytest.fixture(params=places(needs_gpu, "on_a_gpu"))
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the backend runs, with Hopper's kernels on."""
    monkeypatch.setenv("FUSED_ARCFACE_HOPPER", "1")
    if request.param == "cpu":
        monkeypatch.setattr(cuda, "_capability", lambda tensor: hopper.CAPABILITY)
        monkeypatch.setitem(hopper.CONFIGS, "1", hopper.HopperConfig(center_bytes=0))
    with in_place(request.param, monkeypatch, Recording) as device:
        yield device


def _precisions() -> set[str]:
    return set(cuda._kernels.precisions)


@pytest.mark.parametrize("case", CORE, ids=str)
def test_agrees_with_the_reference(case: Case, device: str) -> None:
    check(case, device)
    assert _precisions() == {"hopper"}


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("shape", FULL, ids=str)
def test_agrees_with_the_reference_over_the_full_grid(shape: tuple[int, int], device: str) -> None:
    for case in FULL[shape]:
        check(case, device, seed=1)


@pytest.mark.parametrize("configuration", ["cluster-1", "unordered", "cluster-1-unordered"])
def test_other_configurations(configuration: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_ARCFACE_HOPPER", configuration)
    check(Case(70, 200, 512, "bfloat16", "bfloat16"), device)
    assert _precisions() == {"hopper"}


@pytest.mark.parametrize("pair", [("bfloat16", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("count", [0, 1, 64, 130])
def test_classes_past_the_count_are_padding(count: int, pair: tuple[str, str], device: str) -> None:
    """Their number is known to the device alone; NaN there reaches no result."""
    x, w, target, _ = inputs_on(Case(6, 300, 512, *pair), device)
    target = (target % count if count > 0 else target.fill_(-1)).index_fill_(0, torch.tensor([1], device=device), -1)
    class_count = torch.tensor(count, device=device)
    shift = torch.linspace(-3, 3, 6, dtype=torch.float64, device=device)
    rounded = w.to(torch.bfloat16)
    expected = plain_torch.class_stats(x, rounded, target, 20.0, shift, True, class_count)
    w[count:] = torch.nan
    for result, right, rtol in zip(
        cuda.class_stats(x, w, target, 20.0, shift, True, class_count), expected, (1e-5, 1e-5, 2.0**-7), strict=True
    ):
        size = right.abs().nan_to_num(0, 0, 0).max().item()
        torch.testing.assert_close(result, right, rtol=rtol, atol=rtol * size)


@pytest.mark.parametrize("pair", [("bfloat16", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("N", [1, 64, 65, 200])
def test_without_gradients(N: int, pair: tuple[str, str], device: str) -> None:
    """A kernel without a second product gives the same sums and maxima, also where only the maxima are wanted."""
    x, w, target, _ = inputs_on(Case(N, 330, 512, *pair), device)
    shift = torch.linspace(-3, 3, N, dtype=torch.float64, device=device)
    expected = plain_torch.class_stats(x.double(), w.to(torch.bfloat16).double(), target, 20.0, shift, False)
    total, maximum, nothing = cuda.class_stats(x, w, target, 20.0, shift, False)
    torch.testing.assert_close(total.double(), expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(maximum.double(), expected[1], rtol=1e-5, atol=1e-6)
    assert nothing.numel() == 0
    assert torch.equal(cuda.class_max(x, w, target), maximum)
    assert _precisions() == {"hopper"}


def test_targets_elsewhere(device: str) -> None:
    """Rows whose target is in another shard (-1) have only negatives here."""
    x, w, target, _ = inputs_on(Case(70, 130, 512, "bfloat16", "bfloat16"), device)
    target[::2] = -1
    for result, right, rtol in zip(
        cuda.class_stats(x, w, target, 20.0, None, True),
        plain_torch.class_stats(x, w, target, 20.0, None, True),
        (1e-5, 1e-5, 2.0**-7),
        strict=True,
    ):
        torch.testing.assert_close(result, right, rtol=rtol, atol=rtol * right.abs().max().item())


def test_nan_row_poisons_itself_and_the_weight_gradient(device: str) -> None:
    case = Case(6, 9, 512, "bfloat16", "bfloat16")
    x, w, target, _ = inputs_on(case, device)
    x[2, 3] = torch.nan
    x, w = x.requires_grad_(), w.requires_grad_()
    total, stats = loss(x, w, target, margin=case.margin, scale=case.scale, reduction="sum")
    total.backward()
    nan = [False, False, True, False, False, False]
    assert stats.loss.isnan().tolist() == nan
    assert x.grad is not None and x.grad.isnan().any(1).tolist() == nan
    assert w.grad is not None and w.grad.isnan().any(1).all()


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_rows_of_any_norm(weight_dtype: torch.dtype, device: str) -> None:
    """Rows that bf16 holds, far from 1 and zero: their cosines are those of rows that are near 1."""
    x, w, target, _ = inputs_on(Case(5, 130, 512, "bfloat16", "bfloat16"), device)
    powers = torch.tensor([0.0, 60.0, -42.0, 100.0, -30.0, 45.0, 30.0])[torch.arange(130) % 7].to(device)
    far = (w.double() * 2.0 ** powers.double()[:, None]).to(weight_dtype)
    far[127] = w[127] = 0
    near, mine = (cuda.class_stats(x, each, target, 30.0, None, True) for each in (w, far))
    for result, right in zip(mine, near, strict=True):
        torch.testing.assert_close(result, right, rtol=2.0**-7, atol=2.0**-7 * right.abs().max().item())
    torch.testing.assert_close(mine[0], near[0], rtol=1e-5, atol=0)


def test_nothing_is_chosen_that_does_not_fit(device: str) -> None:
    """Other widths and dtypes, and negatives that are not plain, are the portable kernels'."""
    for case in (Case(3, 5, 512, "float16", "float16"), Case(3, 5, 256, "bfloat16", "bfloat16"), Case(3, 5, 512)):
        x, w, target, _ = inputs_on(case, device)
        cuda.class_stats(x, w, target, 20.0, None, True)
    x, w, target, _ = inputs_on(Case(3, 5, 512, "bfloat16", "bfloat16"), device)
    cuda.class_stats(x, w[:4], target % 4, 20.0, None, True, negatives=Negatives(sub_centers=2))
    assert "hopper" not in _precisions()


def _step(dtype: torch.dtype, momentum_dtype: torch.dtype | None, chosen: str, device: str) -> tuple[tuple, CenterStep]:
    """Arguments of update_centers: 150 classes, or more than a round of blocks takes, of which all, sampled ones or,
    padded, as many are updated."""
    C = 600 if chosen == "rounds" else 150
    x, w, target, _ = inputs_on(Case(12, C, 512, "bfloat16"), device)
    w = w.to(dtype)
    classes = None if chosen in ("all", "rounds") else torch.arange(0, C, 2, device=device)
    if classes is not None:
        target = target % len(classes)
    if chosen == "padded":
        classes = torch.cat([classes, classes.new_full((100,), C)])
    buffer = units = None
    if momentum_dtype == torch.int8:
        buffer = torch.randint(-127, 128, w.shape, generator=torch.Generator().manual_seed(1)).to(device, torch.int8)
        units = torch.full((C, 8), 0.01, device=device)
    elif momentum_dtype is not None:
        buffer = (0.1 * w.float()).to(momentum_dtype)
    active = torch.tensor(True, device=device)
    step = CenterStep(classes, buffer, units, 0.1, 0.9, 5e-4, keyed_random.rounding_key(3, 4), 1000, active)
    rows = torch.linspace(-1, 1, 12, device=device)
    lse = torch.full((12,), 3.0, dtype=torch.float64, device=device)
    return (x, w, target, RowGradients(16.0, lse, rows, -rows)), step


def _copied(step: CenterStep) -> CenterStep:
    return step._replace(
        momentum_buffer=None if step.momentum_buffer is None else step.momentum_buffer.clone(),
        momentum_scale=None if step.momentum_scale is None else step.momentum_scale.clone(),
    )


def _gradient(x: torch.Tensor, w: torch.Tensor, target: torch.Tensor, gradients: RowGradients) -> torch.Tensor:
    """The gradient by the rows of w in fp32, as the kernel hands it to a step."""
    d_weight = torch.empty(w.shape, device=w.device)
    stream, multiprocessors = cuda._device(w)
    options = (0, 0, multiprocessors, 2, True, (1, 0, 0), 0)

    def run(workspace: int) -> int:
        return cuda._kernels.weight_grad(
            "hopper",
            native.matrix(x),
            native.matrix(w),
            target.data_ptr(),
            *native.row_gradients(gradients),
            native.matrix(d_weight),
            options,
            workspace,
            stream,
        )

    workspace = torch.empty(run(0), dtype=torch.uint8, device=w.device)
    run(workspace.data_ptr())
    return d_weight


CORE_STEPS = ((torch.bfloat16, torch.int8), (torch.float32, torch.float32))
STEPS = [
    pytest.param(dtype, momentum, chosen, marks=() if (dtype, momentum) in CORE_STEPS else pytest.mark.full)
    for dtype in (torch.float32, torch.bfloat16)
    for momentum in (None, torch.float32, torch.bfloat16, torch.int8)
    for chosen in ("all", "rounds", "sampled", "padded")
]


@pytest.mark.parametrize(("dtype", "momentum_dtype", "chosen"), STEPS)
def test_step_is_the_reference_s_given_its_gradient(
    dtype: torch.dtype, momentum_dtype: torch.dtype | None, chosen: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (x, w, target, gradients), step = _step(dtype, momentum_dtype, chosen, device)
    got_w, got = w.clone(), _copied(step)
    cuda.update_centers(x, got_w, target, gradients, got)
    assert _precisions() == {"hopper"}

    rows = torch.arange(len(w), device=device) if step.classes is None else step.classes[step.classes < len(w)]
    chosen_w = w[rows].contiguous()
    if step.classes is not None:  # these are copied, as rows off their alignment are
        chosen_w = torch.nn.functional.pad(chosen_w, (1, 0))[:, 1:]
    gradient = _gradient(x, chosen_w, target, gradients)
    padding = 0 if step.classes is None else len(step.classes) - len(rows)
    gradient = torch.cat([gradient, gradient.new_zeros(padding, 512)])
    monkeypatch.setattr(plain_torch, "_exact_weight_grad", lambda *_: gradient)
    expected_w, expected = w.clone(), _copied(step)
    plain_torch.update_centers(x, expected_w, target, gradients, expected)
    # To the bit on a CPU. A GPU fuses a multiplication and an addition into one rounding: last bits of fp32 differ, and
    # now and then a number that was rounded further.
    for mine, right in ((got_w, expected_w), (got.momentum_buffer, expected.momentum_buffer)):
        if mine is None or right is None:
            continue
        if device == "cpu":
            assert torch.equal(mine, right)
        elif mine.dtype == torch.float32:
            torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-6)
        else:
            assert (mine != right).double().mean() <= 0.01
            torch.testing.assert_close(mine.double(), right.double(), rtol=2.0**-7, atol=1)
    if got.momentum_scale is not None:
        torch.testing.assert_close(got.momentum_scale, expected.momentum_scale, rtol=1e-6, atol=0)


def test_nothing_changes_where_the_step_is_not_active(device: str) -> None:
    (x, w, *rest), step = _step(torch.bfloat16, torch.int8, "all", device)
    got_w, got = w.clone(), _copied(step)._replace(active=torch.tensor(False, device=device))
    cuda.update_centers(x, got_w, *rest, got)
    assert torch.equal(got_w, w) and torch.equal(got.momentum_buffer, step.momentum_buffer)


def test_update_without_rows(device: str) -> None:
    """Momentum and weight decay go on."""
    (x, w, target, gradients), step = _step(torch.bfloat16, torch.float32, "all", device)
    nothing = x[:0], target[:0], RowGradients(gradients.scale, *(each[:0] for each in gradients[1:]))
    weights = [w.clone(), w.clone()]
    for backend, weight in zip((cuda, plain_torch), weights, strict=True):
        backend.update_centers(nothing[0], weight, *nothing[1:], _copied(step))
    assert (weights[0] != weights[1]).sum() <= 2 and not torch.equal(weights[0], w)


def test_deterministic_to_the_bit(device: str) -> None:
    """Whatever copies, products and warps do first."""
    case = Case(70, 300, 512, "bfloat16", "bfloat16")
    runs = []
    for _ in range(3):
        x, w, target, _ = inputs_on(case, device)
        x, w = x.requires_grad_(), w.requires_grad_()
        total, _ = loss(x, w, target, margin=case.margin, scale=case.scale, reduction="sum")
        runs.append((total.detach(), *torch.autograd.grad(total, (x, w))))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.emulation
@needs_emulation
@pytest.mark.parametrize(("code", "most"), [(2, 60e6), (0, 100e6)])
def test_workspace_is_small_whatever_the_classes(code: int, most: float) -> None:
    """What a pass asks for, without running it: N = 4096 on 132 multiprocessors, bf16 and fp32 centers."""
    unread, D = 16, 512
    rest = (0, (0, hopper.HopperConfig().center_bytes, 132, 2, True, (1, 0, 0), 0), 0, (0, 0))
    kernels, needed = cuda_emulated.module(), set()
    for C in (3_000_000, 100_000_000):
        x, w = (unread, 2, 4096, D, D, 1), (unread, code, C, D, D, 1)
        step = (0, C, 2, unread, 0, 0.1, 0.9, 0.0, 1, 0, 0)
        needed.add(
            (
                kernels.class_stats("hopper", x, w, unread, 64.0, *[unread] * 4, *rest),
                kernels.weight_grad("hopper", x, w, unread, 64.0, *[unread] * 3, w, *rest[1:]),
                kernels.update_centers("hopper", x, w, unread, 64.0, *[unread] * 3, step, unread, *rest[1:]),
            )
        )
    (bytes_of_passes,) = needed
    assert max(bytes_of_passes) < most


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("configuration", list(hopper.CONFIGS))
@pytest.mark.parametrize("w_dtype", ["bfloat16", "float32"])
def test_real_sizes_on_a_gpu(w_dtype: str, configuration: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tiles than one accumulator keeps, several slices and rounds of blocks; late in training."""
    monkeypatch.setenv("FUSED_ARCFACE_HOPPER", configuration)
    monkeypatch.setattr(cuda, "_kernels", Recording(cuda._kernels))
    check(Case(1500, 40_007, 512, "bfloat16", w_dtype, geometry="late"), "cuda")
    check(Case(40, 140_007, 512, "bfloat16", w_dtype), "cuda")
    assert _precisions() == {"hopper"}


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.empty(2, 512, dtype=torch.bfloat16), torch.empty(3, 512)
    monkeypatch.setenv("FUSED_ARCFACE_HOPPER", "0")
    assert hopper.choose(True, (9, 0), x, w) is None
    for value in ("", "1"):
        monkeypatch.setenv("FUSED_ARCFACE_HOPPER", value)
        assert hopper.choose(True, (9, 0), x, w) == hopper.HopperConfig()
    monkeypatch.setenv("FUSED_ARCFACE_HOPPER", "cluster-1")
    assert hopper.choose(True, (9, 0), x, w) == hopper.HopperConfig(cluster=1)
    assert hopper.choose(False, (9, 0), x, w) is None and hopper.choose(True, (10, 0), x, w) is None
    monkeypatch.setenv("FUSED_ARCFACE_HOPPER", "yes")
    with pytest.raises(ValueError, match=r"^FUSED_ARCFACE_HOPPER must be 0 or one of 1, cluster-1, .*; got 'yes'$"):
        hopper.choose(True, (9, 0), x, w)


def test_says_why_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSED_ARCFACE_HOPPER", raising=False)
    assert hopper.describe(False, (9, 0)) == "not built: that takes nvcc 12.8 or later"
    assert hopper.describe(True, (8, 0)) == ("not used: they need a GPU of compute capability 9.0; this one has 8.0")
    assert hopper.describe(True, (9, 0)).startswith("on for bf16")
    monkeypatch.setenv("FUSED_ARCFACE_HOPPER", "0")
    assert hopper.describe(True, (9, 0)) == "off: FUSED_ARCFACE_HOPPER=0 is set"


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_doctor_gives_the_reason(
    capability: tuple[int, int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with a GPU: the other checks of ``doctor`` are left out."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.delenv("FUSED_ARCFACE_HOPPER", raising=False)
    monkeypatch.setattr(fa.backends.registry, "_unavailable", lambda *_: None)
    monkeypatch.setattr(doctor, "_trial", lambda name: None)
    monkeypatch.setattr(cuda, "unavailable", lambda *_: None)
    monkeypatch.setattr(cuda, "_kernels", SimpleNamespace(HOPPER=True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert cli.run(["doctor"]) == 0
    assert f"Hopper kernels {hopper.describe(True, capability)}" in " ".join(
        capsys.readouterr().out.replace("│", " ").split()
    )
