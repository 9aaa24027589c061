"""Fixtures for all tests."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_arcface import _native
from fused_arcface.app.measure.child import Child
from fused_arcface.backends import cpu

# Drawing takes longer than most commands of the tests. tests/app/report wants reports.
os.environ.setdefault("FUSED_ARCFACE_NO_REPORT", "1")

if importlib.util.find_spec("hypothesis") is not None:  # a machine with a GPU may not have it, nor a way to fetch it
    from hypothesis import settings

    # The same examples at each run: a red test stays red until it is mended.
    settings.register_profile("reproducible", deadline=None, derandomize=True, max_examples=25)
    settings.load_profile("reproducible")


# A program for a process of its own: it puts a driver in the place of CUDA's.
collect_ignore = ["support/cuda_driver/steps.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the interpreter's tests in a session without the interpreter, and all other tests in one with it."""
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    reason = "Triton's compiler is off" if interpreting else "run by TRITON_INTERPRET=1 pytest -m interpreter"
    for item in items:
        if (item.get_closest_marker("interpreter") is not None) != interpreting:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """Keep the garbage collector off the tests and the modules, which stay until the end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    # Most tests are too small for a second thread to help, and on a busy machine torch's threads wait for one another.
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _independent_programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test in Triton's interpreter if a program of a launch touches memory that another one writes."""
    if os.environ.get("TRITON_INTERPRET") == "1" and request.node.get_closest_marker("interpreter") is not None:
        from support.triton_programs import forbid_races

        forbid_races(monkeypatch)


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    """A process in which the benchmark measures memory."""
    with Child() as shared:
        yield shared


@pytest.fixture(params=_native.isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set that this machine has, in use."""
    monkeypatch.setenv("FUSED_ARCFACE_ISA", request.param)
    return request.param


class PoisoningTorch:
    """``torch`` as a backend sees it: fresh memory is NaN (bytes 255), between guards that must stay as they are."""

    GUARD = 256  # bytes

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    def empty(self, *size: object, dtype: torch.dtype = torch.float32, device: object = None) -> torch.Tensor:
        return self.empty_like(torch.empty(*size, dtype=dtype))

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        plain = torch.empty_like(tensor)
        buffer = torch.full((plain.numel() * plain.element_size() + 2 * self.GUARD,), 255, dtype=torch.uint8)
        self.buffers.append(buffer)
        return buffer[self.GUARD : -self.GUARD].view(plain.dtype).as_strided(plain.shape, plain.stride())

    def check(self) -> None:
        for buffer in self.buffers:
            guards = torch.cat([buffer[: self.GUARD], buffer[-self.GUARD :]])
            assert (guards == 255).all(), "written out of bounds"


class NoWaiting(TorchDispatchMode):
    """Raises where a value of a tensor is read, or decides a shape: what a GPU would be waited for."""

    FORBIDDEN = (
        "_local_scalar_dense",
        "nonzero",
        "unique",
        "masked_select",
        "is_nonzero",
        "equal",
        "repeat_interleave",
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        masks = (
            [index for index in args[1] if index is not None] if name in ("index", "index_put", "index_put_") else []
        )
        assert not name.startswith(self.FORBIDDEN) or name == "nonzero_static", f"{func} waits for the device"
        assert all(index.dtype != torch.bool for index in masks), f"{func} by a mask waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU backend's outputs are NaN before it writes them, and it writes nothing beside them."""
    poisoning = PoisoningTorch()
    monkeypatch.setattr(cpu, "torch", poisoning)
    yield
    assert poisoning.buffers, "backends/cpu.py no longer allocates its outputs with torch.empty or torch.empty_like"
    poisoning.check()
