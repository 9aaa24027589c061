"""Find the most identities that fit: the largest C with a training step that stays within a budget of memory.

A step is forward, backward and SGD with momentum. C is first predicted from the bytes per class of small trials, then
verified by a step close to the budget. Each trial runs in another process, which cannot allocate far beyond the
budget: the system limits the data of a CPU process, torch the allocator of a GPU process. A trial fits if its measured
peak, class centers, gradient and momentum included, is within the budget.
"""

from __future__ import annotations

import itertools
import math
import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from fused_arcface.center_sgd import CenterSGD
from fused_arcface.partial_fc import PartialFC

from ..measure import machine
from ..measure.child import Child, ChildFailed
from . import memory
from .cases import REPEATED, Case, draw_centers, make_inputs
from .names import Named
from .providers import HeadRun, Provider, Reason, all_providers
from .report import Skip

Key = tuple[str, str, str, str]
"""Names a setup: recipe, backend, dtypes of class centers and of momentum."""
Attempt = Callable[[int], "Trial | None"]
"""Takes a trial of C classes; returns None if it needed far too much memory."""
Search = Callable[[Attempt, int, int], "Capacity"]
"""Finds the largest C by attempts, given the bytes of the budget and a first C."""
TakeStep = Callable[[], None]
"""Takes one training step over the inputs that it was made for."""

# The share by which the search may miss the largest C.
_PRECISION = 0.02
_MOST_TRIALS = 12
# A trial may take this much more than the budget, so that its measured peak tells how many classes to leave out. The
# bytes are for threads' stacks.
_OVERSHOOT, _SLACK_BYTES = 1.2, 2**28


@dataclass(frozen=True)
class TrainingSetup(Named):
    """A way to take training steps: a head, the dtype of its class centers, and its optimizer."""

    weight_dtype: str
    momentum_dtype: str
    make: Callable[[Case, torch.device], TakeStep]
    """Allocates inputs, class centers and all else that stays between steps; the first step allocates the rest."""
    reason_against: Reason

    @property
    def key(self) -> Key:
        return self.name, self.backend, self.weight_dtype, self.momentum_dtype

    def __str__(self) -> str:
        return f"{super().__str__()}, {self.weight_dtype} + {self.momentum_dtype}"

    def case(self, N: int, C: int, D: int) -> Case:
        return Case(N, C, D, self.weight_dtype, self.weight_dtype)


# Dtypes of the class centers and their momentum, if the update happens in the backward pass.
_FUSED_DTYPES = tuple(itertools.product(("float32", "bfloat16"), ("float32", "bfloat16", "int8")))

SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
"""Options of the optimizer, as arcface_torch trains."""


def all_setups() -> tuple[TrainingSetup, ...]:
    """Return every setup: each head followed by torch.optim.SGD, and ours with the update in its backward pass."""
    plain = ("fused_arcface", "eager", "compiled", "insightface", "insightface-fp16", "pytorch-metric-learning")
    found = []
    for provider in all_providers():
        if provider.name not in plain or (provider.is_ours and not provider.is_fused):
            continue
        name, backend, reason = provider.name, provider.backend, provider.reason_against
        for dtype in ("float32", "bfloat16") if provider.is_ours else ("float32",):
            found.append(TrainingSetup(name, backend, dtype, dtype, partial(_with_sgd, provider), reason))
        for dtype, momentum in _FUSED_DTYPES if provider.is_ours else ():
            fused = partial(with_center_sgd, backend, momentum)
            found.append(TrainingSetup(f"{name} + CenterSGD", backend, dtype, momentum, fused, reason))
    return tuple(found)


def _with_sgd(provider: Provider, case: Case, device: torch.device) -> TakeStep:
    """Make steps of a provider's pass followed by torch.optim.SGD over its class centers."""
    run = provider.open(make_inputs(case, device, distinct=False))
    assert isinstance(run, HeadRun)
    optimizer = torch.optim.SGD([run.weight], **SGD)

    def step() -> None:
        with provider.settings():
            run.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class RepeatedCenters(PartialFC):
    """PartialFC with repeated initial centers: drawing 10⁷ of them takes minutes."""

    def reset_parameters(self) -> None:
        draw_centers(self.weight, REPEATED)


