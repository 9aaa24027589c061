"""The choice of the algorithm and of its tiles, with the reason at each number.

Only the choice of the algorithm was measured on GPUs, an H100 and an H200; the tiles are the model's.

The models behind them count an H200's 790 TFLOP/s of bf16 products, 132 multiprocessors, about 5.5 TB/s out of L2,
232 448 bytes of shared memory a block and 65 536 registers a multiprocessor. bench/NOTES.md carries the sums.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from dataclasses import dataclass

import torch

MIB = 1 << 20

ALGORITHMS = ("flash", "flash-chained", "flash-copied", "chunks", "chunks-copied")


@dataclass(frozen=True)
class ChunkTiles:
    """Tiles of the class-chunk algorithm's kernels."""

    BLOCK_N: int
    BLOCK_C: int
    num_warps: int
    BLOCK_D: int = 16
    """Columns of a step of the product S = X·Wᵀ, if the kernel multiplies."""
    num_stages: int = 3


@dataclass(frozen=True)
class FlashConfig:
    """Tiles of the flash passes. ``OUTER`` rows own an accumulator as wide as D; ``INNER`` rows stream past them."""

    OUTER: int
    INNER: int
    num_warps: int
    num_stages: int
    split_scores: bool = False
    """If true, two warpgroups share the columns of a tile's scores, and exchange them through shared memory; else they
    share the rows, and beside 64 rows both compute all scores."""


@dataclass(frozen=True)
class PanelConfig:
    """The number of class centers and of batch rows in one turn of the host's loop."""

    exponential_bytes: int
    """Size of the (rows, classes) exponentials of one turn."""
    center_bytes: int
    """Size of the normalized copy of the turn's centers."""
    max_rows: int


# A turn should be long beside its launches: a host takes some 35 µs for a forward and a backward turn, its library
# products among them. At D = 512 in 16 bits a turn is 17 M logits at N = 1024 (16 MiB of centers) and 25 M at
# N = 4096, 0.15 and 0.2 ms of tensor cores. Exponentials past the L2's 50 MB (H100, H200) go through memory, 4 bytes a
# logit, 1.2 ps, which run beside products of some 8 ps. With the sums of the centers' gradient a backward pass
# then holds 84 MB, beside which a library product may want 34 of its own.
CHUNKS = PanelConfig(exponential_bytes=48 * MIB, center_bytes=16 * MIB, max_rows=8192)

# Nothing but centers: 32 MiB of them fill L2 to two thirds, and at D = 256 and N = 1024 a turn is 67 M logits, 0.2 ms
# by the model.
FLASH_PANEL = PanelConfig(exponential_bytes=0, center_bytes=32 * MIB, max_rows=1 << 31)

NORMS = 1 << 20
"""Inverse norms of stored centers that are kept at once: 4 MiB in fp32."""

# Centers as they are stored, whose gradient is written where it belongs: 4 bytes for each norm are all there is.
# Offsets within a panel fit 32 bits, 2²⁹ numbers at D = 512.
FLASH_STORED_PANEL = PanelConfig(exponential_bytes=0, center_bytes=4 * NORMS, max_rows=1 << 31)

# Hopper and data-center Blackwell: 128×256 fp32 accumulators are 128 registers in each of 256 threads, and the
# largest tile whose operands (85 flop a byte) L2 can feed near the tensor cores' rate; three stages of 48 KiB leave
# the epilogue its scratch.
_PRODUCT_SM90 = ChunkTiles(BLOCK_N=128, BLOCK_C=256, BLOCK_D=64, num_warps=8, num_stages=3)
# Elsewhere half the tile and half the warps: 48 KiB of shared memory and 220 registers in 128 threads let a
# multiprocessor hold two blocks, so that one's exponentials overlap the other's products (there is no asynchronous
# tensor-core instruction to do it), and fit the 99 KiB a block that sm_86, sm_89 and sm_120 give.
_PRODUCT_PORTABLE = ChunkTiles(BLOCK_N=128, BLOCK_C=128, BLOCK_D=32, num_warps=4, num_stages=4)

