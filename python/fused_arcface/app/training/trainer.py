"""A training run from its options to its end: what ``fused-arcface train`` calls."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from ..data.sources import ImageSource
from .config import TrainConfig
from .events import Ended, Listener
from .interrupt import Interrupt
from .loop import TrainingLoop
from .outcomes import DryRun, TrainingOutcome
from .resolve import agreed_fingerprint, open_data, resolve, temporary_centers
from .runs import RunFolder, check_run, remove_run, write_run
from .world import World, join_world


def train(
    config: TrainConfig,
    output: str | os.PathLike[str],
    *,
    resume: bool | Literal["auto"] = False,
    trust: bool = False,
    listener: Listener | None = None,
) -> TrainingOutcome:
    """Train as the options say, and write a run's folder.

    A resumed run, on any number of ranks, gives the result of an uninterrupted one. On SIGINT (Ctrl-C) and SIGTERM the
    run saves a checkpoint after the step in progress and ends.

    Args:
        config: options; those that are None are chosen here.
        output: folder of the run, made if it is missing. It is locked: one training at a time writes into it.
        resume: true to continue from the newest checkpoint in it, or from the start if there is none yet; ``"auto"`` to
            do so if the folder holds a run, and begin one otherwise.
        trust: run the code that a resumed checkpoint of format 1 may hold.
        listener: called with each event of the training, see :mod:`fused_arcface.app.training.events`.

    Returns:
        The steps that were made, and the figures of the last one.

    Raises:
        RunError: if the folder holds a run and ``resume`` is not set, if that run has other fixed options or other
            data, or if another process trains in it.
        DataError: if there is nothing to train on, data differ between ranks, or the data have a problem and
            ``bad_data`` is ``"stop"``.
        OptionError: if options do not fit each other, the data or the machine, or differ between ranks.
        TrainingError: if the folder was removed or cannot be written, or every step was skipped.
        MissingExtra: if a library is not installed.

    >>> import tempfile
    >>> config = TrainConfig(data="identities:4x4", epochs=2, batch_size=8, image_size=16, workers=0, device="cpu")
    >>> outcome = train(config, Path(tempfile.mkdtemp()) / "run")
    >>> outcome.step, outcome.steps, sorted(outcome.metrics)
    (4, 4, ['accuracy', 'loss', 'target_angle', 'verification_accuracy', 'verification_eer'])
    """
    folder, lock = RunFolder(Path(output)), None
    with _opened(config) as (world, interrupt, config, source), contextlib.ExitStack() as held:
        data = agreed_fingerprint(world, config, source, output=folder.place, resume=resume, dry_run=False)
        with world.together():
            if world.rank == 0:
                lock = held.enter_context(folder.locked())
        with world.together():  # nobody writes before all have looked
            check_run(folder, config, source.names, data, folder.config.exists() if resume == "auto" else resume)
        undo = held.enter_context(contextlib.ExitStack())  # nothing is left of a run that cannot begin
        if world.rank == 0 and not folder.config.exists():
            undo.callback(remove_run, folder)
        with world.together():
            if world.rank == 0:
                write_run(folder, config, source.names, data)
        loop = TrainingLoop(config, folder, lock, world, source, interrupt, listener, trust)
        held.callback(loop.close)
        try:
            with contextlib.ExitStack() as undo_store:
                undo_store.callback(loop.discard)
                first = loop.begin()
                undo_store.pop_all()
            undo.pop_all()
            return loop.run(first)
        finally:
            loop.tell(Ended())


def try_out(
    config: TrainConfig,
    output: str | os.PathLike[str],
    *,
    resume: bool | Literal["auto"] = False,
    listener: Listener | None = None,
) -> DryRun:
    """Do all that comes before the first step of a training, and that step; write nothing.

    Args and errors are those of :func:`train`.

    >>> config = TrainConfig(data="identities:4x4", batch_size=8, image_size=16, workers=0, device="cpu")
    >>> try_out(config, "run").config.scale, Path("run").exists()
    (16.0, False)
    """
    folder = RunFolder(Path(output))
    with _opened(config) as (world, interrupt, config, source):
        data = agreed_fingerprint(world, config, source, output=folder.place, resume=resume, dry_run=True)
        with world.together():
            check_run(folder, config, source.names, data, folder.config.exists() if resume == "auto" else resume)
        with temporary_centers(config, world, folder.has_checkpoint) as config:
            loop = TrainingLoop(config, folder, None, world, source, interrupt, listener)
            with contextlib.closing(loop):
                return loop.try_out()


@contextlib.contextmanager
def _opened(config: TrainConfig) -> Iterator[tuple[World, Interrupt, TrainConfig, ImageSource]]:
    """Join the other ranks, open the data and resolve the options."""
    with join_world(config.device) as world, Interrupt() as interrupt:
        with world.together():
            source = open_data(config)
            config = resolve(config, source, world)
        yield world, interrupt, config, source
