"""Embeddings of a set of images: made by a net, kept in a file, scored again without the images."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import safetensors
from ..data import DataError, ImageSpec
from ..files import replacing
from .pair_sets import ImageSet
from .pairs import Pairs


@dataclass(frozen=True)
class EmbeddingSet:
    """Embeddings as the net gives them, not normalised, and what is known of them.

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
        """Write a ``.npz`` or ``.safetensors`` file: ``embeddings``, ``paths``, and where they are known ``labels``
        (M,), ``pairs`` (P, 2) and ``same`` (P,), all int64.

        Raises:
            ValueError: another suffix.
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
        if path.suffix == ".npz":
            arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
            with replacing(path) as file:
                np.savez(file, **arrays, paths=np.array(self.paths, dtype=np.str_))
            return
        layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        with safetensors.Writer(path, layout, {"paths": json.dumps(self.paths)}) as writer:
            for name, tensor in tensors.items():
                writer.write(name, [tensor])

    @classmethod
    def load(cls, path: str | Path) -> EmbeddingSet:
        """Read what :meth:`save` wrote; ``embeddings`` alone is enough, with ``labels`` or ``pairs`` and ``same``.

        Raises:
            DataError: a file of another kind, or parts that do not fit.
            ValueError: another suffix.
        """
        path = Path(path)
        check_suffix(path)
        try:
            if path.suffix == ".npz":
                with np.load(path, allow_pickle=False) as stored:
                    arrays = {name: stored[name] for name in stored.files}
                listed = arrays.pop("paths", None)
                tensors = {name: torch.as_tensor(array) for name, array in arrays.items()}
                paths = None if listed is None else [str(each) for each in listed]
            else:
                tensors, metadata = safetensors.read(path)
                paths = json.loads(metadata["paths"]) if "paths" in metadata else None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} cannot be read: {error}") from None
        return cls._checked(path, tensors, paths)

    @classmethod
    def _checked(cls, path: Path, tensors: dict[str, Tensor], paths: list[str] | None) -> EmbeddingSet:
        embeddings, labels = tensors.get("embeddings"), tensors.get("labels")
        if embeddings is None or embeddings.dim() != 2 or not embeddings.is_floating_point():
            raise DataError(f"{path} must hold floating-point embeddings (M, D); it holds {_shapes(tensors)}")
        count = len(embeddings)
        if labels is not None and (labels.shape != (count,) or labels.is_floating_point()):
            raise DataError(f"{path}: labels must be ({count},) and whole; the file holds {_shapes(tensors)}")
        pairs = None
        if "pairs" in tensors or "same" in tensors:
            numbers, same = tensors.get("pairs"), tensors.get("same")
            if numbers is None or same is None or numbers.shape != (len(same), 2):
                raise DataError(f"{path} must hold pairs (P, 2) with same (P,); it holds {_shapes(tensors)}")
            if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < count:
                raise DataError(f"{path}: pairs must be numbers of {count} embeddings")
            pairs = Pairs(numbers[:, 0].long(), numbers[:, 1].long(), same.bool())
        names = paths if paths is not None and len(paths) == count else [f"{path.name}[{i}]" for i in range(count)]
        return cls(embeddings.float(), names, None if labels is None else labels.long(), pairs)


SUFFIXES = (".npz", ".safetensors")


def check_suffix(path: Path) -> None:
    """Raises:
    ValueError: a file that embeddings cannot be kept in, by its name."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"embeddings must be in a {' or '.join(SUFFIXES)} file; got {path}")


def _shapes(tensors: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()) or "nothing"


@torch.no_grad()
def embed_set(
    net: nn.Module,
    images: ImageSet,
    spec: ImageSpec,
    *,
    flip: bool = False,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    workers: int = 0,
    done: Callable[[int], None] | None = None,
) -> EmbeddingSet:
    """Run a net over a set of images.

    Args:
        net: images ``(N, channels, size, size)`` to embeddings ``(N, D)``; put into evaluation mode.
        images: the set.
        spec: what the net takes.
        flip: add the embedding of the mirrored image, as the field does at test time.
        batch_size: of the net's input.
        device: the net's.
        workers: processes that read images; 0 reads in this one.
        done: called after each batch with its size.

    Raises:
        ImageError, DataError: an image that cannot be read, by its name.

    >>> from fused_arcface.evaluation.pair_sets import read_labelled
    >>> spec = ImageSpec(size=8, channels=1)
    >>> embed_set(nn.Flatten(), read_labelled("identities:3x2"), spec).embeddings.shape
    torch.Size([6, 64])
    """
    net.eval()
    loader = torch.utils.data.DataLoader(_Reader(images, spec), batch_size, num_workers=workers)
    parts = []
    for batch in loader:
        batch = batch.to(device)
        embeddings = net(batch)
        parts.append((embeddings + net(batch.flip(3)) if flip else embeddings).float().cpu())
        if done is not None:
            done(len(batch))
    return EmbeddingSet(torch.cat(parts), images.paths, images.labels, images.pairs)


class _Reader(torch.utils.data.Dataset[Tensor]):
    def __init__(self, images: ImageSet, spec: ImageSpec) -> None:
        self._images, self._spec = images, spec

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        return self._images.read(index, self._spec)