# 64 rows of a 512-wide fp32 accumulator are 128 registers in each of 256 threads: 128 rows do not fit the register
# file. The stationary 64×512 tile takes 64 KiB of shared memory and so does each streamed one: two stages of them are
# the limit. Hopper alone: Blackwell's tensor cores want the probabilities in shared memory too, 262 944 bytes in all.
# The scores' products are 32 columns wide in either case, so shared memory feeds them at two thirds of the full rate (3
# KiB in 16 clocks at 128 bytes a clock). Model of a tile in clocks of the tensor cores: with split scores
# 1536 + 1024, chained 3072 + 1024, and half of the exponentials. An H100 measured 53.9 and 61.4 ms a step at N = 4096.
_FLASH_512 = FlashConfig(OUTER=64, INNER=64, num_warps=8, num_stages=2, split_scores=True)
# Half the width: the same registers hold 128 rows, so the streamed tiles are read half as often. These two spill
# before and after the loop only (sm_90, Triton 3.7).
_FLASH_256 = FlashConfig(OUTER=128, INNER=64, num_warps=8, num_stages=2)
# Room for a third stage, and nothing spills; INNER=128 would spill 48 bytes.
_FLASH_128 = FlashConfig(OUTER=128, INNER=64, num_warps=8, num_stages=3)
# Half of that, for 99 KiB of shared memory and tensor cores that 4 warps keep busy.
_FLASH_PORTABLE_256 = FlashConfig(OUTER=64, INNER=32, num_warps=4, num_stages=2)
_FLASH_PORTABLE_128 = FlashConfig(OUTER=64, INNER=64, num_warps=4, num_stages=2)

# A library product feeds the kernels, which are bound by memory: 16 elements a thread in 16-byte accesses; a row's 256
# columns are summed within two warps.
ELEMENTS = ChunkTiles(BLOCK_N=16, BLOCK_C=256, num_warps=8)


def is_wide(arch: int) -> bool:
    """Return true for data-center Hopper and Blackwell, which have 227 KiB of shared memory a block.

    ``arch`` is the compute capability × 10.
    """
    return arch in (90, 100, 103)


def product_config(arch: int) -> ChunkTiles:
    """Return the tiles of the kernels that multiply, for ``arch`` (compute capability × 10)."""
    return _PRODUCT_SM90 if is_wide(arch) else _PRODUCT_PORTABLE


def flash_config(width: int, arch: int) -> FlashConfig | None:
    """Return the tiles for rows of a padded width (a power of two), or None if none fit ``arch``."""
    if is_wide(arch):
        if width <= 256:
            return _FLASH_128 if width <= 128 else _FLASH_256
        if width > 512 or arch != 90:
            return None
        return dataclasses.replace(_FLASH_512, split_scores=_asked() != "flash-chained")
    return _FLASH_PORTABLE_128 if width <= 128 else _FLASH_PORTABLE_256 if width <= 256 else None


def _asked() -> str:
    """Return the algorithm that the environment names, or an empty text."""
    asked = os.environ.get("FUSED_ARCFACE_TRITON_ALGORITHM", "")
    if asked not in ("", *ALGORITHMS):
        names = "', '".join(ALGORITHMS)
        raise ValueError(f"FUSED_ARCFACE_TRITON_ALGORITHM must be one of '{names}'; got {asked!r}")
    return asked


def copies_centers() -> bool:
    """Return true if all centers are to be copied, also where a kernel could read them as they are stored."""
    return _asked().endswith("-copied")


def flash_width(D: int) -> int:
    """D padded for the flash passes: Triton's tiles are powers of two, its products at least 16 deep."""
    return max(16, 1 << (D - 1).bit_length())


_CHUNKS_WIN = {
    (512, True): (1024, 1 << 29),
    (512, False): (512, 1 << 28),
    (256, False): (1024, 1 << 29),
}
"""By flash width, and whether center sums or gradients are wanted: the least N and the least N·C of a pass from which
the chunks are faster on Hopper. Other widths have no such N."""


