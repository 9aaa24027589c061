"""The results of verifications that a run keeps: the thresholds of the last one, net and checkpoint of the best."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from torch import nn

from fused_arcface.base.files import write_bytes
from fused_arcface.base.reading import DataError
from fused_arcface.checkpoint.roots import keep_alone

from ..thresholds import KeptThresholds, read_thresholds
from .runs import RunFolder


class BestNet:
    """Writes ``thresholds.json`` at each verification, ``best.pt`` and ``best.json`` at the best one.

    If the checkpoint of the best verification is to be kept (``whole``), it goes to ``best/``, which is a run of its
    own: it can be evaluated, converted, resumed and fine-tuned as any other.

    The run continues from ``step``. A best net of a later step is not used: those steps are made again.
    """

    def __init__(self, folder: RunFolder, step: int, whole: bool) -> None:
        self._folder, self._whole = folder, whole
        self._accuracy = -1.0
        self._step: int | None = None
        with contextlib.suppress(DataError):  # a damaged file will be written anew
            before = read_thresholds(folder.best_thresholds)
            if before is not None and before.step is not None and before.step <= step and folder.best.is_file():
                self._accuracy, self._step = before.accuracy, before.step

    def keep(self, net: nn.Module, found: KeptThresholds) -> bool:
        """Keep a verification of a net; return true if it is the best until now. If two are equal, the first stays."""
        found.save(self._folder.thresholds)
        if found.accuracy <= self._accuracy:
            return False
        write_net(net, self._folder.best)
        found.save(self._folder.best_thresholds)
        self._accuracy, self._step = found.accuracy, found.step
        return True

    def keep_checkpoint(self, directory: Path, step: int) -> str:
        """Keep a complete checkpoint, written at ``step``, if the best verification was at that step.

        Returns:
            A note for the user if it cannot be kept because ``best/`` was trained in; otherwise nothing.
        """
        own, best = self._folder, self._folder.best_run
        if not self._whole or step != self._step:
            return ""
        if best.log.exists():
            return (
                f"{best.root} was trained in, so it stays as it is; the checkpoint of the best verification is not kept"
            )
        keep_alone(directory, best.checkpoints)
        for file, target in (
            (own.classes, best.classes),
            (own.data, best.data),
            (own.best, best.best),
            (own.best_thresholds, best.best_thresholds),
            (own.best_thresholds, best.thresholds),
            (own.config, best.config),  # the last one, because it makes the folder a run
        ):
            write_bytes(target, file.read_bytes())
        return ""


def write_net(net: nn.Module, path: Path) -> None:
    """Write a net's ``state_dict`` as torch saves it, whole or not at all."""
    content = io.BytesIO()
    torch.save(net.state_dict(), content)
    write_bytes(path, content.getvalue())
