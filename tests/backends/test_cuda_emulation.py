"""The net under the CUDA kernels: their source on emulated blocks against plain loops, under ThreadSanitizer, and with
mutations, each of which must be noticed. The emulation and the program are in tests/cuda_emulation.
"""

from __future__ import annotations

import subprocess
import tempfile
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


def _thread_sanitizer_missing() -> str | None:
    if cuda_emulated.CXX is None:
        return cuda_emulated.missing()
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "empty.cpp", Path(folder) / "empty"
        source.write_text("int main() {}\n")
        built = subprocess.run([cuda_emulated.CXX, "-fsanitize=thread", source, "-o", program], capture_output=True)
        works = built.returncode == 0 and subprocess.run([program], capture_output=True).returncode == 0
    return None if works else f"{cuda_emulated.CXX} -fsanitize=thread gives no program that runs here"


needs_thread_sanitizer = pytest.mark.skipif(
    _thread_sanitizer_missing() is not None, reason=str(_thread_sanitizer_missing())
)


def test_kernels_agree_with_plain_loops() -> None:
    result = _run(cuda_emulated.checker())
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        # 128 tiles are N = 4096 and D = 512. Five times as many fill 640 of 648 places, one to four times at most 89 %.
        ("splits 128 8 108", 5),
        ("splits 128 8 132", 2),  # 256 of 264; no count up to 8 does better
        ("splits 4 72 132", 65),  # 260 of 264
        ("splits 300 1 132", 1),
        # A forward pass at N = 1024: eight blocks a tile of classes. 528 of 528 places, 572 would take a third round.
        ("first 7813 72 132 8 512", 66),
        # A backward pass at N = 1024, D = 512: the second product has four blocks a tile, of twice the depth.
        ("both 7813 72 132 8 512 4 1024", 66),  # 528 and 264 of 264: two rounds and one
        # 264 and 132, which are alone; 36 tiles have 24 and 12 blocks too many: 45 % more time for a class.
        ("both 7813 36 132 8 512 4 1024", 33),
        ("both 7813 72 132 32 512 4 4096", 66),
        ("both 7813 72 108 32 512 4 4096", 54),  # 1728 and 216 of 216
        ("both 40 72 132 8 512 4 1024", 40),  # all there are
        ("both 7813 1 132 8 512 4 1024", 1),
    ],
)
def test_blocks_fill_their_waves(choice: str, expected: int) -> None:
    """Two blocks on each of 108 or 132 multiprocessors, worked out by hand; one alone takes 0.65 of their time."""
    result = _run(cuda_emulated.waves(), *choice.split())
    assert result.returncode == 0 and int(result.stdout) == expected


@needs_thread_sanitizer
@pytest.mark.full
def test_no_data_race() -> None:
    """A block's threads as threads of the system, ordered by nothing but its barriers."""
    result = _run(cuda_emulated.checker(threads=True), "quick")
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    assert "WARNING" not in result.stderr


@dataclass(frozen=True)
class Mutant:
    """One change of the sources, and how it must be noticed."""

    name: str
    file: str
    old: str
    new: str
    races: bool = False
    """Noticed by ThreadSanitizer. Else by a wrong result, a crash or a deadlock."""
    full: bool = True
    """Only in the full grid."""

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


