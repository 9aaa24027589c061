"""Training of an embedding net under a head: nets, heads to compare with, and the step they share; and whole runs on
files, from :class:`~fused_arcface.training.config.TrainConfig` to :func:`fused_arcface.training.trainer.train`.

A head is any module called as ``head(embeddings, target) -> loss``: :class:`fused_arcface.MarginHead` and those in
``heads``.
"""

from .heads import ReferenceHead, SoftmaxHead
from .nets import SmallNet, embed
from .steps import Recipe, Step, one_cycle, one_thread, shuffled_batches, training_steps

__all__ = [
    "Recipe",
    "ReferenceHead",
    "SmallNet",
    "SoftmaxHead",
    "Step",
    "embed",
    "one_cycle",
    "one_thread",
    "shuffled_batches",
    "training_steps",
]
