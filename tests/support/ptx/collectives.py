"""The instructions that reach memory or other threads: loads and stores, asynchronous copies, barriers, shuffles, and
tensor cores' matrices.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .instructions import Builders, Registers, Step, Where, numpy_type, rounded
from .memory import Fault, Order, Space

LANES = 32
LOCAL_BITS = 32
"""Of an address in a thread's own memory; above them is the thread's number."""
_ALL = 0xFFFFFFFF


@dataclass
class Copies:
    """The asynchronous copies of a block that are under way."""

    open: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    """(threads, their groups, addresses in shared memory, what arrives)"""
    committed: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Groups that each thread has closed."""


@dataclass
class Surroundings:
    """What a block's instructions meet beside its registers."""

    registers: Registers
    spaces: dict[str, Space] = field(default_factory=dict)
    copies: Copies = field(default_factory=Copies)
    alive: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """The threads that have not returned."""

    @property
    def order(self) -> Order:
        return self.spaces["global"].order

    def threads(self, where: Where) -> np.ndarray:
        return np.arange(self.registers.threads) if where is True else np.flatnonzero(where)

    def warps(self, where: Where) -> np.ndarray:
        """The threads of whole warps; it is a fault if a warp is not together."""
        if where is not True:
            count = where.reshape(-1, LANES).sum(1)
            if (split := (count % LANES != 0)).any():
                thread = int(np.flatnonzero(where & split.repeat(LANES))[0])
                raise Fault(thread, "the other lanes of its warp are not here")
        return self.threads(where)

    def address(self, text: str, space: str) -> Callable[[np.ndarray], np.ndarray]:
        """Return a function that gives the addresses of some threads, of ``[%rd7+-8]`` or of a parameter's name."""
        match = re.fullmatch(r"\[(%?\w+)(?:\+(-?\d+))?\]", text)
        if match is None:
            raise ValueError(f"no known address: {text}")
        count = self.registers.threads
        base = np.broadcast_to(self.registers.read(match[1], "u32" if space == "shared" else "u64"), count)
        offset = np.full(count, int(match[2] or 0)) + (np.arange(count) << LOCAL_BITS) * (space == "local")
        return lambda threads: base[threads].astype(np.int64) + offset[threads]


def _names(text: str) -> list[str]:
    return [each.strip() for each in text.strip("{}").split(",")]


def _loaded(around: Surroundings, operands: list[str], space: str, vector: str | None, type_: str) -> Step:
    address = around.address(operands[1], space)
    outs = [around.registers.write(each, type_) for each in _names(operands[0])]
    kind = np.dtype(numpy_type(type_))

    def step(where: Where) -> None:
        threads = around.threads(where)
        values = around.spaces[space].load(address(threads), threads, kind.itemsize * len(outs)).view(kind)
        for i, out in enumerate(outs):
            out[threads] = values[:, i]

    return step


def _stored(around: Surroundings, operands: list[str], space: str, vector: str | None, type_: str) -> Step:
    address = around.address(operands[0], space)
    inputs = [around.registers.read(each, type_) for each in _names(operands[1])]

    def step(where: Where) -> None:
        threads = around.threads(where)
        values = np.empty((len(threads), len(inputs)), numpy_type(type_))
        for i, each in enumerate(inputs):
            values[:, i] = each[threads] if len(each) > 1 else each
        memory = around.spaces[space]
        memory.store(address(threads), threads, values.view(memory.unit))

    return step


def _copied(around: Surroundings, operands: list[str]) -> Step:
    """From global to shared memory. What arrives is there when the thread has waited for the copy's group."""
    to, of = around.address(operands[0], "shared"), around.address(operands[1], "global")
    size = int(operands[2])

    def step(where: Where) -> None:
        threads, copies, shared = around.threads(where), around.copies, around.spaces["shared"]
        values = around.spaces["global"].load(of(threads), threads, size).view(shared.unit)
        addresses = to(threads)
        shared.begin_copy(addresses, threads, size)
        copies.open.append((threads, copies.committed[threads], addresses, values))

    return step


def _committed(around: Surroundings, operands: list[str]) -> Step:
    def step(where: Where) -> None:
        around.copies.committed[around.threads(where)] += 1

    return step


def _waited(around: Surroundings, operands: list[str]) -> Step:
    """Until at most so many of a thread's latest groups are under way."""
    most = int(operands[0])

    def step(where: Where) -> None:
        copies, here = around.copies, np.zeros(around.registers.threads, bool)
        here[around.threads(where)] = True
        still = []
        for threads, groups, addresses, values in copies.open:
            done = here[threads] & (groups < copies.committed[threads] - most)
            around.spaces["shared"].end_copy(addresses[done], threads[done], values[done])
            if not done.all():
                still.append((threads[~done], groups[~done], addresses[~done], values[~done]))
        copies.open = still

    return step


def _barrier(around: Surroundings, operands: list[str]) -> Step:
    if operands != ["0"]:
        raise ValueError(f"bar.sync of another barrier than 0, or of some threads: {operands}")

    def step(where: Where) -> None:
        missing = around.alive & ~(np.ones_like(around.alive) & where)
        if missing.any():
            raise Fault(int(np.flatnonzero(missing)[0]), "does not reach the barrier that others wait at")
        around.order.pass_barrier()

    return step


