"""The choice of the algorithm and of its tiles, with the reason at each number.

Only the choice of the algorithm was measured on a GPU, an H100; the tiles are the model's.

The models behind them count an H200's 790 TFLOP/s of bf16 products, 132 multiprocessors, about 5.5 TB/s out of L2,
232 448 bytes of shared memory a block and 65 536 registers a multiprocessor. bench/NOTES.md carries the sums.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch

MIB = 1 << 20


@dataclass(frozen=True)
class ProductConfig:
    """Tiles of the class-chunk algorithm's kernel: S = X·Wᵀ, and the exponentials while S is still in registers."""

    BLOCK_N: int
    BLOCK_C: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class FlashConfig:
    """Tiles of the flash passes. ``OUTER`` rows own an accumulator as wide as D; ``INNER`` rows stream past them."""

    OUTER: int
    INNER: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ElementConfig:
    """Tiles of the kernels that a library product feeds."""

    BLOCK_N: int
    BLOCK_C: int
    num_warps: int


@dataclass(frozen=True)
class PanelConfig:
    """How many class centers, and how many batch rows, one turn of the host's loop takes."""

    exponential_bytes: int
    """Of the (rows, classes) exponentials of one turn."""
    center_bytes: int
    """Of the normalized copy of the turn's centers."""
    max_rows: int


# 24 MiB of bf16 exponentials, written and read once per turn, stay in an L2 of 50 MB (H100, H200) beside the turn's
# centers; and 12.6 M logits of D = 512 keep a turn's product at 16 µs of tensor-core time, several times a launch.
CHUNKS = PanelConfig(exponential_bytes=24 * MIB, center_bytes=16 * MIB, max_rows=8192)

# Nothing but centers: 32 MiB of them fill L2 to two thirds, and at D = 256 and N = 1024 a turn is 67 M logits, 0.2 ms
# by the model.
FLASH_PANEL = PanelConfig(exponential_bytes=0, center_bytes=32 * MIB, max_rows=1 << 31)

# Hopper and data-center Blackwell: 128×256 fp32 accumulators are 128 registers in each of 256 threads, and the
# largest tile whose operands (85 flop a byte) L2 can feed near the tensor cores' rate; three stages of 48 KiB leave
# the epilogue its scratch.
_PRODUCT_SM90 = ProductConfig(BLOCK_N=128, BLOCK_C=256, BLOCK_D=64, num_warps=8, num_stages=3)
# Elsewhere half the tile and half the warps: 48 KiB of shared memory and 220 registers in 128 threads let a
# multiprocessor hold two blocks, so that one's exponentials overlap the other's products (there is no asynchronous
# tensor-core instruction to do it), and fit the 99 KiB a block that sm_86, sm_89 and sm_120 give.
_PRODUCT_PORTABLE = ProductConfig(BLOCK_N=128, BLOCK_C=128, BLOCK_D=32, num_warps=4, num_stages=4)

# 64 rows of a 512-wide fp32 accumulator are 128 registers in each of 256 threads: 128 rows do not fit the register
# file. The stationary 64×512 tile takes 64 KiB of shared memory and so does each streamed one: two stages of them are
# the limit. Hopper alone: Blackwell's tensor cores want the probabilities in shared memory too, 262 944 bytes in all.
_FLASH_512 = FlashConfig(OUTER=64, INNER=64, num_warps=8, num_stages=2)
# Half the width: the same registers hold 128 rows, so the streamed tiles are read half as often. What these two spill
# lies before and after the loop, none of it in between (sm_90, Triton 3.7).
_FLASH_256 = FlashConfig(OUTER=128, INNER=64, num_warps=8, num_stages=2)
# Room for a third stage, and nothing spills; INNER=128 would spill 48 bytes.
_FLASH_128 = FlashConfig(OUTER=128, INNER=64, num_warps=8, num_stages=3)
# Half of that, for 99 KiB of shared memory and tensor cores that 4 warps keep busy.
_FLASH_PORTABLE_256 = FlashConfig(OUTER=64, INNER=32, num_warps=4, num_stages=2)
_FLASH_PORTABLE_128 = FlashConfig(OUTER=64, INNER=64, num_warps=4, num_stages=2)

