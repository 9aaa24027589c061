"""The machine code of the CUDA kernels as this build ships it: what can be known of it without a GPU.

``pytest -s`` shows the table.
"""

from __future__ import annotations

import re
import subprocess

import pytest
from support.cuda_binaries import CUOBJDUMP, kernel_name

from fused_arcface import _native

pytestmark = [
    pytest.mark.skipif(
        not hasattr(_native, "cuda"), reason="this build has no CUDA kernels: no nvcc was found where it was built"
    ),
    pytest.mark.skipif(CUOBJDUMP is None, reason="cuobjdump is neither on the PATH nor part of an installed Triton"),
]

ARCHITECTURES = {"sm_80": 166_912, "sm_90": 232_448}
"""Bytes of shared memory that a block may have, by architecture (CUDA C++ programming guide, technical
specifications)."""
REGISTERS = 65_536
"""Of a multiprocessor, on either."""
RESERVED_SHARED = 1024
"""Bytes that the system keeps of each block's shared memory."""
SHARED, THREADS = 64 << 10, 128
"""csrc/cuda/gemm.h: kSharedBytes, kThreads."""

PRODUCTS = {
    "class_stats_kernel": 4,
    "class_gradient_kernel": 4,
    "general_stats_kernel": 4,
    "general_gradient_kernel": 4,
    "center_sum_kernel": 4,
    "center_gradient_kernel": 4,
}
"""Kernels with a product, and the precisions that each is compiled for."""


STEPS = {"0": 64, "1": 64, "2": 64, "3": 3 * 32}
"""Products of a warp in a turn of the loop, by the number of the precision (csrc/cuda/kernels.h).

A turn is a stage of 64 bytes of depth for 64 x 64 scores, 16 x 8 each; in fp32 half a stage, with three products in
place of one."""

MOST_IN_EPILOGUE = {"class_stats_kernel": 3600, "class_gradient_kernel": 1850}
"""Instructions after the last product: 3385 and 1768 with nvcc 13.0, the latter 13.8 for each logit of a thread. Those
of class_stats are two epilogues, with and without stored exponentials, and each has rare branches for targets."""


def _dump(*arguments: str) -> str:
    assert CUOBJDUMP is not None and _native.__file__ is not None
    return subprocess.run([CUOBJDUMP, *arguments, _native.__file__], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_registers_spills_and_shared_memory(architecture: str) -> None:
    report = _dump("--dump-resource-usage", "-arch", architecture)
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report)
    found = dict.fromkeys(PRODUCTS, 0)
    for mangled, *numbers in usage:
        kernel = kernel_name(mangled)
        registers, stack, shared, local = map(int, numbers)
        row = f"{architecture} {kernel:<28}{registers:>4} registers {stack:>3} B stack {shared:>5} B static shared"
        print(row)
        # The sine and cosine of a huge argument are reduced with a table on the stack; spills have none to go to.
        assert stack <= (32 if kernel == "margin_loss_kernel" else 0) and local == 0, row
        if kernel in found:
            found[kernel] += 1
            blocks = min(REGISTERS // (registers * THREADS), ARCHITECTURES[architecture] // (SHARED + RESERVED_SHARED))
            assert blocks >= 2, f"{row}: two blocks on a multiprocessor are to hide each other's latency; {blocks} fit"
    assert found == PRODUCTS


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_tensor_cores_and_asynchronous_copies(architecture: str) -> None:
    """Machine code of the products: HMMA with fp32 sums, LDSM (ldmatrix), LDGSTS (cp.async); no local memory."""
    code: dict[str, str] = {}
    for part in re.split(r"\n\s*Function : ", _dump("-sass", "-arch", architecture))[1:]:
        mangled = part.split("\n", 1)[0].strip()
        code[mangled] = part
    products = {mangled: part for mangled, part in code.items() if kernel_name(mangled) in PRODUCTS}
    assert len(products) == sum(PRODUCTS.values())
    kinds = set()
    for mangled, part in products.items():
        multiplications = set(re.findall(r"HMMA\.(\S+)", part))
        assert multiplications and all(".F32" in kind for kind in multiplications), (mangled, multiplications)
        kinds |= multiplications
        for instruction in (r"LDSM\.16\.M88\.4", r"LDGSTS\.E\.BYPASS\.128", r"BAR\.SYNC"):
            assert re.search(instruction, part), (mangled, instruction)
        assert not re.search(r"\b(STL|LDL)\b", part), mangled
        instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+([^;]*);", part)
        tensor_cores = [index for index, each in enumerate(instructions) if "HMMA" in each]
        precision = re.search(r"PrecisionE(\d)", mangled)
        assert precision is not None and len(tensor_cores) == STEPS[precision[1]], (mangled, len(tensor_cores))
        epilogue = len(instructions) - tensor_cores[-1]
        assert epilogue <= MOST_IN_EPILOGUE.get(kernel_name(mangled), 3200), (mangled, epilogue)
    for kind in ("BF16", "TF32"):
        assert any(kind in each for each in kinds), kinds
    assert "16816.F32" in kinds, kinds  # fp16's
