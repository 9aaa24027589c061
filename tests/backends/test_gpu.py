"""What every backend on a GPU owes its user beside right numbers: no waiting, the caller's stream and device, capture
into a graph, the same bits each time, little memory. Skipped without a GPU; the numbers are test_triton.py's and
test_cuda.py's. Names end in ``on_a_gpu``, by which bench/gpu_verify.sh tells them from the CPU's.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.cases import Case, inputs_on

import fused_arcface as fa
from fused_arcface import backends

pytestmark = pytest.mark.gpu

ALGORITHMS: dict[str, tuple[str, dict[str, str]]] = {
    "cuda": ("cuda", {"FUSED_ARCFACE_HOPPER": "0"}),
    "cuda-hopper": ("cuda", {"FUSED_ARCFACE_HOPPER": "1"}),
    "triton-chunks": ("triton", {"FUSED_ARCFACE_TRITON_ALGORITHM": "chunks"}),
    "triton-flash": ("triton", {"FUSED_ARCFACE_TRITON_ALGORITHM": "flash"}),
}
"""Backends, and what the environment tells them."""


def _reason_against(name: str) -> str | None:
    backend, _ = ALGORITHMS[name]
    reason = backends.available()[backend]
    if reason is not None:
        return f"backend {backend!r}: {reason}"
    described = backends.describe(backend)
    return described if name == "cuda-hopper" and described.startswith("not ") else None


def _param(name: str) -> object:
    reason = _reason_against(name)
    return pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))


@pytest.fixture(params=[_param(name) for name in ALGORITHMS])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name, environment = ALGORITHMS[request.param]
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    yield name
    torch.cuda.synchronize()


def _problem(
    N: int = 64, C: int = 3000, D: int = 512, dtype: str = "bfloat16", device: str = "cuda"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, w, target, _ = inputs_on(Case(N, C, D, dtype, dtype), device)
    return x.requires_grad_(), w.requires_grad_(), target


def test_deterministic_to_the_bit_on_a_gpu(backend: str) -> None:
    x, w, target = _problem(N=256, C=20_000)
    runs = []
    for _ in range(3):
        loss = fa.margin_softmax_loss(x, w, target, backend=backend)
        runs.append((loss.detach(), *torch.autograd.grad(loss, (x, w))))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_no_synchronization_on_a_gpu(backend: str) -> None:
    x, w, target = _problem(N=256, C=20_000)
    fa.margin_softmax_loss(x, w, target, backend=backend).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fa.margin_softmax_loss(x, w, target, backend=backend, return_stats=True)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph_on_a_gpu(backend: str) -> None:
    """Captured on a side stream, replayed on other embeddings."""
    x, w, target = _problem(N=256, C=20_000)

    def step() -> tuple[torch.Tensor, ...]:
        loss = fa.margin_softmax_loss(x, w, target, backend=backend)
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


def test_stream_of_its_own_on_a_gpu(backend: str) -> None:
    """Work queued before, on another stream, is what the kernels see."""
    x, w, target = _problem()
    expected = fa.margin_softmax_loss(x * 2 + 1, w, target, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = x * 2 + 1
        loss = fa.margin_softmax_loss(late, w, target, backend=backend)
    torch.cuda.synchronize()
    torch.testing.assert_close(loss, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU or none: no second device index")
def test_other_device_index_on_a_gpu(backend: str) -> None:
    x, w, target = _problem(device="cuda:1")
    loss = fa.margin_softmax_loss(x, w, target, backend=backend)
    loss.backward()
    assert loss.device.index == 1 and torch.cuda.current_device() == 0
    torch.testing.assert_close(loss, fa.margin_softmax_loss(x, w, target, backend="torch"), rtol=1e-3, atol=1e-3)


def test_compiles_to_one_graph_on_a_gpu(backend: str) -> None:
    x, w, target = _problem()
    compiled = torch.compile(lambda *rows: fa.margin_softmax_loss(*rows, backend=backend), fullgraph=True)
    loss, expected = compiled(x, w, target), fa.margin_softmax_loss(x, w, target, backend=backend)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(expected, (x, w)), strict=True):
        torch.testing.assert_close(a, b)


def test_any_margin_takes_the_plain_tail_on_a_gpu(backend: str) -> None:
    x, w, target = _problem()
    fused = fa.margin_softmax_loss(x, w, target, backend=backend, margin=fa.CosFace(0.2))
    plain = fa.margin_softmax_loss(x, w, target, backend=backend, margin=lambda cosine: cosine - 0.2)
    torch.testing.assert_close(fused, plain)
    for a, b in zip(torch.autograd.grad(fused, (x, w)), torch.autograd.grad(plain, (x, w)), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_on_a_gpu(backend: str) -> None:
    x, w, target = _problem(dtype="float32")
    with torch.autocast("cuda", torch.bfloat16):
        loss = fa.margin_softmax_loss(x, w, target, backend=backend)
    expected = fa.margin_softmax_loss(x.bfloat16(), w, target, backend=backend)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)


def test_labels_out_of_range_on_a_gpu(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, target = _problem(N=4, C=10, D=16)
    target[1], target[2] = 10, -100
    loss = fa.margin_softmax_loss(x, w, target, backend=backend, reduction="none")
    assert loss.isnan().tolist() == [False, True, False, False]
    monkeypatch.setenv("FUSED_ARCFACE_DEBUG", "1")
    with pytest.raises(ValueError, match="got 10 at row 1"):
        fa.margin_softmax_loss(x, w, target, backend=backend)


@pytest.mark.parametrize("N", [1024, 4096])
def test_memory_on_a_gpu(N: int, backend: str, request: pytest.FixtureRequest) -> None:
    """Beyond the weight and its gradient 128 MB at C = 1 000 000, D = 512, and never an allocation of N·C bytes."""
    C, D = 1_000_000, 512
    x = torch.randn(N, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(C, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(C, (N,), device="cuda")
    # The library's workspace is allocated at its first product and kept.
    torch.mm(x[:64], w[:64].T)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fa.margin_softmax_loss(x, w, target, backend=backend).backward()
    extra = torch.cuda.max_memory_allocated() - before - w.numel() * w.element_size()
    print(f"{request.node.callspec.id}: {extra / 1e6:.0f} MB beyond the weight and its gradient")
    assert extra <= 128e6 < N * C
