"""Ctrl-C while the command line imports torch, which takes seconds: one word in place of a traceback.

The package imports this first, because ``python -m fused_arcface`` imports the package before ``__main__``. In other
programs it does nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import PurePath
from types import FrameType

_INTERRUPTED = 130


def _is_command() -> bool:
    as_module = ["-m", "fused_arcface"] in [sys.orig_argv[at : at + 2] for at in range(1, len(sys.orig_argv))]
    return as_module or PurePath(sys.argv[0] if sys.argv else "").stem == "fused-arcface"


def _end(number: int, frame: FrameType | None) -> None:
    print("Interrupted.", file=sys.stderr, flush=True)
    os._exit(_INTERRUPTED)  # an exception may be caught by what is being imported


def _begin() -> None:
    """From here on SIGINT ends the process, if that is the command line and does not ignore it."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if usual and threading.current_thread() is threading.main_thread() and _is_command():
        signal.signal(signal.SIGINT, _end)


def imported() -> None:
    """From here on SIGINT raises KeyboardInterrupt as usual, which the commands answer."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


_begin()
