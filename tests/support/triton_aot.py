"""Ahead-of-time compilation of what the Triton backend would launch: no GPU, no driver, any architecture.

The stages run on meta tensors with the launches recorded, so that kernels, signatures and alignments are those of a
real step.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed here")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fused_arcface.backends.triton import chunks, common, flash, stages  # noqa: E402

SHARED_LIMIT = {80: 166_912, 86: 101_376, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that a block may have, by architecture (CUDA C++ programming guide, technical
specifications)."""

_POINTER = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int8: "*i8",
    torch.bool: "*i1",
}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True)
class Launch:
    """One kernel as Triton's launcher would specialize it."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    """Arguments that are multiples of 16: what vector loads and asynchronous copies need to know."""
    options: tuple[tuple[str, int], ...]

    @staticmethod
    def of(kernel: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> Launch:
        names = kernel.arg_names
        signature, constants, divisible = {}, {}, []
        for index, (name, value) in enumerate(zip(names, args, strict=False)):
            if isinstance(value, torch.Tensor):
                signature[name] = _POINTER[value.dtype]
                # An allocation is aligned to 512 bytes; a view of it begins where it begins.
                if value.storage_offset() * value.element_size() % 16 == 0:
                    divisible.append(index)
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif value is None or (value == 1 and not kernel.params[index].do_not_specialize):
                signature[name], constants[name] = "constexpr", value
            else:
                signature[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
                if value % 16 == 0 and not kernel.params[index].do_not_specialize:
                    divisible.append(index)
        for name, value in meta.items():
            if name not in _OPTIONS:
                signature[name], constants[name] = "constexpr", value
        in_order = tuple((name, signature[name]) for name in names)
        options = tuple((name, meta[name]) for name in _OPTIONS if name in meta)
        return Launch(kernel, in_order, tuple(constants.items()), tuple(divisible), options)

    @property
    def has_dot(self) -> bool:
        return dict(self.constants).get("PRODUCT", self.kernel.__name__.startswith("flash_"))

    @property
    def multiply_adds(self) -> int:
        """Those of one tile: both products of the flash passes, one turn over the depth of the chunks'."""
        constants = dict(self.constants)
        tile: int = constants["BLOCK_N"] * constants["BLOCK_C"]
        if self.kernel.__name__.startswith("flash_"):
            return tile * constants["WIDTH"] * (2 if constants.get("WITH_SUM", True) else 1)
        return tile * constants["BLOCK_D"]

    @property
    def has_loop(self) -> bool:
        """Whether it multiplies more than one tile in turn, so that the next can be loaded meanwhile."""
        constants = dict(self.constants)
        return self.has_dot and constants["WIDTH"] > constants.get("BLOCK_D", 0)

    @property
    def label(self) -> str:
        shown = {"i32", "i64", "fp32", "constexpr"}
        dtypes = [kind[1:] for _, kind in self.signature if kind not in shown]
        distinct = ",".join(dict.fromkeys(kind for kind in dtypes if kind != "i64"))
        flags = " ".join(f"{name}={value}" for name, value in self.constants if name.isupper())
        return f"{self.kernel.__name__.removesuffix('_kernel')} [{distinct}] {flags}"


@dataclass(frozen=True)
class Resources:
    """What the assembler reports of one compiled kernel."""

    registers: int
    stack: int
    shared: int
    ptx: str
    ttgir: str
    """Triton's own form of the kernel, which says how warps share a tile."""
    local_in_loop: int
    """Accesses to local memory, so spilled registers, in one turn of the loops that have tensor-core products."""
    epilogue: int
    """Instructions from the last product to the exit, on the shortest way: that of a tile that takes no rare branch."""

    @property
    def repeated_tiles(self) -> list[str]:
        """The products whose result is smaller than the part that their warps share: some of them compute the same."""
        layouts = {
            name: tuple(map(int, numbers))
            for name, *numbers in re.findall(
                r"(#\w+) = #ttg\.nvidia_mma<\{.*warpsPerCTA = \[(\d+), (\d+)\].*instrShape = \[(\d+), (\d+)", self.ttgir
            )
        }
        found = []
        for rows, columns, name in re.findall(r"dot [^\n]*-> tensor<(\d+)x(\d+)xf32, (#\w+)>", self.ttgir):
            down, across, height, width = layouts[name]
            if down * height > int(rows) or across * width > int(columns):
                found.append(f"{rows}x{columns} by {down}x{across} warps of {height}x{width}")
        return found

    @property
    def pendings(self) -> list[int]:
        """How many products may be under way after each wait for one, in order."""
        return [int(number) for number in re.findall(r"warp_group_dot_wait[^\n]*pendings = (\d+)", self.ttgir)]

    def products(self, num_warps: int) -> int:
        """Return the multiply-adds of the wgmma instructions, each of which a warpgroup of four warps has once."""
        columns = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16", self.ptx)
        return sum(64 * int(each) * 16 for each in columns) * num_warps // 4

    def has_instruction(self, pattern: str) -> bool:
        return re.search(pattern, self.ptx) is not None


