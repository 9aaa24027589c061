"""The loop over the steps of a training run, in one process. :mod:`.trainer` makes it and lets it run."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from fused_arcface import checkpoint
from fused_arcface.base.reading import DataError
from fused_arcface.checkpoint import CheckpointError

from ..data.sources import ImageSource
from ..thresholds import KeptThresholds
from .batches import Batch, BatchPlan, load_batches, share_bounds
from .best import BestNet, write_net
from .config import TrainConfig
from .events import Began, Checkpointed, Event, Listener, LogFiles, Noted, Stepped, Verified, open_log, was_verified
from .interrupt import Interrupt
from .joint_step import StepResult
from .learner import Learner
from .lock import FolderLock
from .outcomes import DryRun, TrainingError, TrainingOutcome
from .resolve import check_problems, open_verification
from .runs import RunFolder
from .verifier import Verifier
from .world import World, resume_command


class TrainingLoop:
    """One process's part of a training run; see :func:`fused_arcface.app.training.trainer.train`."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        lock: FolderLock | None,
        world: World,
        source: ImageSource,
        interrupt: Interrupt,
        listener: Listener | None,
        trust: bool = False,
    ) -> None:
        self._config, self._folder, self._lock, self._world, self._source = config, folder, lock, world, source
        self._interrupt, self._trust = interrupt, trust
        balanced = source.labels if config.balanced else None
        self._plan = BatchPlan(len(source), config.batch_size, config.seed, config.flip, balanced)
        with world.together():  # before the head makes a file of class centers
            pairs = open_verification(config) if world.rank == 0 else None
        self._verifier = Verifier(pairs, config.batch_size, config.workers) if pairs is not None else None
        self._steps = config.epochs * self._plan.steps_per_epoch
        self._learner = Learner(config, len(source.names), self._steps, world)
        self._listener = listener
        self._metrics: dict[str, float] = {}
        self._files: LogFiles = []
        self._failure: Exception | None = None
        self._stopped_by: signal.Signals | None = None
        self._saved = -1

    def tell(self, event: Event) -> None:
        """Tell the listeners; on other ranks than the first, of notes alone."""
        if isinstance(event, Stepped):
            self._metrics.update(loss=event.loss, accuracy=event.accuracy, target_angle=event.target_angle)
        elif isinstance(event, Verified):
            self._metrics.update(verification_accuracy=event.found.accuracy, verification_eer=event.found.eer)
        if self._world.rank == 0 or isinstance(event, Noted):
            if self._listener is not None:
                self._listener(event)
            with self._noting_disk_errors():
                for file in self._files:
                    file(event)

    def close(self) -> None:
        """Close the log, and the store of the class centers if they have one."""
        with self._noting_disk_errors():
            for file in self._files:
                file.close()
        if self._learner.head.center_store is not None:
            self._learner.head.center_store.close()

    def discard(self) -> None:
        """Remove the store that was made for the class centers, if one was."""
        if self._learner.head.center_store is not None:
            self._learner.head.center_store.discard()

    def _fail(self, failure: Exception) -> None:
        """Note this rank's first failure; all ranks raise it at the end of the step."""
        self._failure = self._failure or failure

    @contextlib.contextmanager
    def _noting_disk_errors(self) -> Iterator[None]:
        """Run a block that writes files of the run; note a failure if one cannot be written."""
        try:
            yield
        except OSError as error:
            self._fail(self._unwritten(self._folder.root, error))

    def _unwritten(self, path: Path, error: Exception) -> TrainingError:
        """Return the error for a file of the run that cannot be written."""
        text = str(error)
        if isinstance(error, OSError):
            text = f"{error.filename or path} cannot be written: {os.strerror(error.errno) if error.errno else error}"
        return TrainingError(f"{text}; make room there and resume with: {resume_command(self._folder.root)}")

    def run(self, first: int) -> TrainingOutcome:
        """Train from the step that :meth:`begin` returned until the last one or an interruption."""
        step = self._saved = first
        updates = self._learner.updates
        self._best = BestNet(self._folder, step, self._config.keeps_best_run)
        if step and step % self._plan.steps_per_epoch == 0:
            self._verify(step, missed=True)
        self._keep_best(step, checkpoint.latest(self._folder.checkpoints))
        sizes, batches = self._batches(step)
        batch = self._next_batch(batches) if step < self._steps else None
        self._world.share(self._failure)
        start = time.perf_counter()
        while batch is not None and self._stopped_by is None:
            self._note_problems(batch)
            result = self._learner.learn(batch.images, batch.labels, sizes, step)
            step += 1
            # Read before the ranks exchange the step's figures: a rank that cannot go on tells the others with them.
            batch = self._next_batch(batches) if step < self._steps else None
            # A coarse clock may stand still, or go back.
            self._conclude(step, result, max(time.perf_counter() - start, 1e-9))
            if step % self._plan.steps_per_epoch == 0:
                self._verify(step)
                self._save(step)
            elif self._config.save_every and step % self._config.save_every == 0:
                self._save(step)
            start = time.perf_counter()
        self._save(step)
        self._world.share(self._failure)
        if step == self._steps:
            if self._learner.updates in (0, updates if step > first else -1):
                raise TrainingError(
                    f"all {step - first or step} steps were skipped: no loss or gradient was finite. Look at the "
                    "images, at the weights of --init, and try a smaller learning rate or precision fp32"
                )
            self._write_model()
        return TrainingOutcome(step, self._steps, self._stopped_by, self._metrics)

    def try_out(self) -> DryRun:
        """Make the first step, and keep nothing of it."""
        step = self.begin()
        sizes, batches = self._batches(min(step, self._steps - 1))
        start = time.perf_counter()
        batch = self._next_batch(batches)
        self._world.share(self._failure)
        assert batch is not None
        self._note_problems(batch)
        loss = self._learner.learn(batch.images, batch.labels, sizes, step).loss
        return DryRun(self._config, loss, time.perf_counter() - start)

    def begin(self) -> int:
        """Load the newest checkpoint, or begin; tell the listeners and return the number of steps made by then."""
        config, learner, source = self._config, self._learner, self._source
        if self._folder.has_checkpoint:
            step = learner.load(self._folder.checkpoints, trust=self._trust)
        else:
            step = 0
            with self._world.together():
                learner.start(source.names)
        assert config.scale is not None
        if self._lock is not None:
            with self._noting_disk_errors():
                self._files = open_log(self._folder.log, self._folder.tensorboard, step)
        self.tell(
            Began(
                step=step,
                steps=self._steps,
                images=len(source),
                identities=len(source.names),
                parameters=sum(each.numel() for each in learner.backbone.parameters()),
                device=str(self._world.device),
                image=learner.spec.shape,
                batch_size=self._plan.rows,
                scale=config.scale,
                memory=learner.memory,
            )
        )
        if self._world.rank == 0:
            problems = [*source.problems]
            if self._verifier is not None:
                problems += [f"verification: {problem}" for problem in self._verifier.problems]
            for note in [*learner.notes, *source.notes, *(f"{problem}; skipped" for problem in problems)]:
                self.tell(Noted(note))
        return step

    def _batches(self, step: int) -> tuple[list[int], Iterator[Batch]]:
        """Return the sizes of this rank's micro-batches, and its share of the batches from a step on."""
        # Only ranks times micro-batches matter: a run with half the ranks and twice the micro-batches is the same.
        parts = self._config.accumulation
        bounds = share_bounds(self._plan.rows, self._world.world_size * parts)
        bounds = bounds[self._world.rank * parts : (self._world.rank + 1) * parts + 1]
        items = self._plan.from_step(step, self._steps, slice(bounds[0], bounds[-1]))
        batches = load_batches(
            self._source,
            self._learner.spec,
            items,
            self._config.workers,
            pin_memory=self._world.device.type == "cuda",
            level=self._config.augment,
        )
        return [end - start for start, end in pairwise(bounds)], batches

    def _next_batch(self, batches: Iterator[Batch]) -> Batch | None:
        """Return the next batch; note a failure and return None if there is a problem with it."""
        try:
            batch = next(batches)
            check_problems(batch.problems, self._config.bad_data)
            return batch
        except DataError as error:
            self._fail(error)
            return None

    def _note_problems(self, batch: Batch) -> None:
        for problem in batch.problems:
            self.tell(Noted(f"{problem}; the next image is taken instead"))

    def _conclude(self, step: int, result: StepResult, seconds: float) -> None:
        """Sum figures over all ranks; if one rank was asked to stop, all stop at this step."""
        received = self._interrupt.received
        self._check_folder()
        angles = result.stats.target_cosine.double().clamp(-1, 1).acos()
        flags = (self._failure is not None, received == signal.SIGINT, received == signal.SIGTERM)
        figures = (angles.sum(), result.stats.correct.sum(), len(angles))
        failed, *asked, angle, correct, rows = self._world.sum([float(each) for each in (*flags, *figures)])
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

    def _verify(self, step: int, missed: bool = False) -> None:
        """Verify the net at the end of an epoch, on the first rank; the others wait.

        An interrupted training saves at once. When it is resumed, it makes the verification that it ``missed``.
        """
        epoch = step // self._plan.steps_per_epoch
        due = epoch % self._config.verify_every == 0 or epoch == self._config.epochs
        due = due and self._stopped_by is None
        if self._verifier is not None and due and not (missed and was_verified(self._folder.log, step)):
            name = Path(self._config.verify_data or f"unseen {self._config.data}").name
            learner = self._learner
            checked, problems = self._verifier(learner.backbone, learner.spec, self._world.device, name, step)
            for problem in problems:
                self.tell(Noted(f"verification: {problem}"))
            if checked is not None:
                found = checked.found
                kept = KeptThresholds(name, found.accuracy, checked.thresholds, step, found.num_pairs[1])
                best = False
                with self._noting_disk_errors():
                    best = self._best.keep(learner.backbone, kept)
                    if checked.digest is not None:
                        checked.digest.save(self._folder.verification)
                self.tell(Verified(step, epoch, found, best))
        self._world.wait()

    def _save(self, step: int) -> None:
        if step == self._saved:
            return
        self._check_folder()
        self._world.share(self._failure)
        try:
            path = self._learner.save(self._folder.checkpoints, step)
        except (CheckpointError, OSError) as error:
            raise self._unwritten(self._folder.checkpoints, error) from None
        self._saved = step
        self.tell(Checkpointed(step, path))
        self._keep_best(step, path)

    def _keep_best(self, step: int, path: Path | None) -> None:
        """Keep the checkpoint of a step if its verification is the best, on the first rank."""
        if self._world.rank == 0 and path is not None:
            with self._noting_disk_errors():
                if note := self._best.keep_checkpoint(path, step):
                    self.tell(Noted(note))

    def _write_model(self) -> None:
        """Write the finished net into a file, on the first rank."""
        with self._world.together(), self._noting_disk_errors():
            if self._world.rank == 0:
                write_net(self._learner.backbone, self._folder.model)
        self._world.share(self._failure)

    def _check_folder(self) -> None:
        """Note a failure if the run's folder is no longer the one that this process has locked."""
        if self._lock is not None and not self._lock.is_in_place():
            root = self._folder.root
            self._fail(
                TrainingError(
                    f"{root} was removed or replaced while the run trained in it. Put the folder back and "
                    f"resume with: {resume_command(root)}; or start again with another --output"
                )
            )
