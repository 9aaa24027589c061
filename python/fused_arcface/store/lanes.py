"""Work beside the computation: on a thread for files, on a separate stream for a GPU.

The tests run the same lines with a CPU in place of the GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

Wait = Callable[[], object]
"""A function that waits for some work, or makes the device wait for it."""


def _at_once() -> None:
    """Wait for nothing."""


class ThreadLane:
    """One thread that does one thing after the other."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "center_storage")

    def start(self, work: Callable[[], None]) -> Wait:
        """Begin work, and return a function that waits for its end and raises its error."""
        future: Future[None] = self._pool.submit(work)
        return future.result

    def close(self) -> None:
        self._pool.shutdown()


class StreamLane:
    """A stream of a GPU beside the current one. On a CPU everything happens at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, work: Callable[[], None]) -> Wait:
        """Queue work behind all that is queued now. The host does not wait.

        The function that is returned makes the current stream wait for the work.
        """
        done = self._queue(work)
        return _at_once if done is None else lambda: torch.cuda.current_stream().wait_event(done)

    def _queue(self, work: Callable[[], None]) -> torch.cuda.Event | None:
        """Queue work and return the event of its end; on a CPU do the work, and return None."""
        if self._stream is None:
            work()
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            work()
            return self._stream.record_event()

    def download(self, source: dict[str, Tensor], to: dict[str, Tensor]) -> Wait:
        """Copy tensors of the GPU into pinned memory; the function that is returned waits for the bytes."""

        def copy() -> None:
            for name, tensor in source.items():
                to[name].copy_(tensor, non_blocking=True)

        done = self._queue(copy)
        return _at_once if done is None else done.synchronize

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
