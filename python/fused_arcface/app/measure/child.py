"""A child process that runs this package's functions, so that a measurement's memory is seen apart from all else."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# Blocks from 64 KiB on are mapped, and go back to the system when freed. So memory of an earlier measurement does not
# hide the peak of the next one.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


class ChildFailed(RuntimeError):
    """Raised if the child raised an error or ended; the message says which."""


class Child:
    """Calls ``"module:function"`` in another process; ``close`` or ``with`` ends it.

    The module's name is relative to ``fused_arcface.app``. Arguments and result are JSON.

    The process is kept between calls. When it dies (killed for its memory, say) the call raises and the next one starts
    another.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, function: str, **arguments: Any) -> Any:
        """Call a function and return its result.

        Raises:
            MemoryError: if it ran out of memory.
            ChildFailed: if it raised anything else, or the process ended.
        """
        process = self._process or self._start()
        assert process.stdin and process.stdout
        try:
            process.stdin.write(json.dumps([function, arguments]) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            status = process.wait()
            self._process = None
            if status == -9:
                raise MemoryError("the child process was killed, most likely for its memory")
            raise ChildFailed(f"the child process ended with status {status}")
        kind, value = json.loads(answer)
        if kind == "memory":
            raise MemoryError(value)
        if kind == "error":
            raise ChildFailed(value)
        return value

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            assert self._process.stdin and self._process.stdout
            self._process.stdin.close()
            self._process.stdout.close()
            self._process.wait()
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        # The folder that holds this package: it need not be installed, and the caller's folder may hold anything.
        root = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=root,
            env={**os.environ, **_ALLOCATOR, "PYTHONPATH": path},
        )
        return self._process


def out_of_memory(error: BaseException) -> bool:
    """Return true if an allocation failed. On a CPU, only the text tells torch's error from other RuntimeErrors."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text or "bad_alloc" in text


def serve() -> None:
    """Answer calls from standard input on standard output until it closes."""
    # The output of libraries must not reach the pipe of the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    for line in sys.stdin:
        function, arguments = json.loads(line)
        module, _, name = function.partition(":")
        try:
            called = getattr(importlib.import_module(f"fused_arcface.app.{module}"), name)
            answer = ["result", called(**arguments)]
        except Exception as error:
            answer = ["memory" if out_of_memory(error) else "error", f"{type(error).__name__}: {error}"]
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
