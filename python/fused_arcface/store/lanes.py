"""Work beside the computation: on a thread for files, on a separate stream for a GPU.

The tests run the same lines with a CPU in place of the GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

_Result = TypeVar("_Result")
Wait = Callable[[], object]
"""A function that waits for some work, or makes the device wait for it."""


class ThreadLane:
    """One thread that does one thing after the other."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "center_storage")

    def start(self, work: Callable[[], _Result]) -> Callable[[], _Result]:
        """Begin work. The function that is returned waits for the result, and raises the work's error."""
        return self._pool.submit(work).result

    def close(self) -> None:
        self._pool.shutdown()


class StreamLane:
    """A stream of a GPU beside the current one. On a CPU everything happens at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, work: Callable[[], _Result]) -> Callable[[], _Result]:
        """Queue work behind all that is queued now. The host does not wait.

        The function that is returned makes the current stream wait for the work, and returns its result.
        """
        result, done = self._queue(work)

        def wait() -> _Result:
            if done is not None:
                torch.cuda.current_stream().wait_event(done)
            return result

        return wait

    def _queue(self, work: Callable[[], _Result]) -> tuple[_Result, torch.cuda.Event | None]:
        """Queue work; return its result, and the event of its end on a GPU."""
        if self._stream is None:
            return work(), None
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            return work(), self._stream.record_event()

    def download(self, source: dict[str, Tensor], to: dict[str, Tensor]) -> Wait:
        """Copy tensors of the GPU into pinned memory; the function that is returned waits for the bytes."""

        def copy() -> None:
            for name, tensor in source.items():
                to[name].copy_(tensor, non_blocking=True)

        _, done = self._queue(copy)
        return (lambda: None) if done is None else done.synchronize

    def close(self) -> None:
        pass


class _Mapped:
    """Host memory in the form in which torch accepts memory that a GPU can address."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory  # alive as long as the tensor that is made of it
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": tuple(memory.shape),
            "typestr": "|u1",
            "data": (memory.data_ptr(), False),
            "version": 3,
        }


def visible(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a contiguous tensor of host memory as the device sees it: a GPU reads and writes it over the bus.

    For that its pages are locked in memory as long as the tensor exists.

    Raises:
        RuntimeError: if the system refuses to lock them.
    """
    if device.type != "cuda":
        return tensor
    memory = tensor.detach().view(torch.uint8)
    runtime = torch.cuda.cudart()
    with torch.cuda.device(device):
        error = int(runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
        if error != 0:
            size = memory.numel() / 2**30
            raise RuntimeError(
                f"center_storage='host': {size:.1f} GiB of host memory cannot be pinned (CUDA error {error}): raise "
                "the limit of locked memory (ulimit -l), or use a file"
            )
        weakref.finalize(tensor.untyped_storage(), runtime.cudaHostUnregister, memory.data_ptr())
        seen: Tensor = torch.as_tensor(_Mapped(memory), device=device)
    return seen.view(tensor.dtype)
