"""The machine code of the kernels for Hopper, by the nvcc that is here: what can be known of it without a GPU.

``pytest -s`` shows the table. The source is assembled once and kept in build/hopper under a hash of what it is made of.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from functools import lru_cache
from typing import NamedTuple

import pytest
from support.cuda_binaries import CUOBJDUMP, kernel_name
from support.cuda_emulated import ROOT

NVCC = shutil.which("nvcc")


def _missing() -> str | None:
    if NVCC is None:
        return "nvcc is not on the PATH"
    found = re.search(
        r"release (\d+)\.(\d+)", subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout
    )
    if found is None or tuple(map(int, found.groups())) < (12, 8):
        return f"nvcc 12.8 or later is needed; {NVCC} is older"
    return None if CUOBJDUMP is not None else "cuobjdump is neither on the PATH nor part of an installed Triton"


pytestmark = [pytest.mark.slow, pytest.mark.skipif(_missing() is not None, reason=str(_missing()))]

ENTRY, SCORES, SUMS, THREADS = 168, 184, 160, 128
"""Registers of a thread at a kernel's entry and in the two roles, threads of a warpgroup: csrc/cuda/hopper/block.h."""
TOTALS, FILLING = 216, 72
"""The same of class_totals_kernel, two warpgroups of which have scores: csrc/cuda/hopper/totals.h."""
KERNELS = {"class_sums_kernel": 2, "class_totals_kernel": 2, "weight_grad_kernel": 6}
"""The kernels with products, and how many there are of each: by cluster; by a gradient's dtype, and with the step of
CenterSGD in the tile."""


class Assembled(NamedTuple):
    log: str
    code: dict[str, str]
    """Machine code by mangled name."""


@lru_cache(maxsize=1)
def _assembled() -> Assembled:
    csrc = ROOT / "csrc"
    source = csrc / "cuda" / "hopper" / "passes.cu"
    key = hashlib.sha256(b"".join(path.read_bytes() for path in (source, *sorted(csrc.rglob("*.h"))))).hexdigest()[:24]
    folder = ROOT / "build" / "hopper"
    folder.mkdir(parents=True, exist_ok=True)
    cubin, log = folder / f"{key}.cubin", folder / f"{key}.log"
    if not log.exists():
        command = [
            *(NVCC, "-std=c++17", "-O3", "-DNDEBUG", f"-I{csrc}", "-cubin", "-o", str(cubin)),
            *("-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v,-warn-spills", str(source)),
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]
        partial = log.with_suffix(f".{os.getpid()}")
        partial.write_text(result.stdout + result.stderr)
        partial.rename(log)
    dump = subprocess.run([str(CUOBJDUMP), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"\n\s*Function : ", dump)[1:]
    return Assembled(log.read_text(), {part.split("\n", 1)[0].strip(): part for part in parts})


def _products() -> dict[str, str]:
    found = {mangled: code for mangled, code in _assembled().code.items() if kernel_name(mangled) in KERNELS}
    counted = dict.fromkeys(KERNELS, 0)
    for mangled in found:
        counted[kernel_name(mangled)] += 1
    assert counted == KERNELS
    return found


def _instructions(code: str) -> list[str]:
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code)


def test_no_spill_and_no_warning() -> None:
    """ptxas reports serialized products and ignored setmaxnreg as advisories C7502 to C7520."""
    log = _assembled().log
    assert not re.search(r"C75\d\d|[Ww]arning|error", log), log
    reports = re.findall(
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        log,
        re.DOTALL,
    )
    products = _products()
    assert {mangled for mangled, *_ in reports} >= set(products)
    for mangled, *numbers in reports:
        stack, stores, loads, registers = map(int, numbers)
        print(f"{kernel_name(mangled):<28}{registers:>4} registers, {stack} bytes of stack, {stores + loads} spilled")
        assert (stack, stores, loads) == (0, 0, 0), mangled
        assert mangled not in products or registers == ENTRY, mangled
    assert SCORES + 2 * SUMS == 2 * TOTALS + FILLING == 3 * ENTRY and 3 * ENTRY * THREADS <= 65_536


def test_products_and_copies_are_hopper_s() -> None:
    """Both shapes of product, one with the stationary rows in registers; the registers of the two roles; copies by
    tensor maps, to a cluster where there is one."""
    for mangled, code in _products().items():
        totals = kernel_name(mangled) == "class_totals_kernel"
        scores = re.findall(r"HGMMA\.64x64x16\.F32\.BF16 R\d+, (\S+),", code)
        assert sum(operand.startswith("R") for operand in scores) == (32 if totals else 28), mangled
        assert sum(operand.startswith("gdesc") for operand in scores) == (0 if totals else 4), mangled
        sums = re.findall(r"HGMMA\.64x256x16\.F32\.BF16 R\d+, gdesc\[\w+\]\.tnspB", code)
        assert len(sums) == (0 if totals else 4), mangled
        more, less = (TOTALS, FILLING) if totals else (SCORES, SUMS)
        assert re.search(rf"USETMAXREG\.TRY_ALLOC\.CTAPOOL \w+, 0x{more:x}", code), mangled
        assert re.search(rf"USETMAXREG\.DEALLOC\.CTAPOOL 0x{less:x}", code), mangled
        assert "UTMALDG.2D " in code and "UBLKCP" in code and "LDSM.16.M88.4" in code, mangled
        assert ("STSM.16.M88.4" in code) == (not totals), mangled
        assert ("UTMALDG.2D.MULTICAST" in code) == ("kernelILi2E" in mangled), mangled
        assert ("UBLKPF.L2" in code) == ("CenterStep" in mangled), mangled


def test_nothing_slow_among_the_products() -> None:
    """No local memory; and no fence of the whole GPU between the first product and the last."""
    for mangled, code in _products().items():
        instructions = _instructions(code)
        assert not {"STL", "LDL"} & {name.split(".")[0] for name in instructions}, mangled
        products = [i for i, name in enumerate(instructions) if name.startswith("HGMMA")]
        between = instructions[products[0] : products[-1]]
        assert not [name for name in between if re.fullmatch(r"MEMBAR\.\w+\.(GPU|SYS)|ERRBAR", name)], mangled
