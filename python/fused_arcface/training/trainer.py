"""A training run from its options to its end: what ``fused-arcface train`` calls."""

from __future__ import annotations

import math
import signal
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from ..data.sources import ImageSource
from ..reading import DataError
from .batches import Batch, BatchPlan, load_batches, share_bounds
from .config import TrainConfig
from .events import Began, Ended, Event, Listener, Noted, Saved, Stepped, Verified, folder_listeners
from .interrupt import Interrupt
from .joint_step import StepResult
from .learner import Learner
from .resolve import open_data, open_verification, resolve, stopped_by
from .runs import RunFolder, check_run, write_run
from .verifier import Verifier
from .world import World, join_world


@dataclass(frozen=True)
class Outcome:
    """How a training ended."""

    step: int
    steps: int
    signal: signal.Signals | None = None
    """What interrupted it."""


def train(config: TrainConfig, output: Path, *, resume: bool = False, listener: Listener) -> Outcome:
    """Train as the options say, in a folder of its own; resumed, on any number of ranks, it goes on as if it had never
    been interrupted.

    SIGINT (Ctrl-C) and SIGTERM end it after the step under way, saved.

    Args:
        config: the options; None among them are chosen here.
        output: the run's folder, made if it is missing.
        resume: go on from the newest checkpoint in it, or from the start if there is none yet.
        listener: is told what goes on.

    Raises:
        RunError: the folder holds a run and ``resume`` is not set, or one with other fixed options.
        DataError: nothing to train on; or a problem in the data, with ``bad_data="stop"``.
        OptionError: options that do not fit each other, the data or the machine.
        MissingExtra: a library is not installed.

    >>> import tempfile
    >>> config = TrainConfig(data="identities:4x4", epochs=2, batch_size=8, image_size=16, workers=0, device="cpu")
    >>> train(config, Path(tempfile.mkdtemp()) / "run", listener=lambda event: None)
    Outcome(step=4, steps=4, signal=None)
    """
    with join_world(config.device) as world, Interrupt() as interrupt:
        source = open_data(config)
        config = resolve(config, source, world)
        folder = RunFolder(output)
        check_run(folder, config, source.names, resume)
        world.wait()  # nobody writes before all have looked
        if world.rank == 0:
            write_run(folder, config, source.names)
        trainer = Trainer(config, folder, world, source, interrupt, listener)
        try:
            return trainer.run()
        finally:
            trainer.tell(Ended())


