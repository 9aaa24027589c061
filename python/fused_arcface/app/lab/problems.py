"""What the demo trains on and how: every number that was chosen, with its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fused_arcface.margins.angular import ArcFace

from ..benchmark.cases import Case
from ..data import LabeledImages, digit_images, identity_images
from ..data.digits import TRAINED, UNSEEN
from .plan import FULL as COMPARED
from .steps import Recipe

MARGIN = ArcFace(0.5)
"""The ArcFace paper's."""

STEP_BOUND = 1e-5
"""Most that fused and reference may differ on the same embeddings: loss, and both gradients in norm, relative to the
reference's."""

CURVE_BOUND, CURVE_STEPS = 1e-2, 50
"""Most that the losses of the two trainings, each on its own, may differ over the first steps."""


@dataclass(frozen=True)
class Problem:
    """A set of images, some identities to train on and others to verify."""

    name: str
    describe: str
    load: Callable[[int], tuple[LabeledImages, LabeledImages]]
    """From a seed to the images that are trained on and those of unseen identities."""
    recipe: Recipe
    remark: str = ""
    """What to know when reading the results."""
    embedding_dim: int = 64


@dataclass(frozen=True)
class Plan:
    """What one run of the demo does."""

    problems: tuple[Problem, ...]
    seeds: tuple[int, ...]
    """Each changes the images where they are generated, the nets' initial weights and the batches."""
    large: Case
    """A shape of real use at which the head is measured beside those of the problems."""
    seconds: float
    """To spend on the time measurements of one shape."""


def _digits(steps: int) -> Problem:
    def load(seed: int) -> tuple[LabeledImages, LabeledImages]:
        return digit_images(TRAINED), digit_images(UNSEEN)

    return Problem(
        "digits",
        f"handwritten digits (scikit-learn's), trained on {_listed(TRAINED)}, verified on {_listed(UNSEEN)}",
        load,
        # Three passes over 1246 images, gently: seven classes are soon told apart, and from there unseen ones only
        # get worse.
        Recipe(steps=steps, batch_size=64, learning_rate=0.001),
        remark="Seven digits teach a net little about the other three: expect nothing better than bare pixels.",
    )


def _identities(trained: int, samples: int, unseen: int, recipe: Recipe) -> Problem:
    def load(seed: int) -> tuple[LabeledImages, LabeledImages]:
        return (
            identity_images(trained, samples, seed=seed),
            identity_images(unseen, 10, first=trained, seed=seed),
        )

    return Problem(
        "identities",
        f"generated identities, trained on {trained} with {samples} images each, verified on {unseen} others",
        load,
        recipe,
    )


def _listed(digits: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, digits[:-1]))} and {digits[-1]}"


FULL = Plan(
    problems=(
        _digits(steps=60),
        _identities(COMPARED.identities, COMPARED.samples, COMPARED.unseen, COMPARED.recipe),
    ),
    seeds=(0, 1, 2),
    large=Case(N=128, C=100_000, D=512),
    seconds=3.0,
)

QUICK = Plan(
    problems=(_digits(steps=8), _identities(12, 4, 6, Recipe(steps=8, batch_size=32, learning_rate=0.02))),
    seeds=(0,),
    large=Case(N=16, C=500, D=32),
    seconds=0.05,
)
