"""A child process that runs this package's functions, so that a measurement's memory is seen apart from all else."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

# Blocks from 64 KiB on are mapped, and go back to the system when freed. So memory of an earlier measurement does not
# hide the peak of the next one.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}

_Given = ParamSpec("_Given")
_Found = TypeVar("_Found")


class ChildFailed(RuntimeError):
    """Raised if the child raised an error or ended; the message says which."""


class Child:
    """Calls functions in another process, which is kept between calls; ``with`` ends it.

    Function, arguments and result are pickled. torch has as many threads there as in the caller. When the process dies,
    for example because it needed too much memory, the call raises an error and the next call starts another process.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.communicate()
            self._process = None

    def call(self, function: Callable[_Given, _Found], *arguments: _Given.args, **options: _Given.kwargs) -> _Found:
        """Call a function of a module and return its result.

        Raises:
            MemoryError: if it ran out of memory.
            ChildFailed: if it raised anything else, or the process ended.
        """
        self._process = process = self._process or _start()
        assert process.stdin and process.stdout
        try:
            pickle.dump((torch.get_num_threads(), function, arguments, options), process.stdin)
            process.stdin.flush()
            error, result = pickle.load(process.stdout)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError):
            status = process.wait()
            self._process = None
            if status == -9:
                raise MemoryError("the child process was killed, most likely for its memory") from None
            raise ChildFailed(f"the child process ended with status {status}") from None
        if error is not None:
            raise error
        return result


def _start() -> subprocess.Popen[bytes]:
    # The folder that holds this package: it need not be installed, and the caller's folder may hold anything.
    root = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import serve; serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=root,
        env={**os.environ, **_ALLOCATOR, "PYTHONPATH": path},
    )


def out_of_memory(error: BaseException) -> bool:
    """Return true if an allocation failed. On a CPU torch raises a RuntimeError, and only its text says so."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text or "bad_alloc" in text


def serve() -> None:
    """Answer calls from standard input on standard output until it closes."""
    # The output of libraries must not reach the pipe of the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            threads, function, arguments, options = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        torch.set_num_threads(threads)
        answer: tuple[Exception | None, object]
        try:
            answer = None, function(*arguments, **options)
        except Exception as error:
            kind = MemoryError if out_of_memory(error) else ChildFailed
            answer = kind(f"{type(error).__name__}: {error}"), None
        pickle.dump(answer, answers)
        answers.flush()
