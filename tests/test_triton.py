"""The Triton backend: its kernels in the interpreter on any machine, and on a GPU where there is one.

The interpreter needs a process of its own (triton_interpreted.py says why). Tests that need a GPU are skipped without.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.version import Version  # pytest needs it too

import fused_arcface as fa
from fused_arcface import backends
from fused_arcface.backends import triton as backend

triton = pytest.importorskip("triton", reason="Triton is not installed here")

from cases import Case  # noqa: E402
from triton_cases import BF16, CORE, FULL, Setting, check, force, inputs_on  # noqa: E402

needs_gpu = pytest.mark.skipif(
    backend.unavailable() is not None, reason=f"backend 'triton' cannot run here: {backend.unavailable()}"
)

versions = f"Triton {triton.__version__} and NumPy {np.__version__}"
needs_interpreter = pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"),
    reason=f"Triton's interpreter before 3.7 makes numbers of arrays, which NumPy 2.4 refuses: {versions} are here",
)


def _interpret(*arguments: str) -> None:
    tests = Path(__file__).parent
    files = [str(tests / name) for name in ("triton_interpreted.py", "triton_interpreted_updates.py")]
    # Without pytest's cache, which belongs to the session around this one.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *arguments]
    result = subprocess.run(
        command,
        cwd=tests.parent,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    print(result.stdout[-2000:])
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


@needs_interpreter
@pytest.mark.timeout(600)
def test_kernels_in_the_interpreter() -> None:
    _interpret("-m", "not full")


@needs_interpreter
@pytest.mark.full
@pytest.mark.timeout(3600)
def test_kernels_in_the_interpreter_over_the_full_grid() -> None:
    _interpret("-m", "full")


@pytest.mark.skipif(backend.unavailable() is None, reason="the backend can run here")
def test_says_why_it_cannot_run() -> None:
    reason = backends.available()["triton"]
    assert reason is not None and ("CUDA" in reason or "triton" in reason or "GPU" in reason)
    x = torch.eye(2)
    with pytest.raises(RuntimeError, match="backend 'triton' is not available: ") as raised:
        fa.margin_softmax_loss(x, x, torch.tensor([0, 1]), backend="triton")
    assert reason in str(raised.value)


@pytest.mark.parametrize(
    ("found", "reason"), [("3.3.1", "triton >= 3.4 is needed; found 3.3.1"), ("3.4.0", None), ("10.0", None)]
)
def test_least_version(found: str, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "version", lambda _: found)
    assert backend._missing_compiler() == reason


def test_a_missing_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    reason = backend._missing_compiler()
    assert reason is not None and reason.startswith("the package triton (>= 3.4) cannot be imported")


def test_every_size_has_panels_and_splits() -> None:
    """The host's loops: whole tiles, within their budgets, never empty."""
    from fused_arcface.backends.triton import configs

    for N in (1, 64, 1000, 4096, 100_000):
        for D in (16, 512, 8192):
            for C in (1, 1000, 10_000_000):
                classes = configs.panel_classes(configs.CHUNKS, N, C, 2 * D, 2, 256)
                assert classes % 256 == 0 and 256 <= classes <= -(-C // 256) * 256
                rows = min(N, configs.CHUNKS.max_rows)
                assert classes == 256 or rows * classes * 2 <= configs.CHUNKS.exponential_bytes
        splits = configs.row_splits(-(-N // 64), 512, 4 * N * 512, 132)
        assert 1 <= splits <= 132 and (splits == 1 or splits * 4 * N * 512 <= 64 * configs.MIB)
    assert configs.row_splits(64, 512, 4 * 4096 * 512, 132) == 2  # N = 4096: 128 blocks on 132 multiprocessors


def test_unknown_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_arcface.backends.triton import configs

    monkeypatch.setenv("FUSED_ARCFACE_TRITON_ALGORITHM", "fast")
    with pytest.raises(ValueError, match="must be 'flash' or 'chunks'; got 'fast'"):
        configs.pick(1, 1, 1, 90, torch.bfloat16)


def test_fp32_and_fp16_are_not_for_the_flash_passes() -> None:
    from fused_arcface.backends.triton import configs

    for dtype in (torch.float16, torch.float32, torch.float64):
        assert configs.pick(64, 1000, 64, 90, dtype) == "chunks"


@pytest.fixture
def gpu() -> Iterator[str]:
    yield "cuda"
    torch.cuda.synchronize()


def _problem(
    N: int = 256, C: int = 20_000, D: int = 512, dtype: str = "bfloat16", device: str = "cuda"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, w, target, _ = inputs_on(Case(N, C, D, dtype, dtype), device)
    return x.requires_grad_(), w.requires_grad_(), target


@needs_gpu
@pytest.mark.parametrize("setting", CORE, ids=str)
def test_agrees_with_the_reference_on_a_gpu(setting: Setting, gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(setting, monkeypatch)
    check(setting, gpu)


@needs_gpu
@pytest.mark.full
@pytest.mark.parametrize("setting", FULL, ids=str)
def test_agrees_with_the_reference_over_the_full_grid_on_a_gpu(
    setting: Setting, gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(setting, monkeypatch)
    check(setting, gpu)


@needs_gpu
@pytest.mark.parametrize(
    ("algorithm", "dtypes", "D"),
    [
        ("chunks", BF16, 512),
        ("chunks", ("bfloat16", "float32"), 512),
        ("chunks", ("float16", "float16"), 512),
        ("chunks", ("float32", "float32"), 512),
        ("flash", BF16, 512),
        ("flash", BF16, 256),
        ("flash", BF16, 128),
    ],
)
def test_real_sizes_on_a_gpu(
    algorithm: str, dtypes: tuple[str, str], D: int, gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several panels of the budgets as they are, the last of them short; late in training."""
    setting = Setting(Case(1500, 40_007, D, *dtypes, geometry="late"), algorithm)
    force(setting, monkeypatch)
    check(setting, gpu)


@needs_gpu
@pytest.mark.parametrize("algorithm", ["chunks", "flash"])
def test_deterministic_to_the_bit_on_a_gpu(algorithm: str, gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_ARCFACE_TRITON_ALGORITHM", algorithm)
    x, w, target = _problem(D=256)
    runs = []
    for _ in range(3):
        loss = fa.margin_softmax_loss(x, w, target, backend="triton")
        runs.append((loss.detach(), *torch.autograd.grad(loss, (x, w))))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@needs_gpu
def test_no_synchronisation_on_a_gpu(gpu: str) -> None:
    x, w, target = _problem()
    fa.margin_softmax_loss(x, w, target, backend="triton").backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fa.margin_softmax_loss(x, w, target, backend="triton", return_stats=True)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("algorithm", ["chunks", "flash"])
def test_cuda_graph(algorithm: str, gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured on a side stream, replayed on other embeddings."""
    monkeypatch.setenv("FUSED_ARCFACE_TRITON_ALGORITHM", algorithm)
    x, w, target = _problem(D=256)

    def step() -> tuple[torch.Tensor, ...]:
        loss = fa.margin_softmax_loss(x, w, target, backend="triton")
        return loss, *torch.autograd.grad(loss, (x, w))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        torch.testing.assert_close(a, b)


@needs_gpu
def test_stream_of_its_own(gpu: str) -> None:
    """Work queued before, on another stream, is what the kernels see."""
    x, w, target = _problem(N=64, C=3000, D=128)
    expected = fa.margin_softmax_loss(x * 2 + 1, w, target, backend="triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = x * 2 + 1
        loss = fa.margin_softmax_loss(late, w, target, backend="triton")
    torch.cuda.synchronize()
    torch.testing.assert_close(loss, expected)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU or none: no second device index")
def test_other_device_index(gpu: str) -> None:
    x, w, target = _problem(N=64, C=3000, D=128, device="cuda:1")
    loss = fa.margin_softmax_loss(x, w, target, backend="triton")
    loss.backward()
    assert loss.device.index == 1 and torch.cuda.current_device() == 0
    torch.testing.assert_close(loss, fa.margin_softmax_loss(x, w, target, backend="reference"), rtol=1e-3, atol=1e-3)


@needs_gpu
def test_compiles_to_one_graph(gpu: str) -> None:
    x, w, target = _problem(N=64, C=3000, D=128)
    compiled = torch.compile(lambda *rows: fa.margin_softmax_loss(*rows, backend="triton"), fullgraph=True)
    loss, expected = compiled(x, w, target), fa.margin_softmax_loss(x, w, target, backend="triton")
    torch.testing.assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(expected, (x, w)), strict=True):
        torch.testing.assert_close(a, b)


@needs_gpu
def test_any_margin_takes_the_plain_tail(gpu: str) -> None:
    x, w, target = _problem(N=64, C=3000, D=128)
    fused = fa.margin_softmax_loss(x, w, target, backend="triton", margin=fa.CosFace(0.2))
    plain = fa.margin_softmax_loss(x, w, target, backend="triton", margin=lambda cosine: cosine - 0.2)
    torch.testing.assert_close(fused, plain)
    for a, b in zip(torch.autograd.grad(fused, (x, w)), torch.autograd.grad(plain, (x, w)), strict=True):
        torch.testing.assert_close(a, b)


@needs_gpu
def test_autocast(gpu: str) -> None:
    x, w, target = _problem(N=64, C=3000, D=128, dtype="float32")
    with torch.autocast("cuda", torch.bfloat16):
        loss = fa.margin_softmax_loss(x, w, target, backend="triton")
    expected = fa.margin_softmax_loss(x.bfloat16(), w, target, backend="triton")
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)


@needs_gpu
def test_labels_out_of_range(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, target = _problem(N=4, C=10, D=16)
    target[1], target[2] = 10, -100
    loss = fa.margin_softmax_loss(x, w, target, backend="triton", reduction="none")
    assert loss.isnan().tolist() == [False, True, False, False]
    monkeypatch.setenv("FUSED_ARCFACE_DEBUG", "1")
    with pytest.raises(ValueError, match="got 10 at row 1"):
        fa.margin_softmax_loss(x, w, target, backend="triton")


@needs_gpu
@pytest.mark.parametrize("N", [1024, 4096])
@pytest.mark.parametrize("algorithm", ["chunks", "flash"])
def test_memory_on_a_gpu(algorithm: str, N: int, gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the weight and its gradient 128 MB at C = 1 000 000, D = 512, and never an allocation of N·C bytes."""
    monkeypatch.setenv("FUSED_ARCFACE_TRITON_ALGORITHM", algorithm)
    C, D = 1_000_000, 512
    x = torch.randn(N, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(C, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(C, (N,), device="cuda")
    # The library's workspace is allocated at its first product and kept.
    torch.mm(x[:64], w[:64].T)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fa.margin_softmax_loss(x, w, target, backend="triton").backward()
    extra = torch.cuda.max_memory_allocated() - before - w.numel() * w.element_size()
    print(f"{algorithm}, N = {N}: {extra / 1e6:.0f} MB beyond the weight and its gradient")
    assert extra <= 128e6 < N * C