def with_center_sgd(backend: str, momentum_dtype: str, case: Case, device: torch.device) -> TakeStep:
    """Make steps of PartialFC, which updates its class centers in the backward pass; a process group shares them."""
    optimizer = CenterSGD(**SGD, momentum_dtype=getattr(torch, momentum_dtype))
    dtype = case.torch_weight_dtype
    head = RepeatedCenters(case.D, case.C, center_optimizer=optimizer, backend=backend, device=device, dtype=dtype)
    embeddings = torch.randn(case.N, case.D, device=device).to(dtype).requires_grad_()
    target = torch.randint(case.C, (case.N,), device=device)

    def step() -> None:
        head(embeddings, target).backward()
        embeddings.grad = None

    return step


class Trial(NamedTuple):
    """Two training steps: their peak memory, class centers included, and the time of the second."""

    peak_bytes: int
    step_ms: float


def _two_steps(setup: TrainingSetup, shape: tuple[int, int, int], device: torch.device, budget_bytes: int) -> Trial:
    """Take the steps of :func:`try_step` in this process."""
    N, C, D = shape
    setup.make(setup.case(8, 128, D), device)()  # loads libraries' code and starts threads, which are not counted
    limit = min(int(_OVERSHOOT * budget_bytes) + _SLACK_BYTES, memory.available_bytes(device))
    with memory.limited(device, limit):
        before = memory.reset_peak(device)
        step = setup.make(setup.case(N, C, D), device)
        step()  # allocates the momentum
        memory.synchronize(device)
        start = time.perf_counter()
        step()
        memory.synchronize(device)
        milliseconds = (time.perf_counter() - start) * 1e3
        return Trial(memory.peak_since_reset(device) - before, milliseconds)


def try_step(
    setup: TrainingSetup, shape: tuple[int, int, int], device: torch.device, budget_bytes: int, child: Child
) -> Trial | None:
    """Take two training steps of (N, C, D) in a child process; return None if they need far more than the budget.

    Raises:
        ChildFailed: if it failed for another reason than its memory.
    """
    try:
        return child.call(_two_steps, setup, shape, device, budget_bytes)
    except MemoryError:
        return None


@dataclass(frozen=True)
class Capacity:
    """The largest C that fits."""

    max_C: int
    bytes_per_class: float
    how: str
    """``extrapolated`` from the bytes per class of small problems, ``measured`` close to the budget, or ``computed``
    without a trial."""
    step_ms: float | None = None
    """Time of a step with this C; None if it was not measured."""

    def row(self, key: Key, N: int, D: int, budget_bytes: int, context: dict[str, str]) -> dict[str, Any]:
        """Return the flat record of a setup; ``context`` holds device, torch, commit and date."""
        recipe, backend, weight_dtype, momentum_dtype = key
        return {
            "recipe": recipe,
            "backend": backend,
            "dtype": weight_dtype,
            "weight_dtype": weight_dtype,
            "momentum_dtype": momentum_dtype,
            "N": N,
            "D": D,
            "budget_bytes": budget_bytes,
            "max_C": self.max_C,
            "bytes_per_class": round(self.bytes_per_class, 1),
            "step_ms": None if self.step_ms is None else round(self.step_ms, 1),
            "how": self.how,
            **context,
        }


def extrapolate(attempt: Attempt, budget_bytes: int, start: int) -> Capacity:
    """Extrapolate the largest C from the bytes per class between ``start`` classes and twice as many.

    Raises:
        MemoryError: if twice as many do not fit.
    """
    small, large = attempt(start), attempt(2 * start)
    if small is None or large is None or large.peak_bytes > budget_bytes:
        raise MemoryError(f"{2 * start} classes do not fit into {budget_bytes} bytes")
    slope = max(1.0, (large.peak_bytes - small.peak_bytes) / start)
    return Capacity(int(2 * start + (budget_bytes - large.peak_bytes) / slope), slope, "extrapolated")


