"""The progress bars of the commands that run for minutes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class TrainingBar(Progress):
    """Shows a bar for the current training and a line for each that has ended; see ``lab.training.Reporter``."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self.add_task("", total=None, loss="-")
        self._shown = 0.0

    def begin(self, what: str, steps: int = 0) -> None:
        self.reset(self._task, description=what, total=steps or None, loss="-")

    def step(self, loss: float) -> None:
        # Formatting at every step would cost as much as a small head.
        now = time.monotonic()
        if now - self._shown > 0.1:
            self._shown = now
            self.update(self._task, loss=f"{loss:.3f}")
        self.advance(self._task)

    def ended(self, name: str, first_loss: float, last_loss: float, steps: int, seconds: float) -> None:
        line = f"  {name:<40}loss {first_loss:6.2f} → {last_loss:6.3f}  in {steps} steps, {seconds:.1f} s"
        self.console.print(line, highlight=False, soft_wrap=True)


@contextmanager
def spinner(console: Console) -> Iterator[Callable[[str], None]]:
    """Show a spinner with the elapsed time and a text; yield a function that sets the text."""
    columns = (SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=None)
        yield lambda text: progress.update(task, description=text)
