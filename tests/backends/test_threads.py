"""Many threads, many callers, many processes: the same numbers."""

from __future__ import annotations

import multiprocessing
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from support.cases import Case, Inputs, Outcome, check, make_inputs, run

import fused_arcface as fa

# Enough multiply-adds for three threads, each with several blocks of classes.
LARGE = Case(N=70, C=11_000, D=64, geometry="late")


def compute(inputs: Inputs) -> Outcome:
    return run(fa.margin_softmax_loss, inputs, backend="cpu")


def assert_identical(got: Outcome, right: Outcome) -> None:
    for name in ("loss", "d_embeddings", "d_weight"):
        assert torch.equal(getattr(got, name), getattr(right, name)), name
    assert all(torch.equal(a, b) for a, b in zip(got.stats, right.stats, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.slow
def test_right_with_any_number_of_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    check(LARGE, "cpu")
    check(Case(N=1500, C=50, D=450), "cpu")  # fewer blocks of classes than threads: rows are split


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.slow
def test_bitwise_reproducible(dtype: str, threads: int, isa: str) -> None:
    torch.set_num_threads(threads)
    inputs = make_inputs(Case(N=70, C=11_000, D=64, x_dtype=dtype, w_dtype=dtype))
    right = compute(inputs)
    for _ in range(3):
        assert_identical(compute(inputs), right)


def test_numbers_of_threads_agree() -> None:
    inputs = make_inputs(LARGE)
    torch.set_num_threads(1)
    one = compute(inputs)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        got = compute(inputs)
        # The class centers' gradient is made of whole rows, whoever computes them.
        torch.testing.assert_close(got.loss, one.loss, rtol=1e-5, atol=0)
        for name in ("d_embeddings", "d_weight"):
            right = getattr(one, name)
            torch.testing.assert_close(getattr(got, name), right, rtol=0, atol=1e-5 * right.abs().max().item())


def test_concurrent_calls() -> None:
    """From several Python threads at once, on different inputs: no state is shared."""
    torch.set_num_threads(2)
    all_inputs = [make_inputs(LARGE, seed) for seed in range(4)]
    right = [compute(inputs) for inputs in all_inputs]
    with ThreadPoolExecutor(4) as pool:
        for got, seed in [(pool.submit(compute, all_inputs[i % 4]), i % 4) for i in range(16)]:
            assert_identical(got.result(timeout=240), right[seed])


def _report(connection: Connection, inputs: Inputs) -> None:
    # Nothing of torch's here that is large enough for OpenMP, which does not survive a fork.
    x, w = inputs.embeddings.requires_grad_(), inputs.weight.requires_grad_()
    loss = fa.margin_softmax_loss(x, w, inputs.target, reduction="none", backend="cpu")
    gradients = torch.autograd.grad(loss, (x, w), inputs.upstream.to(loss.dtype))
    connection.send([tensor.detach().numpy() for tensor in (loss, *gradients)])


@pytest.mark.skipif(platform.system() != "Linux", reason="processes are forked on Linux only")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_workers() -> None:
    """As data-loader workers are, after the parent has used the kernels: no threads that a fork would lose."""
    torch.set_num_threads(2)
    inputs = make_inputs(LARGE)
    right = compute(inputs)
    context = multiprocessing.get_context("fork")
    workers = []
    for _ in range(2):
        receiver, sender = context.Pipe(duplex=False)
        worker = context.Process(target=_report, args=(sender, inputs))
        worker.start()
        workers.append((worker, receiver))
    try:
        for worker, receiver in workers:
            assert receiver.poll(240), "the worker hangs"
            for got, theirs in zip(receiver.recv(), (right.loss, right.d_embeddings, right.d_weight), strict=True):
                assert torch.equal(torch.from_numpy(got).double(), theirs)
            worker.join(240)
            assert worker.exitcode == 0
    finally:
        for worker, _ in workers:
            worker.kill()
    assert_identical(compute(inputs), right)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_thread_that_cannot_be_started_is_done_without(tmp_path: Path) -> None:
    """Memory is refused at the list of threads (nothing has begun: an exception) or at a thread (the others do all)."""
    here = Path(__file__).parents[1]
    program = tmp_path / "failing"
    source, include = here / "threads" / "failing.cpp", here.parent / "csrc" / "cpu"
    subprocess.run(["c++", "-std=c++17", "-pthread", f"-I{include}", source, "-o", program], check=True)
    for allocations, expected in ((0, "bad_alloc"), *((each, "1200") for each in (1, 2, 3, 4, -1))):
        result = subprocess.run([program, str(allocations)], capture_output=True, text=True, timeout=120)
        assert (result.returncode, result.stdout.strip()) == (0, expected), (allocations, result)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_little_scratch_memory_is_kept(tmp_path: Path) -> None:
    """At most 12 MiB between calls, with their headers, so that a call and what is kept stay below 32 MB together."""
    csrc, program = Path(__file__).parents[2] / "csrc", tmp_path / "scratch"
    sources = [Path(__file__).parents[1] / "threads" / "scratch.cpp", csrc / "cpu" / "scratch.cpp"]
    subprocess.run(["c++", "-std=c++17", f"-I{csrc}", *sources, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True, timeout=120, check=True)
    held = [int(line) for line in result.stdout.split()]
    assert len(held) == 3
    assert all(0 < each <= 12 * 2**20 + 24 * 64 for each in held), held


@pytest.mark.full
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_no_data_race(tmp_path: Path) -> None:
    """The portable kernels under ThreadSanitizer, several callers at once."""
    here = Path(__file__).parents[1]
    csrc = here.parent / "csrc"
    program = tmp_path / "passes"
    sources = [here / "threads" / "passes.cpp", csrc / "cpu" / "kernels.cpp", csrc / "cpu" / "scratch.cpp"]
    flags = ["-std=c++17", "-O1", "-fsanitize=thread", "-pthread", "-DFA_ISA=portable", f"-I{csrc}"]
    built = subprocess.run(["c++", *flags, *map(str, sources), "-o", program], capture_output=True, text=True)
    if "tsan" in built.stderr:
        pytest.skip("this compiler has no ThreadSanitizer")
    assert built.returncode == 0, built.stderr[-4000:]
    result = subprocess.run([program], capture_output=True, text=True, timeout=600)
    assert (result.returncode, result.stdout) == (0, "0 wrong\n"), result.stderr[-4000:]
    assert "WARNING" not in result.stderr


AT_EXIT = """
import os, threading, time, torch, fused_arcface as fa
torch.set_num_threads(3)
x, w = torch.randn(64, 64), torch.randn(20000, 64, requires_grad=True)
target = torch.arange(64)

def train(steps):
    for _ in range(steps):
        fa.margin_softmax_loss(x, w, target, backend="cpu").backward()

train(2)
before = set(os.listdir("/proc/self/task"))
train(3)
end = time.monotonic() + 20  # the system lists a thread for a moment after it has been joined
while (left := set(os.listdir("/proc/self/task")) - before) and time.monotonic() < end:
    time.sleep(0.01)
print(len(left))
threading.Thread(target=train, args=(40,)).start()
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="threads are counted in /proc")
@pytest.mark.slow
def test_no_thread_outlives_a_call_and_the_interpreter_may_end() -> None:
    """The main thread ends while another is inside the kernels: Python waits for that one, and no more."""
    result = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, timeout=240)
    assert (result.returncode, result.stdout, result.stderr) == (0, "0\n", "")


def test_set_num_threads_between_the_passes() -> None:
    """The backward pass takes as many threads as there are by then."""
    inputs = make_inputs(LARGE)
    right = compute(inputs)
    x, w = inputs.embeddings.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    for forward, backward in ((1, 3), (3, 1)):
        torch.set_num_threads(forward)
        loss = fa.margin_softmax_loss(x, w, inputs.target, reduction="none", backend="cpu")
        torch.set_num_threads(backward)
        (d_weight,) = torch.autograd.grad(loss, w, inputs.upstream.to(loss.dtype))
        allowed = 1e-5 * right.d_weight.abs().max().item()
        torch.testing.assert_close(d_weight.double(), right.d_weight, rtol=0, atol=allowed)
