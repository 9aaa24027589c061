"""A training on the terminal: a bar while it runs, a line for each epoch and for what should be known."""

from __future__ import annotations

import statistics
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from ..training.events import Began, Ended, Event, Noted, Saved, Stepped, Verified

_REPEATED = 20  # notes that are shown one by one


class TrainingProgress:
    """Listens to a training; see :mod:`fused_arcface.app.training.events`."""

    def __init__(self, console: Console, error: Console, epochs: int) -> None:
        self._console, self._error, self._epochs = console, error, epochs
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, epoch=f"-/{epochs}", figures="")
        self._shown = 0.0
        self._epoch: list[Stepped] = []
        self._notes = 0

    def __call__(self, event: Event) -> None:
        match event:
            case Began():
                self._begin(event)
            case Stepped():
                self._step(event)
            case Verified():
                self._end_epoch()
                rates = ", ".join(f"TAR {rate:.3f} at FAR {far:g}" for far, rate in event.found.tar.items())
                self._say(f"               verification: accuracy {event.found.accuracy:.3f}, {rates}")
            case Noted():
                self._note(event.text)
            case Saved():
                self._end_epoch()
            case Ended():
                self._end()

    def _begin(self, event: Began) -> None:
        net = f"a net of {event.parameters / 1e6:.2f} M parameters"
        what = f"{event.images} images of {event.identities} identities, {net}"
        self._say(what + (f", resumed after step {event.step} of {event.steps}" if event.step else ""))
        self._bar.update(self._task, total=event.steps, completed=event.step)
        if self._console.is_terminal:
            self._bar.start()

    def _step(self, event: Stepped) -> None:
        if self._epoch and self._epoch[-1].epoch != event.epoch:
            self._end_epoch()
        self._epoch.append(event)
        self._bar.advance(self._task)
        now = time.monotonic()
        if now - self._shown > 0.1:  # formatting at every step would cost as much as a small head
            self._shown = now
            self._bar.update(self._task, epoch=f"{event.epoch}/{self._epochs}", figures=_figures([event]))

    def _end_epoch(self) -> None:
        if self._epoch:
            self._say(f"epoch {self._epoch[-1].epoch:>3}/{self._epochs}  {_figures(self._epoch)}")
        self._epoch = []

    def _note(self, text: str) -> None:
        self._notes += 1
        if self._notes <= _REPEATED:
            self._error.print(text, style="yellow", markup=False, highlight=False)

    def _end(self) -> None:
        self._bar.stop()
        if self._notes > _REPEATED:
            self._error.print(f"and {self._notes - _REPEATED} more such notes", style="yellow")

    def _say(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _figures(steps: list[Stepped]) -> str:
    """Means over some steps."""

    def mean(name: str) -> float:
        return statistics.fmean(getattr(step, name) for step in steps)

    rate = len(steps) / sum(1 / step.images_per_second for step in steps)
    return (
        f"loss {mean('loss'):.3f}  angle {mean('target_angle'):.1f}°  accuracy {mean('accuracy'):.3f}  "
        f"{rate:.0f} images/s  head {mean('head_share'):.0%}"
    )
