"""Class centers that are not on the computing device: in host memory, or in a file. A head holds one of these."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from .columns import Buffers, Columns, Tensors, gather, scatter
from .file import FileRows
from .lanes import StreamLane, ThreadLane, visible
from .pipeline import Pipeline, SampledRows, StepRows, Traffic
from .records import StoreError


class CenterStore:
    """The class centers of one shard and their momentum. Each step gets copies of some rows.

    Attributes:
        device: computing device.
        in_memory: True if the head's ``weight`` and momentum are tensors with all rows.
        traffic: bytes moved so far.
    """

    in_memory: bool

    def __init__(self, device: torch.device, num_rows: int, row_start: int) -> None:
        self.device, self._num_rows, self._row_start = device, num_rows, row_start
        self._pipeline: Pipeline | None = None
        self.traffic = Traffic()

    def place(self, target_class: Tensor) -> Tensor:
        """Return the batch's classes (N,) on the device that chooses the rows of a step."""
        return target_class if self.in_memory else target_class.cpu()

    def take(self, held: Tensors, drawn: StepRows) -> SampledRows:
        """Return copies of the rows of a step on the computing device; ``held``: the head's weight and momentum."""
        raise NotImplementedError

    def view(self, weight: Tensor) -> Tensor | CenterView:
        """Return the shard's class centers for evaluation: a tensor, or a view that reads pieces of them."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise any error of the work beside the computation, before a step begins."""
        if self._pipeline is not None:
            self._pipeline.check()

    def drain(self) -> None:
        """Wait until all rows of the steps so far are in the store."""
        if self._pipeline is not None:
            self._pipeline.drain()

    def move(self, device: torch.device) -> None:
        """Compute on another device from now on."""
        if device != self.device:
            self.drain()
            self.device, self._pipeline = device, None

    def close(self) -> None:
        """Wait for all work, and release what is held."""
        if self._pipeline is not None:
            with contextlib.suppress(StoreError):  # changes after the last checkpoint are undone anyway
                self._pipeline.drain()
            self._pipeline.close()
            self._pipeline = None

    def discard(self) -> None:
        """Close the store, and remove the files that it has made."""
        self.close()


class CenterView:
    """Class centers (C, D) that are read in pieces: a shape, a dtype, and slices of rows."""

    def __init__(
        self, shape: torch.Size, dtype: torch.dtype, device: torch.device, read: Callable[[int, int], Tensor]
    ) -> None:
        self.shape, self.dtype, self.device, self._read = shape, dtype, device, read

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        return self._read(start, stop).to(self.device)


class _HostRows:
    """The rows of tensors in host memory, as the computing device sees them."""

    def __init__(self, device: torch.device, columns: Columns) -> None:
        self.columns, self._device = columns, device
        self._seen: dict[str, tuple[int, Tensor]] = {}
        self.held: Tensors = {}

    def _tensors(self) -> Tensors:
        for name, tensor in self.held.items():
            if name not in self._seen or self._seen[name][0] != tensor.data_ptr():
                self._seen[name] = tensor.data_ptr(), visible(tensor, self._device)
        return {name: self._seen[name][1] for name in self.held}

    def read(self, rows: Tensor, out: Tensors, keep: bool) -> None:
        for name, tensor in self._tensors().items():
            gather(tensor, rows, out[name])

    def write(self, rows: Tensor, tensors: Tensors) -> None:
        for name, tensor in self._tensors().items():
            scatter(tensor, rows, tensors[name])


class HostCenters(CenterStore):
    """Class centers in host memory. ``weight`` and the momentum are ordinary tensors on the CPU.

    A GPU reads and writes their rows over the bus, from pinned memory; the host waits for nothing.
    """

    in_memory = True

    def __reduce__(self) -> tuple[Any, ...]:
        return HostCenters, (self.device, self._num_rows, self._row_start)

    def take(self, held: Tensors, drawn: StepRows) -> SampledRows:
        on_device = waits(self.device)
        # A GPU reads and writes padding in one more row.
        held = {name: _with_a_row_more(tensor) if on_device else tensor.detach() for name, tensor in held.items()}
        if self._pipeline is None:
            self._rows = _HostRows(self.device, Columns.of(held))
            lane = StreamLane(self.device) if on_device else None
            self._pipeline = Pipeline(self._rows, self._num_rows, self._row_start, self.device, lane, self.traffic)
        self._rows.held = held
        return self._pipeline.take(drawn)

    def view(self, weight: Tensor) -> Tensor | CenterView:
        if weight.device == self.device:
            return weight
        return CenterView(weight.shape, weight.dtype, self.device, lambda start, stop: weight[start:stop])