def recorded(step: Callable[[], None], arch: int) -> list[Launch]:
    """The distinct launches of ``step`` on a GPU of ``arch`` with 132 multiprocessors."""
    launches: dict[Launch, None] = {}

    def record(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        launches[Launch.of(kernel, args, meta)] = None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "_run", record)
        for module in (chunks, flash, stages):
            patch.setattr(module, "device_limits", lambda device: (arch, 132))
        step()
    return list(launches)


def compiled(launch: Launch, arch: int) -> Resources:
    attributes = {(index,): [["tt.divisibility", 16]] for index in launch.divisible}
    source = ASTSource(launch.kernel, dict(launch.signature), dict(launch.constants), attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    report = _tool(kernel.asm["cubin"], "cuobjdump", "--dump-resource-usage").splitlines()[-1]
    usage = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", report)}
    listing = _tool(kernel.asm["cubin"], "nvdisasm", "-c") if launch.has_dot else ""
    return Resources(
        usage["REG"],
        usage["STACK"],
        kernel.metadata.shared,
        kernel.asm["ptx"],
        kernel.asm["ttgir"],
        _local_in_loops(listing) if launch.has_dot else 0,
        _epilogue(listing) if launch.has_dot else 0,
    )


def _tool(cubin: bytes, name: str, option: str) -> str:
    """Return what one of Triton's copies of NVIDIA's tools prints about a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def _parsed(listing: str) -> tuple[dict[str, int], list[str]]:
    """Return the labels of a disassembly, each with the index of the instruction that follows, and the instructions."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*)", line):
            instructions.append(instruction[1])
    assert instructions, "the listing has another form than expected"
    return labels, instructions


def _epilogue(listing: str) -> int:
    """Count the instructions of the shortest way from the last product to the exit."""
    labels, instructions = _parsed(listing)
    start = max(index for index, each in enumerate(instructions) if re.search(r"[HQG]MMA", each))
    reached, front, steps = {start}, [start], 0
    while front:
        steps += 1
        following = []
        for index in front:
            words = re.match(r"(@!?\w+ )?(\w+)(.*)", instructions[index])
            assert words is not None
            condition, name, rest = words.groups()
            if name == "EXIT" and condition is None:
                return steps
            target = re.search(r"`\((\.L_x_\d+)\)", rest) if name == "BRA" else None
            following += [labels[target[1]]] if target else []
            is_taken_always = condition is None and not re.search(r"\bU?P\d|\.DIV", rest)
            following += [] if name in ("BRA", "RET") and is_taken_always else [index + 1]
        front = [index for index in dict.fromkeys(following) if index not in reached]
        reached.update(front)
    raise AssertionError("no way to the exit was found")


def _local_in_loops(listing: str) -> int:
    """Count loads and stores of local memory between a backward branch and its target, if a product is there."""
    labels, instructions = _parsed(listing)
    local = set()
    for last, instruction in enumerate(instructions):
        branch = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction)
        first = labels.get(branch[1], last + 1) if branch else last + 1
        body = instructions[first : last + 1]
        if any("MMA" in each for each in body):
            local |= {first + i for i, each in enumerate(body) if re.search(r"\b(LDL|STL)\b", each)}
    return len(local)
