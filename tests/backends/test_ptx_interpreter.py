"""The interpreter of PTX (tests/support/ptx) by itself: small kernels and single instructions, with results worked out
by hand from the PTX ISA. Nothing of CUDA is needed.
"""

from __future__ import annotations

import numpy as np
import pytest
from support.ptx import instructions
from support.ptx.instructions import Registers
from support.ptx.machine import Machine, PtxError
from support.ptx.memory import Memory, Order, Space
from support.ptx.program import parse

KINDS = {"%r": ("b32", 8), "%rd": ("b64", 8), "%f": ("f32", 8), "%fd": ("f64", 8), "%rs": ("b16", 8), "%p": ("pred", 4)}


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("shl.b32 %r0, 1, 31", 1 << 31),
        ("shl.b32 %r0, 1, 32", 0),
        ("shr.u32 %r0, -1, 32", 0),
        ("shr.s32 %r0, -8, 1", 2**32 - 4),
        ("shr.s32 %r0, -8, 40", 2**32 - 1),
        ("shl.b64 %rd0, 1, 40", 1 << 40),
        ("div.s32 %r0, -7, 2", 2**32 - 3),
        ("rem.s32 %r0, -7, 2", 2**32 - 1),
        ("div.s64 %rd0, 7, -2", 2**64 - 3),
        ("mul.lo.s32 %r0, 65537, 65537", 65537**2 % 2**32),
        ("mul.wide.s32 %rd0, -1, 3", 2**64 - 3),
        ("mul.wide.u32 %rd0, -1, 3", (2**32 - 1) * 3),
        ("mad.wide.u32 %rd0, -1, 2, 5", (2**32 - 1) * 2 + 5),
        ("max.u32 %r0, -1, 1", 2**32 - 1),
        ("max.s64 %rd0, -1, 1", 1),
        ("not.b32 %r0, 5", 2**32 - 6),
        ("bfi.b32 %r0, 255, 0, 8, 4", 0xF00),
        ("bfi.b32 %r0, 0, -1, 16, 16", 0xFFFF),
        ("selp.b32 %r0, 3, 4, %p0", 4),
        ("cvt.s64.s32 %rd0, -1", 2**64 - 1),
        ("cvt.u64.u32 %rd0, -1", 2**32 - 1),
        ("cvt.u32.u64 %r0, 4294967298", 2),
        ("cvt.s16.s8 %rs0, 200", 2**16 - 56),
        ("max.f32 %f0, 0f7FC00000, 0f3F800000", 0x3F800000),  # a NaN gives way
        ("min.f32 %f0, 0fBF800000, 0f7FC00000", 0xBF800000),
        ("add.f32 %f0, 0f3F800000, 0f33800000", 0x3F800000),  # 1 + 2⁻²⁴: to even
        ("add.rz.f32 %f0, 0f3F800000, 0f33C00000", 0x3F800000),  # 1 + 1.5·2⁻²⁴: cut off
        ("add.f32 %f0, 0f3F800000, 0f33C00000", 0x3F800001),
        ("fma.rn.f32 %f0, 0f3F800001, 0f3F800001, 0fBF800002", 0x28800000),  # 2⁻⁴⁶ is left of a square
        ("fma.rm.f32 %f0, 0fBF800000, 0f33800000, 0f3F800000", 0x3F7FFFFF),
        ("copysign.f32 %f0, 0f80000000, 0f3F800000", 0xBF800000),
        ("neg.f32 %f0, 0f00000000", 0x80000000),
        ("rcp.rn.f32 %f0, 0f40400000", 0x3EAAAAAB),
        ("sqrt.rn.f32 %f0, 0f40000000", 0x3FB504F3),
        ("ex2.approx.ftz.f32 %f0, 0f40400000", 0x41000000),
        ("ex2.approx.ftz.f32 %f0, 0fC2FE0000", 0),  # 2⁻¹²⁷ is not normal
        ("cvt.rni.s32.f32 %r0, 0f40200000", 2),  # 2.5
        ("cvt.rzi.s32.f32 %r0, 0fBFC00000", 2**32 - 1),  # -1.5
        ("cvt.rzi.s32.f32 %r0, 0f60AD78EC", 2**31 - 1),  # 1e20
        ("cvt.rzi.s32.f32 %r0, 0f7FC00000", 0),
        ("cvt.rmi.f32.f32 %f0, 0fBFC00000", 0xC0000000),
        ("cvt.sat.f32.f32 %f0, 0f7FC00000", 0),
        ("cvt.sat.f32.f32 %f0, 0f40000000", 0x3F800000),
        ("cvt.rna.tf32.f32 %r0, 0f3F801000", 0x3F802000),  # half a unit: away from zero
        ("cvt.rna.tf32.f32 %r0, 0f3F800FFF", 0x3F800000),
        ("cvt.rn.bf16.f32 %rs0, 0f3F808000", 0x3F80),  # half a unit: to even
        ("cvt.rn.bf16.f32 %rs0, 0f3F818000", 0x3F82),
        ("cvt.rn.bf16.f32 %rs0, 0f7FFFFFFF", 0x7FFF),
        ("cvt.rn.f16.f32 %rs0, 0f47800000", 0x7C00),  # 65536 is infinite
        ("cvt.rn.f32.f64 %f0, 0d3FF0000010000000", 0x3F800000),
        ("cvt.rn.f32.u32 %f0, -1", 0x4F800000),
        ("mov.b64 %rd0, {%r1, %r2}", 7 << 32 | 5),
    ],
)
def test_instruction(text: str, bits: int) -> None:
    registers = Registers(KINDS, 32)
    opcode, _, rest = text.partition(" ")
    (instruction,) = parse("one", f".entry one(\n)\n{{\n{text};\nret;\n}}")["one"].blocks[0].steps
    registers.write("%r1", "b32")[:], registers.write("%r2", "b32")[:] = 5, 7
    step = instructions.build(registers, opcode, instruction.operands)
    assert step is not None
    with np.errstate(all="ignore"):
        step(True)
    stem = rest.partition(",")[0]
    kind = KINDS[stem.rstrip("0")][0]
    assert set(registers.read(stem, f"b{kind[1:]}").tolist()) == {bits}


