"""What the package tells torch.compile, torch.func and torch.jit."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch

import fused_arcface as fa
from fused_arcface.base.compiler import not_compiled

HEADS = [fa.MarginHead(4, 3), fa.PartialFC(4, 3), fa.PartialFC(4, 3, center_optimizer=fa.CenterSGD(0.1))]


@pytest.mark.parametrize("head", HEADS, ids=lambda head: type(head).__name__)
def test_torch_func_is_refused_by_name(head: torch.nn.Module) -> None:
    before = {name: value.clone() for name, value in head.state_dict().items()}
    expected = (
        r"^(MarginHead|PartialFC|margin_softmax_loss) cannot be transformed by torch\.func .*torch\.autograd\.grad"
    )
    for transformed in (torch.func.grad, torch.func.vmap):
        with pytest.raises(RuntimeError, match=expected):
            transformed(lambda x: head(x, torch.tensor([0, 1])))(torch.randn(2, 4).expand(2, 2, 4).clone()[0])
    assert all(value.equal(before[name]) for name, value in head.state_dict().items())


@pytest.mark.parametrize("head", HEADS, ids=lambda head: type(head).__name__)
def test_torch_jit_script_is_refused_by_name(head: torch.nn.Module) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), head)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for scripted in (head, model):
            with pytest.raises(RuntimeError, match=rf"^{type(head).__name__} cannot be compiled by torch\.jit\.script"):
                torch.jit.script(scripted)


def test_a_function_that_is_not_compiled_runs_between_the_graphs() -> None:
    seen = []

    @not_compiled
    def seen_as_python(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.compiler.is_compiling())
        return x + 1

    def program(x: torch.Tensor) -> torch.Tensor:
        return seen_as_python(x * 2) * 3

    x = torch.ones(2)
    assert torch.compile(program, backend="eager")(x).equal(torch.full((2,), 9.0))
    assert "torch._dynamo" in sys.modules and seen and not any(seen)
