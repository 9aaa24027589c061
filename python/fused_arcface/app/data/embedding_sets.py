"""Embeddings of a set of images: made by a net, kept in a file, scored again without the images."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fused_arcface.base.reading import DataError
from fused_arcface.evaluation.pairs import Pairs

from .formats import embeddings as embedding_files
from .images import ImageSpec
from .sources import ImageSet, ignore_interrupts

_ROWS = 1 << 20
"""Embeddings that a small file may hold. A larger file may hold one more for each 8 bytes."""


@dataclass(frozen=True)
class EmbeddingSet:
    """Embeddings of images as the net gives them, not normalized, with names, and labels or pairs if they are known.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "embeddings.safetensors"
    >>> EmbeddingSet(torch.eye(2), ["ann.png", "bob.png"], torch.tensor([0, 1])).save(file)
    >>> EmbeddingSet.load(file).paths
    ['ann.png', 'bob.png']
    """

    embeddings: Tensor
    """(M, D) fp32."""
    paths: list[str]
    """(M,)."""
    labels: Tensor | None = None
    """(M,) int64."""
    pairs: Pairs | None = None

    def save(self, path: str | Path) -> None:
        """Write a ``.npz`` or ``.safetensors`` file.

        It has ``embeddings``, ``paths``, and where they are known ``labels`` (M,), ``pairs`` (P, 2) and ``same`` (P,),
        all int64.

        Raises:
            ValueError: if ``path`` has another suffix.
        """
        path = Path(path)
        check_suffix(path)
        tensors = {"embeddings": self.embeddings.float().cpu()}
        if self.labels is not None:
            tensors["labels"] = self.labels.cpu()
        if self.pairs is not None:
            tensors["pairs"] = torch.stack([self.pairs.first, self.pairs.second], 1).cpu()
            tensors["same"] = self.pairs.same.long().cpu()
        path.parent.mkdir(parents=True, exist_ok=True)
        embedding_files.FORMATS[path.suffix].write(path, tensors, self.paths)

    @classmethod
    def load(cls, path: str | Path) -> EmbeddingSet:
        """Read what :meth:`save` wrote; ``embeddings`` alone is enough, with ``labels`` or ``pairs`` and ``same``.

        Raises:
            DataError: if the file is of another kind, or its parts do not fit.
            ValueError: if ``path`` has another suffix.
        """
        path = Path(path)
        check_suffix(path)
        return cls._checked(path, *embedding_files.FORMATS[path.suffix].read(path))

    @classmethod
    def _checked(cls, path: Path, tensors: dict[str, Tensor], paths: list[str] | None) -> EmbeddingSet:
        embeddings, labels = tensors.get("embeddings"), tensors.get("labels")
        if embeddings is None or embeddings.dim() != 2 or not embeddings.is_floating_point():
            raise DataError(f"{path} must hold floating-point embeddings (M, D); it holds {_shapes(tensors)}")
        count, most = len(embeddings), _ROWS + os.path.getsize(path) // 8
        if count > most or embeddings.shape[1] == 0:  # each row takes a name in memory, even if none in the file
            raise DataError(f"{path} must hold embeddings (M <= {most}, D >= 1); it holds {_shapes(tensors)}")
        if not embeddings.isfinite().all():
            raise DataError(f"{path}: embeddings must be finite")
        if labels is not None and (labels.shape != (count,) or labels.is_floating_point()):
            raise DataError(f"{path}: labels must be ({count},) and whole; the file holds {_shapes(tensors)}")
        pairs = None
        if "pairs" in tensors or "same" in tensors:
            numbers, same = tensors.get("pairs"), tensors.get("same")
            if numbers is None or same is None or same.dim() != 1 or numbers.shape != (len(same), 2):
                raise DataError(f"{path} must hold pairs (P, 2) with same (P,); it holds {_shapes(tensors)}")
            if numbers.is_floating_point() or not ((same == 0) | (same == 1)).all():
                raise DataError(f"{path}: pairs must be whole numbers and same must be 0 or 1")
            if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < count:
                raise DataError(f"{path}: pairs must be numbers of {count} embeddings")
            pairs = Pairs(numbers[:, 0], numbers[:, 1], same.bool())
        names = paths if paths is not None and len(paths) == count else [f"{path.name}[{i}]" for i in range(count)]
        return cls(embeddings, names, labels, pairs)

    def only(self, numbers: Tensor, images: int) -> EmbeddingSet:
        """Renumber the pairs for a set that lost some of its ``images``, and leave out the pairs of lost ones.

        ``numbers`` (M,) are the numbers of these rows in the whole set.
        """
        if self.pairs is None or len(numbers) == images:
            return self
        row_of = torch.full((images,), -1)
        row_of[numbers] = torch.arange(len(numbers))
        first, second = row_of[self.pairs.first], row_of[self.pairs.second]
        both = (first >= 0) & (second >= 0)
        return replace(self, pairs=Pairs(first[both], second[both], self.pairs.same[both]))


def check_suffix(path: Path | None, name: str = "embeddings") -> None:
    """Raise ValueError unless a file of this name can hold embeddings. None is allowed. Messages call it ``name``."""
    if path is not None and path.suffix not in embedding_files.SUFFIXES:
        raise ValueError(f"{name} must be in a {embedding_files.EMBEDDING_FILES} file; got {path}")


def _shapes(tensors: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()) or "nothing"


@torch.no_grad()
def embed_set(
    net: nn.Module,
    images: ImageSet,
    spec: ImageSpec,
    *,
    rows: Sequence[int] | None = None,
    flip: bool = False,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    workers: int = 0,
    done: Callable[[int], None] | None = None,
    unreadable: Callable[[str], None] | None = None,
) -> EmbeddingSet:
    """Run a net over a set of images.

    Args:
        net: images ``(N, channels, size, size)`` to embeddings ``(N, D)``; put into evaluation mode.
        images: the set.
        spec: what the net takes.
        rows: numbers of the images to embed, ascending; None for all.
        flip: add the embedding of the mirrored image, as the field does at test time.
        batch_size: images that the net sees at once.
        device: the net's device.
        workers: processes that read images; 0 reads in this one.
        done: called after each batch with its size.
        unreadable: called with the message for an image that cannot be read. The image and its pairs are left out.

    Raises:
        DataError: if an image cannot be read and ``unreadable`` is None, or no image can be read.

    >>> from fused_arcface.app.data.pair_sets import read_labeled
    >>> spec = ImageSpec(size=8, channels=1)
    >>> embed_set(nn.Flatten(), read_labeled("identities:3x2"), spec).embeddings.shape
    torch.Size([6, 64])
    """
    net.eval()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(_Reader(images, spec), range(len(images)) if rows is None else rows),
        batch_size,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=ignore_interrupts,
    )
    parts, kept, first = [], [], ""
    for batch in loader:
        for problem in batch.problems:
            if unreadable is None:
                raise DataError(problem)
            unreadable(problem)
            first = first or problem
        if batch.numbers:
            pixels = batch.pixels.to(device)
            embeddings = net(pixels)
            parts.append((embeddings + net(pixels.flip(3)) if flip else embeddings).float().cpu())
            kept += batch.numbers
        if done is not None:
            done(len(batch.numbers) + len(batch.problems))
    if not parts:
        raise DataError(f"no image can be read; the first: {first}" if first else "there are no images to embed")
    numbers = torch.tensor(kept)
    labels = None if images.labels is None else images.labels[numbers]
    found = EmbeddingSet(torch.cat(parts), [images.paths[number] for number in kept], labels, images.pairs)
    return found.only(numbers, len(images))


class _Read(NamedTuple):
    """Images that were read, and what is wrong with the others."""

    numbers: list[int]
    pixels: Tensor
    """``(len(numbers), channels, size, size)``."""
    problems: list[str]


class _Reader(torch.utils.data.Dataset[_Read]):
    def __init__(self, images: ImageSet, spec: ImageSpec) -> None:
        self._images, self._spec = images, spec

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> _Read:
        # Returned, not raised: an error from a worker comes with that process's traceback.
        try:
            return _Read([index], self._images.read(index, self._spec)[None], [])
        except (ValueError, OSError) as error:
            return _Read([], torch.empty(0, *self._spec.shape), [str(error)])


def _collate(read: list[_Read]) -> _Read:
    numbers, pixels, problems = zip(*read, strict=True)
    return _Read(list(chain(*numbers)), torch.cat(pixels), list(chain(*problems)))
