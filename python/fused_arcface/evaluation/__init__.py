"""Evaluation on people never seen in training: 1:1 verification and 1:N identification, of images and of templates."""

from .distances import Cosine, Distance, Euclidean, InnerProduct, Mahalanobis, PNorm, make_distance
from .identification import Identification, identify, split_gallery
from .pairs import Pairs, balanced_pairs
from .search import nearest
from .templates import Templates, identify_templates, pool_templates, verify_templates
from .verification import (
    Rates,
    Verification,
    accept_rates,
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
    "Rates",
    "Templates",
    "Verification",
    "accept_rates",
    "balanced_pairs",
    "equal_error_rate",
    "identify",
    "identify_templates",
    "k_fold_accuracy",
    "make_distance",
    "mean_scores",
    "nearest",
    "pair_scores",
    "pool_templates",
    "roc",
    "split_gallery",
    "tar_at_far",
    "verify",
    "verify_scores",
    "verify_templates",
]
