"""The two places where tests of the CUDA backend run: csrc/cuda on emulated blocks of the CPU, and a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import PoisoningTorch

from fused_arcface.backends import cuda

from . import cuda_emulated

needs_emulation = pytest.mark.skipif(cuda_emulated.missing() is not None, reason=str(cuda_emulated.missing()))
needs_gpu = pytest.mark.skipif(
    cuda.unavailable() is not None, reason=f"backend 'cuda' cannot run here: {cuda.unavailable()}"
)


def places(gpu: pytest.MarkDecorator = needs_gpu, gpu_id: str = "gpu") -> list[Any]:
    """The parameters of a fixture ``device``: ``"cpu"``, emulated, and ``"cuda"``, skipped where ``gpu`` says so."""
    return [
        pytest.param("cpu", id="emulated", marks=[pytest.mark.emulation, needs_emulation]),
        pytest.param("cuda", id=gpu_id, marks=[pytest.mark.gpu, gpu]),
    ]


@contextlib.contextmanager
def in_place(
    device: str, monkeypatch: pytest.MonkeyPatch, wrapped: Callable[[Any], Any] = lambda kernels: kernels
) -> Iterator[str]:
    """Let the backend run on ``device``. Emulated, its memory is NaN before it is written, and nothing beside it is
    written. ``wrapped`` makes the kernels to use of those that there are."""
    if device == "cuda":
        monkeypatch.setattr(cuda, "_kernels", wrapped(cuda._kernels))
        yield device
        torch.cuda.synchronize()
        return
    poisoning = PoisoningTorch()
    monkeypatch.setattr(cuda, "torch", poisoning)
    monkeypatch.setattr(cuda, "_kernels", wrapped(cuda_emulated.module()))
    monkeypatch.setattr(cuda, "_device", lambda tensor: ((0, 0), 4))
    yield device
    poisoning.check()
