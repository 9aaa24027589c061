"""1:1 verification of a net that is being trained, on labelled images of people that it is not trained on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..data.images import ImageSpec
from ..data.sources import ImageSource
from ..evaluation import Verification, verify
from .batches import Item, load_batches
from .config import OptionError
from .nets import embed


class Verifier:
    """Called with a net at the end of an epoch.

    Args:
        source: the images.
        batch_size: images that are embedded at once.
        workers: processes that read images.

    Raises:
        OptionError: no identity has two images, or there is only one identity.
        MissingExtra: scikit-learn is not installed.
    """

    def __init__(self, source: ImageSource, batch_size: int, workers: int) -> None:
        self._source, self._batch_size, self._workers = source, batch_size, workers
        counts = source.labels.bincount()
        if len(counts) < 2 or counts.max() < 2:
            raise OptionError("verify_data must hold two identities or more, and one of them twice")

    def __call__(self, net: nn.Module, spec: ImageSpec, device: torch.device) -> tuple[Verification, list[str]]:
        """The figures, and the images that could not be read: the next ones stood in for them."""
        parts: list[Tensor] = []
        labels: list[Tensor] = []
        problems: list[str] = []
        for batch in load_batches(self._source, spec, self._items(), self._workers):
            parts.append(embed(net, batch.images.to(device)).float().cpu())
            labels.append(batch.labels)
            problems += batch.problems
        return verify(torch.cat(parts), torch.cat(labels)), problems

    def _items(self) -> Iterator[list[Item]]:
        for start in range(0, len(self._source), self._batch_size):
            yield [Item(index, False) for index in range(start, min(start + self._batch_size, len(self._source)))]