def _warp_barrier(around: Surroundings, operands: list[str]) -> Step:
    if int(operands[0]) % 2**32 != _ALL:
        raise ValueError(f"a barrier of a part of a warp: {operands}")
    return lambda where: around.order.pass_warp_barrier(np.unique(around.warps(where) // LANES))


def _shuffled(around: Surroundings, operands: list[str]) -> Step:
    """The value of the lane whose number differs in the bits of the third operand."""
    to, _, held = operands[0].partition("|")
    read = around.registers.read
    out, holds = around.registers.write(to, "b32"), around.registers.write(held, "pred")
    value, bits, clamp, members = (read(text, "u32") for text in operands[1:])

    def step(where: Where) -> None:
        threads = around.warps(where)
        here = np.broadcast_to(np.stack(np.broadcast_arrays(bits, clamp, members)), (3, len(value)))[:, threads]
        if (here[1] != LANES - 1).any() or (here[2] != _ALL).any() or (here[0] >= LANES).any():
            raise Fault(int(threads[0]), "a shuffle that is not of a whole warp")
        out[threads] = value[threads ^ here[0]]
        holds[threads] = True

    return step


def _matrices(around: Surroundings, operands: list[str], transposed: str | None) -> Step:
    """Four matrices of 8 rows of 16 bytes. Lane 8m + r has the address of row r of matrix m; lane 4r + c receives the
    four bytes c of row r, or of column r's 16-bit numbers 2c and 2c + 1."""
    outs = [around.registers.write(each, "b32") for each in _names(operands[0])]
    address = around.address(operands[1], "shared")

    def step(where: Where) -> None:
        threads = around.warps(where)
        rows = around.spaces["shared"].load(address(threads), threads, 16).view(np.uint16).reshape(-1, 4, 8, 8)
        if transposed:
            rows = rows.swapaxes(2, 3)
        words = np.ascontiguousarray(rows).view(np.uint32)
        for i, out in enumerate(outs):
            out[threads] = words[:, i].reshape(-1)

    return step


_NUMBERS: dict[str, tuple[type, Callable[[np.ndarray], np.ndarray]]] = {
    "bf16": (np.uint16, lambda bits: (bits.astype(np.uint32) << 16).view(np.float32)),
    "f16": (np.uint16, lambda bits: bits.view(np.float16)),
    "tf32": (np.uint32, lambda bits: (bits & np.uint32(0xFFFFE000)).view(np.float32)),
}
"""An operand's units, and their numbers: of tf32 the last 13 bits count for nothing."""


def _multiplied(around: Surroundings, operands: list[str], depth: str, type_: str) -> Step:
    """d (16, 8) = a (16, depth) b (depth, 8) + c. With g = lane / 4 and t = lane % 4 a lane has of a the rows g and
    g + 8 at the depths p·t … p·t + p − 1 and 4p further on, p numbers in a register, of b the same depths of column g,
    and of c and d the columns 2t and 2t + 1 of rows g and g + 8. The sum is exact, and then cut off to fp32."""
    unit, numbers = _NUMBERS[type_]
    p = 4 // np.dtype(unit).itemsize
    if int(depth) != 8 * p:
        raise ValueError(f"no product of depth {depth} in {type_}")
    a_names, b_names, c_names = (_names(text) for text in operands[1:])
    a, b = ([around.registers.read(each, "b32") for each in names] for names in (a_names, b_names))
    c = [around.registers.read(each, "f32") for each in c_names]
    d = [around.registers.write(each, "f32") for each in _names(operands[0])]

    def gathered(registers: list[np.ndarray], threads: np.ndarray, kind: type) -> np.ndarray:
        return np.stack([each[threads] for each in registers]).view(kind)

    def step(where: Where) -> None:
        threads = around.warps(where)
        left = gathered(a, threads, unit).reshape(2, 2, -1, 8, 4, p).transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 8 * p)
        right = gathered(b, threads, unit).reshape(2, -1, 8, 4, p).transpose(1, 0, 3, 4, 2).reshape(-1, 8 * p, 8)
        sums = gathered(c, threads, np.float32).reshape(2, 2, -1, 8, 4).transpose(2, 0, 3, 4, 1).reshape(-1, 16, 8)
        exact = numbers(left).astype(np.float64) @ numbers(right).astype(np.float64) + sums
        result = rounded(exact, "f4", 0).reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
        for out, row in zip(d, result, strict=True):
            out[threads] = row

    return step


_VECTOR = r"(?:\.(v2|v4))?"
BUILDERS: Builders = (
    (rf"ld\.(param|global|shared|local)(?:\.nc)?{_VECTOR}\.([su]8|u16|[su]32|u64|f32|f64)", _loaded),
    (rf"st\.(global|shared|local){_VECTOR}\.(u8|u16|u32|u64|f32|f64)", _stored),
    (r"cp\.async\.cg\.shared\.global", _copied),
    (r"cp\.async\.commit_group", _committed),
    (r"cp\.async\.wait_group", _waited),
    (r"bar\.sync", _barrier),
    (r"bar\.warp\.sync", _warp_barrier),
    (r"shfl\.sync\.bfly\.b32", _shuffled),
    (r"ldmatrix\.sync\.aligned\.m8n8\.x4(\.trans)?\.shared\.b16", _matrices),
    (r"mma\.sync\.aligned\.m16n8k(8|16)\.row\.col\.f32\.(tf32|bf16|f16)\.\2\.f32", _multiplied),
)
