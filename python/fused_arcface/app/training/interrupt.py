"""Ctrl-C and SIGTERM end a training after the step in progress, so that it is saved."""

from __future__ import annotations

import contextlib
import signal
from types import FrameType


class Interrupt(contextlib.ExitStack):
    """A context that notes the first SIGINT or SIGTERM in ``received``; the second one acts as usual.

    Outside the main thread it notes nothing: Python handles signals in the main thread alone.
    """

    received: signal.Signals | None = None

    def __enter__(self) -> Interrupt:
        with contextlib.suppress(ValueError):  # not the main thread
            for each in (signal.SIGINT, signal.SIGTERM):
                self.callback(signal.signal, each, signal.signal(each, self._note))
        return self

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self.close()  # the handlers that were there before act from now on