def verify(attempt: Attempt, budget_bytes: int, guess: int) -> Capacity:
    """Search the largest C that fits, to 2 %.

    Raises:
        MemoryError: if no trial fits.
    """
    fits, best, fails = 0, None, math.inf
    guess = int(guess * (1 - _PRECISION / 2))
    for _ in range(_MOST_TRIALS):
        tried = attempt(guess)
        if tried is not None and tried.peak_bytes <= budget_bytes:
            fits, best = guess, tried
        else:
            fails = guess
        near = best is not None and best.peak_bytes * (1 + _PRECISION) >= budget_bytes
        if near or fails <= fits * (1 + _PRECISION):
            break
        # From the bytes per class of the trial. A trial without a result took an unknown amount too much.
        guess = int(guess * (0.85 if tried is None else 0.995 * budget_bytes / tried.peak_bytes))
        if not fits < guess < fails:
            guess = int((fits + fails) / 2) if fails < math.inf else int(fits * (1 + _PRECISION))
    if best is None:
        raise MemoryError(f"{guess} classes do not fit into {budget_bytes} bytes")
    return Capacity(fits, best.peak_bytes / fits, "measured", best.step_ms)


def run_capacity(
    setups: Sequence[TrainingSetup],
    device: torch.device,
    budget_bytes: int,
    *,
    N: int = 64,
    D: int = 512,
    earlier: Sequence[dict[str, Any]] = (),
    progress: Callable[[str], None] = lambda text: None,
    on_row: Callable[[list[dict[str, Any]]], object] = lambda rows: None,
) -> tuple[list[dict[str, Any]], list[Skip]]:
    """Return a row for each setup that can run here, and the reasons why others cannot.

    All setups are extrapolated first. Then each is verified, if the machine has the memory of the budget.

    Args:
        setups: the ways to train that are tried.
        device: the device to train on.
        budget_bytes: memory for a step, class centers, gradient and momentum included.
        N: rows of a batch.
        D: dimensions.
        earlier: rows of an interrupted run, which are kept; those that were extrapolated are verified.
        progress: called with a line before each trial.
        on_row: called with all rows each time that one has been found.

    Raises:
        RuntimeError: if this system does not report a process's peak memory.
    """
    if not memory.can_measure(device):
        raise RuntimeError("this system does not report a process's peak of resident memory; Linux does")
    context = machine.context(device)
    key = operator.itemgetter("recipe", "backend", "weight_dtype", "momentum_dtype")
    rows = {key(row): row for row in earlier}
    skips: list[Skip] = []
    with Child() as child:

        def search(setup: TrainingSetup, how: Search, guess: int, where: Case | None = None) -> None:
            """Find a setup's row, or the reason why there is none."""

            def attempt(C: int) -> Trial | None:
                progress(f"{setup}: {C:,} classes")
                return try_step(setup, (N, C, D), device, budget_bytes, child)

            try:
                rows[setup.key] = how(attempt, budget_bytes, guess).row(setup.key, N, D, budget_bytes, context)
            except (MemoryError, ChildFailed) as error:
                skips.append(Skip(setup.name, setup.backend, where, str(error)))
            else:
                on_row([*rows.values()])

        for setup in setups:
            case = setup.case(N, 1, D)
            reason = setup.reason_against(case, device)
            if reason is not None:
                skips.append(Skip(setup.name, setup.backend, None, reason))
            elif setup.key not in rows:
                search(setup, extrapolate, max(1024, budget_bytes // (128 * case.weight_bytes)))
        for setup in setups:
            row = rows.get(setup.key)
            if row is not None and row["how"] != "measured" and budget_bytes <= memory.available_bytes(device):
                search(setup, verify, row["max_C"], setup.case(N, row["max_C"], D))
    return [*rows.values()], skips
