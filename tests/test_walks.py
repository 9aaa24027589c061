"""The walks from the public functions to the kernel, as data: the files that hand an argument on, each once.

Run ``python tests/test_walks.py`` to print them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch

import fused_arcface as fa
from fused_arcface.backends import native
from fused_arcface.base.options import HeadOptions
from fused_arcface.engine.terms import RowGradients

PACKAGE = Path(fa.__file__).parent
SCALE = 27.125
"""A number that nothing else in a step is equal to."""


def _holds(value: object, argument: object) -> bool:
    """Return true if a parameter is the argument, or one of the tuples that it travels in."""
    if isinstance(value, (HeadOptions, RowGradients)):
        return value.scale == argument
    if isinstance(value, fa.PartialFC):
        return value.scale == argument
    if isinstance(value, torch.Tensor) or isinstance(argument, torch.Tensor):
        return isinstance(value, torch.Tensor) and value is argument
    return isinstance(value, type(argument)) and value == argument


def _takes(frame: FrameType, argument: object) -> bool:
    names, positional, keywords, values = inspect.getargvalues(frame)
    given = [values[name] for name in names if name in values]
    given += [*values.get(positional, ())] if positional else []
    given += [*values.get(keywords, {}).values()] if keywords else []
    return any(_holds(value, argument) for value in given)


def walk(call: Callable[[], object], kernel: str, argument: object) -> list[str]:
    """Return the files whose functions take the argument as a parameter, from the call to a compiled kernel, in order.

    Files in base/ are not counted. A file that calls itself is listed once; one that is come back to, again.
    """
    found: list[str] = []

    def arrive(*_: object) -> None:
        frames, frame = [], inspect.currentframe()
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back
        for each in reversed(frames):
            path = Path(each.f_code.co_filename)
            if PACKAGE in path.parents and path.parent.name != "base" and _takes(each, argument):
                name = str(path.relative_to(PACKAGE))
                if not found or found[-1] != name:
                    found.append(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native.module, kernel, arrive)
        call()
    return found


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(4, 8, generator=generator), torch.randn(5, 8, generator=generator)
    return x.requires_grad_(), w.requires_grad_(), torch.tensor([0, 1, 2, 4])


def from_the_function() -> list[str]:
    x, w, target = _inputs()
    return walk(lambda: fa.margin_softmax_loss(x, w, target, scale=SCALE, backend="cpu"), "class_stats", SCALE)


def from_the_head() -> list[str]:
    x, _, target = _inputs()
    head = fa.PartialFC(8, 5, scale=SCALE, backend="cpu")
    return walk(lambda: head(x, target), "class_stats", SCALE)


def from_the_head_backward() -> list[str]:
    x, _, target = _inputs()
    head = fa.PartialFC(8, 5, scale=SCALE, backend="cpu", center_optimizer=fa.CenterSGD(0.1))
    loss = head(x, target)
    return walk(loss.backward, "update_centers", SCALE)


WALKS = {
    "margin_softmax_loss": (from_the_function, 5),
    "PartialFC.forward": (from_the_head, 7),
    "backward of PartialFC with CenterSGD": (from_the_head_backward, 7),
}


@pytest.mark.parametrize("name", WALKS)
def test_each_file_of_a_walk_occurs_once(name: str) -> None:
    find, most = WALKS[name]
    files = find()
    assert files[-1] == "backends/cpu.py", files
    assert len(set(files)) == len(files) <= most, files


def test_the_walk_of_the_function() -> None:
    expected = ["functional.py", "engine/step.py", "engine/autograd.py", "engine/ops.py", "backends/cpu.py"]
    assert from_the_function() == expected
    assert from_the_head() == ["partial_fc.py", *expected[1:]]


if __name__ == "__main__":
    for name, (find, _) in WALKS.items():
        print(f"{name}: {' -> '.join(find())}")
