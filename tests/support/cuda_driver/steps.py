"""Steps of the Triton backend on the stub driver: their launches and the host's time, as JSON. Run as a program.

Triton's own compiler, cache and launcher run; the kernels do not. Tensors are the CPU's, of memory that nobody touches.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

library = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
library.stub_launches.restype = library.stub_modules.restype = ctypes.c_long

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.driver import CudaDriver  # noqa: E402

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
"""The functions of this package's operators by name."""

_implement = torch.library.impl


def _record(name: str, key: str, function: Callable[..., Any] | None = None) -> Any:
    """Register an operator's function as ``torch.library.impl`` does, and remember it."""
    if function is None:
        return functools.partial(_record, name, key)
    if key == "default":
        IMPLEMENTATIONS[name.removeprefix("fused_arcface::")] = function
    return _implement(name, key, function)


torch.library.impl = _record  # type: ignore[assignment]

import fused_arcface as fa  # noqa: E402
from fused_arcface import backends, partial_fc  # noqa: E402
from fused_arcface.backends.triton import chunks, stages  # noqa: E402
from fused_arcface.engine.terms import RowGradients  # noqa: E402


class Driver(CudaDriver):
    """Triton's driver for NVIDIA GPUs on a torch without one."""

    def __init__(self) -> None:
        torch.cuda.get_device_capability = lambda *_: (9, 0)  # type: ignore[assignment]
        super().__init__()
        self.get_current_stream = lambda *_: 0
        self.get_current_device = lambda: 0
        self.set_current_device = lambda *_: None

    def get_current_target(self) -> GPUTarget:
        """Return Hopper's target."""
        return GPUTarget("cuda", 90, 32)


class Kernels(TorchDispatchMode):
    """Counts torch's kernels: operators that compute something, not views or allocations."""

    FREE = re.compile(
        r"aten\.(promote_types|to\.dtype|item|_local_scalar_dense|empty|new_empty|resize|set_|record_stream|lift_fresh|"
        r"slice|select|view|detach|alias|unbind|expand|unsqueeze|squeeze|as_strided|split|permute|t\.|transpose)"
    )

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operator and run it; those of this package run under the mode as well."""
        name = str(function)
        if name.startswith("fused_arcface."):
            with self:
                return IMPLEMENTATIONS[name.removeprefix("fused_arcface.").removesuffix(".default")](
                    *args, **(kwargs or {})
                )
        if name.startswith("aten.") and not self.FREE.match(name):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@triton.jit
def _copy(x_ptr, y_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


def bare_launches(count: int = 100) -> None:
    """Launch a small kernel: the work of Triton's own launcher, and none of this package's."""
    x = torch.empty(16)
    for _ in range(count):
        _copy[(1,)](x, x, BLOCK=16)


def microseconds(run: Callable[[], object]) -> tuple[float, float]:
    """Return the host's time of the quickest of several runs, and that of a bare launch, measured in turn.

    It is processor time, so that other processes may run beside it.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(15):
        for each, call in zip(times, (run, bare_launches), strict=True):
            begin = time.process_time()
            call()
            each.append(time.process_time() - begin)
    return min(times[0]) * 1e6, min(times[1]) * 1e6 / 100


def passes(
    dtype: torch.dtype, weight_dtype: torch.dtype, N: int, C: int, D: int, algorithm: str
) -> dict[str, dict[str, float]]:
    """Return launches, library products and time of a forward and of a backward pass over the classes."""
    os.environ["FUSED_ARCFACE_TRITON_ALGORITHM"] = algorithm
    products = 0

    def count(*_: object, **__: object) -> None:
        nonlocal products
        products += 1

    chunks.multiply = count
    x, w = torch.empty(N, D, dtype=dtype), torch.empty(C, D, dtype=weight_dtype)
    target, lse = torch.empty(N, dtype=torch.int64), torch.empty(N, dtype=torch.float64)
    gradients = RowGradients(64.0, lse, *torch.empty(2, N).unbind())
    runs: dict[str, Callable[[], object]] = {
        "forward": lambda: stages.class_stats(x, w, target, 64.0, None, True),
        "backward": lambda: stages.weight_grad(x, w, target, gradients),
    }
    report: dict[str, dict[str, float]] = {}
    for name, run in runs.items():
        run()  # compiles
        products, before = 0, library.stub_launches()
        run()
        launches = library.stub_launches() - before
        report[name] = {"launches": launches, "products": products}
        report[name] |= zip(("microseconds", "a bare launch"), microseconds(run), strict=True)
    return report


