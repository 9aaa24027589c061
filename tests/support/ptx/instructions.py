"""The instructions that a thread carries out by itself: arithmetic, comparisons and conversions, each for all threads
of a block at once. Those of several threads and of memory are in collectives.py.

Each builder takes the modifiers of an opcode and its operands, and returns a function that does it for the threads
``where``: True for all, or one boolean for each thread.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np

Where = Any  # True, or (threads,) bool
Step = Callable[[Where], None]
Builders = tuple[tuple[str, Callable[..., Step]], ...]
"""By regular expressions of opcodes; a builder also takes their groups."""


def numpy_type(type_: str) -> str:
    """``s32`` → ``i4``. Bits without a meaning are unsigned."""
    return "?" if type_ == "pred" else {"b": "u", "s": "i"}.get(type_[0], type_[0]) + str(int(type_[1:]) // 8)


class Registers:
    """A block's registers, (threads,) each, and the constants that stand beside them."""

    def __init__(self, kinds: dict[str, tuple[str, int]], threads: int) -> None:
        self.threads = threads
        self._arrays = {}
        for name, (kind, count) in kinds.items():
            unsigned = "?" if kind == "pred" else f"u{int(kind[1:]) // 8}"
            self._arrays[name] = np.zeros((count, threads), unsigned)
        self.block, self.grid = np.zeros((2, 3, 1), np.uint32)
        self.symbols: dict[str, int] = {}
        """Addresses of arrays."""

    def poison(self) -> None:
        """Let nothing of an earlier block be left."""
        for array in self._arrays.values():
            array.view(np.uint8)[:] = 255 if array.dtype != bool else 1

    def _register(self, name: str) -> np.ndarray:
        stem = name.rstrip("0123456789")
        return self._arrays[stem][int(name[len(stem) :] or 0)]

    def read(self, text: str, type_: str) -> np.ndarray:
        """An operand's value, (threads,) or (1,): of a register of more bits the lowest."""
        kind = np.dtype(numpy_type(type_))
        if text in ("%tid.x", "%tid.y", "%tid.z"):
            return np.arange(self.threads, dtype=np.uint32) * np.uint32(text == "%tid.x")
        if text.startswith(("%ctaid.", "%nctaid.")):
            return (self.block if text[1] == "c" else self.grid)["xyz".index(text[-1])]
        if text.startswith("%"):
            register = self._register(text)
            return register.view(kind)[:: register.itemsize // kind.itemsize]
        if text.startswith(("0f", "0d")):
            return np.array([int(text[2:], 16)], f"u{kind.itemsize}").view(kind)
        value = self.symbols[text] if text in self.symbols else int(text, 0)
        return np.array([value % 2 ** (8 * kind.itemsize)], f"u{kind.itemsize}").view(kind)

    def write(self, text: str, type_: str) -> np.ndarray:
        """A register to write to: where it has more bits than the type, a number is extended to them."""
        register = self._register(text)
        return register.view(numpy_type(type_)[0] + (str(register.itemsize) if type_ != "pred" else ""))


def put(to: np.ndarray, value: np.ndarray, where: Where) -> None:
    np.copyto(to, value, where=where, casting="unsafe")


def rounded(exact: np.ndarray, kind: str, toward: float) -> np.ndarray:
    """Numbers of more bits as those of a type, cut off toward an infinity or toward zero."""
    nearest = exact.astype(kind)
    if toward == 0:
        return np.where(np.abs(nearest) > np.abs(exact), np.nextafter(nearest, nearest.dtype.type(0)), nearest)
    return np.where(nearest > exact, np.nextafter(nearest, nearest.dtype.type(toward)), nearest)


def _function(registers: Registers, operands: list[str], to: str, of: str, function: Callable[..., np.ndarray]) -> Step:
    """``function`` of all operands but the first, each of type ``of``, or of the types that are named with commas."""
    types = of.split(",")
    out = registers.write(operands[0], to)
    inputs = [
        registers.read(text, types[min(i, len(types) - 1)]) for i, text in enumerate(operands[1:])
    ]  # fmt: skip
    return lambda where: put(out, function(*inputs), where)


def _ufunc(registers: Registers, operands: list[str], type_: str, function: np.ufunc) -> Step:
    """The same without a copy, where NumPy has the function."""
    out = registers.write(operands[0], type_)
    inputs = [registers.read(text, type_) for text in operands[1:]]
    return lambda where: function(*inputs, out=out, where=where)


def _divided(registers: Registers, operands: list[str], what: str, type_: str) -> Step:
    """Integers' quotient, cut off toward zero, or its remainder."""
    out = registers.write(operands[0], type_)
    a, b = (registers.read(text, type_) for text in operands[1:])

    def step(where: Where) -> None:
        if ((b == 0) & where).any():
            raise ZeroDivisionError("a division by zero")
        rest = np.fmod(a, b)
        put(out, rest if what == "rem" else (a - rest) // b, where)

    return step


def _compared(registers: Registers, operands: list[str], comparison: str, type_: str) -> Step:
    unordered = len(comparison) == 3  # true of a NaN as well
    name = {"ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}[comparison] if unordered else comparison
    names = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
             "ge": np.greater_equal}  # fmt: skip
    function = names[name]
    if unordered:
        return _function(registers, operands, "pred", type_, lambda a, b: ~function(a, b))
    return _function(registers, operands, "pred", type_, function)


def _shifted(registers: Registers, operands: list[str], way: str, type_: str) -> Step:
    """A shift by as many bits as there are, or by more, leaves zeros or copies of the sign."""
    bits = int(type_[1:])

    def function(a: np.ndarray, count: np.ndarray) -> np.ndarray:
        if type_[0] == "s":
            return a >> np.minimum(count, bits - 1).astype(a.dtype)
        by = np.minimum(count, bits - 1).astype(a.dtype)
        return np.where(count >= bits, 0, a << by if way == "shl" else a >> by)

    return _function(registers, operands, type_, f"{type_},u32", function)


def _fused(registers: Registers, operands: list[str], mode: str, type_: str) -> Step:
    """``a * b + c`` of fp32 with the product exact, and rounded once more from fp64's 53 bits; of fp64 with the 64 bits
    that a long double has on x86."""
    wide = np.float64 if type_ == "f32" else np.longdouble

    def function(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        exact = a.astype(wide) * b.astype(wide) + c
        return exact if mode == "rn" else rounded(exact, numpy_type(type_), -np.inf)

    return _function(registers, operands, type_, type_, function)


def _wide(registers: Registers, operands: list[str], base: str, type_: str) -> Step:
    double = f"{type_[0]}{2 * int(type_[1:])}"
    kind = numpy_type(double)
    types = f"{type_},{type_},{double}"
    return _function(
        registers, operands, double, types, lambda a, b, c=0: a.astype(kind) * b.astype(kind) + np.array(c, kind)
    )


def _moved(registers: Registers, operands: list[str], type_: str) -> Step:
    """A copy, or two halves of a register of 64 bits into registers of 32, or back."""
    to, of = operands
    if to.startswith("{"):
        halves = [registers.write(name.strip(), "b32") for name in to[1:-1].split(",")]
        words = registers.read(of, "b64").view(np.uint32).reshape(-1, 2)
        return lambda where: [put(half, words[:, i].copy(), where) for i, half in enumerate(halves)] and None
    if of.startswith("{"):
        low, high = (registers.read(name.strip(), "b32") for name in of[1:-1].split(","))
        out = registers.write(to, "b64")
        return lambda where: put(out, low | high.astype(np.uint64) << np.uint64(32), where)
    return _ufunc(registers, operands, f"b{type_[1:]}", np.positive)


def _to_integer(registers: Registers, operands: list[str], mode: str, type_: str) -> Step:
    """fp32 as an integer: the nearest one that there is, and 0 for a NaN."""
    limits = np.iinfo(numpy_type(type_))
    function = np.trunc if mode == "rzi" else np.rint
    return _function(
        registers, operands, type_, "f32",
        lambda a: np.clip(np.nan_to_num(function(a.astype(np.float64)), nan=0), limits.min, limits.max).astype(np.int64)
    )  # fmt: skip


def to_tf32(a: np.ndarray) -> np.ndarray:
    """To ten fraction bits, the greater one of two nearest; infinities and NaN stay."""
    bits = a.view(np.uint32)
    return np.where(np.isfinite(a), bits + np.uint32(0x1000) & np.uint32(0xFFFFE000), bits)


def to_bfloat16(a: np.ndarray) -> np.ndarray:
    """To the upper half, the even one of two nearest; NaN becomes 0x7fff."""
    bits = a.view(np.uint32)
    return np.where(np.isnan(a), 0x7FFF, bits + np.uint32(0x7FFF) + (bits >> 16 & 1) >> 16).astype(np.uint16)


def _exp2(a: np.ndarray) -> np.ndarray:
    result = np.exp2(a.astype(np.float64))
    return np.where(result < 2.0**-126, 0, result)  # not NaN


def _inserted(registers: Registers, operands: list[str], bits: str) -> Step:
    """The lowest bits of one number in the place of those of another."""
    position, count = (int(text) for text in operands[3:])
    mask = (2**count - 1) << position

    def function(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        kind = a.dtype.type
        return b & kind(mask ^ 2 ** int(bits) - 1) | a << kind(position) & kind(mask)

    return _function(registers, operands[:3], f"b{bits}", f"b{bits}", function)


_SIMPLE: dict[str, np.ufunc] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "mul.lo": np.multiply, "div.rn": np.divide,
    "sqrt.rn": np.sqrt, "neg": np.negative, "abs": np.absolute, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "not": np.invert,
}  # fmt: skip
_OF_NUMBERS = {"min": np.fmin, "max": np.fmax}  # a NaN gives way
_OF_INTEGERS = {"min": np.minimum, "max": np.maximum}


def _simple(registers: Registers, operands: list[str], name: str, type_: str) -> Step:
    return _ufunc(registers, operands, type_, _SIMPLE[name])


def _extreme(registers: Registers, operands: list[str], name: str, type_: str) -> Step:
    return _ufunc(registers, operands, type_, (_OF_NUMBERS if type_[0] == "f" else _OF_INTEGERS)[name])


def _of(to: str, of: str, function: Callable[..., np.ndarray]) -> Callable[..., Step]:
    """The builder of an instruction that is this function; without types, of those that its opcode names."""

    def builder(registers: Registers, operands: list[str], *types: str) -> Step:
        return _function(registers, operands, to or types[0], of.format(*types[-1:]), function)

    return builder


_INTEGER = r"([su]32|[su]64)"
_REAL = r"(f32|f64)"
BUILDERS: Builders = (
    (rf"(add|sub|mul\.lo)\.{_INTEGER}", _simple),
    (rf"(add|sub|mul)(?:\.rn)?\.{_REAL}", _simple),
    (rf"(div\.rn|sqrt\.rn|abs)\.{_REAL}", _simple),
    (r"(neg)\.(s32|s64|f32)", _simple),
    (r"(and|or|xor|not)\.(pred|b16|b32|b64)", _simple),
    (r"(min|max)\.([su]32|[su]64|f32|f64)", _extreme),
    (rf"rcp\.rn\.{_REAL}", _of("", "{}", lambda a: 1 / a)),
    (rf"(div|rem)\.{_INTEGER}", _divided),
    (r"setp\.(eq|ne|lt|le|gt|ge)\.([su]16|[su]32|[su]64)", _compared),
    (rf"setp\.(eq|lt|le|gt|ge|ltu|leu|gtu|geu)\.{_REAL}", _compared),
    (r"(shl)\.(b32|b64)", _shifted),
    (rf"(shr)\.{_INTEGER}", _shifted),
    (rf"fma\.(rn)\.{_REAL}", _fused),
    (r"fma\.(rm)\.(f32)", _fused),
    (r"add\.rz\.f32", _of("f32", "f32", lambda a, b: rounded(a + b.astype("f8"), "f4", 0))),
    (r"(mul|mad)\.wide\.([su]16|[su]32)", _wide),
    (r"selp\.(u16|b32|b64|f32|f64)", _of("", "{0},{0},pred", lambda a, b, c: np.where(c, a, b))),
    (r"mov\.([bu]16|[bu]32|[bu]64|f32|f64)", _moved),
    (r"cvta(?:\.to)?\.(?:global|local)\.(u64)", _moved),
    (r"bfi\.b(32|64)", _inserted),
    (r"copysign\.f32", _of("f32", "f32", lambda a, b: np.copysign(b, a))),
    (r"ex2\.approx\.ftz\.f32", _of("f32", "f32", _exp2)),
    (r"cvt(?:\.rn)?\.(f16|f32|f64)\.([su]16|[su]32|[su]64|f16|f32|f64)", _of("", "{}", np.array)),
    (r"cvt\.([su]16|[su]32|[su]64)\.([su]8|[su]16|[su]32|[su]64)", _of("", "{}", np.array)),
    (r"cvt\.(rzi|rni)\.(s32)\.f32", _to_integer),
    (r"cvt\.rmi\.f32\.f32", _of("f32", "f32", np.floor)),
    (r"cvt\.sat\.f32\.f32", _of("f32", "f32", lambda a: np.nan_to_num(np.clip(a, 0, 1), nan=0))),
    (r"cvt\.rna\.tf32\.f32", _of("b32", "f32", to_tf32)),
    (r"cvt\.rn\.bf16\.f32", _of("b16", "f32", to_bfloat16)),
)


@functools.cache
def _found(builders: Builders, opcode: str) -> tuple[Callable[..., Step], tuple[str, ...]] | None:
    matches = ((builder, re.fullmatch(pattern, opcode)) for pattern, builder in builders)
    return next(((builder, match.groups()) for builder, match in matches if match), None)


def build(context: object, opcode: str, operands: list[str], builders: Builders = BUILDERS) -> Step | None:
    """Return the function of an instruction, or None if no builder knows it. They get the context: the registers."""
    found = _found(builders, opcode)
    return found and found[0](context, operands, *found[1])
