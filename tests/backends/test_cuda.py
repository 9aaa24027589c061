"""The CUDA backend: its kernels' source on emulated blocks (cuda_emulated.py) on any machine, and on a GPU where there
is one. Emulated, everything runs as users call it but for the device: backends/cuda.py takes the CPU's tensors.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from support import cuda_emulated, extreme_rows
from support.cases import Case, inputs_on
from support.cuda_cases import BF16, CORE, FP16, FP32, FULL, Setting, check, loss
from support.cuda_places import in_place, needs_emulation, needs_gpu, places

import fused_arcface as fa
from fused_arcface import _native, backends
from fused_arcface.backends import cuda
from fused_arcface.backends import torch as plain_torch


@pytest.fixture(params=places())
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the backend runs. Hopper's kernels, which test_hopper.py tests, are off."""
    monkeypatch.setenv("FUSED_ARCFACE_HOPPER", "0")
    with in_place(request.param, monkeypatch) as device:
        yield device


def _chunks(setting: Setting, patch: pytest.MonkeyPatch) -> None:
    if setting.chunks:
        patch.setattr(cuda, "CHUNKS", cuda.ChunkConfig(0, 0))


@pytest.mark.slow
@pytest.mark.parametrize("setting", CORE, ids=str)
def test_agrees_with_the_reference(setting: Setting, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _chunks(setting, monkeypatch)
    check(setting, device)


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("shape", FULL, ids=str)
def test_agrees_with_the_reference_over_the_full_grid(
    shape: tuple[int, int, int], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for setting in FULL[shape]:
        _chunks(setting, monkeypatch)
        check(setting, device, seed=1)


def test_stages_with_targets_elsewhere(device: str) -> None:
    """Rows whose target is in another shard (-1) have only negatives here."""
    x, w, target, _ = inputs_on(Case(6, 9, 16), device)
    target[::2] = -1
    for result, expected in zip(
        cuda.class_stats(x, w, target, 20.0, None, True),
        plain_torch.class_stats(x, w, target, 20.0, None, True),
        strict=True,
    ):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    torch.testing.assert_close(cuda.class_max(x, w, target), plain_torch.class_max(x, w, target))
    torch.testing.assert_close(cuda.target_cosine(x, w, target), plain_torch.target_cosine(x, w, target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_have_the_embeddings_dtype(
    dtype: torch.dtype, w_dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Centers of another dtype are rounded to 16 bits once: the results are those of centers that are stored so."""
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    monkeypatch.setattr(cuda, "CHUNKS", cuda.ChunkConfig(0, 0))
    x, w, target, _ = inputs_on(Case(6, 140, 16), device)
    x, w = x.to(dtype), w.to(w_dtype)
    assert cuda._precision(x) == names[dtype]
    product = torch.float32 if dtype == torch.float32 else dtype
    shift = torch.linspace(-3, 3, 6, dtype=torch.float64, device=device)
    expected = plain_torch.class_stats(x.double(), w.to(product).double(), target, 20.0, shift, False)
    total, maximum, _ = cuda.class_stats(x, w, target, 20.0, shift, False)
    torch.testing.assert_close(total.double(), expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(maximum.double(), expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtypes", [FP32, BF16, FP16])
@pytest.mark.parametrize("count", [0, 1, 128, 130])
def test_classes_past_the_count_are_padding(
    count: int, dtypes: tuple[str, str], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their number is known to the device alone; NaN there reaches no result. Chunks of one tile: some are padding."""
    monkeypatch.setattr(cuda, "CHUNKS", cuda.ChunkConfig(0, 0))
    x, w, target, _ = inputs_on(Case(6, 300, 16, *dtypes), device)
    target = (target % count if count > 0 else target.fill_(-1)).index_fill_(0, torch.tensor([1], device=device), -1)
    class_count = torch.tensor(count, device=device)
    shift = torch.linspace(-3, 3, 6, dtype=torch.float64, device=device)
    expected = plain_torch.class_stats(x, w, target, 20.0, shift, True, class_count)
    maximum = plain_torch.class_max(x, w, target, class_count)
    w[count:] = torch.nan
    rounding = 1e-5 if dtypes == FP32 else 2.0**-7
    for result, right, rtol in zip(
        cuda.class_stats(x, w, target, 20.0, shift, True, class_count), expected, (1e-5, 1e-5, rounding), strict=True
    ):
        size = right.abs().nan_to_num(0, 0, 0).max().item()
        torch.testing.assert_close(result, right, rtol=rtol, atol=rtol * size)
    torch.testing.assert_close(cuda.class_max(x, w, target, class_count), maximum)


def test_invalid_label_is_nan(device: str) -> None:
    x = torch.eye(3, device=device)
    target = torch.tensor([0, -1, -2], device=device)
    assert cuda.target_cosine(x, x, target).isnan().tolist() == [False, False, True]


@pytest.mark.parametrize("dtypes", [("float32", "float32"), BF16, FP16])
def test_nan_row_poisons_itself_and_the_weight_gradient(dtypes: tuple[str, str], device: str) -> None:
    case = Case(6, 9, 16, *dtypes)
    x, w, target, _ = inputs_on(case, device)
    x[2, 3] = torch.nan
    x, w = x.requires_grad_(), w.requires_grad_()
    total, stats = loss(x, w, target, margin=case.margin, scale=case.scale, reduction="sum")
    total.backward()
    nan = [False, False, True, False, False, False]
    assert stats.loss.isnan().tolist() == nan
    assert x.grad is not None and x.grad.isnan().any(1).tolist() == nan
    assert w.grad is not None and w.grad.isnan().any(1).all()


def test_no_rows(device: str) -> None:
    case = Case(0, 9, 16)
    x, w, target, _ = inputs_on(case, device)
    x, w = x.requires_grad_(), w.requires_grad_()
    loss(x, w, target, margin=case.margin, scale=case.scale, reduction="sum")[0].backward()
    assert x.grad is not None and x.grad.shape == (0, 16)
    assert w.grad is not None and (w.grad == 0).all()
    assert cuda.class_max(x, w, target).shape == (0,)


def test_fp64_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.registry, "_unavailable", lambda *_: None)
    with pytest.raises(TypeError) as raised:
        backends.select("cuda", torch.device("cuda", 0), torch.float64)
    assert str(raised.value) == (
        "backend 'cuda' needs embeddings and weight of float32, bfloat16, float16; got float64"
    )


@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
@pytest.mark.parametrize("boundary", ["none", "hard", "fold", "clip", "easy", "continuous", "linear"])
def test_margin_agrees_point_by_point(boundary: str, gradient: str, device: str) -> None:
    """The finalizing kernel against fused_arcface.margins in fp64 over a dense grid with both ends."""
    cosine = torch.cat([torch.linspace(-1, 1, 1021), torch.tensor([-1.0, -0.0, 0.0, 1.0])]).to(device)
    order = torch.randperm(cosine.numel(), generator=torch.Generator().manual_seed(0))
    lse = torch.linspace(-80, 80, cosine.numel())[order].to(device)
    for m1, m2, m3 in [(1.0, 0.5, 0.0), (4.0, 0.0, 0.1), (1.35, 0.4, 0.2)]:
        numbers = (64.0, m1, m2, m3, boundary, gradient)
        phi = m1 * cosine.double().acos() + m2
        # A jump lies at a multiple of π, and fp32 may see it one rounding away.
        away = ((phi / math.pi - (phi / math.pi).round()).abs() > 1e-6) | (phi < 1)
        results = cuda.margin_loss(lse, cosine, *numbers)
        expected = plain_torch.margin_loss(lse.double(), cosine.double(), *numbers)
        for name, result, truth in zip(("loss", "lse", "d_lse", "d_cosine"), results, expected, strict=True):
            scale = 64 * m1 / fa.margins.SIN_FLOOR if name == "d_cosine" else 64
            error = ((result - truth).abs() / truth.abs().clamp(min=scale))[away].max()
            assert error < 2e-6, (name, m1, m2, m3, error)


def test_small_losses_keep_their_digits(device: str) -> None:
    """Not log(exp z + Z) - z, which is off by 11 % when the loss is small."""
    rows = torch.tensor([[-30.0], [0.5]], device=device)
    small, *_ = cuda.margin_loss(*rows, 1.0, 1.0, 0.0, 0.0, "linear", "exact")
    torch.testing.assert_close(small.cpu(), torch.tensor([math.exp(-30.5)]), rtol=1e-5, atol=0)


def loss_on(device: str) -> extreme_rows.Loss:
    def plain_loss(x: torch.Tensor, w: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float64:  # for which there are no kernels
            return extreme_rows.plain(fa.reference.margin_softmax_loss)(x, w, target)
        moved = (each.to(device) for each in (x, w, target))
        options = {"margin": fa.NormSoftmax(), "scale": extreme_rows.SCALE, "reduction": "none"}
        return loss(*moved, **options)[0].cpu()  # type: ignore[arg-type]

    return plain_loss


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-6)])
def test_rows_of_any_norm(dtype: torch.dtype, tolerance: float, device: str) -> None:
    extreme_rows.check_norms(loss_on(device), dtype, tolerance)


def test_gradients_that_overflow_in_fp16(device: str) -> None:
    extreme_rows.check_overflow(loss_on(device))


def test_zero_row_in_fp16_saturates(device: str) -> None:
    x = torch.zeros(1, 4, dtype=torch.float16, device=device)
    gradient = cuda.embedding_grad(torch.tensor([[1.0, -1.0, 0.0, 1e-20]], device=device), x)
    assert gradient.tolist() == [[65504.0, -65504.0, 0.0, 0.0]]


def test_deterministic_to_the_bit(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "CHUNKS", cuda.ChunkConfig(0, 0))
    case = Case(140, 300, 40, *BF16)
    runs = []
    for _ in range(2):
        x, w, target, _ = inputs_on(case, device)
        x, w = x.requires_grad_(), w.requires_grad_()
        total, _ = loss(x, w, target, margin=case.margin, scale=case.scale, reduction="sum")
        runs.append((total.detach(), *torch.autograd.grad(total, (x, w))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.emulation
@needs_emulation
@pytest.mark.parametrize(("precision", "code"), [("bfloat16", 2), ("float16", 3), ("tf32", 0), ("float32", 0)])
def test_workspace_is_small_whatever_the_classes(precision: str, code: int) -> None:
    """What a pass asks for, without running it: N = 4096, D = 512 on 132 multiprocessors."""
    unread, D = 16, 512
    forward, backward = (
        (stored, cuda.CHUNKS.centers(precision), 132, 1, True, (1, 0, 0), 0)
        for stored in (cuda.CHUNKS.exponential_bytes, cuda.CHUNKS.gradient_bytes)
    )
    kernels, needed = cuda_emulated.module(), set()
    for C in (1_000_000, 100_000_000):
        x, w = ((unread, code, rows, D, D, 1) for rows in (4096, C))
        rest = (0, (0, 0))
        needed.add(
            (
                kernels.class_stats(precision, x, w, unread, 64.0, *[unread] * 4, 0, forward, *rest),
                kernels.weight_grad(precision, x, w, unread, 64.0, *[unread] * 3, w, backward, *rest),
            )
        )
    (bytes_of_passes,) = needed
    print(f"\n{precision}: {[round(each / 1e6) for each in bytes_of_passes]} MB")
    assert bytes_of_passes[0] < 80e6 and bytes_of_passes[1] < 110e6


def test_says_why_it_cannot_run() -> None:
    reason = backends.available()["cuda"]
    if reason is None:
        pytest.skip("the backend can run here")
    assert "CUDA" in reason or "GPU" in reason
    x = torch.eye(2)
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: ") as raised:
        fa.margin_softmax_loss(x, x, torch.tensor([0, 1]), backend="cuda")
    assert reason in str(raised.value)


def test_a_build_without_kernels_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_kernels", None)
    reason = cuda.unavailable()
    assert reason is not None and "nvcc" in reason and "FUSED_ARCFACE_CUDA=ON" in reason


NEWER_RUNTIME = "the driver is for CUDA 12.4, and this build of the kernels for CUDA 13.0 (driver too old)"


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ((12040, 13000, ""), None),  # a driver may know later versions of the same major one
        ((12040, 13000, "driver too old"), f"{NEWER_RUNTIME}: update the driver, or with nvcc 12.4 on the PATH run "),
        (
            (13000, 12080, "no image"),
            "the kernels cannot start on Old GPU: no image. This build may have none for this ",
        ),
        ((13000, 13000, "PTX JIT compilation was disabled"), "the kernels cannot start on Old GPU: PTX JIT compilat"),
    ],
)
def test_kernels_that_cannot_start_are_a_reason(
    found: tuple[int, int, str], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old driver, no machine code for the GPU, a driver that refuses to compile: "auto" takes the next backend."""
    asked = []
    kernels = SimpleNamespace(readiness=lambda index: asked.append(index) or found)
    monkeypatch.setattr(cuda.nvidia, "unavailable", lambda *_: None)
    monkeypatch.setattr(cuda, "_kernels", kernels)
    monkeypatch.setattr(cuda, "_cannot_start", functools.cache(cuda._cannot_start.__wrapped__))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old GPU")
    for device in (torch.device("cuda", 3), torch.device("cuda"), None):
        said = cuda.unavailable(device)
        assert said == reason or (reason is not None and said.startswith(reason))
        assert reason is None or said.endswith("FUSED_ARCFACE_CUDA=ON pip install . in a checkout of the sources")
    assert asked == [3, 1]  # a kernel is loaded once for each GPU
    monkeypatch.setattr(backends.registry, "_BY_PRIORITY", (backends.registry._ROWS["cuda"],))
    with contextlib.nullcontext() if reason is None else pytest.warns(UserWarning, match="cannot start|driver is for"):
        assert backends.select("auto", torch.device("cuda", 3)) == ("cuda" if reason is None else "torch")


@pytest.mark.skipif(not hasattr(_native, "cuda"), reason="this build has no CUDA kernels: no nvcc where it was built")
def test_readiness_without_a_driver() -> None:
    """The runtime of the build itself says that no kernel can start."""
    if torch.cuda.is_available():
        pytest.skip("kernels can start here")
    driver, runtime, error = _native.cuda.readiness(0)
    assert driver == 0 and runtime >= 11000 and "driver" in error


def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the table, and the next one where the first cannot run or has no kernels for the dtype."""
    missing = {"triton": None, "cuda": None}
    monkeypatch.setattr(backends.registry, "_unavailable", lambda name, _=None: missing.get(name))
    gpu = torch.device("cuda", 0)
    assert backends.select("auto", gpu) == "triton"
    assert backends.select("auto", gpu, torch.float64) == "triton"
    missing["triton"] = "no compiler"
    assert backends.select("auto", gpu) == "cuda"
    assert backends.select("auto", gpu, torch.float64) == "torch"
    missing["cuda"] = "not built"
    assert backends.select("auto", gpu) == "torch"


@pytest.mark.skipif(not hasattr(_native, "cuda"), reason="this build has no CUDA kernels: no nvcc where it was built")
def test_import_needs_no_driver() -> None:
    """The module with its kernels is importable, and links no CUDA library."""
    assert _native.__file__ is not None
    if shutil.which("ldd") is not None:
        linked = subprocess.run(["ldd", _native.__file__], capture_output=True, text=True).stdout
        assert "libcuda" not in linked
    command = [sys.executable, "-c", "import fused_arcface as fa; print(fa.backends.available()['cuda'])"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and result.stdout.strip() not in ("", "None"), result.stderr


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtypes", [BF16, FP16, ("float32", "float32"), ("bfloat16", "float32")])
@pytest.mark.parametrize("D", [128, 512])
def test_real_sizes_on_a_gpu(dtypes: tuple[str, str], D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_ARCFACE_HOPPER", "0")
    """Several chunks of the budgets as they are, the last of them short; late in training."""
    check(Setting(Case(1500, 40_007, D, *dtypes, geometry="late"), chunks=False), "cuda")


@pytest.mark.slow
@pytest.mark.parametrize(
    "lines",
    [
        "torch.set_float32_matmul_precision('high'); assert cuda._precision(x) == 'tf32'",
        "torch.set_float32_matmul_precision('highest'); assert cuda._precision(x) == 'float32'",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'; assert cuda._precision(x) == 'tf32'",
        "torch.backends.cuda.matmul.fp32_precision = 'ieee'; assert cuda._precision(x) == 'float32'",
        "torch.backends.fp32_precision = 'tf32'; assert cuda._precision(x) == 'tf32'",
    ],
)
def test_precision_by_the_older_and_the_newer_setting(lines: str) -> None:
    """In a process of its own: torch refuses to read the older setting once the newer was written."""
    if "fp32_precision" in lines and not hasattr(torch.backends, "fp32_precision"):
        pytest.skip(f"torch {torch.__version__} has no fp32_precision")
    code = f"import torch; from fused_arcface.backends import cuda; x = torch.ones(1); {lines}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
