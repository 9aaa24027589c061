"""The interpreter ends while a daemon thread is inside a kernel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# The main thread ends as soon as a kernel of the chosen name has begun, and takes longer to end than the kernel does:
# module globals are deleted after the interpreter has begun to refuse its lock to other threads.
PROGRAM = """
import sys, threading, time, torch, fused_arcface as fa
from fused_arcface.backends import native
torch.set_num_threads(2)

class Slow:
    def __init__(self):
        self.sleep = time.sleep
    def __del__(self):
        self.sleep(1.5)

name, inside = sys.argv[1], threading.Event()
kernel = getattr(native.module, name)

def announced(*arguments):
    inside.set()
    kernel(*arguments)

setattr(native.module, name, announced)
x, w = torch.randn(1024, 256, requires_grad=True), torch.randn(8000, 256, requires_grad=True)
target = torch.arange(1024)

def train():
    while True:
        fa.margin_softmax_loss(x, w, target, backend="cpu").backward()

threading.Thread(target=train, daemon=True).start()
inside.wait()
last = Slow()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["class_stats", "weight_grad"])
def test_a_daemon_thread_may_be_inside_a_kernel(kernel: str) -> None:
    """Before Python 3.14 that thread ends as it asks for the interpreter's lock: it must not take the process along."""
    result = subprocess.run([sys.executable, "-c", PROGRAM, kernel], capture_output=True, text=True, timeout=240)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_every_binding_gives_the_lock_up_by_the_same_guard() -> None:
    csrc = Path(__file__).parents[2] / "csrc"
    others = ("gil_scoped", "PyGILState", "PyEval", "Py_BEGIN_ALLOW_THREADS")
    found = [
        path.relative_to(csrc)
        for path in sorted([*csrc.rglob("*.h"), *csrc.rglob("*.cpp"), *csrc.rglob("*.cu")])
        if path.name != "without_gil.h" and any(name in path.read_text(encoding="utf-8") for name in others)
    ]
    assert found == []
    assert "WithoutGil" in (csrc / "bindings.cpp").read_text(encoding="utf-8")
