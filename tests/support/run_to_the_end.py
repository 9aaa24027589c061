"""Run a script as ``__main__``, and fail if threads of gloo are left when it has ended.

Such a thread may drop the last tensor of a collective while the interpreter ends, and then aborts the process. This
happens now and then on a busy machine. The check sees the cause in every run; it needs Linux's ``/proc``.

Usage: run_to_the_end.py [--threads-stay] SCRIPT ARGUMENT...

--threads-stay: the script uses a part of torch that never releases the group (FSDP2: the caches of DTensor). The
process then ends without the end of the interpreter.
"""

import contextlib
import os
import runpy
import sys
import time
from pathlib import Path

PATIENCE = 20
"""Seconds for threads that are ending: the system lists one for a moment after it has been joined."""


def threads_of_gloo() -> list[str]:
    """Return the names of this process's threads that belong to gloo."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            names.append((task / "comm").read_text().strip())
    return [name for name in names if "gloo" in name]


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    stay = sys.argv[0] == "--threads-stay"
    sys.argv = sys.argv[stay:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    if stay:
        sys.stdout.flush()
        os._exit(0)
    end = time.monotonic() + PATIENCE
    while left := threads_of_gloo():
        if time.monotonic() > end:
            sys.exit(f"threads outlive the process group: {left}")
        time.sleep(0.01)