def waits(device: torch.device) -> bool:
    """Return true if the host waits for the work that is queued on the device before it can read a tensor there."""
    return device.type != "cpu"


def _with_a_row_more(tensor: Tensor) -> Tensor:
    """Return (R + 1, D) rows; the first R are the tensor's. If its memory has no room for the last, it is moved."""
    rows, width = tensor.shape
    room = tensor.untyped_storage().nbytes() // tensor.element_size()
    if not tensor.is_contiguous() or tensor.storage_offset() > 0 or room < (rows + 1) * width:
        moved = torch.empty(rows + 1, width, dtype=tensor.dtype)
        moved[:rows] = tensor.detach()
        moved[rows:] = 0
        tensor.data = moved[:rows]
    return tensor.detach().as_strided((rows + 1, width), (width, 1))


class FileCenters(CenterStore):
    """Class centers in a file. ``weight`` and the momentum have only a shape and a dtype, on the device ``meta``.

    The host waits for the labels of a batch, because it reads their rows from a disk.
    """

    in_memory = False

    def __init__(self, device: torch.device, rows: FileRows) -> None:
        super().__init__(device, rows.count, rows.first)
        self.rows = rows
        self._staging: StreamLane | None = None

    def __reduce__(self) -> NoReturn:
        raise StoreError(f"a head whose class centers are in a file cannot be copied: {self.rows.folder} has one owner")

    def check(self) -> None:
        self.rows.check_begun()
        super().check()

    def take(self, held: Tensors, drawn: StepRows) -> SampledRows:
        on_device = waits(self.device)
        if self._pipeline is None:
            cpu, pinned = torch.device("cpu"), self.device.type == "cuda"
            lane = ThreadLane()
            self._pipeline = Pipeline(self.rows, self._num_rows, self._row_start, cpu, lane, self.traffic, pinned)
            self._staging = StreamLane(self.device) if on_device else None
            self._on_device = Buffers(self.rows.columns, self.device)
        sampled = self._pipeline.take(drawn)
        return sampled if self._staging is None else self._uploaded(sampled, self._staging)

    def _uploaded(self, sampled: SampledRows, lane: StreamLane) -> SampledRows:
        """Return copies of the rows on the GPU. They go back through the pinned buffer that they came from."""
        count, turn = len(sampled.rows), sampled.turn
        tensors = self._on_device.rows(turn, count) if turn > 0 else self.rows.columns.empty(count, self.device)
        for name, tensor in tensors.items():
            tensor.copy_(sampled.tensors[name], non_blocking=True)
        ids = sampled.ids.to(self.device, non_blocking=True)

        def write_back() -> None:
            sampled.ready = lane.download(tensors, sampled.tensors)
            sampled.write_back()

        return SampledRows(sampled.rows, ids, tensors, write_back, sampled.turn)

    def piece(self, start: int, stop: int) -> Tensors:
        """Return rows ``[start, stop)`` of the shard as they are now, on the CPU."""
        self.drain()
        tensors = self.rows.columns.empty(stop - start)
        self.rows.read(torch.arange(start, stop), tensors, keep=False)
        return tensors

    def replace(self, rows: Tensor, weight: Tensor) -> None:
        """Replace class centers (K,) int64 of the shard, ascending, by (K, D); their momentum stays."""
        self.drain()
        tensors = self.rows.columns.empty(len(rows))
        self.rows.read(rows, tensors, keep=True)
        tensors["weight"].copy_(weight)
        self.rows.write(rows, tensors)

    def view(self, weight: Tensor) -> Tensor | CenterView:
        return CenterView(
            weight.shape, weight.dtype, self.device, lambda start, stop: self.piece(start, stop)["weight"]
        )

    def close(self) -> None:
        super().close()
        self.rows.close()

    def discard(self) -> None:
        super().close()
        self.rows.discard()
