"""The time that the package and its command line take to start: processor time of a fresh process.

``fused-arcface bench --cases start`` prints and writes the figures.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import NamedTuple

_SCRIPT = """
import json, sys, time
{first}
start = time.process_time()
try:
    {measured}
except SystemExit:
    pass
seconds = time.process_time() - start
print()
print(json.dumps([seconds, sorted(sys.modules)]))
"""
_PARTS = {
    "import fused_arcface": ("import torch", "import fused_arcface as fa"),
    "import fused_arcface, both heads": ("import torch", "import fused_arcface as fa; fa.MarginHead, fa.PartialFC"),
    "fused-arcface --help": ("sys.argv[1:] = ['--help']", "from fused_arcface.__main__ import main; main()"),
    "fused-arcface --version": ("sys.argv[1:] = ['--version']", "from fused_arcface.__main__ import main; main()"),
}
BOUND = 0.3
"""Most seconds that each part may take."""
PARTS = tuple(_PARTS)
"""Parts that :func:`measure` can measure. The imports are measured beyond ``import torch``."""


class Start(NamedTuple):
    """The cost of one start."""

    seconds: float
    modules: frozenset[str]
    """All modules that the process had imported in the end."""


def measure(part: str) -> Start:
    """Return the processor time of one of :data:`PARTS` in a fresh process, and the modules that it imported."""
    first, measured = _PARTS[part]
    command = [sys.executable, "-c", _SCRIPT.format(first=first, measured=measured)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, modules = json.loads(done.stdout.splitlines()[-1])
    return Start(seconds, frozenset(modules))


def fastest(part: str, tries: int = 3) -> float:
    """Return the least processor time of some starts: the processor is slower while others use it."""
    return min(measure(part).seconds for _ in range(tries))
