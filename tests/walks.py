"""Print the walks of docs/architecture.md: the files that a call goes through, from the public name to the kernel.

``python tests/walks.py`` lists the files of the package on the stack where the pass over the classes begins, from the
outermost call to the innermost. ``base/`` is not counted. Below them it lists the files that also get the embeddings on
the way, and return.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

import fused_arcface as fa

PACKAGE = Path(fa.__file__).parent
KERNEL = "backends/cpu.py", "class_stats"


@dataclass
class Walk:
    """The files of one call."""

    down: list[str] = field(default_factory=list)
    """From the public name to the kernel, one entry for each change of file."""
    aside: list[str] = field(default_factory=list)
    """Files whose functions get the embeddings too, in the order of the calls."""


def walk(call: Callable[[Tensor], Tensor], embeddings: Tensor) -> Walk:
    """Return the files of ``call(embeddings)``."""
    address, result = embeddings.data_ptr(), Walk()

    def listen(frame: FrameType, event: str, _: object) -> None:
        file = _file(frame)
        if event != "call" or file is None:
            return
        if (file, frame.f_code.co_name) == KERNEL:
            outward = [frame]
            while outward[-1].f_back is not None:
                outward.append(outward[-1].f_back)
            files = [each for each in map(_file, reversed(outward)) if each is not None]
            result.down = [each for each, _ in itertools.groupby(files)]
        count = frame.f_code.co_argcount + frame.f_code.co_kwonlyargcount
        arguments = [frame.f_locals.get(name) for name in frame.f_code.co_varnames[:count]]
        if any(isinstance(each, Tensor) and each.data_ptr() == address for each in arguments):
            result.aside.append(file)

    sys.setprofile(listen)
    try:
        call(embeddings)
    finally:
        sys.setprofile(None)
    result.aside = [each for each in dict.fromkeys(result.aside) if each not in result.down]
    return result


def _file(frame: FrameType) -> str | None:
    """Return the frame's file in the package, ``base/`` excepted."""
    path = Path(frame.f_code.co_filename)
    if not path.is_relative_to(PACKAGE) or path.is_relative_to(PACKAGE / "base"):
        return None
    return path.relative_to(PACKAGE).as_posix()


def walks() -> dict[str, Walk]:
    """Return the walks of ``margin_softmax_loss`` and of ``PartialFC.forward``."""
    x, w, target = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8), torch.arange(4)
    head = fa.PartialFC(8, 5, backend="cpu")
    return {
        "margin_softmax_loss": walk(lambda rows: fa.margin_softmax_loss(rows, w, target, backend="cpu"), x),
        "PartialFC.forward": walk(lambda rows: head(rows, target), x),
    }


if __name__ == "__main__":
    for name, each in walks().items():
        print(f"{name}: {len(each.down)} files to the kernel", *each.down, sep="\n  ")
        print("  aside:", *each.aside)
