"""1:1 verification of a net in training, on pairs of people that it is not trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fused_arcface.evaluation import Pairs, Verification, pair_scores, verify_scores
from fused_arcface.evaluation.thresholds import OperatingPoint, operating_points
from fused_arcface.evaluation.verification import FARS

from ..data.images import ImageSpec
from ..data.sources import ImageSet
from ..nets.small import embed
from ..report.digest import Digest, digest_pairs
from ..report.thumbnails import Thumbnails
from ..thresholds import of_cosine_distance
from .batches import Item, load_batches
from .config import OptionError

_FARS = FARS[:3]


class Checked(NamedTuple):
    """One verification."""

    found: Verification
    thresholds: list[OperatingPoint]
    """Cosines."""
    digest: Digest | None = None
    """For the run's report; None if it could not be made."""


class Verifier:
    """Verifies a net at the end of an epoch.

    Args:
        images: set of images with pairs.
        batch_size: number of images that are embedded at once.
        workers: number of processes that read images.

    Raises:
        OptionError: if there are too few pairs to verify with.
        MissingExtra: if scikit-learn is not installed.
    """

    def __init__(self, images: ImageSet, batch_size: int, workers: int) -> None:
        assert images.pairs is not None
        self._images, self._pairs, self._batch_size, self._workers = images, images.pairs, batch_size, workers
        self.problems = images.problems
        try:
            # With random embeddings: an error is raised before hours of training, not after them.
            _verify(torch.randn(len(images), 2, generator=torch.Generator().manual_seed(0)), self._pairs)
        except ValueError as error:
            raise OptionError(f"verify_data: {error}") from None

    def __call__(
        self, net: nn.Module, spec: ImageSpec, device: torch.device, name: str, step: int
    ) -> tuple[Checked | None, list[str]]:
        """Verify a net; return the figures, None if there are none, and what went wrong.

        A pair with an image that cannot be read is left out. A verification that cannot be made does not end the
        training. The figures keep the set's ``name`` and the ``step``.
        """
        embeddings: list[Tensor] = []
        numbers: list[Tensor] = []
        problems: list[str] = []
        try:
            for batch in load_batches(_Numbered(self._images), spec, self._items(), self._workers):
                embeddings.append(embed(net, batch.images.to(device)).float().cpu())
                numbers.append(batch.labels)
                problems += [f"{problem}; its pairs are left out" for problem in batch.problems]
            rows = torch.cat(embeddings)
            if not rows.isfinite().all():
                return None, [*problems, "no figures, the net's embeddings are not finite"]
            pairs = _with_both(self._pairs, torch.cat(numbers))
            checked = _verify(rows, pairs)
        except ValueError as error:
            return None, [*problems, f"no figures, {error}"]
        try:
            return checked._replace(digest=self._digest(checked.found, rows, pairs, name, step)), problems
        except Exception as error:  # nothing that goes wrong with a report may cost a training
            return checked, [*problems, f"the report will not show it, {str(error) or type(error).__name__}"]

    def _digest(self, found: Verification, rows: Tensor, pairs: Pairs, name: str, step: int) -> Digest:
        thumbnails, scores = Thumbnails([self._images]), pair_scores(rows, pairs)
        return digest_pairs(name, found, scores, pairs, self._images.paths, thumbnails, cosine=True, step=step)

    def _items(self) -> Iterator[list[Item]]:
        for start in range(0, len(self._images), self._batch_size):
            yield [Item(index, False) for index in range(start, min(start + self._batch_size, len(self._images)))]


class _Numbered:
    """Images with their numbers as labels: so a batch shows which image replaces one that cannot be read."""

    def __init__(self, images: ImageSet) -> None:
        self._images = images
        self.labels = torch.arange(len(images))

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int, spec: ImageSpec) -> Tensor:
        return self._images.read(index, spec)


def _with_both(pairs: Pairs, numbers: Tensor) -> Pairs:
    """Return the pairs with two images that were read; ``numbers`` (M,) are those of the images in each place."""
    own = numbers == torch.arange(len(numbers))
    kept = own[pairs.first] & own[pairs.second]
    return Pairs(pairs.first[kept], pairs.second[kept], pairs.same[kept])


def _verify(embeddings: Tensor, pairs: Pairs) -> Checked:
    same, scores = pairs.same.numpy(), pair_scores(embeddings, pairs)
    return Checked(verify_scores(same, scores, fars=_FARS), of_cosine_distance(operating_points(same, scores)))
