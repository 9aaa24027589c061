"""How the tests read machine code: by the cuobjdump of the CUDA toolkit, or by the one that Triton brings."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path


def _cuobjdump() -> str | None:
    triton = importlib.util.find_spec("triton")
    bundled = triton and triton.origin and Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return shutil.which("cuobjdump") or (str(bundled) if bundled and bundled.exists() else None)


CUOBJDUMP = _cuobjdump()


def kernel_name(mangled: str) -> str:
    match = re.search(r"\d+([a-z_]+_kernel)", mangled)
    assert match is not None, mangled
    return match.group(1)
