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
        OptionError: too few identities or images to verify with.
        MissingExtra: scikit-learn is not installed.
    """

    def __init__(self, source: ImageSource, batch_size: int, workers: int) -> None:
        self._source, self._batch_size, self._workers = source, batch_size, workers
        try:
            # With any embeddings: what cannot be verified is said before the hours are spent, not after.
            verify(torch.randn(len(source), 2, generator=torch.Generator().manual_seed(0)), source.labels)
        except ValueError as error:
            raise OptionError(f"verify_data: {error}") from None

    def __call__(self, net: nn.Module, spec: ImageSpec, device: torch.device) -> tuple[Verification | None, list[str]]:
        """The figures, None if the net's embeddings are not finite, and what went wrong: where images cannot be read,
        the next ones stand in for them."""
        parts: list[Tensor] = []
        labels: list[Tensor] = []
        problems: list[str] = []
        for batch in load_batches(self._source, spec, self._items(), self._workers):
            parts.append(embed(net, batch.images.to(device)).float().cpu())
            labels.append(batch.labels)
            problems += batch.problems
        embeddings = torch.cat(parts)
        if not embeddings.isfinite().all():
            return None, [*problems, "no verification: the net's embeddings are not finite"]
        return verify(embeddings, torch.cat(labels)), problems

    def _items(self) -> Iterator[list[Item]]:
        for start in range(0, len(self._source), self._batch_size):
            yield [Item(index, False) for index in range(start, min(start + self._batch_size, len(self._source)))]
