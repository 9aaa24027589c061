"""What a run keeps of its verifications: the thresholds of the last one, and the net of the best one."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import nn

from fused_arcface.base.files import write_bytes
from fused_arcface.base.reading import DataError

from ..thresholds import KeptThresholds, read_thresholds
from .runs import RunFolder


class BestNet:
    """Writes ``thresholds.json`` at each verification, ``best.pt`` and ``best.json`` at the best one.

    Args:
        folder: of the run.
        step: from which the run goes on; a best net of a later step belongs to a training that was given up.
    """

    def __init__(self, folder: RunFolder, step: int) -> None:
        self._folder = folder
        try:
            before = read_thresholds(folder.best_thresholds)
        except DataError:  # it will be written anew
            before = None
        known = before is not None and before.step is not None and before.step <= step and folder.best.is_file()
        self._accuracy = before.accuracy if before is not None and known else -1.0

    def keep(self, net: nn.Module, found: KeptThresholds) -> bool:
        """Keep a verification of a net; return whether it is the best until now. Of equal ones the first stays.

        Raises:
            OSError: a file cannot be written.
        """
        found.save(self._folder.thresholds)
        if found.accuracy <= self._accuracy:
            return False
        write_net(net, self._folder.best)
        found.save(self._folder.best_thresholds)
        self._accuracy = found.accuracy
        return True


def write_net(net: nn.Module, path: Path) -> None:
    """Write a net's ``state_dict`` as torch saves it, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    content = io.BytesIO()
    torch.save(net.state_dict(), content)
    write_bytes(path, content.getvalue())