@pytest.mark.parametrize(
    ("comparison", "of_nan"),
    [("lt", False), ("ge", False), ("eq", False), ("ltu", True), ("geu", True), ("gtu", True), ("leu", True)],
)
def test_comparison_with_nan(comparison: str, of_nan: bool) -> None:
    registers = Registers(KINDS, 32)
    step = instructions.build(registers, f"setp.{comparison}.f32", ["%p0", "0f7FC00000", "0f3F800000"])
    assert step is not None
    step(True)
    assert set(registers.read("%p0", "pred").tolist()) == {of_nan}


HEAD = """
.extern .shared .align 128 .b8 memory[];
.entry kernel(
 .param .u64 kernel_param_0
)
.maxntid 64, 1, 1
{
 .reg .pred %p<8>;
 .reg .b32 %r<32>;
 .reg .f32 %f<32>;
 .reg .b64 %rd<8>;
 ld.param.u64 %rd1, [kernel_param_0];
 mov.u32 %r1, %tid.x;
 mov.u32 %r2, %ctaid.x;
 mul.wide.u32 %rd2, %r1, 4;
 add.s64 %rd3, %rd1, %rd2;
 mov.u32 %r9, memory;
 shl.b32 %r10, %r1, 2;
 add.s32 %r11, %r9, %r10;
"""


def run(body: str, blocks: int = 1, written: bool = True) -> list[int]:
    """What a kernel of 64 threads a block leaves of 64 numbers, which are 0 … 63 before."""
    machine = Machine(parse("test", HEAD + body + "\n}")["kernel"], 64)
    numbers = np.arange(64, dtype=np.uint32)
    device = Space(np.dtype(np.uint8), Order())
    device.add(numbers.ctypes.data, Memory(numbers.view(np.uint8), written=written))
    machine.launch(device, (blocks, 1, 1), 256, [numbers.ctypes.data.to_bytes(8, "little")])
    return numbers.tolist()


LOOP = """
 mov.u32 %r3, 0;
 mov.u32 %r4, %r1;
$L_loop:
 setp.eq.s32 %p1, %r4, 0;
 @%p1 bra $L_done;
 add.s32 %r3, %r3, %r4;
 add.s32 %r4, %r4, -1;
 and.b32 %r5, %r4, 1;
 setp.eq.s32 %p2, %r5, 0;
 @!%p2 bra $L_loop;
 add.s32 %r3, %r3, 100;
 bra.uni $L_loop;
$L_done:
"""


