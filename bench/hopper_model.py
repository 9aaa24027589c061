"""An event model of one multiprocessor that runs the kernels of csrc/cuda/hopper: the busy share of its tensor cores.

    python bench/hopper_model.py

Warpgroups issue products to one tensor pipe, copies fill the ring, barriers order them, as in block.h. Times are in
clocks. The model is not a measurement: NOTES.md has its predictions, to compare with a GPU.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

Process = Generator[tuple, None, None]
SLOTS, STEPS = 3, 32


@dataclass(frozen=True)
class Machine:
    """One multiprocessor, with times in clocks. The defaults are estimates, except the tensor cores' rate."""

    arbitration: str = "in turn"
    """Order of warpgroups with products to issue: "in turn", "first come", or "the same" as long as it has some."""
    score_step: int = 32
    """Time of an m64n64k16 product at the full rate."""
    sum_step: int = 128
    """Time of an m64n256k16 product."""
    latency: int = 900
    """Time until a copy begins to arrive."""
    bytes_per_clock: float = 48.0
    exponentials: int = 420
    """Time of a tile's exponentials: some 300 instructions a warp."""
    store: int = 100
    """Time to store the weights, with the fence."""
    barrier: int = 50
    load_stationary: int = 1900
    """Time to compute the norms of a block's rows in shared memory and to load the rows into registers (700)."""
    epilogue: int = 2500
    """Time to add a block's sums: four rounds of loads from L2 and stores."""
    skew: int = 50
    """Time between the blocks of a cluster."""


class Multiprocessor:
    """Runs processes that yield what they wait for, or how long they are busy."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.clock = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self._counts: dict[str, int] = {}
        self._waiting: list[tuple[str, int, str, Process]] = []
        self._queues: dict[str, deque[tuple[int, int, str | None]]] = {}
        self._pipe_busy, self._last, self._copies_end = False, "", 0.0

    def _at(self, time: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._number), action))

    def start(self, name: str, process: Process) -> None:
        self._queues[name] = deque()
        self._at(0, lambda: self._step(name, process))

    def signal(self, name: str) -> None:
        self._counts[name] = self._counts.get(name, 0) + 1
        ready = [each for each in self._waiting if self._counts.get(each[0], 0) >= each[1]]
        for each in ready:
            self._waiting.remove(each)
            self._step(each[2], each[3])

    def copy(self, size: int, signal: str) -> None:
        begin = max(self.clock + self.machine.latency, self._copies_end)
        self._copies_end = begin + size / self.machine.bytes_per_clock
        self._at(self._copies_end, lambda: self.signal(signal))

    def _step(self, name: str, process: Process) -> None:
        for what, *rest in process:
            if what == "busy":
                self._at(self.clock + rest[0], lambda: self._step(name, process))
                return
            if what == "need":
                if self._counts.get(rest[0], 0) < rest[1]:
                    self._waiting.append((rest[0], rest[1], name, process))
                    return
            elif what == "product":
                self._queues[name].append((rest[0], next(self._number), rest[1]))
                self._issue()

    def _issue(self) -> None:
        ready = [name for name, queue in self._queues.items() if queue]
        if self._pipe_busy or not ready:
            return
        names = list(self._queues)
        if self.machine.arbitration == "first come":
            name = min(ready, key=lambda each: self._queues[each][0][1])
        elif self.machine.arbitration == "the same":
            name = self._last if self._last in ready else ready[0]
        else:
            first = (names.index(self._last) + 1) % len(names) if self._last in names else 0
            name = next(each for each in names[first:] + names[:first] if self._queues[each])
        duration, _, done = self._queues[name].popleft()
        self._pipe_busy, self._last = True, name

        def end() -> None:
            self._pipe_busy = False
            if done is not None:
                self.signal(done)
            self._issue()

        self._at(self.clock + duration, end)

    def run(self) -> float:
        while self._events:
            self.clock, _, action = heapq.heappop(self._events)
            action()
        return self.clock


def utilization(machine: Machine, tiles: int, blocks: int = 1, ordered: bool = True) -> float:
    """Return the tensor pipe's share of the time for ``blocks`` stationary blocks of ``tiles`` tiles each."""
    multiprocessor = Multiprocessor(machine)
    items = [(block, j) for block in range(blocks) for j in range(-1, tiles)]

    def fill(item: int) -> None:
        if item < len(items):
            for box in range(8):
                multiprocessor.copy(8192, f"full {item} {box}")

    def scores() -> Process:
        tile = 0
        for item, (_, j) in enumerate(items):
            if j < 0:
                for box in range(8):
                    yield "need", f"full {item} {box}", 1
                yield "busy", machine.load_stationary
                multiprocessor.signal(f"empty {item}")
                continue
            for step in range(STEPS):
                yield "need", f"full {item} {step // 4}", 1
                yield "product", machine.score_step, f"scores {tile}" if step + 1 == STEPS else None
            yield "need", f"scores {tile}", 1
            yield "busy", machine.barrier
            multiprocessor.signal(f"done {tile}")
            yield "busy", machine.exponentials
            if tile > 1:
                yield "need", f"room {tile - 2}", 2
            yield "busy", machine.store
            multiprocessor.signal(f"weights {tile}")
            tile += 1

    def sums(name: str, fills: bool) -> Process:
        if fills:
            for item in range(SLOTS):
                fill(item)
        tile = 0
        for item, (_, j) in enumerate(items):
            if j < 0:
                if fills:
                    yield "need", f"empty {item}", 1
                    fill(item + SLOTS)
                continue
            yield "need", f"weights {tile}", 1
            if ordered and j + 1 < tiles:
                yield "need", f"done {tile + 1}", 1
            yield "busy", machine.barrier
            for step in range(4):
                yield "product", machine.sum_step, f"{name} {tile}" if step == 3 else None
            yield "need", f"{name} {tile}", 1
            yield "busy", machine.barrier
            multiprocessor.signal(f"empty {item}")
            last = j + 1 == tiles
            if not last:
                multiprocessor.signal(f"room {tile}")
            if fills:
                yield "need", f"empty {item}", 2
                yield "busy", machine.skew
                fill(item + SLOTS)
            if last:
                yield "busy", machine.epilogue
                multiprocessor.signal(f"room {tile}")
            tile += 1

    multiprocessor.start("scores", scores())
    multiprocessor.start("left", sums("left", True))
    multiprocessor.start("right", sums("right", False))
    work = STEPS * machine.score_step + 2 * 4 * machine.sum_step
    return blocks * tiles * work / multiprocessor.run()


