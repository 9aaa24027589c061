"""Measure the peak memory of a pass beyond inputs, class centers and the two gradients, which every head holds."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from fused_arcface.base.memory import available_bytes as available_bytes

from ..measure.child import Child
from .cases import PASSES, Case, make_inputs
from .providers import Provider

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peaks_of(provider: Provider, case: Case, device: torch.device, child: Child) -> dict[str, int]:
    """Return the peak extra bytes of each of :data:`PASSES`.

    They are counted by CUDA's allocator, or on a CPU as the resident memory of ``child``.

    Raises:
        MemoryError, torch.OutOfMemoryError: if it did not fit.
        ChildFailed: if anything else went wrong there.
    """
    measured = provider, case, device
    return _peaks(*measured) if device.type == "cuda" else child.call(_peaks, *measured)


def _peaks(provider: Provider, case: Case, device: torch.device) -> dict[str, int]:
    peaks = {}
    with provider.settings():
        # A tiny pass comes first, so that libraries' code and threads are not counted. Buffers of full size that a
        # library keeps after its first call are counted, as the tiny pass makes none. Memory for compiling is not.
        tiny = Case(min(case.N, 8), min(case.C, 128), case.D, case.dtype, case.weight_dtype)
        warm_up = provider.open(make_inputs(case if provider.name.startswith("compiled") else tiny, device))
        for backward in PASSES.values():
            warm_up(backward)
        del warm_up
        inputs = make_inputs(case, device, distinct=False)
        for pass_name, backward in PASSES.items():
            gc.collect()
            before = reset_peak(device)
            provider.open(inputs)(backward)
            peaks[pass_name] = max(0, peak_since_reset(device) - before - _held_by_all(provider, case, backward))
    return peaks


def _held_by_all(provider: Provider, case: Case, backward: bool) -> int:
    """Return the bytes of a pass that are not counted: the gradients, and another layout of the class centers."""
    gradients = case.weight_bytes + case.N * case.D * case.torch_dtype.itemsize if backward else 0
    return gradients + (case.weight_bytes if provider.own_weight else 0)


def can_measure(device: torch.device) -> bool:
    """Return whether peaks can be measured: on a GPU, and where the peak of resident memory can be reset (Linux)."""
    return device.type == "cuda" or (_STATUS.exists() and _CLEAR.exists())


def reset_peak(device: torch.device) -> int:
    """Start a new peak of this process's memory on a device; return the bytes held now.

    Raises:
        OSError: if this system has no such peak.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    _CLEAR.write_text("5", encoding="ascii")
    return status_bytes("VmRSS")


def peak_since_reset(device: torch.device) -> int:
    """Return the greatest bytes of this process since :func:`reset_peak`: of CUDA's allocator, or resident on a CPU.

    ``getrusage`` cannot be used: its peak cannot be reset, and a child's begins at its parent's.
    """
    if device.type == "cuda":
        synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return status_bytes("VmHWM")


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def limited(device: torch.device, more_bytes: int) -> Iterator[None]:
    """Let this process allocate at most ``more_bytes`` more. A larger request fails."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, (held + min(more_bytes, free)) / total), device)
        undo = partial(torch.cuda.set_per_process_memory_fraction, 1.0, device)
    else:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (status_bytes("VmData") + more_bytes, hard))
        undo = partial(resource.setrlimit, resource.RLIMIT_DATA, (soft, hard))
    try:
        yield
    finally:
        undo()


def status_bytes(name: str) -> int:
    """Return a size in /proc/self/status (Linux), in bytes."""
    for line in _STATUS.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def release(device: torch.device) -> None:
    """Free cached memory between cases."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