def pick(N: int, C: int, D: int, arch: int, dtype: torch.dtype, with_sums: bool) -> str:
    """Return ``"flash"`` or ``"chunks"``, for operands of ``dtype`` on ``arch`` (compute capability × 10).

    ``with_sums``: the pass has a second product, into the sum of centers or into the gradient by the centers.

    The chunks' time divided by flash's in bf16, C = 1 000 000 unless named, on an H100, in rows 3 to 5 on an H200
    (bench/results):

    ========== ============== ================== ==============
    D          N              forward + backward forward alone
    ========== ============== ================== ==============
    512        4096           0.78               0.65
    512        1024           0.91               0.67
    512        512            1.02               0.74
    512        256            1.69               1.13
    512        1024, C = 10⁵  1.35               1.05
    256        4096           1.59               0.89
    128        4096           2.04               1.76
    ========== ============== ================== ==============

    At D = 512 the GPU's share of the chunks' time is nowhere more than that of the flash passes (``graph_ms``). But the
    host needs longer for their turns, so the turns must be large, and a step must be long beside its other launches. A
    step of CenterSGD on a sample of 100 000 classes took 1.26 of flash's time at N = 4096. At D = 256 only N = 4096
    was measured, so the limits there are taken from D = 512.

    ``FUSED_ARCFACE_TRITON_ALGORITHM`` in the environment overrides it where the named algorithm can run at all:
    benchmarks compare them with it. ``flash-chained`` is flash without ``split_scores``; with ``-copied`` no kernel
    reads the centers where they are stored.

    >>> pick(256, 1_000_000, 512, 90, torch.bfloat16, True), pick(4096, 1_000_000, 512, 90, torch.bfloat16, True)
    ('flash', 'chunks')
    """
    # One operand dtype for both products: fp16 cannot hold unshifted exponentials. And fp32 products belong to the
    # library, which follows torch.get_float32_matmul_precision and whose fp32 kernels beat Triton's.
    width = flash_width(D)
    if dtype != torch.bfloat16 or flash_config(width, arch) is None:
        return "chunks"
    if asked := _asked():
        return asked.partition("-")[0]
    if arch != 90 or (width, with_sums) not in _CHUNKS_WIN:
        return "flash"
    least_rows, least_logits = _CHUNKS_WIN[width, with_sums]
    return "chunks" if least_rows <= N and least_logits <= N * C else "flash"


def panel_classes(config: PanelConfig, N: int, C: int, row_bytes: int, exponential_size: int, multiple: int) -> int:
    """Return the class centers of one turn, a multiple of the tile: as many as the budgets allow in turns of one size.

    ``row_bytes`` is the size of one center's copy, ``exponential_size`` that of one exponential, 0 if none are stored.
    """
    needed = -(-C // multiple) * multiple
    budgets = [config.center_bytes // row_bytes, needed]
    if exponential_size > 0:
        budgets.append(config.exponential_bytes // (min(N, config.max_rows) * exponential_size))
    most = max(multiple, min(budgets) // multiple * multiple)
    # As many turns as with the most, and all of them alike: a short last one would be padded to a whole panel.
    turns = -(-needed // most)
    return -(-needed // turns // multiple) * multiple


def row_splits(row_tiles: int, class_tiles: int, split_bytes: int, multiprocessors: int) -> int:
    """Return the number of ranges of a panel's classes, so that the flash forward's blocks fill the multiprocessors.

    Each range has its own (N, D) fp32 sums of ``split_bytes``: 64 MiB of them at most.
    """
    most = max(1, min(class_tiles, multiprocessors, 64 * MIB // max(1, split_bytes)))

    def use(splits: int) -> float:
        blocks = row_tiles * splits
        return blocks / (-(-blocks // multiprocessors) * multiprocessors)

    # The fewest splits within 2 % of the best use.
    best = max(map(use, range(1, most + 1)))
    return next(splits for splits in range(1, most + 1) if use(splits) >= 0.98 * best)


@functools.lru_cache
def device_limits(device: torch.device) -> tuple[int, int]:
    """Return the compute capability × 10 and the number of multiprocessors."""
    if device.type != "cuda":  # the interpreter's tests, on CPU tensors: Hopper's choices
        return 90, 132
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count
