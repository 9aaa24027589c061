"""Run the suite: what can share the machine in two processes, then the rest alone; print how long it all took.

``python tests/run.py [--limit SECONDS] [-m MARKERS] [arguments for pytest]``: exits with 1 if a test fails, or if the
suite takes more than the limit.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

NO_TESTS = 5
"""The exit code of pytest if no test is left after the choice by ``-m`` or ``-k``."""

WORKERS = ["-n", "2", "--dist", "worksteal"]


@dataclass(frozen=True)
class Session:
    """One call of pytest."""

    name: str
    marks: str
    options: list[str]
    mark: str = ""
    """A text in the files of its tests. If the caller names no file, pytest reads only these. Empty: all files."""
    environment: dict[str, str] = field(default_factory=dict)


SESSIONS = (
    Session("tests in two processes", "not interpreter and not serial", WORKERS),
    Session(
        "Triton's interpreter, in two processes", "interpreter", WORKERS, "= INTERPRETED", {"TRITON_INTERPRET": "1"}
    ),
    Session("large tests, one at a time", "serial", [], "mark.serial"),
)


def files_with(mark: str) -> list[str]:
    """Return the files of tests in which ``mark`` stands; without one nothing, which is all of the suite to pytest."""
    files = sorted(Path(__file__).parent.rglob("test_*.py")) if mark else []
    return [os.path.relpath(each) for each in files if mark in each.read_text(encoding="utf-8")]


def main(arguments: list[str]) -> int:
    """Run every session, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, help="seconds that the whole suite may take")
    parser.add_argument("-m", dest="marks", default="", help="an expression of markers, as for pytest")
    options, others = parser.parse_known_args(arguments)

    named = any(Path(each.partition("::")[0]).exists() for each in others)
    failed, seconds = [], {}
    for session in SESSIONS:
        print(f"==> {session.name}", flush=True)
        marks = f"({session.marks}) and ({options.marks})" if options.marks else session.marks
        command = [sys.executable, "-m", "pytest", "-q", "--durations=40", "-m", marks, *session.options, *others]
        start = time.monotonic()
        code = subprocess.run(
            [*command, *([] if named else files_with(session.mark))], env=os.environ | session.environment, check=False
        ).returncode
        seconds[session.name] = time.monotonic() - start
        if code not in (0, NO_TESTS):
            failed.append(session.name)

    total = sum(seconds.values())
    for name, each in seconds.items():
        print(f"{each:6.0f} s  {name}{'  FAILED' if name in failed else ''}")
    print(f"{total:6.0f} s  in all")
    if options.limit is not None and total > options.limit:
        print(f"The suite may take {options.limit:.0f} s. tests/README.md says what to do.", file=sys.stderr)
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