class Trainer:
    """One process's part of a training run; see :func:`train`."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        world: World,
        source: ImageSource,
        interrupt: Interrupt,
        listener: Listener,
    ) -> None:
        self._config, self._folder, self._world, self._source = config, folder, world, source
        self._interrupt = interrupt
        self._plan = BatchPlan(len(source), config.batch_size, config.seed, config.flip)
        self._steps = config.epochs * self._plan.steps_per_epoch
        self._learner = Learner(config, len(source.names), self._steps, world)
        self._listeners = [listener]
        self._verifier: Verifier | None = None
        if world.rank == 0:
            self._listeners += folder_listeners(folder.log, folder.tensorboard)
            pairs = open_verification(config)
            self._verifier = Verifier(pairs, config.batch_size, config.workers) if pairs is not None else None
        self._stopped_by: signal.Signals | None = None
        self._saved = -1

    def tell(self, event: Event) -> None:
        """Tells the listeners; on ranks but the first of problems alone."""
        if self._world.rank == 0 or isinstance(event, Noted):
            for listener in self._listeners:
                listener(event)

    def run(self) -> Outcome:
        """Trains until the last step or an interruption."""
        resumed, learner = self._folder.has_checkpoint, self._learner
        step = self._saved = learner.load(self._folder.checkpoints) if resumed else learner.start()
        parameters = sum(each.numel() for each in self._learner.backbone.parameters())
        self.tell(Began(step, self._steps, len(self._source), len(self._source.names), parameters))
        if self._world.rank == 0:
            for note in [*self._source.notes, *(f"{problem}; skipped" for problem in self._source.problems)]:
                self.tell(Noted(note))
            for problem in self._verifier.problems if self._verifier is not None else ():
                self.tell(Noted(f"verification: {problem}; skipped"))
        bounds = self._share()
        sizes = [end - start for start, end in pairwise(bounds)]
        items = self._plan.from_step(step, self._steps, slice(bounds[0], bounds[-1]))
        pin_memory = self._world.device.type == "cuda"
        batches = load_batches(self._source, self._learner.spec, items, self._config.workers, pin_memory)
        start = time.perf_counter()
        while step < self._steps and self._stopped_by is None:
            batch = next(batches)
            self._report(batch)
            result = self._learner.learn(batch.images, batch.labels, sizes, step)
            step += 1
            self._conclude(step, result, time.perf_counter() - start)
            if step % self._plan.steps_per_epoch == 0:
                self._verify(step)
                self._save(step)
            elif self._config.save_every and step % self._config.save_every == 0:
                self._save(step)
            start = time.perf_counter()
        self._save(step)
        if step == self._steps and self._world.rank == 0:
            torch.save(self._learner.backbone.state_dict(), self._folder.model)
        return Outcome(step, self._steps, self._stopped_by)

    def _share(self) -> list[int]:
        """Where this rank's micro-batches begin and end in the joint batch. Ranks times micro-batches count: a run
        whose ranks have become micro-batches, or the other way round, is the same."""
        parts = self._config.accumulation
        bounds = share_bounds(self._plan.rows, self._world.world_size * parts)
        return bounds[self._world.rank * parts : (self._world.rank + 1) * parts + 1]

    def _report(self, batch: Batch) -> None:
        for problem in batch.problems:
            if self._config.bad_data == "stop":
                raise DataError(stopped_by(problem))
            self.tell(Noted(f"{problem}; the next image is taken instead"))

    def _conclude(self, step: int, result: StepResult, seconds: float) -> None:
        """Figures over all ranks, and whether any of them was asked to stop: then all do, at the same step."""
        received = self._interrupt.received
        angles = result.stats.target_cosine.double().clamp(-1, 1).acos()
        *asked, angle, correct, rows = self._world.sum(
            [
                float(received == signal.SIGINT),
                float(received == signal.SIGTERM),
                float(angles.sum()),
                float(result.stats.correct.sum()),
                float(len(angles)),
            ]
        )
        if any(asked):
            self._stopped_by = signal.SIGINT if asked[0] else signal.SIGTERM
        self.tell(
            Stepped(
                step=step,
                epoch=1 + (step - 1) // self._plan.steps_per_epoch,
                loss=result.loss,
                target_angle=math.degrees(angle / rows),
                accuracy=correct / rows,
                lr=self._learner.lr,
                images_per_second=rows / seconds,
                head_share=result.head_seconds / seconds,
            )
        )
        if not result.updated and self._world.rank == 0 and self._config.precision != "fp16":
            self.tell(
                Noted(f"step {step}: loss {result.loss:g}, the gradient is not finite: the net was left as it was")
            )

    def _verify(self, step: int) -> None:
        """At the end of an epoch, by the first rank; the others wait."""
        epoch = step // self._plan.steps_per_epoch
        due = epoch % self._config.verify_every == 0 or epoch == self._config.epochs
        if self._verifier is not None and due and self._stopped_by is None:
            found, problems = self._verifier(self._learner.backbone, self._learner.spec, self._world.device)
            for problem in problems:
                self.tell(Noted(f"verification: {problem}"))
            if found is not None:
                self.tell(Verified(step, epoch, found))
        self._world.wait()

    def _save(self, step: int) -> None:
        if step != self._saved:
            path = self._learner.save(self._folder.checkpoints, step)
            self._saved = step
            self.tell(Saved(step, path))
