"""A run and images of drawn people, for the commands that evaluate, and what is right for them."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import torch
from PIL import Image

from fused_arcface.app.data import ImageSpec, identity_images
from fused_arcface.app.data.embedding_sets import EmbeddingSet
from fused_arcface.app.data.pair_sets import read_labeled
from fused_arcface.app.training.runs import load_backbone
from fused_arcface.evaluation import Pairs, balanced_pairs
from support.training_runs import write_random_run

PEOPLE, IMAGES = 12, 5


def write_people(root: Path) -> None:
    """Write a run as ``train`` leaves it, a folder of identities in PNG, and insightface's .bin of them in JPEG."""
    write_random_run(root / "run")
    drawn = identity_images(PEOPLE, IMAGES)
    encoded = []
    for number, (image, label) in enumerate(zip(drawn.images, drawn.labels.tolist(), strict=True)):
        gray = Image.fromarray((255 * image[0].clamp(0, 1)).byte().numpy())
        path = root / "people" / f"person {label:02d}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        gray.save(path)
        file = io.BytesIO()
        gray.convert("RGB").save(file, "jpeg", quality=95)
        encoded.append(file.getvalue())
    pairs = balanced_pairs(drawn.labels, 60)
    listed = [encoded[i] for pair in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True) for i in pair]
    (root / "people.bin").write_bytes(pickle.dumps((listed, pairs.same.tolist()), 2))


def figures(shown: str) -> list[str]:
    """Return the rows of the table that a command showed."""
    kinds = ("pairs", "people in", "images of", "probes", "accuracy", "equal", "TAR", "rank", "TPIR")
    return [" ".join(line.split()) for line in shown.splitlines() if line.startswith(kinds)]


def embedded(root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the net's embeddings of the people, in the folder's order, and their labels."""
    net, spec = load_backbone(root / "run")
    assert spec == ImageSpec(16, 1)
    images = read_labeled(str(root / "people"))
    assert images.labels is not None
    with torch.no_grad():
        return net(torch.stack([images.read(i, spec) for i in range(len(images))])), images.labels


def save_pairs(path: Path, same: list[bool]) -> Path:
    """Save random embeddings of two images for each pair."""
    numbers = torch.arange(2 * len(same)).view(-1, 2)
    pairs = Pairs(numbers[:, 0], numbers[:, 1], torch.tensor(same))
    EmbeddingSet(torch.randn(2 * len(same), 4), [""] * 2 * len(same), pairs=pairs).save(path)
    return path
