"""A training run from its options to its end: what ``fused-arcface train`` calls."""

from __future__ import annotations

import contextlib
import io
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch.distributed.checkpoint.api import CheckpointException

from fused_arcface.base.files import write_bytes
from fused_arcface.base.reading import DataError
from fused_arcface.checkpoint import CheckpointError

from ..data.sources import ImageSource
from .batches import Batch, BatchPlan, load_batches, share_bounds
from .config import OptionError, TrainConfig, rules
from .events import Began, Ended, Event, Listener, Noted, Saved, Stepped, Verified, folder_listeners
from .failures import TrainingError, disk_error
from .fingerprint import Fingerprint
from .interrupt import Interrupt
from .joint_step import StepResult
from .learner import Learner
from .lock import FolderLock
from .resolve import open_data, open_verification, resolve, stopped_by
from .runs import RunFolder, check_run, write_run
from .verifier import Verifier
from .world import World, join_world, resume_command


@dataclass(frozen=True)
class Outcome:
    """How a training ended."""

    step: int
    steps: int
    signal: signal.Signals | None = None
    """What interrupted it."""


_OF_ONE_RANK = ("data", "verify_data", "init", "workers", "device")
"""Options that may differ between ranks: paths, and what a machine has."""


def train(
    config: TrainConfig,
    output: Path,
    *,
    resume: bool | Literal["auto"] = False,
    trust: bool = False,
    listener: Listener,
) -> Outcome:
    """Train as the options say, in a folder of its own; resumed, on any number of ranks, it goes on as if it had never
    been interrupted.

    SIGINT (Ctrl-C) and SIGTERM end it after the step under way, saved.

    Args:
        config: the options; None among them are chosen here.
        output: the run's folder, made if it is missing. It is locked: one training at a time writes into it.
        resume: go on from the newest checkpoint in it, or from the start if there is none yet; ``"auto"``: do so if the
            folder holds a run, else begin one.
        trust: run the code that a resumed checkpoint of format 1 may hold.
        listener: is told what goes on.

    Raises:
        RunError: the folder holds a run and ``resume`` is not set, one with other fixed options or other data, or one
            that another process trains in.
        DataError: nothing to train on; data that differ between ranks; or a problem in the data, with
            ``bad_data="stop"``.
        OptionError: options that do not fit each other, the data or the machine, or differ between ranks.
        TrainingError: the folder was removed or cannot be written, or every step was skipped.
        MissingExtra: a library is not installed.

    >>> import tempfile
    >>> config = TrainConfig(data="identities:4x4", epochs=2, batch_size=8, image_size=16, workers=0, device="cpu")
    >>> train(config, Path(tempfile.mkdtemp()) / "run", listener=lambda event: None)
    Outcome(step=4, steps=4, signal=None)
    """
    folder, lock = RunFolder(output), None
    with join_world(config.device) as world, Interrupt() as interrupt, contextlib.ExitStack() as held:
        with world.together():
            source = open_data(config)
            config = resolve(config, source, world)
            data = Fingerprint.of(source)
        _check_ranks(world, config, data)
        with world.together():
            if world.rank == 0:
                lock = held.enter_context(folder.lock())
        with world.together():  # nobody writes before all have looked
            check_run(folder, config, source.names, data, folder.config.exists() if resume == "auto" else resume)
        with world.together():
            if world.rank == 0:
                write_run(folder, config, source.names, data)
        trainer = Trainer(config, folder, lock, world, source, interrupt, listener, trust)
        try:
            return trainer.run()
        finally:
            trainer.tell(Ended())


def _check_ranks(world: World, config: TrainConfig, data: Fingerprint) -> None:
    """Raises on every rank alike where options or data differ between ranks."""
    try:
        world.check_agreement("options", {name: getattr(config, name) for name in rules() if name not in _OF_ONE_RANK})
    except ValueError as error:
        raise OptionError(str(error)) from None
    try:
        world.check_agreement("data", asdict(data))
    except ValueError as error:
        raise DataError(str(error)) from None


