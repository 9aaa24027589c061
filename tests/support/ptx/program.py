"""The text of a PTX file as kernels: their parameters, registers and basic blocks.

Only the grammar that nvcc uses for csrc/cuda is known; anything else is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Instruction:
    line: int
    opcode: str
    text: str
    """Its operands."""

    @property
    def operands(self) -> list[str]:
        return _OPERAND.findall(self.text)

    def __str__(self) -> str:
        return f"line {self.line}, {self.opcode} {self.text}"


@dataclass
class BasicBlock:
    """Instructions without a branch, and where the threads go afterwards, as numbers of blocks."""

    steps: list[Instruction] = field(default_factory=list)
    predicate: str | None = None
    """A register, after "!" where it is negated: threads for which it holds go to ``target``, the others on."""
    target: int | None = None
    """None: they go on."""
    ends: bool = False


@dataclass
class Kernel:
    name: str
    parameters: dict[str, int] = field(default_factory=dict)
    """Bytes by name, in order."""
    registers: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Type (``pred``, ``b32``, ``f64``, …) and count by name without the number: ``%r7`` is one of ``%r``."""
    local: dict[str, int] = field(default_factory=dict)
    """Bytes of a thread's own arrays."""
    most_threads: int = 0
    blocks: list[BasicBlock] = field(default_factory=list)
    constants: dict[str, bytes] = field(default_factory=dict)
    """Arrays of the whole file, which kernels read."""
    shared: str = ""
    """The name of the block's shared memory."""

    def meeting_points(self) -> list[int]:
        """Return each block's immediate post-dominator; the number of blocks stands for the kernel's end."""
        end = len(self.blocks)
        after = [
            [end] if block.ends else ([i + 1] if block.target is None or block.predicate else [])
            + ([] if block.target is None else [block.target])
            for i, block in enumerate(self.blocks)
        ]  # fmt: skip
        everything = (1 << end + 1) - 1
        sets = [everything] * end + [1 << end]
        changed = True
        while changed:
            changed = False
            for i in reversed(range(end)):
                common = everything
                for successor in after[i]:
                    common &= sets[successor]
                changed |= sets[i] != common | 1 << i
                sets[i] = common | 1 << i
        # The nearest is the one that the others post-dominate.
        return [
            next(j for j in range(end + 1) if sets[i] ^ 1 << i == sets[j] and j != i) if sets[i] != everything else end
            for i in range(end)
        ]


_OPERAND = re.compile(r"\s*(\{[^}]*\}|\[[^\]]*\]|[^,\s]+)\s*(?:,|$)")
_IGNORED = re.compile(r"(\.(version|target|address_size|minnctapersm|pragma)\b.*|[()]|)")
_PARAMETER = re.compile(r"\.param (?:\.align \d+ )?\.[a-z](\d+) (\w+)(?:\[(\d+)\])?,?")
_REGISTERS = re.compile(r"\.reg \.(\w+)\s+(%\w+?)(?:<(\d+)>)?;")
_STATEMENT = re.compile(r"(?:@(!?%\w+) +)?([a-z][\w.]*)(?: +(.*))?;")


def parse(file: str, text: str) -> dict[str, Kernel]:
    """Return the kernels of a file's text by name."""
    kernels: dict[str, Kernel] = {}
    constants: dict[str, bytes] = {}
    shared = ""
    kernel = Kernel("")
    labels: dict[str, int] = {}
    branches: list[tuple[BasicBlock, str]] = []
    depth = 0
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.partition("//")[0].strip().replace("\t", " ")
        if statement := _STATEMENT.fullmatch(line):
            guard, opcode, rest = statement.groups()
            block = kernel.blocks[-1]
            if opcode in ("bra", "bra.uni"):
                block.predicate = guard
                branches.append((block, rest))
            elif opcode == "ret" and guard is None:
                block.ends = True
            elif guard is None:
                block.steps.append(Instruction(number, opcode, rest or ""))
                continue
            else:
                raise ValueError(f"{file}, line {number}: only a branch may have a predicate: {line}")
            kernel.blocks.append(BasicBlock())
        elif _IGNORED.fullmatch(line):
            continue
        elif entry := re.fullmatch(r"(?:\.visible )?\.entry (\w+)\(", line):
            kernel = kernels[entry[1]] = Kernel(entry[1], constants=constants, shared=shared)
        elif match := re.fullmatch(r"\.extern \.shared \.align \d+ \.b8 (\w+)\[\];", line):
            shared = match[1]
        elif match := re.fullmatch(r"\.global \.align \d+ \.b8 (\w+)\[\d+\] = \{([\d, ]+)\};", line):
            constants[match[1]] = bytes(map(int, match[2].split(",")))
        elif match := _PARAMETER.fullmatch(line):
            kernel.parameters[match[2]] = int(match[1]) // 8 * int(match[3] or 1)
        elif match := re.fullmatch(r"\.maxntid (\d+), 1, 1", line):
            kernel.most_threads = int(match[1])
        elif match := _REGISTERS.fullmatch(line):
            kernel.registers[match[2]] = match[1], int(match[3] or 1)
        elif match := re.fullmatch(r"\.local \.align \d+ \.b8 +(\w+)\[(\d+)\];", line):
            kernel.local[match[1]] = int(match[2])
        elif line == "{":
            if depth == 0:
                kernel.blocks, labels, branches = [BasicBlock()], {}, []
            depth += 1
        elif line == "}":
            depth -= 1
            if depth == 0:
                while kernel.blocks and not kernel.blocks[-1].steps and not kernel.blocks[-1].ends:
                    kernel.blocks.pop()  # opened after the last ret
                for block, label in branches:
                    block.target = labels[label]
        elif label := re.fullmatch(r"(\$\w+):", line):
            if kernel.blocks[-1].steps:
                kernel.blocks.append(BasicBlock())
            labels[label[1]] = len(kernel.blocks) - 1
        else:
            raise ValueError(f"{file}, line {number}: no known PTX: {line}")
    return kernels