# An H100 under this load: 865 TFLOP/s at some 1600 MHz, less a tenth for effects that are not in the model. Before the
# forward pass 1 GB of centers is read for its norms in 0.33 ms.
TFLOPS, LEFT_OUT, NORMS_MS = 865.0, 0.9, 0.33
WITH_STEP = 12_000
"""Clocks at the end of a block with CenterSGD's step: 2500, and eight rows a warp of some 600 instructions each, with
two warps on each scheduler."""


def ps_per_logit(share: float, blocks_in_use: float) -> float:
    """Return the time of one pass, two products of 512 columns, for a share of the tensor pipe's time."""
    return 4 * 512 / (share * LEFT_OUT * TFLOPS * blocks_in_use)


def main() -> None:
    """Print the shares with other settings, then the predictions."""
    base = Machine()
    forward = utilization(base, 150)
    print(f"forward: {forward:.2f}, unordered {utilization(base, 150, ordered=False):.2f}")
    for field, values in {
        "arbitration": ("in turn", "first come", "the same"),
        "bytes_per_clock": (24, 28, 32, 40, 64),
        "latency": (600, 1200, 1500, 2000),
        "exponentials": (350, 600, 800, 1000),
    }.items():
        shares = [
            [f"{utilization(replace(base, **{field: value}), 150, ordered=o):.2f}" for o in (True, False)]
            for value in values
        ]
        print(f"  {field}: " + ", ".join(f"{v} {a}/{b}" for v, (a, b) in zip(values, shares, strict=True)))
    for N in (512, 1024, 4096):
        back = {
            each: utilization(replace(base, epilogue=each), N // 64, max(3, 300 * 64 // N))
            for each in (2500, 5000, WITH_STEP)
        }
        fwd_ps = ps_per_logit(forward, 128 / 132)
        norms = NORMS_MS * 1e9 / (N * 1e6)
        for epilogue, share in back.items():
            bwd_ps = ps_per_logit(share, 0.995)
            total = fwd_ps + bwd_ps + norms
            print(
                f"N = {N}, epilogue {epilogue}: backward {share:.2f}; ps a logit: forward {fwd_ps:.2f} + backward "
                f"{bwd_ps:.2f} + norms {norms:.2f} = {total:.2f} ({4096 / total:.0f} TFLOP/s)"
            )


if __name__ == "__main__":
    main()
