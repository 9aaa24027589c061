"""Show a training on the terminal: its data and net, a bar, a line for each epoch, and the commands for its result."""

from __future__ import annotations

import dataclasses
import shlex
import statistics
import time

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from fused_arcface.base.text import counted

from ..training.events import Began, Checkpointed, Ended, Event, Noted, Stepped, Verified
from ..training.outcomes import DryRun
from ..training.runs import RunFolder
from .terminal import Problems, say

_SECONDS = 30.0  # between two lines within an epoch, where the output is no terminal


class TrainingProgress:
    """Listens to a training; see :mod:`fused_arcface.app.training.events`.

    A terminal gets a bar that fits 80 columns. A pipe or a file gets a line for each epoch, and in longer epochs one
    every 30 seconds.
    """

    def __init__(self, console: Console, error: Console, epochs: int) -> None:
        self._console, self._notes, self._epochs = console, Problems(error, "", "notes"), epochs
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("epoch {task.fields[epoch]}  step"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, epoch=f"-/{epochs}", figures="")
        self._shown = time.monotonic()
        self._epoch: list[Stepped] = []
        self._steps = 0

    def __call__(self, event: Event) -> None:
        match event:
            case Began():
                self._begin(event)
            case Stepped():
                self._step(event)
            case Verified():
                self._end_epoch()
                rates = ", ".join(f"{far:g}: {rate:.3f}" for far, rate in event.found.tar.items())
                self._say(f"  verified  accuracy {event.found.accuracy:.3f}  TAR at FAR {rates}")
                if event.best:
                    self._say("            the best so far, saved in best.pt")
            case Noted():
                self._notes(event.text)
            case Checkpointed():
                self._end_epoch()
            case Ended():
                self._end()

    def _begin(self, event: Began) -> None:
        self._steps = event.steps
        channels, size, _ = event.image
        color = "gray" if channels == 1 else "color"
        self._say(
            f"{event.device}: {event.images} images of {event.identities} identities, {size} × {size} {color}; "
            f"{counted(event.steps, 'step')} of {event.batch_size} images, scale {event.scale:g}"
        )
        net = f"a net of {event.parameters / 1e6:.2f} M parameters"
        self._say(f"{net}; {_bytes(event.memory)} of memory for weights and optimizers")
        if event.step:
            self._say(f"resumed after step {event.step} of {event.steps}")
        self._bar.update(self._task, total=event.steps, completed=event.step)
        if self._console.is_terminal:
            self._bar.start()

    def _step(self, event: Stepped) -> None:
        if self._epoch and self._epoch[-1].epoch != event.epoch:
            self._end_epoch()
        self._epoch.append(event)
        self._bar.advance(self._task)
        now = time.monotonic()
        if not self._console.is_terminal:
            if now - self._shown > _SECONDS:
                self._shown = now
                self._say(f"step {event.step}/{self._steps}  {_figures([event])}")
        elif now - self._shown > 0.1:  # formatting at every step would cost as much as a small head
            self._shown = now
            figures = f"loss {event.loss:.3f}  {event.images_per_second:.0f} images/s"
            self._bar.update(self._task, epoch=f"{event.epoch}/{self._epochs}", figures=figures)

    def _end_epoch(self) -> None:
        if self._epoch:
            self._say(f"epoch {self._epoch[-1].epoch:>3}/{self._epochs}  {_figures(self._epoch)}")
        self._epoch = []

    def _end(self) -> None:
        if self._console.is_terminal:  # elsewhere rich would print an empty line for a bar that was not shown
            self._bar.stop()
        self._notes.end()

    def _say(self, text: str) -> None:
        say(self._bar.console, text)


def explain_end(console: Console, folder: RunFolder, steps: int) -> None:
    """Print the files of a finished run, and the commands that use them."""
    run = shlex.quote(str(folder.root))
    lines = ["", f"{steps} step{'s are' if steps != 1 else ' is'} done. The net is in {folder.model}.", ""]
    files = {
        folder.model: "the weights of the finished net, a state_dict for torch.load",
        folder.best: "the same of the net with the best verification",
        folder.best_run.root: "its checkpoint, with class centers; a run of its own",
        folder.thresholds: "cosine thresholds for one person, by false accept rate",
        folder.log: "a JSON object for each step and verification",
        folder.tensorboard: "the same as curves",
    }
    lines += [f"  {path.name:<16} {text}" for path, text in files.items() if path.exists()]
    curves = f"tensorboard --logdir {shlex.quote(str(folder.tensorboard))}"
    if not folder.tensorboard.is_dir():
        curves = 'pip install "fused_arcface[tensorboard]"   # then the next run has curves'
    commands = (
        f"fused-arcface similarity A.jpg B.jpg --checkpoint {run}",
        f"fused-arcface embed IMAGES --checkpoint {run} --output embeddings.npz",
        f"fused-arcface verify --data PEOPLE --checkpoint {run}",
        f"fused-arcface export --checkpoint {run} --output net.onnx",
        curves,
    )
    say(console, "\n".join([*lines, "", "Next:", *(f"  {command}" for command in commands)]))


def explain_trial(console: Console, trial: DryRun) -> None:
    """Print the options of a dry run and the figures of its one step."""
    for name, value in dataclasses.asdict(trial.config).items():
        if value not in (None, ""):
            say(console, f"  {name} = {value!r}")
    took = f"The first step took {trial.seconds:.2f} s, its warm-up included; loss {trial.loss:.3f}."
    say(console, f"{took} Nothing was written.")


def _figures(steps: list[Stepped]) -> str:
    """Return the means over some steps; with the epoch before them they fit 80 columns."""

    def mean(name: str) -> float:
        return statistics.fmean(getattr(step, name) for step in steps)

    rate = len(steps) / sum(1 / step.images_per_second for step in steps)
    return (
        f"loss {mean('loss'):.3f}  angle {mean('target_angle'):.1f}°  accuracy {mean('accuracy'):.3f}  "
        f"{rate:.0f} images/s  head {mean('head_share'):.0%}"
    )


def _bytes(count: int) -> str:
    """Return a number of bytes for people.

    >>> _bytes(3_500_000), _bytes(12_000_000_000)
    ('3.5 MB', '12.0 GB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
