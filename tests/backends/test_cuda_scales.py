"""A scale that only the device knows, in the CUDA backend: the same results as of a number, and the host never reads
it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.cases import Case, inputs_on
from support.cuda_places import in_place, places
from torch import Tensor

from fused_arcface.backends import cuda, hopper
from fused_arcface.base import keyed_random
from fused_arcface.engine.terms import CenterStep, RowGradients


@pytest.fixture(params=places())
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "cpu":
        monkeypatch.setattr(cuda, "_capability", lambda tensor: hopper.CAPABILITY)
    with in_place(request.param, monkeypatch) as device:
        yield device


class Unread(Tensor):
    """A number that the host must not read."""

    def _refuse(self, *_: Any) -> Any:
        raise AssertionError("the host reads the scale")

    item = tolist = __float__ = __int__ = __bool__ = cpu = numpy = _refuse


# Hopper's kernels, and the portable ones in two precisions.
KINDS = {"hopper": Case(5, 140, 512, "bfloat16", "float32"), "bfloat16": Case(5, 140, 16, "bfloat16", "bfloat16")}
KINDS["float32"] = Case(5, 140, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_same_results_as_of_a_number(kind: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_ARCFACE_HOPPER", "1" if kind == "hopper" else "0")
    x, w, target, _ = inputs_on(KINDS[kind], device)
    unread = torch.tensor(20.0, dtype=torch.float64, device=device).as_subclass(Unread)
    rows = torch.linspace(-1, 1, 5, device=device)
    lse = torch.full((5,), 3.0, dtype=torch.float64, device=device)
    active = torch.tensor(True, device=device)
    results = []
    for scale in (20.0, unread):
        gradients = RowGradients(scale, lse, rows, -rows)
        step = CenterStep(None, torch.zeros_like(w), None, 0.1, 0.9, 0.0, keyed_random.rounding_key(3, 4), 0, active)
        updated = w.clone()
        cuda.update_centers(x, updated, target, gradients, step)
        sums = [cuda.class_stats(x, w, target, scale, lse, wanted) for wanted in (True, False)]
        results.append((*sums[0], *sums[1], cuda.weight_grad(x, w, target, gradients), updated))
    for of_number, of_tensor in zip(*results, strict=True):
        assert torch.equal(of_number, of_tensor)
    assert not torch.equal(results[0][-1], w)