STAGE_BARRIER = "__syncthreads();  // this stage has landed for all threads, and all are done with the one before it"
OPERANDS_BARRIER = "__syncthreads();  // all warps are done with the operands that lie there"
SWAPPED = "b[n][0] = pair[0], b[n][1] = pair[1], b[n + 1][0] = pair[2], b[n + 1][1] = pair[3];"
MUTANTS = (
    Mutant("no barrier between stages", "gemm.h", STAGE_BARRIER, "", full=False),
    Mutant("no barrier between stages, as a race", "gemm.h", STAGE_BARRIER, "", races=True),
    Mutant("no barrier before the tile is staged", "gemm.h", OPERANDS_BARRIER, ""),
    Mutant("no barrier before the tile is staged, as a race", "gemm.h", OPERANDS_BARRIER, "", races=True),
    Mutant(
        "no barrier after the tile is staged", "gemm.h",
        "      }\n  __syncthreads();\n}", "      }\n}"
    ),
    Mutant("a wait for one copy less", "gemm.h", "copy_wait<kStages - 2>", "copy_wait<kStages - 1>"),
    Mutant("no wait", "gemm.h", "copy_wait<kStages - 2>();", ""),
    Mutant("a stage copied too far ahead", "gemm.h", "copy_stage(stage + kStages - 1);",
           "copy_stage(stage + kStages);"),
    Mutant("no group where there is no stage", "gemm.h", "copy_commit();  // an",
           "if (stage < stages) copy_commit();  // an"),
    Mutant("two fragments of B swapped", "gemm.h", SWAPPED, SWAPPED.replace("pair[1]", "pair[X]").replace(
        "pair[2]", "pair[1]").replace("pair[X]", "pair[2]"), full=False),
    Mutant("halves of A's depth swapped", "gemm.h", "2 * step + (lane >> 4))", "2 * step + 1 - (lane >> 4))"),
    Mutant("halves of B's depth swapped", "gemm.h", "step * 8 + lane % 4,", "step * 8 + (lane % 4 ^ 1),"),
    Mutant("no permutation of chunks", "gemm.h", "chunk ^ permutation", "chunk + 0 * permutation"),
    Mutant("a remainder dropped", "gemm.h", "mma_tf32(acc[m][n], a_low, b_high[n]);", ""),
    Mutant("no mask of the target", "scores.h", "column == target || ", "", full=False),
    Mutant("no coefficient of the target", "scores.h", "is_target ? of_target : ", "false && is_target ? of_target : "),
    Mutant("no mask of the last classes", "scores.h", " || column >= present) acc", ") acc"),
    Mutant("padding is a class", "scores.h", "chunk.classes.present_in_tile(static_cast<int>(blockIdx.y))", "kTile"),
    Mutant("padding is packed", "rows.h", "position >= present_count()) return -1;", "position >= count) return -1;"),
    Mutant("a padded index is read", "rows.h", "return row < rows ? row : -1;", "return row;"),
    Mutant("chunks overwrite each other", "scores.h", "stats.accumulate ? stats.sums[at] + sum : sum", "sum"),
    Mutant("halves of a tile share a slot", "scores.h", "static_cast<int64_t>(blockIdx.x) + place.column / kWarpTile;",
           "static_cast<int64_t>(blockIdx.x);"),
    Mutant("half a quad's sum", "scores.h", "for (int mask = 1; mask <= 2; mask *= 2) {",
           "for (int mask = 1; mask < 2; mask *= 2) {"),
    Mutant("the general stats take the target", "negatives.h", "if (j >= present || rule.is_own(j, target)) continue;",
           "if (j >= present) continue;"),
    Mutant("the general gradient has no target", "negatives.h", "derivative = terms.target_coefficient[i];", ";"),
    Mutant("general slots are shared", "negatives.h", "static_cast<int64_t>(blockIdx.x) * chunk.panel.rows +",
           "static_cast<int64_t>(0) * chunk.panel.rows +"),
    Mutant("no mask of the last rows", "products.h", "if (in_weight < 0) return;  // the whole warp", ""),
    Mutant("a gradient that is not projected", "products.h", "center[i] * factor", "center[i] * 0 * factor"),
    Mutant("a split of the classes twice", "products.h", "min(begin + share, all)", "min(begin + share + 1, all)"),
    Mutant("32-bit offsets of rows read", "rows.h", "in_matrix * row_stride",
           "static_cast<int>(in_matrix * row_stride)"),
    Mutant("32-bit offsets of rows written", "products.h", "in_weight * out.d_weight.row_stride",
           "static_cast<int>(in_weight * out.d_weight.row_stride)"),
    Mutant("no barrier of the warp before a unit is written", "center_sgd.h", "__syncwarp();", "", races=True),
    Mutant("no barrier before the parts are summed", "rows.h", "  __syncthreads();\n", "\n"),
)  # fmt: skip


@pytest.fixture
def mutated(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    mutant = request.param
    return cuda_emulated.mutated(tmp_path, mutant.file, mutant.old, mutant.new)


def _cases(races: bool) -> list[object]:
    chosen = (mutant for mutant in MUTANTS if mutant.races == races)
    return [pytest.param(mutant, marks=[pytest.mark.full] if mutant.full else [], id=str(mutant)) for mutant in chosen]


@pytest.mark.parametrize("mutated", _cases(races=False), indirect=True)
def test_mutants_fail(mutated: Path, tmp_path: Path) -> None:
    program = cuda_emulated.checker(mutated, cache=tmp_path)
    assert _run(program).returncode != 0


@needs_thread_sanitizer
@pytest.mark.parametrize("mutated", _cases(races=True), indirect=True)
def test_mutants_race(mutated: Path, tmp_path: Path) -> None:
    result = _run(cuda_emulated.checker(mutated, threads=True, cache=tmp_path), "quick")
    assert result.returncode != 0 and "WARNING: ThreadSanitizer: data race" in result.stderr
