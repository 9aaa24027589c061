"""Evaluation on people never seen in training."""

from .verification import Pairs, Verification, balanced_pairs, k_fold_accuracy, pair_cosines, roc, tar_at_far, verify

__all__ = [
    "Pairs",
    "Verification",
    "balanced_pairs",
    "k_fold_accuracy",
    "pair_cosines",
    "roc",
    "tar_at_far",
    "verify",
]