def compilations(algorithm: str) -> dict[str, int]:
    """Return the kernels that each batch size adds to those of the sizes before it, in a step of CenterSGD."""
    os.environ["FUSED_ARCFACE_TRITON_ALGORITHM"] = algorithm
    chunks.multiply = lambda *_, **__: None
    recipe = fa.CenterSGD(lr=0.1, momentum_dtype=torch.int8)
    head = fa.PartialFC(512, 20_000, center_optimizer=recipe, dtype=torch.bfloat16, backend="triton")
    added = {}
    for N in (1024, 512, 1000, 999, 1001, 96, 97, 3, 2048):
        before = library.stub_modules()
        head(torch.zeros(N, 512, dtype=torch.bfloat16, requires_grad=True), torch.zeros(N).long()).backward()
        added[str(N)] = library.stub_modules() - before
    return added


def partial_fc_step(sample_rate: float) -> dict[str, float]:
    """Return the launches of a training step of PartialFC with CenterSGD: torch's kernels, Triton's, and products."""
    products = 0

    def count(*_: object, **__: object) -> None:
        nonlocal products
        products += 1

    chunks.multiply = count
    os.environ["FUSED_ARCFACE_TRITON_ALGORITHM"] = ""
    recipe = fa.CenterSGD(lr=0.1, momentum_dtype=torch.int8)
    head = fa.PartialFC(
        512, 20_000, sample_rate=sample_rate, center_optimizer=recipe, dtype=torch.bfloat16, backend="triton"
    )
    x, y = torch.zeros(1024, 512, dtype=torch.bfloat16, requires_grad=True), torch.arange(1024)
    head(x, y).backward()
    products, before = 0, library.stub_launches()
    with Kernels() as kernels:
        head(x, y).backward()
    triton_launches = library.stub_launches() - before
    torch_kernels = sum(kernels.counts.values())
    return {"torch": torch_kernels, "triton": triton_launches, "products": products}


def main() -> None:
    """Print the report."""
    triton.runtime.driver.set_active(Driver())
    backends.load("triton").unavailable = lambda *_: None  # type: ignore[attr-defined]
    row = dataclasses.replace(backends.registry._ROWS["triton"], device_type="cpu")
    backends.registry._ROWS["triton"] = row
    partial_fc._is_waited_for = lambda _: True
    print(
        json.dumps(
            {
                # First, so that nothing else has compiled the kernels.
                "compilations": {name: compilations(name) for name in ("flash", "chunks")},
                "flash": passes(torch.bfloat16, torch.bfloat16, 1024, 1_000_000, 512, "flash"),
                "flash, fp32 centers": passes(torch.bfloat16, torch.float32, 1024, 1_000_000, 512, "flash"),
                "chunks": passes(torch.float32, torch.float32, 1024, 1_000_000, 512, "chunks"),
                "chunks in bf16": passes(torch.bfloat16, torch.bfloat16, 1024, 1_000_000, 512, "chunks"),
                "chunks in bf16, N = 4096": passes(torch.bfloat16, torch.bfloat16, 4096, 1_000_000, 512, "chunks"),
                "all classes": partial_fc_step(1.0),
                "sampled": partial_fc_step(0.1),
            }
        )
    )


if __name__ == "__main__":
    main()
