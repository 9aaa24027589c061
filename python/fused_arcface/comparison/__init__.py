"""The field's losses side by side: one net, the same images and seeds, a training criterion each, then verification and
identification of people never seen in training. ``cli.compare`` calls :func:`run_comparison` and prints what it
returns."""

from .criteria import Criterion, criteria
from .experiment import Comparison, run_comparison
from .plan import FULL, QUICK, Plan
from .record import ComparisonError

__all__ = ["FULL", "QUICK", "Comparison", "ComparisonError", "Criterion", "Plan", "criteria", "run_comparison"]