class Trainer:
    """One process's part of a training run; see :func:`train`."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        lock: FolderLock | None,
        world: World,
        source: ImageSource,
        interrupt: Interrupt,
        listener: Listener,
        trust: bool = False,
    ) -> None:
        self._config, self._folder, self._lock, self._world, self._source = config, folder, lock, world, source
        self._interrupt, self._trust = interrupt, trust
        self._plan = BatchPlan(len(source), config.batch_size, config.seed, config.flip)
        self._steps = config.epochs * self._plan.steps_per_epoch
        self._learner = Learner(config, len(source.names), self._steps, world)
        self._listeners = [listener]
        self._files: list[Listener] = []
        self._failure: Exception | None = None
        self._verifier: Verifier | None = None
        if world.rank == 0:
            self._files = folder_listeners(folder.log, folder.tensorboard)
            pairs = open_verification(config)
            self._verifier = Verifier(pairs, config.batch_size, config.workers) if pairs is not None else None
        self._stopped_by: signal.Signals | None = None
        self._saved = -1

    def tell(self, event: Event) -> None:
        """Tells the listeners; on ranks but the first of problems alone."""
        if self._world.rank == 0 or isinstance(event, Noted):
            for listener in self._listeners:
                listener(event)
            try:
                for listener in self._files:
                    listener(event)
            except OSError as error:
                self._fail(disk_error(self._folder.root, error, self._way_back()))

    def _fail(self, failure: Exception) -> None:
        """Notes this rank's first failure; all ranks raise it at the end of the step."""
        self._failure = self._failure or failure

    def run(self) -> Outcome:
        """Trains until the last step or an interruption."""
        resumed, learner = self._folder.has_checkpoint, self._learner
        first = step = learner.load(self._folder.checkpoints, trust=self._trust) if resumed else learner.start()
        self._saved = first
        updates = learner.updates
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
        batch = self._next_batch(batches) if step < self._steps else None
        self._world.share(self._failure)
        start = time.perf_counter()
        while batch is not None and self._stopped_by is None:
            self._note_problems(batch)
            result = self._learner.learn(batch.images, batch.labels, sizes, step)
            step += 1
            # Read before the ranks tell each other of the step: one that cannot go on says so at the same time.
            batch = self._next_batch(batches) if step < self._steps else None
            self._conclude(step, result, time.perf_counter() - start)
            if step % self._plan.steps_per_epoch == 0:
                self._verify(step)
                self._save(step)
            elif self._config.save_every and step % self._config.save_every == 0:
                self._save(step)
            start = time.perf_counter()
        self._save(step)
        if step == self._steps:
            if learner.updates in (0, updates if step > first else -1):
                raise TrainingError(
                    f"all {step - first or step} steps were skipped: no loss or gradient was finite. Look at the "
                    "images, at the weights of --init, and try a smaller learning rate or precision fp32"
                )
            self._write_model()
        return Outcome(step, self._steps, self._stopped_by)

    def _next_batch(self, batches: Iterator[Batch]) -> Batch | None:
        """The next batch; None, and a failure noted, if it cannot be trained on."""
        try:
            batch = next(batches)
            if batch.problems and self._config.bad_data == "stop":
                raise DataError(stopped_by(batch.problems[0]))
        except DataError as error:
            self._fail(error)
            return None
        return batch

    def _note_problems(self, batch: Batch) -> None:
        for problem in batch.problems:
            self.tell(Noted(f"{problem}; the next image is taken instead"))

    def _share(self) -> list[int]:
        """Where this rank's micro-batches begin and end in the joint batch. Ranks times micro-batches count: a run
        whose ranks have become micro-batches, or the other way round, is the same."""
        parts = self._config.accumulation
        bounds = share_bounds(self._plan.rows, self._world.world_size * parts)
        return bounds[self._world.rank * parts : (self._world.rank + 1) * parts + 1]

    def _conclude(self, step: int, result: StepResult, seconds: float) -> None:
        """Figures over all ranks, and whether any of them was asked to stop: then all do, at the same step."""
        received = self._interrupt.received
        self._check_folder()
        angles = result.stats.target_cosine.double().clamp(-1, 1).acos()
        failed, *asked, angle, correct, rows = self._world.sum(
            [
                float(self._failure is not None),
                float(received == signal.SIGINT),
                float(received == signal.SIGTERM),
                float(angles.sum()),
                float(result.stats.correct.sum()),
                float(len(angles)),
            ]
        )
        if failed:
            self._world.share(self._failure)
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
        if step == self._saved:
            return
        self._check_folder()
        self._world.share(self._failure)
        try:
            path = self._learner.save(self._folder.checkpoints, step)
        except OSError as error:
            raise disk_error(self._folder.checkpoints, error, self._way_back()) from None
        except CheckpointException as error:  # a BaseException of torch's: what was raised on some ranks
            causes = [wrapped[0] for wrapped in error.failures.values()]
            if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
                raise KeyboardInterrupt from None
            why = "; ".join(map(str, causes))
            raise TrainingError(f"{self._folder.checkpoints} cannot be written: {why}; {self._way_back()}") from None
        except CheckpointError as error:
            raise TrainingError(f"{error}; {self._way_back()}") from None
        self._saved = step
        self.tell(Saved(step, path))

    def _write_model(self) -> None:
        """The finished net in a file of its own, by the first rank."""
        with self._world.together():
            if self._world.rank == 0:
                content = io.BytesIO()
                torch.save(self._learner.backbone.state_dict(), content)
                try:
                    write_bytes(self._folder.model, content.getvalue())
                except OSError as error:
                    raise disk_error(self._folder.model, error, self._way_back()) from None

    def _check_folder(self) -> None:
        """Notes a failure if the run's folder is no longer the one that this process has locked."""
        if self._lock is not None and not self._lock.is_in_place():
            root = self._folder.root
            self._fail(
                TrainingError(
                    f"{root} was removed or replaced while the run trained in it. Put the folder back and "
                    f"go on with: {resume_command(root)}; or begin anew with another --output"
                )
            )

    def _way_back(self) -> str:
        return f"make room there and go on with: {resume_command(self._folder.root)}"
