"""The folder of a training run: its files, and the trained net.

::

    RUN/config.toml     every option as it was resolved
    RUN/classes.txt     the name of each class, a line each; see :func:`fused_arcface.base.text.encode_names`
    RUN/data.json       fingerprint of the data, see :mod:`fused_arcface.app.training.fingerprint`
    RUN/run.lock        held by the process that trains, see :mod:`fused_arcface.app.training.lock`
    RUN/log.jsonl       figures of each step and verification
    RUN/checkpoints/    see :mod:`fused_arcface.checkpoint`
    RUN/tensorboard/    the same for TensorBoard, where it is installed
    RUN/model.pt        the finished backbone's state_dict
    RUN/best.pt         the state_dict of the backbone with the highest verification accuracy
    RUN/thresholds.json cosine thresholds of the last verification, see :mod:`fused_arcface.app.thresholds`
    RUN/best.json       the same of best.pt
    RUN/verification.json curves and hardest pairs of the last verification, see :mod:`fused_arcface.app.report.digest`
    RUN/report.html     the report of the run, see :mod:`fused_arcface.app.report.training`
    RUN/best/           a run that ends at that verification: its checkpoint with the class centers, and the files above
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fused_arcface import checkpoint
from fused_arcface.base.files import write_bytes, write_text
from fused_arcface.base.reading import DataError, check_regular, file_errors, read_bytes, read_names
from fused_arcface.base.text import encode_names
from fused_arcface.checkpoint.roots import remove_unfinished

from ..data.images import ImageSpec
from ..nets.backbones import build_backbone
from .config import TrainConfig, read_options, rules
from .fingerprint import Fingerprint
from .lock import FolderInUse, FolderLock

_MOST_BYTES = 1 << 16
"""Largest size of a fingerprint's file."""


class RunError(ValueError):
    """Raised for a folder that is not a training run, or cannot be used; the message says what to do."""


class _Place:
    """The path of a file or a folder in a run's folder."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, folder: RunFolder, _: object) -> Path:
        return folder.root / self._name


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    root: Path

    @property
    def place(self) -> str:
        """The folder's absolute path, which all ranks must have given."""
        return str(self.root.resolve())

    config = _Place("config.toml")
    classes = _Place("classes.txt")
    data = _Place("data.json")
    log = _Place("log.jsonl")
    checkpoints = _Place("checkpoints")
    tensorboard = _Place("tensorboard")
    model = _Place("model.pt")
    best = _Place("best.pt")
    thresholds = _Place("thresholds.json")
    best_thresholds = _Place("best.json")
    verification = _Place("verification.json")
    report = _Place("report.html")

    @property
    def best_run(self) -> RunFolder:
        return RunFolder(self.root / "best")

    @property
    def has_checkpoint(self) -> bool:
        return checkpoint.latest(self.checkpoints) is not None

    @contextlib.contextmanager
    def locked(self) -> Iterator[FolderLock]:
        """Make the folder, if it is missing, and lock it for this process.

        If it is not a training run in the end, the lock's file is removed, and the folders that were made for it.

        Raises:
            RunError: if another process trains in it, or it cannot be written.
        """
        missing = [folder for folder in (self.root, *self.root.parents) if not folder.exists()]
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(self.root)
        except FolderInUse as owner:
            raise RunError(
                f"{self.root} is in use: {owner} trains in it; wait for its end or stop it, or name another --output"
            ) from None
        except OSError as error:
            raise RunError(f"{self.root} cannot be written: {error.strerror}") from None
        with lock:
            try:
                yield lock
            finally:
                with contextlib.suppress(OSError):  # something else lies in a folder
                    if lock.is_in_place() and not self.config.exists():
                        lock.remove()
                        for folder in missing:
                            folder.rmdir()

    def check_files(self) -> None:
        """Raise RunError if one of the run's files exists and is not a regular file.

        A training reads and writes them, and would wait forever for a named pipe.
        """
        evaluated = (self.thresholds, self.best_thresholds, self.verification, self.report)
        for file in (self.config, self.classes, self.data, self.log, self.model, self.best, *evaluated):
            if file.exists():
                try:
                    check_regular(file)
                except DataError as error:
                    raise RunError(f"{error}; remove it or put the run's own back") from None

    def read_fingerprint(self) -> Fingerprint | None:
        """Return the fingerprint of the run's data, None for a run of an old version; RunError if it is damaged."""
        if not self.data.is_file():
            return None
        try:
            with file_errors(self.data):
                return Fingerprint.from_json(read_bytes(self.data, _MOST_BYTES).decode())
        except DataError as error:
            raise RunError(f"{error}; remove it to continue without it") from None

    def read_config(self) -> TrainConfig:
        """Return the run's options; RunError if there are none or they cannot be read."""
        if not self.config.exists():
            if not self.root.exists():
                why = "does not exist"
            elif self.root.is_dir():
                why = f"is not a training run: it has no {self.config.name}"
            else:
                why = "is not a folder"
            command = f"fused-arcface train --data DATA --output {shlex.quote(str(self.root))}"
            raise RunError(f"{self.root} {why}; make a run with: {command}")
        try:
            config = TrainConfig().replace(read_options(self.config))
            if not config.data:
                raise ValueError("it names no data, so it is damaged or not of a run; restore it from a copy")
            return config
        except (TypeError, ValueError) as error:
            raise RunError(f"{self.config}: {error}") from None

    def build_net(self) -> tuple[nn.Module, ImageSpec]:
        """Return the run's net with new weights, in evaluation mode, and the images that it takes.

        Raises:
            RunError: if the run has no options.
        """
        config = self.read_config()
        if config.image_size is None or config.channels is None or config.embedding_dim is None:
            raise RunError(f"{self.config} must have image_size, channels and embedding_dim, as a run writes it")
        spec = ImageSpec(config.image_size, config.channels)
        return build_backbone(config.backbone, config.embedding_dim, spec).eval(), spec


