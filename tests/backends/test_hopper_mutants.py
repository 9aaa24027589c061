"""The net under the kernels for Hopper: their source on emulated clusters against plain loops, under each schedule of
what happens beside the threads; and with mutations, each of which must be noticed.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import cuda_emulated

pytestmark = [
    pytest.mark.emulation,
    pytest.mark.skipif(cuda_emulated.missing() is not None, reason=str(cuda_emulated.missing())),
]


def _run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["quick", *(pytest.param(each, marks=pytest.mark.full) for each in ("all", "long"))])
def test_passes_agree_with_plain_loops(which: str) -> None:
    result = _run(cuda_emulated.hopper_checker(), which)
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr


def test_operands_and_results_lie_as_in_cute() -> None:
    """Descriptors, swizzle and registers against the layouts of NVIDIA's CuTe, recorded in the program."""
    result = _run(cuda_emulated.layout_checker())
    assert result.returncode == 0 and result.stdout == "scores: 0 of 4096 differ; sums: 0 of 32768\n", result


@dataclass(frozen=True)
class Mutant:
    """One change of a file of csrc/cuda/hopper, and the problems that must notice it by a wrong result, a broken rule,
    a crash or a deadlock."""

    name: str
    file: str
    old: str
    new: str
    which: str = "quick"
    full: bool = True
    """Only in the full grid."""

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


