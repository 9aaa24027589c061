"""The demonstration: a small net trained with the fused head and with the reference, compared at every step, then
verified on
identities that it never saw, beside the plain softmax classifier. ``cli.demo`` calls :func:`run_demo` and prints what
it returns.
"""

from .experiment import Demo, run_demo
from .problems import FULL, QUICK, Plan, Problem

__all__ = ["FULL", "QUICK", "Demo", "Plan", "Problem", "run_demo"]
