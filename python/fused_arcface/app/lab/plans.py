"""The plans of the experiments: images, recipes and seeds, every chosen number with its reason."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fused_arcface.base.text import listed

from ..benchmark.cases import Case
from ..data import DataError, ImageSpec, LabeledImages, digit_images, identity_images, open_source
from ..data.digits import TRAINED, UNSEEN

Halves = tuple[LabeledImages, LabeledImages]
"""Images to train on, and images of identities that are not among them."""


@dataclass(frozen=True)
class Recipe:
    """The settings of a training: AdamW with a learning rate that rises and falls once."""

    steps: int
    batch_size: int
    learning_rate: float
    """The greatest learning rate of the training."""
    warm_up: float = 0.25
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 5e-4


@dataclass(frozen=True)
class Generated:
    """Generated identities; the seed draws others."""

    identities: int
    """To train on."""
    samples: int
    """Images of each identity, in both halves."""
    unseen: int
    """Identities to evaluate on."""

    def load(self, seed: int) -> Halves:
        return (
            identity_images(self.identities, self.samples, seed=seed),
            identity_images(self.unseen, self.samples, first=self.identities, seed=seed),
        )

    def describe(self) -> str:
        return (
            f"generated identities, 32-pixel gray: trained on {self.identities} with {self.samples} images each, "
            f"verified on {self.unseen} others"
        )


@dataclass(frozen=True)
class Digits:
    """Scikit-learn's handwritten digits; the seed changes nothing."""

    def load(self, seed: int) -> Halves:
        return digit_images(TRAINED), digit_images(UNSEEN)

    def describe(self) -> str:
        return f"handwritten digits (scikit-learn's): trained on {listed(TRAINED)}, verified on {listed(UNSEEN)}"


@dataclass(frozen=True)
class Files:
    """A user's images in a labeled folder or a RecordIO file; the seed chooses who is held out."""

    path: str
    held_out: float = 0.3
    """Share of the identities to evaluate on."""
    image_size: int = 32
    """Pixels of a side to which every image is brought, in gray."""

    def load(self, seed: int) -> Halves:
        """Return both halves, pixels from about 0 to 1, as generated images have them.

        Raises:
            DataError, ImageError: if the files cannot be used.
        """
        source = open_source(self.path)
        spec = ImageSpec(self.image_size, 1)
        order = torch.randperm(len(source.names), generator=torch.Generator().manual_seed(seed))
        count = round(self.held_out * len(order))
        if not 2 <= count <= len(order) - 2:
            raise DataError(f"{self.path} must hold two identities to train on and two to hold out; got {len(order)}")

        def part(chosen: torch.Tensor) -> LabeledImages:
            renumbered = torch.full((len(order),), -1)
            renumbered[chosen] = torch.arange(len(chosen))
            labels = renumbered[source.labels]
            rows = (labels >= 0).nonzero()[:, 0].tolist()
            return LabeledImages(torch.stack([(source.read(row, spec) + 1) / 2 for row in rows]), labels[rows])

        return part(order[count:]), part(order[:count])

    def describe(self) -> str:
        size = f"{self.image_size} × {self.image_size} pixels in gray"
        return f"images of {self.path}, each brought to {size}; {self.held_out:.0%} of the identities held out"


@dataclass(frozen=True)
class Task:
    """Images, and how a net is trained on them."""

    name: str
    images: Generated | Digits | Files
    """A set of images: ``load`` returns its two halves, ``describe`` a few words about it."""
    recipe: Recipe
    embedding_dim: int = 64
    remark: str = ""
    """A note that is printed below the results."""


@dataclass(frozen=True)
class Plan:
    """One experiment; on one machine the same plan gives the same figures, but for times and memory."""

    tasks: tuple[Task, ...]
    seeds: tuple[int, ...]
    """Each changes the images, the initial weights and the batches."""
    toy: Task | None = None
    """A training in two dimensions, to draw."""
    shapes: tuple[Case, ...] = ()
    """Shapes at which the head's time and memory are measured, beside those of the tasks."""
    seconds: float = 0.0
    """Time to spend on the samples of one shape."""


def _digits(steps: int) -> Task:
    # Three passes over 1246 images at a low rate: the net soon tells seven classes apart, and more training only makes
    # unseen ones worse.
    return Task(
        "digits",
        Digits(),
        Recipe(steps=steps, batch_size=64, learning_rate=0.001),
        remark=(
            "Seven digits teach a net little about three others, so no loss is expected to beat the bare pixels here. "
            "This set shows that the fused head trains real images as the reference does, not that margins help."
        ),
    )


# After eight passes over the images the softmax classifier fits them (its loss ends near 0.01). The comparison then
# shows how the criteria generalize, not how fast they learn. Softmax does as well at half and at twice this learning
# rate.
_IDENTITIES = Task(
    "identities",
    Generated(identities=500, samples=10, unseen=200),
    Recipe(steps=300, batch_size=128, learning_rate=0.02),
)
_FEW_IDENTITIES = Task(
    "identities",
    Generated(identities=12, samples=8, unseen=8),
    Recipe(steps=8, batch_size=32, learning_rate=0.02),
)


def _toy(identities: int, samples: int, recipe: Recipe) -> Task:
    return Task("two dimensions", Generated(identities, samples, unseen=1), recipe, embedding_dim=2)


# The set where margins win comes first.
DEMO = Plan((_IDENTITIES, _digits(steps=60)), seeds=(0, 1, 2), shapes=(Case(N=128, C=100_000, D=512),), seconds=3.0)
QUICK_DEMO = Plan((_FEW_IDENTITIES, _digits(steps=8)), seeds=(0,), shapes=(Case(N=64, C=20_000, D=32),), seconds=0.05)

COMPARISON = Plan((_IDENTITIES,), seeds=(0, 1, 2), toy=_toy(8, 40, Recipe(120, batch_size=64, learning_rate=0.01)))
QUICK_COMPARISON = Plan((_FEW_IDENTITIES,), seeds=(0,), toy=_toy(4, 6, Recipe(5, batch_size=16, learning_rate=0.01)))


def comparison_plan(quick: bool, data: str | None, seeds: int, steps: int | None, batch_size: int | None) -> Plan:
    """Return a comparison's plan; ``quick``: a few steps on tiny sets from one seed.

    Data are a labeled folder or RecordIO file, None for generated identities. ``steps`` of each training and
    ``batch_size`` are the plan's own numbers if None.
    """
    plan = QUICK_COMPARISON if quick else replace(COMPARISON, seeds=tuple(range(seeds)))
    (task,) = plan.tasks
    recipe = replace(task.recipe, steps=steps or task.recipe.steps, batch_size=batch_size or task.recipe.batch_size)
    task = replace(task, recipe=recipe) if data is None else Task("files", Files(data), recipe)
    return replace(plan, tasks=(task,))
