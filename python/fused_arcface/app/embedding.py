"""Embeddings of many images in one file, made in parts, so that an interrupted command resumes.

The command ``embed`` calls it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fused_arcface.base.files import replacing, write_text
from fused_arcface.base.reading import DataError, read_bytes
from fused_arcface.base.text import encode_names

from .data.embedding_sets import EmbeddingSet, embed_set
from .data.formats.embeddings import SUFFIXES
from .data.sources import ImageSet
from .embedder import Embedder
from .predictions import csv_line
from .training.lock import FolderInUse, FolderLock

_PART = 256
"""Number of images in a part. An interrupted command embeds at most so many again."""
_MOST_BYTES = 1 << 20
_CSV = ".csv"
_OURS = re.compile(r"about\.json|\d{12}\.(npz|empty)|\.partial-[0-9a-f]{8}(-[0-9a-f]{12})?")
"""Names of the files in the folder of the parts; earlier versions wrote ``.empty``."""


def check_output(path: Path) -> None:
    """Raise ValueError unless embeddings can be written to a file of this name; see :func:`embed_to_file`."""
    if path.suffix not in (*SUFFIXES, _CSV):
        raise ValueError(f"embeddings must go to a {', '.join(SUFFIXES)} or {_CSV} file; got {path}")


def embed_to_file(
    embedder: Embedder,
    images: ImageSet,
    output: Path,
    *,
    flip: bool = False,
    normalize: bool = True,
    batch_size: int = 64,
    workers: int = 0,
    part: int = _PART,
    done: Callable[[int], None] = lambda count: None,
    unreadable: Callable[[str], None] = lambda problem: None,
) -> EmbeddingSet:
    """Embed images, write the embeddings with the images' names and labels, and return them.

    Parts lie in a folder beside the file, ``OUTPUT.parts``, until all are there. If the same images are embedded by the
    same net again, finished parts are taken from it; parts of anything else are replaced. The folder is locked: another
    process that writes the same output is refused.

    Args:
        embedder: the net with its preprocessing.
        images: the images.
        output: a ``.npz`` or ``.safetensors`` file, see :meth:`EmbeddingSet.save`, or a ``.csv`` file with a line for
            each image: its name, its label if there is one, and D numbers.
        flip: add the embedding of the mirrored image.
        normalize: scale the embeddings to norm 1.
        batch_size: images that the net sees at once.
        workers: processes that read images; 0 reads in this one.
        part: images of a part.
        done: called with a number of images, also for those of finished parts.
        unreadable: called with what is wrong with an image that cannot be read; it is left out.

    Raises:
        DataError: if no image can be read, or another process writes this output.
        ValueError: if the output has another suffix.
        OSError: if a file cannot be written.
    """
    check_output(output)
    if not len(images):
        raise DataError("there are no images to embed")
    folder = output.with_name(f"{output.name}.parts")
    key = _key(embedder, images, {"flip": flip, "normalize": normalize, "part": part})
    how: dict[str, Any] = {"flip": flip, "batch_size": batch_size, "workers": workers, "done": done}
    with _parts(folder, key, output):
        found: list[EmbeddingSet] = []
        for start in range(0, len(images), part):
            rows = range(start, min(start + part, len(images)))
            file = folder / f"{start:012d}.npz"
            if file.is_file():
                done(len(rows))
            else:
                _embed_part(embedder, images, rows, file, normalize, unreadable, **how)
            if os.path.getsize(file):
                found.append(EmbeddingSet.load(file))
        if not found:
            raise DataError("no image can be read")
        labels = [each.labels for each in found if each.labels is not None]
        whole = EmbeddingSet(
            torch.cat([each.embeddings for each in found]),
            [path for each in found for path in each.paths],
            torch.cat(labels) if labels else None,
        )
        if output.suffix == _CSV:
            _write_csv(output, whole, images.names)
        else:
            whole.save(output)
    return whole


def _embed_part(
    embedder: Embedder,
    images: ImageSet,
    rows: range,
    file: Path,
    normalize: bool,
    unreadable: Callable[[str], None],
    **how: Any,
) -> None:
    """Write the embeddings of some images into ``file``; it is empty if none of them can be read."""
    device = next((each.device for each in embedder.net.parameters()), torch.device("cpu"))
    problems: list[str] = []
    how |= {"rows": rows, "device": device, "unreadable": problems.append}
    try:
        found = embed_set(embedder.net, images, embedder.spec, **how)
        vectors = torch.nn.functional.normalize(found.embeddings) if normalize else found.embeddings
        replace(found, embeddings=vectors).save(file)
    except DataError:
        if len(problems) < len(rows):
            raise
        write_text(file, "")
    for problem in problems:
        unreadable(problem)


def _key(embedder: Embedder, images: ImageSet, options: dict[str, Any]) -> str:
    """Return a text that changes with the images, the net and the options."""
    names = hashlib.sha256(encode_names(images.paths))
    for path in images.paths:
        names.update(_state(path).encode())
    weights = hashlib.sha256()
    for name, tensor in embedder.net.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    values = {"images": names.hexdigest(), "net": weights.hexdigest(), **options}
    return json.dumps({**values, "size": embedder.spec.shape}, sort_keys=True)


def _state(path: str) -> str:
    """Return size and time of the file that an image lies in: it may have got another content under the same name."""
    for file in (path, path.rpartition("[")[0]):  # train.rec[7] lies in train.rec
        with contextlib.suppress(OSError, ValueError):
            found = os.stat(file)
            return f"{found.st_size} {found.st_mtime_ns};"
    return ""


@contextlib.contextmanager
def _parts(folder: Path, key: str, output: Path) -> Iterator[None]:
    """Make and lock the folder of the parts, and remove it at the end. Finished parts of the same work stay in it.

    Only files with names of this module are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FolderLock(folder)
    except FolderInUse as owner:
        raise DataError(f"{output} is in use: {owner} writes it; wait for its end, or name another output") from None
    with lock:
        about = folder / "about.json"
        if not about.is_file() or read_bytes(about, _MOST_BYTES) != key.encode():
            _clear(folder)
            write_text(about, key)
        yield
        _clear(folder)
        lock.remove()
        with contextlib.suppress(OSError):  # something else lies in it
            folder.rmdir()


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name):
            path.unlink()


def _write_csv(path: Path, found: EmbeddingSet, names: list[str]) -> None:
    columns = {"image": found.paths}
    if found.labels is not None:
        columns["label"] = [names[label] if label < len(names) else str(label) for label in found.labels.tolist()]
    with replacing(path) as file:
        file.write(csv_line([*columns, *(f"e{i}" for i in range(found.embeddings.shape[1]))]))
        for row, *about in zip(found.embeddings, *columns.values(), strict=True):
            # 9 digits give back every fp32 number.
            file.write(csv_line([*about, *(f"{value:.9g}" for value in row.tolist())]))
