"""A clock for tests of code that measures time: what they find does not depend on the machine."""

from __future__ import annotations


class Clock:
    """Stands in for the module ``time``. It moves when a test sleeps by it, and a little at each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
