"""Write what the pages show of the registries: margins as a table and a picture, and the formats of data sets.

python docs/update.py
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch

import fused_arcface as fa
from fused_arcface.app.data import formats
from fused_arcface.app.drawing import WIDTH, Drawing, write_pictures
from fused_arcface.app.lab.margin_pictures import entries, label, styles
from fused_arcface.margins import registry

DOCS = Path(__file__).resolve().parent
LISTS = {
    "margins": registry.as_markdown(),
    "formats of labeled images": formats.as_markdown(),
    "formats of pairs": formats.as_markdown(pairs=True),
}
"""The text for each pair of markers, ``<!-- NAME -->`` and ``<!-- /NAME -->``."""


def with_lists(page: str) -> str:
    """Return the page with the registries' lists between their markers."""

    def current(found: re.Match[str]) -> str:
        return f"<!-- {found[1]} -->\n{LISTS[found[1]]}<!-- /{found[1]} -->"

    return re.sub(r"<!-- ([\w ]+) -->\n.*?<!-- /\1 -->", current, page, flags=re.S)


def draw(plt: Any) -> Any:
    """Draw modified cosine and derivative by the cosine against the angle: each margin of the angle, by default."""
    figure, axes = plt.subplots(2, 1, figsize=(WIDTH, 7.6), sharex=True, layout="constrained")
    angles = torch.linspace(0.02, math.pi - 0.02, 400, dtype=torch.float64)
    drawn = {label(entry): entry.margin() for entry in entries("angular")}
    drawn['ArcFace(0.5, boundary="none")'] = fa.ArcFace(0.5, boundary="none")
    for (name, margin), style in zip(drawn.items(), styles(), strict=False):
        cosines = angles.cos().requires_grad_()
        modified = margin(cosines)
        (slope,) = torch.autograd.grad(modified.sum(), cosines)
        for axis, values in zip(axes, (modified.detach(), slope), strict=True):
            axis.plot(angles.rad2deg().numpy(), values.numpy(), label=name if axis is axes[0] else None, **style)
    axes[0].set(ylabel="modified cosine f(θ)", title="the target's logit ÷ s")
    axes[1].set(xlabel="angle θ to the class center, degrees", ylabel="df / d cos θ", title="derivative", ylim=(-1, 6))
    for axis in axes:
        axis.set(xlim=(0, 180), xticks=range(0, 181, 30))
        axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


if __name__ == "__main__":
    for page in DOCS.glob("*.md"):
        page.write_text(with_lists(page.read_text(encoding="utf-8")), encoding="utf-8")
    write_pictures([Drawing("margins", "Each margin of the angle, by default.", draw)], DOCS)
