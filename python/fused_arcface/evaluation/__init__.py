"""Evaluation on people never seen in training: 1:1 verification, 1:N identification, and the distances of both."""

from .distances import Cosine, Distance, Euclidean, InnerProduct, Mahalanobis, PNorm, make_distance
from .identification import Identification, identify, split_gallery
from .pairs import Pairs, balanced_pairs
from .search import nearest
from .verification import (
    Verification,
    equal_error_rate,
    k_fold_accuracy,
    mean_scores,
    pair_scores,
    roc,
    tar_at_far,
    verify,
    verify_scores,
)

__all__ = [
    "Cosine",
    "Distance",
    "Euclidean",
    "Identification",
    "InnerProduct",
    "Mahalanobis",
    "PNorm",
    "Pairs",
    "Verification",
    "balanced_pairs",
    "equal_error_rate",
    "identify",
    "k_fold_accuracy",
    "make_distance",
    "mean_scores",
    "nearest",
    "pair_scores",
    "roc",
    "split_gallery",
    "tar_at_far",
    "verify",
    "verify_scores",
]