WEIGHTS_DONE = "      fence_async();\n      barrier_arrive(&s.weights_full"
FIRST_HALF = "  barrier_wait(&s.full[slot.place][0], slot.parity);\n  if (rows.mends(j))"
SECOND_HALF = "  barrier_wait(&s.full[slot.place][1], slot.parity);\n  product_fence();  //"
ROOM = "barrier_wait(&s.weights_empty[turn.place()], turn.parity() ^ 1);"
REFILL = "        barrier_wait(&s.empty[slot.place], slot.parity);\n        refill(slot.place, block, j + 1);"
REFILL_STATIONARY = "      barrier_wait(&s.empty[slot.place], slot.parity);\n      refill(slot.place, block, 0);"
SUMS_DONE = "      product_wait(u);\n      release<cluster>(&s.empty[slot.place], lane, 1);"
WRITTEN = "numbers, mine, kColumns);\n    named_sync<2, 2 * kWarpGroup>();\n"
STEPPED = "    named_sync<2, 2 * kWarpGroup>();  // before"
TERMS_READ = "    __syncwarp();  // all lanes have read the terms"
MUTANTS = (
    # Barriers, phases and fences.
    Mutant("no fence after the weights", "block.h", WEIGHTS_DONE, WEIGHTS_DONE.split("\n")[1], full=False),
    Mutant("no fence before the scores", "block.h",
           "  product_fence();\n#pragma unroll\n  for (int k = 0; k < kSt",
           "#pragma unroll\n  for (int k = 0; k < kSt"),
    Mutant("no wait for the first half", "block.h", FIRST_HALF, "  if (rows.mends(j))"),
    Mutant("no wait for the second half", "block.h", SECOND_HALF, "  product_fence();  //"),
    Mutant("no wait for the weights' place", "block.h", ROOM, ""),
    Mutant("the weights' place a phase late", "block.h", ROOM, ROOM.replace(" ^ 1", "")),
    Mutant("no wait for the weights", "block.h", "barrier_wait(&s.weights_full[turn.place()], turn.parity());", "",
           which="all"),
    Mutant("no wait before a slot is refilled", "block.h", REFILL, REFILL.split("\n")[1]),
    Mutant("no wait for the stationary rows' slot", "block.h", REFILL_STATIONARY, REFILL_STATIONARY.split("\n")[1]),
    Mutant("a slot released before its products", "block.h", SUMS_DONE, "\n".join(reversed(SUMS_DONE.split("\n")))),
    Mutant("a slot released in its own block alone", "block.h", "barrier_arrive_at(empty, lane % cluster);",
           "barrier_arrive_at(empty, cluster_rank());"),
    Mutant("a slot released by one block", "block.h", "barrier_init(&s.empty[i], kReadingWarps * cluster);",
           "barrier_init(&s.empty[i], kReadingWarps);"),
    Mutant("a slot released half", "block.h", "at.lane, 2);  // four warps", "at.lane, 1);  // four warps"),
    Mutant("no wait for the scores", "block.h", "      product_wait(d);\n", ""),
    Mutant("no wait for the sums", "block.h", "      product_wait(u);\n", ""),
    Mutant("a slot's phase that does not change", "block.h", "place = 0, parity ^= 1;", "place = 0;"),
    Mutant("the weights' phase of each tile", "block.h", "return count >> 1 & 1;", "return count & 1;"),
    Mutant("room for weights twice", "block.h", "if (!due && lane == 0)", "if (lane == 0)"),
    Mutant("numbers that the next block overwrites", "block.h", "rows.finish(s, turn.place());",
           "rows.finish(s, 0);"),
    Mutant("no fence after the last box", "block.h", "  fence_async();\n  named_sync<1, kWarpGroup>();\n}\n",
           "  named_sync<1, kWarpGroup>();\n}\n"),
    Mutant("no barrier before the first copies", "block.h",
           "  if constexpr (cluster > 1)\n    cluster_sync();\n  else\n    __syncthreads();\n", ""),
    Mutant("more registers than there are", "block.h", "kScoreRegisters = 184", "kScoreRegisters = 192"),
    # Copies.
    Mutant("fewer bytes expected", "block.h", "barrier_arrive_expecting(full, kTileBytes / 2 +",
           "barrier_arrive_expecting(full, kTileBytes / 4 +"),
    Mutant("the terms' bytes not expected", "block.h", "half == 0 ? kTermsBytes : 0", "half == 0 ? 0 : 0"),
    Mutant("a part for its own block alone", "block.h", "(1 << cluster) - 1", "1 << rank"),
    Mutant("the same part by both blocks", "block.h", "for (int box = rank; box < 4;", "for (int box = 0; box < 4;"),
    Mutant("the first half's columns twice", "block.h",
           "walk.streaming, half * 256 + box * 64, row", "walk.streaming, box * 64, row"),
    Mutant("a tile too far ahead", "block.h", "    position += kSlots;", "    position += kSlots + 1;"),
    Mutant("the next block in place of the grid's", "block.h",
           "position -= walk.tiles + 1, block += walk.block_stride;",
           "position -= walk.tiles + 1, block += 1;"),
    # Operands.
    Mutant("the other half's columns", "block.h", "+ half * (kTileBytes / 2), kBoxBytes",
           "+ (1 - half) * (kTileBytes / 2), kBoxBytes"),
    Mutant("weights' steps too far apart", "block.h", "further(weights, k * 32)", "further(weights, k * 64)"),
    Mutant("a tile's steps too close", "block.h", "k * 16 * 128", "k * 8 * 128"),
    Mutant("a box's steps too far apart", "block.h",
           "k / 4 * kBoxBytes + k % 4 * 32", "k / 4 * kBoxBytes + k % 4 * 64"),
    Mutant("leading and stride offsets swapped", "wgmma.h",
           "(box >> 4) << 16 |\n         uint64_t{1024 >> 4} << 32",
           "(box >> 4) << 32 |\n         uint64_t{1024 >> 4} << 16"),
    Mutant("another swizzle", "wgmma.h", "uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;\n}\n// The rows are",
           "uint64_t{1024 >> 4} << 32 | uint64_t{2} << 62;\n}\n// The rows are"),
    Mutant("a chunk's place by the next row", "block.h", "(chunk ^ (row & 7))", "(chunk ^ ((row + 1) & 7))"),
    Mutant("the weights' registers in another order", "block.h", "p[4 * q + 1],\n                       p[4 * q + 2]",
           "p[4 * q + 2],\n                       p[4 * q + 1]"),
    Mutant("another box for the last", "block.h", "(kBoxes - 1) * kBoxBytes", "(kBoxes - 2) * kBoxBytes"),
    Mutant("sums that the next block begins with", "block.h", "for (int i = 0; i < 128; ++i) u[i] = 0;\n        __sync",
           "for (int i = 1; i < 128; ++i) u[i] = 0;\n        __sync"),
    # The forward pass.
    Mutant("no mask of the target", "forward.h", "column != target[h] - j * kRows && ", ""),
    Mutant("no mask of the padding", "forward.h", " && column < present)", " && (masked || column < present))"),
    Mutant("padding that stays NaN", "forward.h", "bool mends(int j) const { return j >= plain; }",
           "bool mends(int) const { return false; }"),
    Mutant("odd rows as they are", "forward.h", "*task.args.classes.odd != 0 ? 0 : ", ""),
    Mutant("targets of the first chunk", "forward.h", " - task.args.selection.first", ""),
    Mutant("the first slice's factors", "forward.h", "factor + task.first_class() + j", "factor + j"),
    Mutant("center sums of the last chunk", "forward.h", "{{old[k].at[0] + sums[0]", "{{sums[0]"),
    Mutant("sums of the last tiles", "forward.h", "s.numbers[h][threadIdx.x] += sum[h]",
           "s.numbers[h][threadIdx.x] = sum[h]",
           which="long"),
    Mutant("sums handed over twice", "forward.h", " += sum[h], sum[h] = 0;", " += sum[h];", which="long"),
    Mutant("the last chunk's maximum", "forward.h", "fmaxf(task.args.stats.maxima[to], maximum)", "maximum"),
    Mutant("the last chunk's sum", "forward.h", "stats.sums[to] += total", "stats.sums[to] = total"),
    Mutant("half a quad's sum", "forward.h", "mask <= 2; mask *= 2", "mask < 2; mask *= 2"),
    Mutant("weights without the inverse", "forward.h",
           "weight[i] = exponential * inverse;", "weight[i] = exponential;"),
    Mutant("a tile less", "forward.h", "(present + kRows - 1) / kRows - first", "present / kRows - first"),
    Mutant("sums that begin as they are", "forward.h", "center_sum[i] = 0", "center_sum[i] *= 1"),
    # The forward pass without the centers' sum.
    Mutant("both warpgroups' rows the same", "totals.h", "walk.first_block + group", "walk.first_block", full=False),
    Mutant("the stationary rows' slot released by half of the warps", "totals.h",
           "    __syncwarp();\n    release<cluster>(&s.empty[slot.place], at.lane, 1);\n",
           "    if (i == group) release<cluster>(&s.empty[slot.place], at.lane, 1);\n"),
    Mutant("the stationary rows' slot released for the other warpgroup", "totals.h",
           "    __syncwarp();\n    release<cluster>(&s.empty[slot.place], at.lane, 1);\n",
           "    if (i == group) release<cluster>(&s.empty[slot.place], at.lane, 2);\n"),
    Mutant("a tile of totals that is never released", "totals.h",
           TERMS_READ + "\n    release<cluster>(&s.empty[slot.place], at.lane, 1);\n", ""),
    Mutant("no wait for the totals' scores", "totals.h", "    product_wait(d);\n", ""),
    Mutant("no wait for an empty slot", "totals.h", "    barrier_wait(&s.empty[slot.place], slot.parity ^ 1);\n", ""),
    Mutant("turns that never come", "totals.h", "(j + group + 1) & 1", "j & 1"),
    Mutant("a tile mended by both warpgroups", "totals.h", "if (threadIdx.x < kWarpGroup) Forward", "Forward"),
    Mutant("no wait for the other one's mending", "totals.h", "named_sync<2, kTotalGroups * kWarpGroup>();", "",
           which="all"),  # in order, the turns make the second one wait
    Mutant("stationary rows in place of a tile", "totals.h", "item - kTotalGroups + 1 : 0", "item - kTotalGroups : 0"),
    Mutant("pairs of blocks that overlap", "totals.h", "kTotalGroups * static_cast<int>(blockIdx.x)",
           "static_cast<int>(blockIdx.x)"),
    Mutant("more registers than there are, totals", "totals.h", "kTotalRegisters = 216", "kTotalRegisters = 224"),
    Mutant("totals of half of the blocks", "passes.cu", "stored ? 1 : kTotalGroups;", "1;"),
    # The backward pass.
    Mutant("no coefficient of the target", "backward.h",
           "gradient[i] = batch[i].target_coefficient;", "gradient[i] += 0;"),
    Mutant("targets of the first chunk, backward", "backward.h", "static_cast<int>(task.args.selection.first) + ", ""),
    Mutant("no projection", "backward.h", "0.0f : along[h] *", "0.0f : 0 * along[h] *"),
    Mutant("half a quad's projection", "backward.h", "mask <= 2; mask *= 2", "mask < 2; mask *= 2"),
    Mutant("rows past the last class", "block_end.h",
           "const bool present = first + row < count;", "const bool present = true;"),
    Mutant("a gradient's rows without their stride", "block_end.h", "to + row * stride", "to + row * kColumns"),
    Mutant("centers' rows without their stride", "block_end.h", "* rows.stride + column", "* kColumns + column"),
    # The step of CenterSGD in the tile.
    Mutant("a step before the other half's gradient", "block_end.h", WRITTEN, WRITTEN.split("\n")[0]),
    Mutant("a gradient of the next block too early", "block_end.h", STEPPED, "    // before", which="all"),
    Mutant("one gradient for all blocks", "block_end.h", "static_cast<int64_t>(blockIdx.x) * kRows", "int64_t{0}"),
    Mutant("steps of the first block's rows", "block_end.h", "selection.row(first + row)", "selection.row(row)"),
    Mutant("steps of half of the rows", "block_end.h", "row += kReadingWarps)", "row += 2 * kReadingWarps)"),
    Mutant("a projection of odd rows as they are", "backward.h", "(inverse[h] * s.block.factor[row])", "inverse[h]"),
    Mutant("odd rows as they are, backward", "prepare.h", "    mine.multiply(factor);\n    measure", "    measure"),
    # Rows before the passes, chunks.
    Mutant("no fence after rows are mended", "prepare.h",
           "  mine.multiply(factors[mine.row]);\n  fence_async();", "  mine.multiply(factors[mine.row]);"),
    Mutant("padding times zero", "prepare.h", "factor == 0 ? BFloat16{0} : ", ""),
    Mutant("no row is odd", "prepare.h", "|| largest == 0;", "|| largest >= 0;"),
    Mutant("columns of a quad in another order", "block_end.h",
           "upper ? other : pairs[0][i]", "upper ? pairs[0][i] : other"),
    Mutant("columns of a pair in another order", "block_end.h", "odd ? other : even_n", "odd ? even_n : other"),
    Mutant("half of a row's squares", "prepare.h", "*squares += __shfl_xor_sync(0xffffffffu, *squares, 1);", ""),
    Mutant("another warp's rows", "backward.h", "at.warp * 16 + at.lane;", "(at.warp * 16 + at.lane + 16) % kRows;"),
    Mutant("terms of the first block", "backward.h", "classes.inverse[first + row]", "classes.inverse[row]"),
    Mutant("every chunk to the first rows", "passes.cu", "selection.first * d_weight.row_stride", "int64_t{0}"),
    Mutant("the last chunk as long as the others", "passes.cu", "std::min(rows.rows, all - selection.first)",
           "rows.rows"),
)  # fmt: skip


@pytest.mark.parametrize(
    "mutant", [pytest.param(each, marks=[pytest.mark.full] if each.full else [], id=str(each)) for each in MUTANTS]
)
def test_mutants_fail(mutant: Mutant, tmp_path: Path) -> None:
    csrc = cuda_emulated.mutated(tmp_path, f"hopper/{mutant.file}", mutant.old, mutant.new)
    result = _run(cuda_emulated.hopper_checker(csrc, cache=tmp_path), mutant.which)
    print(result.stdout[-300:], result.stderr)
    assert result.returncode != 0
