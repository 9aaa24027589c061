"""The machine: its name, its measured ceilings, and the context that every figure carries."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fused_arcface import __version__, backends
from fused_arcface.base.precision import fp32_products
from fused_arcface.base.text import counted

from .timing import Timed, Timing, time_interleaved

# Square products large enough to be bound by arithmetic alone, small enough for a quick run.
_CPU_SIZE, _CUDA_SIZE = 3072, 8192
# Bytes of a copy that no cache holds.
_COPY_BYTES = 2**28


@dataclass(frozen=True)
class Ceiling:
    """The fastest square matrix product of the machine's libraries, and the speed of a copy."""

    library: str
    size: int
    timing: Timing
    error: float
    """Largest relative error in the product's first row."""
    copy_bytes_per_second: float
    """Bytes read and written."""

    @property
    def flops_per_second(self) -> float:
        """The rate of the fastest sample, which a busy moment of the machine does not lower."""
        return 2 * self.size**3 / (self.timing.least * 1e-3)


def measure_ceiling(device: torch.device, dtype: str = "float32", seconds: float = 2.0) -> Ceiling:
    """Measure a large square product in ``dtype``, or ``"tf32"``: torch's, or numpy's (CPU, fp32) if that is faster.

    It is somewhat below the processor's FMA peak, which only a loop in registers reaches. No head that is built on a
    library's products can pass it.
    """
    size = _CUDA_SIZE if device.type == "cuda" else _CPU_SIZE
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, device=device, generator=generator)
    a = a if dtype == "tf32" else a.to(getattr(torch, dtype))
    result = torch.empty_like(a)

    def with_torch() -> None:
        with fp32_products(tf32=dtype == "tf32"):
            torch.mm(a, a, out=result)

    runs: dict[str, Timed] = {"torch": with_torch}
    # numpy takes every processor that it may run on: it is comparable only if torch takes all of them as well.
    if device.type == "cpu" and dtype == "float32" and torch.get_num_threads() >= processors():
        runs["numpy"] = partial(np.matmul, a.numpy(), a.numpy(), out=result.numpy())
    timings = time_interleaved(runs, device, seconds)
    library = min(timings, key=lambda name: timings[name].least)
    runs[library]()
    right = a[:1].double() @ a.double()
    error = float((result[:1].double() - right).abs().max() / right.abs().max())

    copied = copy_bytes_per_second(device, seconds / 4)
    return Ceiling(library, size, timings[library], error, copied)


def fma_flops_per_second(seconds: float = 0.5) -> float | None:
    """Measure fp32 multiply-adds in registers, the fastest within ``seconds``; None without the CPU backend."""
    if backends.available()["cpu"] is not None:
        return None
    multiply_adds = backends.load("cpu").multiply_adds
    rounds = 2_000_000
    done = multiply_adds(rounds)
    fastest = time_interleaved({"fma": lambda: multiply_adds(rounds)}, torch.device("cpu"), seconds)["fma"].least
    return float(done / (fastest * 1e-3))


def copy_bytes_per_second(device: torch.device, seconds: float) -> float:
    """Measure bytes read and written per second by a copy that no cache holds, the fastest within ``seconds``."""
    source = torch.ones(_COPY_BYTES, dtype=torch.int8, device=device)
    copy = torch.empty_like(source)
    copied = time_interleaved({"copy": lambda: copy.copy_(source)}, device, seconds)["copy"]
    return 2 * _COPY_BYTES / (copied.least * 1e-3)


def processors() -> int:
    """Return the number of processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(device: torch.device, threads: int | None = None) -> str:
    """Return the GPU's name, or the processor's with the number of threads; None is torch's number."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        fields = (line.split(":", 1) for line in lines if line.startswith("model name"))
        name = next((value.strip() for _, value in fields), name)
    return f"{name}, {platform.machine()}, {counted(threads or torch.get_num_threads(), 'thread')}"


def commit() -> str:
    """Return the commit of the checkout that this package runs from; outside one, the version.

    The commit ends in "-dirty" if the sources have changed since. A build outside of its checkout reads the commit from
    the environment variable ``FUSED_ARCFACE_COMMIT``.
    """
    if given := os.environ.get("FUSED_ARCFACE_COMMIT"):
        return given
    package = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # A wheel may lie in an environment inside some other repository: ask whether that one knows this file.
        git("ls-files", "--error-unmatch", __file__)
        # Changed results and notes do not count.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(package), ":(top)csrc")
        return git("rev-parse", "--short=10", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return f"v{__version__}"


def context(device: torch.device) -> dict[str, str]:
    """Return the columns that every row has: device, torch, commit and date."""
    return {"device": device_name(device), "torch": torch.__version__, "commit": commit(), "date": now()}


def now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