def check_run(folder: RunFolder, config: TrainConfig, classes: list[str], data: Fingerprint, resume: bool) -> None:
    """Raise RunError unless a training with these options, classes and data may begin or continue in the folder."""
    folder.check_files()
    if not resume:
        if not folder.has_checkpoint:
            return
        if folder.config.exists():
            raise RunError(f"{folder.root} holds a run already: add --resume to continue it, or name another --output")
        raise RunError(
            f"{folder.root} has checkpoints but no {folder.config.name}: put it back and --resume, or name another "
            "--output"
        )
    before = folder.read_config()
    try:
        saved_classes = read_names(folder.classes) if folder.classes.exists() else classes
    except DataError as error:
        raise RunError(str(error)) from None
    if not folder.has_checkpoint:
        return
    for name, (rule, _) in rules().items():
        own, saved = getattr(config, name), getattr(before, name)
        if rule.fixed and own != saved:
            raise RunError(f"{folder.root}: a resumed run keeps its {name}, {saved!r}; got {own!r}")
    if saved_classes != classes:
        raise RunError(
            f"{folder.root}: a resumed run keeps its {len(saved_classes)} identities; "
            f"{config.data} has {len(classes)}, or others"
        )
    saved_data = folder.read_fingerprint()
    what = saved_data.difference(data) if saved_data is not None else None
    if what is not None:
        raise RunError(
            f"{folder.root}: a resumed run keeps its data; {config.data} has other {what} than the run began with: "
            f"{getattr(saved_data, what)} then, {getattr(data, what)} now. Give it the same images, name another "
            f"--output, or remove {folder.data} to continue with these"
        )


def write_run(folder: RunFolder, config: TrainConfig, classes: list[str], data: Fingerprint) -> None:
    """Write options, classes and fingerprint of a run, or raise RunError. The options come last: they make it a run."""
    try:
        # Files that a killed process had not finished. The lock says that no other process is at work.
        for place in (folder.root, folder.checkpoints, folder.best_run.root):
            for unfinished in place.glob(".partial-*"):
                if unfinished.is_file():
                    unfinished.unlink()
        if folder.checkpoints.is_dir():
            remove_unfinished(folder.checkpoints)
        write_bytes(folder.classes, encode_names(classes))
        write_text(folder.data, data.to_json())
        config.save(folder.config)
    except OSError as error:
        raise RunError(f"{folder.root} cannot be written: {error.strerror}") from None


def remove_run(folder: RunFolder) -> None:
    """Remove what :func:`write_run` wrote, of a run that cannot begin. What cannot be removed stays."""
    for path in (folder.config, folder.data, folder.classes):
        with contextlib.suppress(OSError):
            path.unlink()


def load_backbone(run: Path, device: torch.device | str = "cpu", *, trust: bool = False) -> tuple[nn.Module, ImageSpec]:
    """Load the net of a run from its newest complete checkpoint, and return it with the images that it takes.

    Args:
        run: folder of the run, ``--output`` of ``fused-arcface train``. The run may still be in progress.
        device: device of the net.
        trust: run the code that a checkpoint of format 1 may hold. Nothing else of a run is code: its margin is not
            needed, and not imported.

    Raises:
        RunError: if the folder is no run, or its checkpoint is missing or does not fit its options.
        fused_arcface.checkpoint.CheckpointError: if the checkpoint is damaged.
        MissingExtra: if the net is timm's and timm is not installed.
    """
    folder = RunFolder(Path(run))
    backbone, spec = folder.build_net()
    state = read_backbone(folder, trust=trust)
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        raise RunError(f"{run}: the checkpoint does not fit {folder.config.name}: {error}") from None
    return backbone.to(device).eval(), spec


def read_backbone(folder: RunFolder, *, trust: bool = False) -> dict[str, Tensor]:
    """Return the state of a run's net in its newest complete checkpoint.

    Raises:
        RunError: if the run has no checkpoint, or one without a net.
        fused_arcface.checkpoint.CheckpointError: if the checkpoint is damaged.
    """
    try:
        state = checkpoint.load_state(folder.checkpoints, "backbone", trust=trust)
    except FileNotFoundError:
        raise RunError(f"{folder.root} has no complete checkpoint yet") from None
    if not isinstance(state, dict) or not all(isinstance(each, Tensor) for each in state.values()):
        raise RunError(f"{folder.root}: the checkpoint's backbone is no state of a net")
    return {str(name): each for name, each in state.items()}
