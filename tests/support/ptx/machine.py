"""A launch of a kernel: its blocks one after the other, the threads of a block in step, those of a branch's two ways
one after the other until they meet again.
"""

from __future__ import annotations

import numpy as np

from . import collectives, instructions
from .collectives import LANES, LOCAL_BITS, Copies, Surroundings
from .instructions import Registers
from .memory import Fault, Memory, Space
from .program import Instruction, Kernel

SHARED_START = 1 << 10  # what a block of sm_80 cannot have comes first
_LONGEST = 50_000  # basic blocks that a block runs through; a small problem has some hundreds


class PtxError(Exception):
    """A kernel does what it must not, or an instruction is not known."""


class Machine:
    """A kernel, ready to run with so many threads a block."""

    def __init__(self, kernel: Kernel, threads: int) -> None:
        self.kernel, self.threads = kernel, threads
        self.meeting_points = kernel.meeting_points()
        self.registers = Registers(kernel.registers, threads)
        self.around = Surroundings(self.registers)
        self.constants = {name: np.frombuffer(each, np.uint8).copy() for name, each in kernel.constants.items()}
        self.registers.symbols = {
            kernel.shared: SHARED_START,
            **{name: array.ctypes.data for name, array in self.constants.items()},
            **{name: i << 16 for names in (kernel.local, kernel.parameters) for i, name in enumerate(names)},
        }
        self.blocks = [[(each, self._build(each)) for each in block.steps] for block in kernel.blocks]
        self.predicates = [
            None if block.predicate is None else self.registers.read(block.predicate.lstrip("!"), "pred")
            for block in kernel.blocks
        ]

    def _build(self, instruction: Instruction) -> instructions.Step:
        try:
            opcode, operands = instruction.opcode, instruction.operands
            step = instructions.build(self.registers, opcode, operands)
            step = step or instructions.build(self.around, opcode, operands, collectives.BUILDERS)
        except (ValueError, LookupError) as error:
            raise PtxError(f"{self.kernel.name}, {instruction}: {error}") from error
        if step is None:
            raise PtxError(f"{self.kernel.name}, {instruction}: an instruction that the interpreter does not know")
        return step

    def launch(self, device: Space, grid: tuple[int, int, int], shared_bytes: int, parameters: list[bytes]) -> None:
        """Run the kernel's blocks over a device's memory."""
        for array in self.constants.values():
            if array.ctypes.data not in device.starts:
                device.add(array.ctypes.data, Memory(array, written=True))
        for memory in device.memories:
            memory.begin_launch()
        given = Space(np.uint8, device.order)
        for i, contents in enumerate(parameters):
            given.add(i << 16, Memory(np.frombuffer(contents, np.uint8), written=True))
        self.around.spaces = {"global": device, "param": given}
        self.registers.grid[:, 0] = grid
        for z, y, x in np.ndindex(grid[::-1]):
            self.registers.block[:, 0] = x, y, z
            self._begin_block(shared_bytes)
            with np.errstate(all="ignore"):
                self._run_threads()

    def _begin_block(self, shared_bytes: int) -> None:
        around = self.around
        around.order.begin_block(self.threads // LANES)
        self.registers.poison()
        shared, local = Space(np.uint32, around.order), Space(np.uint8, around.order)
        shared.add(SHARED_START, Memory(np.full(shared_bytes // 4, 0xFFFFFFFF, np.uint32)))
        for i, size in enumerate(self.kernel.local.values()):
            for thread in range(self.threads):
                local.add((thread << LOCAL_BITS) + (i << 16), Memory(np.full(size, 255, np.uint8)))
        around.spaces |= {"shared": shared, "local": local}
        around.copies = Copies(committed=np.zeros(self.threads, np.int64))
        around.alive = np.ones(self.threads, bool)

    def _run_threads(self) -> None:
        """Carry the threads along the kernel's basic blocks. What is pending is a stack of threads that wait: where
        they go on, and where they meet others."""
        end, alive = len(self.blocks), self.around.alive
        pending = [(0, end, alive.copy())]
        count = 0
        while pending:
            at, meeting, mask = pending.pop()
            mask &= alive
            while at != meeting and mask.any():
                count += 1
                if count > _LONGEST:
                    raise PtxError(f"{self.kernel.name}: a block that does not end")
                self._run_steps(at, True if mask.all() else mask)
                block = self.kernel.blocks[at]
                if block.ends:
                    alive &= ~mask
                    break
                predicate = self.predicates[at]
                if predicate is None:
                    at = at + 1 if block.target is None else block.target
                    continue
                taken = mask & (predicate != block.predicate.startswith("!"))
                if not taken.any():
                    at += 1
                elif taken.sum() == mask.sum():
                    at = block.target
                else:
                    meet = self.meeting_points[at]
                    if meet != meeting:
                        pending.append((meet, meeting, mask))
                    pending.append((at + 1, meet, mask & ~taken))
                    at, meeting, mask = block.target, meet, taken

    def _run_steps(self, at: int, where: instructions.Where) -> None:
        for instruction, step in self.blocks[at]:
            try:
                step(where)
            except (Fault, ZeroDivisionError) as error:
                thread = f"thread {error.thread}" if isinstance(error, Fault) else "a thread"
                block = ", ".join(map(str, self.registers.block[:, 0]))
                raise PtxError(f"{self.kernel.name}, {instruction}: {thread} of block ({block}) {error}") from error
