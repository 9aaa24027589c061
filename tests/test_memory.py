"""Peak memory of the loss and of CenterSGD, and scratch memory read before it is written: each in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT = 32 * 2**20


def run_child(program: str, *arguments: object, **environment: str) -> object:
    """What ``program`` prints last, as JSON."""
    child = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


PEAK = """
import json, sys, torch, fused_arcface as fa
torch.set_num_threads(2)

def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

OPTIONS = {
    "plain": {},
    "sub_centers": {"sub_centers": 4},
    "CurricularFace": {"margin": fa.CurricularFace()},
    "SphereFace2": {"margin": fa.SphereFace2(kind="arc")},
    "AdaCos": {"scale": fa.AdaCos()},
}

def step(x, w, target, backward, options):
    x.requires_grad_(backward)
    w.requires_grad_(backward)
    loss = fa.margin_softmax_loss(x, w, target, backend="cpu", **OPTIONS[options])
    if backward:
        loss.backward()
    assert loss.isfinite()

def peak(n, c, d, dtype, backward, options="plain"):
    dtype = getattr(torch, dtype)
    # Code and threads of the libraries first: they are no part of the peak.
    step(torch.ones(8, d, dtype=dtype), torch.randn(300, d).to(dtype), torch.arange(8), backward, options)
    x, target = torch.randn(n, d).to(dtype), torch.arange(n) % c
    w = torch.randn(8192, d).to(dtype).repeat(c // 8192 + 1, 1)[:c]
    open("/proc/self/clear_refs", "w").write("5")
    before = kilobytes("VmRSS")
    step(x, w, target, backward, options)
    gradients = sum(t.grad.nbytes for t in (x, w) if t.grad is not None)
    return (kilobytes("VmHWM") - before) * 1024 - gradients

print(json.dumps([peak(*case) for case in json.loads(sys.argv[1])]))
"""

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can reset a process's peak")


@linux
@pytest.mark.slow
def test_peak_does_not_grow_with_the_classes() -> None:
    """Logits alone would be 100 and 400 MB here. 8 MB of slack: what the C library keeps or gives back."""
    cases = [(256, classes, 64, "float32", backward) for backward in (False, True) for classes in (100_000, 400_000)]
    peaks = run_child(PEAK, json.dumps(cases))
    assert max(peaks) <= LIMIT
    for small, large in (peaks[:2], peaks[2:]):
        assert large - small <= 8 * 2**20


@linux
@pytest.mark.parametrize("options", ["sub_centers", "CurricularFace", "SphereFace2", "AdaCos"])
@pytest.mark.slow
def test_peak_with_other_negatives(options: str) -> None:
    """With a pass for the maximum as well: none stores logits, which would be 100 MB."""
    (peak,) = run_child(PEAK, json.dumps([(256, 100_000, 64, "float32", True, options)]))
    assert peak <= LIMIT


@linux
@pytest.mark.full
@pytest.mark.serial
@pytest.mark.parametrize("shape", [(256, 100_000, 512), (256, 1_000_000, 512), (4096, 20_000, 128)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_at_full_size(shape: tuple[int, int, int], dtype: str) -> None:
    """Scratch for the batch comes on top where it is large: its two layouts, its sums and their slices."""
    n, _, d = shape
    (peak,) = run_child(PEAK, json.dumps([(*shape, dtype, True)]))
    assert peak <= LIMIT + 8 * max(0, n - 256) * d * 4


CENTER_SGD = """
import json, resource, sys, torch, fused_arcface as fa
num_classes, dtype, momentum_dtype = int(sys.argv[1]), getattr(torch, sys.argv[2]), getattr(torch, sys.argv[3])
def step(num_classes):
    recipe = fa.CenterSGD(lr=0.1, momentum_dtype=momentum_dtype)
    head = fa.PartialFC(512, num_classes, dtype=dtype, center_optimizer=recipe)
    x = torch.randn(64, 512, requires_grad=True)
    for _ in range(2):
        head(x, torch.randint(0, num_classes, (64,))).backward()
step(1000)  # loads what is loaded at the first use
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
step(num_classes)
# Not ru_maxrss: that counts the process which started this one, too.
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps((peak - before) / (num_classes * 512)))
"""


@pytest.mark.parametrize(
    ("dtype", "momentum_dtype", "most"),
    [
        ("float32", "float32", 8.5),
        ("bfloat16", "int8", 3.5),
        pytest.param("float32", "int8", 5.5, marks=pytest.mark.full),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory in use from /proc")
@pytest.mark.parametrize(
    "num_classes", [100_000, pytest.param(1_000_000, marks=[pytest.mark.full, pytest.mark.serial])]
)
@pytest.mark.slow
def test_center_sgd_peak_of_each_element(num_classes: int, dtype: str, momentum_dtype: str, most: float) -> None:
    """Bytes of each weight element at the process's peak, construction and two steps at N = 64 included."""
    found = run_child(CENTER_SGD, num_classes, dtype, momentum_dtype)
    print(f"{num_classes} classes, {dtype} centers, {momentum_dtype} momentum: {found:.2f} bytes an element")
    assert found <= most


SUM = """
import json, torch, fused_arcface as fa
torch.set_num_threads(2)
torch.manual_seed(0)
out = []
for n, c, d, scale in ((1, 1, 1, 64.0), (33, 97, 7, 64.0), (130, 200, 513, 1000.0), (70, 1500, 64, 64.0)):
    x, w = torch.randn(n, d, requires_grad=True), torch.randn(c, d, requires_grad=True)
    loss = fa.margin_softmax_loss(x, w, torch.arange(n) % c, scale=scale, reduction="none", backend="cpu")
    loss.sum().backward()
    out += [tensor.double().sum().item() for tensor in (loss, x.grad, w.grad)]
    out += [tensor.double().abs().max().item() for tensor in (loss, x.grad, w.grad)]
print(json.dumps(out))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone can fill fresh memory")
@pytest.mark.slow
def test_scratch_is_written_before_it_is_read() -> None:
    """The same bits when the C library fills all memory that it hands out, in two ways."""
    one, other = (run_child(SUM, MALLOC_PERTURB_=fill) for fill in ("1", "128"))  # filled with 0xfe and with 0x7f
    assert one == other
    assert all(value == value for value in one)
