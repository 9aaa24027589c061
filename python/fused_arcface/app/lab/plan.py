"""What a comparison trains on and how: every number that was chosen, with its reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..data import DataError, ImageSpec, LabeledImages, identity_images, open_source
from .steps import Recipe


@dataclass(frozen=True)
class Plan:
    """What one comparison does; the same plan gives the same figures on one machine, but for times and memory."""

    seeds: tuple[int, ...]
    """Each changes the generated images (or who is held out), the nets' initial weights and the batches."""
    recipe: Recipe
    toy: Recipe
    """Of the nets with two dimensions that are drawn."""
    identities: int = 500
    """Generated to train on, ``samples`` images each."""
    samples: int = 10
    unseen: int = 200
    """Generated to evaluate on, as many images each."""
    toy_identities: int = 8
    toy_samples: int = 40
    embedding_dim: int = 64
    data: str | None = None
    """A labeled folder or RecordIO file to use instead; ``held_out`` of its identities are the unseen ones."""
    held_out: float = 0.3
    image_size: int = 32
    """Side to which its images are brought, in gray."""

    def load(self, seed: int) -> tuple[LabeledImages, LabeledImages]:
        """The images that are trained on and those of unseen people.

        Raises:
            DataError, ImageError: what is wrong with ``data``.
        """
        if self.data is None:
            return (
                identity_images(self.identities, self.samples, seed=seed),
                identity_images(self.unseen, self.samples, first=self.identities, seed=seed),
            )
        source = open_source(self.data)
        spec = ImageSpec(self.image_size, 1)
        order = torch.randperm(len(source.names), generator=torch.Generator().manual_seed(seed))
        count = round(self.held_out * len(order))
        if not 2 <= count <= len(order) - 2:
            raise DataError(f"{self.data} must hold two identities to train on and two to hold out; got {len(order)}")
        parts = []
        for chosen in (order[count:], order[:count]):
            renumbered = torch.full((len(order),), -1)
            renumbered[chosen] = torch.arange(len(chosen))
            labels = renumbered[source.labels]
            rows = (labels >= 0).nonzero()[:, 0].tolist()
            # About 0 to 1, as generated images are.
            images = torch.stack([(source.read(row, spec) + 1) / 2 for row in rows])
            parts.append(LabeledImages(images, labels[rows]))
        return parts[0], parts[1]

    def toy_images(self) -> LabeledImages:
        """The few people of the two-dimensional pictures, generated."""
        return identity_images(self.toy_identities, self.toy_samples, seed=self.seeds[0])


FULL = Plan(
    seeds=(0, 1, 2),
    # Eight passes over the images: the softmax classifier then fits them (its loss ends near 0.01), so
    # that what is compared is how the criteria generalize, not how fast they learn. The learning rate is one at which
    # softmax does as well as at half and at twice that.
    recipe=Recipe(steps=300, batch_size=128, learning_rate=0.02),
    toy=Recipe(steps=120, batch_size=64, learning_rate=0.01),
)

QUICK = Plan(
    seeds=(0,),
    recipe=Recipe(steps=8, batch_size=32, learning_rate=0.02),
    toy=Recipe(steps=5, batch_size=16, learning_rate=0.01),
    identities=12,
    samples=8,
    unseen=8,
    toy_identities=4,
    toy_samples=6,
)