def test_threads_of_a_loop_meet_again() -> None:
    """Each thread t turns t times, one way or another; a shuffle of whole warps comes afterwards."""
    shuffled = " mov.u32 %r6, 1;\n shfl.sync.bfly.b32 %r7|%p3, %r3, %r6, 31, -1;\n st.global.u32 [%rd3], %r7;\n ret;"
    sums = [t * (t + 1) // 2 + 100 * ((t + 1) // 2) for t in range(64)]
    assert run(LOOP + shuffled) == [sums[t ^ 1] for t in range(64)]


def test_threads_that_return_are_not_waited_for() -> None:
    body = """
 setp.ge.s32 %p1, %r1, 40;
 @%p1 bra $L_end;
 st.shared.u32 [%r11], %r1;
 bar.sync 0;
 mov.u32 %r12, 39;
 sub.s32 %r13, %r12, %r1;
 shl.b32 %r14, %r13, 2;
 add.s32 %r15, %r9, %r14;
 ld.shared.u32 %r16, [%r15];
 st.global.u32 [%rd3], %r16;
$L_end:
 ret;"""
    with pytest.raises(PtxError, match=r"thread 40 of block .*does not reach the barrier"):
        run(body)
    # A way of the branch that ends by itself does not come back.
    assert run(body.replace("bra $L_end", "bra $L_out").replace("$L_end:\n", "ret;\n$L_out:\n"))[:40] == [
        *range(39, -1, -1)
    ]


FAULTS = {
    "a barrier that a half does not reach": (
        "setp.lt.s32 %p1, %r1, 32;\n@%p1 bra $L_1;\nbar.sync 0;\n$L_1:\nret;",
        r"bar\.sync 0: thread 0 of block \(0, 0, 0\) does not reach the barrier",
    ),
    "a shuffle of a part of a warp": (
        "setp.lt.s32 %p1, %r1, 5;\n@%p1 bra $L_1;\nshfl.sync.bfly.b32 %r7|%p3, %r1, 1, 31, -1;\n$L_1:\nret;",
        "thread 5 of block .* the other lanes of its warp are not here",
    ),
    "a read of shared memory that nothing wrote": (
        "ld.shared.u32 %r3, [%r11];\nret;",
        "thread 0 of block .* reads what nothing wrote",
    ),
    "a read of another thread's number without a barrier": (
        "st.shared.u32 [%r11], %r1;\nld.shared.u32 %r3, [memory];\nret;",
        r"line 21, .*: thread 1 of block .* reads what thread 0 wrote, without a barrier between",
    ),
    "a write over a number that others read": (
        "st.shared.u32 [%r11], %r1;\nbar.sync 0;\nld.shared.u32 %r3, [memory];\nst.shared.u32 [%r11], %r1;\nret;",
        "thread 0 of block .* writes what another thread read, without a barrier between",
    ),
    "two writes at once": ("st.shared.u32 [memory], %r1;\nret;", "writes what another thread writes at once"),
    "a copy that is not waited for": (
        "and.b32 %r3, %r1, 15;\nshl.b32 %r4, %r3, 4;\nadd.s32 %r5, %r9, %r4;\nsetp.ge.s32 %p1, %r1, 16;\n"
        "@%p1 bra $L_1;\ncvt.u64.u32 %rd4, %r4;\nadd.s64 %rd5, %rd1, %rd4;\n"
        "cp.async.cg.shared.global [%r5], [%rd5], 16;\ncp.async.commit_group;\ncp.async.wait_group 1;\n$L_1:\n"
        "bar.sync 0;\nld.shared.u32 %r6, [%r11];\nret;",
        "reads bytes whose copy is not waited for",
    ),
    "an access past an allocation": (
        "ld.global.u32 %r3, [%rd3+4];\nret;",
        r"ld\.global\.u32 %r3, \[%rd3\+4\]: thread 63 of block .* 4 bytes at 0x\w+ are outside of all memory",
    ),
    "an access before shared memory": ("st.shared.u32 [%r11+-4], %r1;\nret;", "thread 0 of .* outside of all memory"),
    "an access that is not aligned": ("ld.global.v2.u32 {%r3, %r4}, [%rd3];\nret;", "thread [01] .*not a multiple"),
    "a division by zero": ("div.s32 %r3, 5, %r1;\nret;", "a division by zero"),
    "a block that does not end": ("$L_1:\nbra.uni $L_1;\nret;", "does not end"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault(name: str) -> None:
    body, why = FAULTS[name]
    with pytest.raises(PtxError, match=why):
        run(body)


def test_blocks_that_touch_the_same_memory() -> None:
    """A block's write of what another one reads or writes is a fault; what all of them read is not."""
    assert run("ld.global.u32 %r3, [%rd3];\nret;", blocks=3) == [*range(64)]
    with pytest.raises(PtxError, match=r"block \(1, 0, 0\) writes what another block wrote"):
        run("st.global.u32 [%rd3], %r1;\nret;", blocks=2)
    body = (
        "ld.global.u32 %r3, [%rd1];\nsetp.ne.s32 %p1, %r2, 1;\n@%p1 bra $L_1;\nst.global.u32 [%rd3], %r1;\n$L_1:\nret;"
    )
    with pytest.raises(PtxError, match=r"thread 0 of block \(1, 0, 0\) writes what another block read"):
        run(body, blocks=2)


def test_memory_that_nothing_wrote() -> None:
    with pytest.raises(PtxError, match="reads what nothing wrote"):
        run("ld.global.u32 %r3, [%rd3];\nret;", written=False)


@pytest.mark.parametrize(
    "body",
    ["add.sat.s32 %r3, %r1, 1;", "ld.global.ca.u32 %r3, [%rd3];", "atom.global.add.u32 %r3, [%rd3], 1;", "bar.sync 1;"],
)
def test_unknown_instructions_are_errors(body: str) -> None:
    with pytest.raises(PtxError, match=r"does not know|another barrier"):
        run(body + "\nret;")