# Bound by memory: 16 elements a thread in 16-byte accesses; a row's 256 columns are summed within two warps.
ELEMENTS = ElementConfig(BLOCK_N=16, BLOCK_C=256, num_warps=8)


def is_wide(arch: int) -> bool:
    """Return true if ``arch`` (compute capability × 10) has 227 KiB of shared memory a block.

    Data-center Hopper and Blackwell have.
    """
    return arch in (90, 100, 103)


def product_config(arch: int) -> ProductConfig:
    """Return the tiles of the product kernel for ``arch`` (compute capability × 10)."""
    return _PRODUCT_SM90 if is_wide(arch) else _PRODUCT_PORTABLE


def flash_config(width: int, arch: int) -> FlashConfig | None:
    """Tiles for rows of padded width ``width`` (a power of two), or None where none fit ``arch``."""
    if is_wide(arch):
        if width <= 256:
            return _FLASH_128 if width <= 128 else _FLASH_256
        return _FLASH_512 if width <= 512 and arch == 90 else None
    return _FLASH_PORTABLE_128 if width <= 128 else _FLASH_PORTABLE_256 if width <= 256 else None


def flash_width(D: int) -> int:
    """D padded for the flash passes: Triton's tiles are powers of two, its products at least 16 deep."""
    return max(16, 1 << (D - 1).bit_length())


def pick(D: int, arch: int, dtype: torch.dtype) -> str:
    """Return ``"flash"`` or ``"chunks"``, for operands of ``dtype`` on ``arch`` (compute capability × 10).

    The flash passes run wherever they can. On an H100 they took 0.63 of the chunks' time at D = 512, 0.21 at D = 256
    and 0.14 at D = 128 (N = 4096, C = 1 000 000, bf16, forward and backward; bench/results/h100).

    ``FUSED_ARCFACE_TRITON_ALGORITHM`` in the environment overrides it where the named algorithm can run at all:
    benchmarks compare the two with it.

    >>> pick(512, 90, torch.bfloat16), pick(512, 90, torch.float32)
    ('flash', 'chunks')
    """
    # One operand dtype for both products: fp16 cannot hold unshifted exponentials. And fp32 products belong to the
    # library, which follows torch.get_float32_matmul_precision and whose fp32 kernels beat Triton's.
    possible = dtype == torch.bfloat16 and flash_config(flash_width(D), arch) is not None
    asked = os.environ.get("FUSED_ARCFACE_TRITON_ALGORITHM", "")
    if asked not in ("", "flash", "chunks"):
        raise ValueError(f"FUSED_ARCFACE_TRITON_ALGORITHM must be 'flash' or 'chunks'; got {asked!r}")
    if asked:
        return "flash" if asked == "flash" and possible else "chunks"
    return "flash" if possible else "chunks"


def panel_classes(config: PanelConfig, N: int, C: int, row_bytes: int, exponential_size: int, multiple: int) -> int:
    """Class centers of one turn: as many as the budgets allow, a multiple of the tile, no more than there are.

    ``row_bytes`` of one center's copy, ``exponential_size`` of one stored exponential, 0 if none are stored.
    """
    budgets = [config.center_bytes // row_bytes, -(-C // multiple) * multiple]
    if exponential_size > 0:
        budgets.append(config.exponential_bytes // (min(N, config.max_rows) * exponential_size))
    return max(multiple, min(budgets) // multiple * multiple)


def row_splits(row_tiles: int, class_tiles: int, split_bytes: int, multiprocessors: int) -> int:
    """Return the number of ranges that the flash forward cuts a panel's classes into.

    Its blocks then fill the multiprocessors evenly.

    Each split has its own (N, D) fp32 sums of ``split_bytes``: 64 MiB of them at most.
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
    """Compute capability × 10 and number of multiprocessors."""
    if device.type != "cuda":  # the interpreter's tests, on CPU tensors: Hopper's choices
        return 90, 132
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count
