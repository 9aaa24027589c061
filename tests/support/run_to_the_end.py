"""Run a script as ``__main__``, and fail if threads of gloo are left when it has ended.

Such a thread may drop the last tensor of a collective while the interpreter ends, and then aborts the process. This
happens now and then on a busy machine. The check sees the cause in every run; it needs Linux's ``/proc``.

Usage: run_to_the_end.py [--threads-stay] SCRIPT ARGUMENT...

--threads-stay: the script uses a part of torch that never releases the group (FSDP2: the caches of DTensor). The
process then ends without the end of the interpreter.
"""

import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    stay = sys.argv[0] == "--threads-stay"
    sys.argv = sys.argv[stay:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    if stay:
        sys.stdout.flush()
        os._exit(0)
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
    if left := [name for name in names if "gloo" in name]:
        sys.exit(f"threads outlive the process group: {left}")
