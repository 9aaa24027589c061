"""The folder of a training run: what lies in it under which name, and a trained net out of it.

::

    RUN/config.toml     every option as it was resolved
    RUN/classes.txt     the name of each class, a line each; see :func:`fused_arcface.text.encode_names`
    RUN/log.jsonl       figures of each step and verification
    RUN/checkpoints/    see :mod:`fused_arcface.checkpoint`
    RUN/tensorboard/    the same for TensorBoard, where it is installed
    RUN/model.pt        the finished backbone's state_dict
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .. import checkpoint
from ..data.images import ImageSpec
from ..files import write_bytes
from ..text import decode_names, encode_names
from .backbones import build_backbone
from .config import TrainConfig, read_options, rules


class RunError(ValueError):
    """A folder that is no training run, or none that can be used so; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.toml"

    @property
    def classes(self) -> Path:
        return self.root / "classes.txt"

    @property
    def log(self) -> Path:
        return self.root / "log.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def has_checkpoint(self) -> bool:
        return checkpoint.latest(self.checkpoints) is not None

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def model(self) -> Path:
        return self.root / "model.pt"

    def read_config(self) -> TrainConfig:
        """The run's options.

        Raises:
            RunError: it has none, or they cannot be read.
        """
        if not self.config.is_file():
            why = "is not a folder" if not self.root.is_dir() else f"is no training run: it has no {self.config.name}"
            raise RunError(f"{self.root} {why}; make one with: fused-arcface train --output {self.root}")
        try:
            return TrainConfig().replace(read_options(self.config))
        except (TypeError, ValueError) as error:
            raise RunError(f"{self.config}: {error}") from None


def check_run(folder: RunFolder, config: TrainConfig, classes: list[str], resume: bool) -> None:
    """Raises unless a training with these options and classes may begin in the folder, or go on there.

    Raises:
        RunError: see above.
    """
    if not resume:
        if folder.has_checkpoint:
            raise RunError(f"{folder.root} holds a run already: --resume goes on with it; or name another --output")
        return
    before = folder.read_config()
    for name, (rule, _) in rules().items():
        own, saved = getattr(config, name), getattr(before, name)
        if rule.fixed and folder.has_checkpoint and own != saved:
            raise RunError(f"{folder.root}: a resumed run keeps its {name}, {saved!r}; got {own!r}")
    try:
        saved_classes = decode_names(folder.classes.read_bytes()) if folder.classes.exists() else classes
    except (OSError, ValueError) as error:
        raise RunError(f"{folder.classes} cannot be read: {error}") from None
    if folder.has_checkpoint and saved_classes != classes:
        raise RunError(
            f"{folder.root}: a resumed run keeps its {len(saved_classes)} identities; "
            f"{config.data} has {len(classes)}, or others"
        )


def write_run(folder: RunFolder, config: TrainConfig, classes: list[str]) -> None:
    """Makes the folder and writes down what is trained in it.

    Raises:
        RunError: it cannot be written.
    """
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
        config.save(folder.config)
        write_bytes(folder.classes, encode_names(classes))
    except OSError as error:
        raise RunError(f"{folder.root} cannot be written: {error.strerror}") from None


def load_backbone(run: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, ImageSpec]:
    """The net of a training run, from its newest complete checkpoint, in evaluation mode, and the images it takes.

    Args:
        run: the run's folder, ``--output`` of ``fused-arcface train``. It may still be under way.
        device: where the net goes.

    Raises:
        RunError: the folder is no run, has no checkpoint yet, or one that does not fit its configuration.
        fused_arcface.checkpoint.CheckpointError: the checkpoint is truncated.
        MissingExtra: the net is timm's, and timm is not installed.
    """
    folder = RunFolder(Path(run))
    config = folder.read_config()
    if config.image_size is None or config.channels is None or config.embedding_dim is None:
        raise RunError(f"{folder.config} must have image_size, channels and embedding_dim, as a run writes it")
    spec = ImageSpec(config.image_size, config.channels)
    backbone = build_backbone(config.backbone, config.embedding_dim, spec)
    try:
        backbone.load_state_dict(checkpoint.load_state(folder.checkpoints, "backbone"))
    except FileNotFoundError:
        raise RunError(f"{run} has no complete checkpoint yet") from None
    except RuntimeError as error:
        if isinstance(error, checkpoint.CheckpointError):
            raise
        raise RunError(f"{run}: the checkpoint does not fit {folder.config.name}: {error}") from None
    return backbone.to(device).eval(), spec
