"""Writes images of generated identities to disk, as the data readers and the training are to find them. One place for
all tests."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image

from fused_arcface.app.data import RecordWriter, draw, pack_image
from fused_arcface.app.data.identities import Style

# (mode, width, height, suffix) that files take in turn.
MIXED = (
    ("L", 32, 32, "png"),
    ("RGB", 40, 48, "png"),
    ("RGBA", 56, 36, "png"),
    ("P", 33, 47, "png"),
    ("L", 64, 64, "jpg"),
)


def picture(identity: int, sample: int, mode: str = "L", size: tuple[int, int] = (32, 32)) -> Image.Image:
    """An identity's drawing of any mode and (width, height)."""
    ink = draw(torch.tensor([identity]), torch.tensor([sample]), style=Style(size=max(size)))[0, 0]
    gray = Image.fromarray((ink.clamp(0, 1) * 255).byte().numpy()).resize(size)
    return gray.convert("RGB").convert(mode) if mode != "L" else gray


def encoded(image: Image.Image, format: str = "png") -> bytes:
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def write_folder(root: Path, identities: int, samples: int, kinds: tuple = MIXED, first: int = 0) -> Path:
    """One folder an identity, images of all ``kinds`` in each."""
    for identity in range(first, first + identities):
        folder = root / f"person_{identity:03d}"
        folder.mkdir(parents=True)
        for sample in range(samples):
            mode, width, height, suffix = kinds[sample % len(kinds)]
            picture(identity, sample, mode, (width, height)).save(folder / f"{sample:02d}.{suffix}")
    return root


def write_records(root: Path, identities: int, samples: int, labels_each: int = 1) -> Path:
    """``train.rec`` and ``train.idx`` as insightface's: a header, the images, a range for each identity.

    With ``labels_each`` > 1 the images have more labels behind the first, as MXNet's ``im2rec`` writes them.
    """
    root.mkdir(parents=True, exist_ok=True)
    count = identities * samples
    with RecordWriter(root / "train.rec") as writer:
        writer.write(0, pack_image([count + 1, count + 1 + identities], 0, b""))
        for place in range(count):
            identity, sample = divmod(place, samples)
            labels = float(identity) if labels_each == 1 else [float(identity), *[0.25] * (labels_each - 1)]
            writer.write(place + 1, pack_image(labels, place + 1, encoded(picture(identity, sample), "jpeg")))
        for identity in range(identities):
            bounds = [1 + identity * samples, 1 + (identity + 1) * samples]
            writer.write(count + 1 + identity, pack_image(bounds, count + 1 + identity, b""))
    return root
