"""Write what docs/margins.md shows of the margins: the table out of the registry, and the picture.

python docs/update_margins.py
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch

import fused_arcface as fa
from fused_arcface.base.extras import pyplot, save_figure
from fused_arcface.margins.registry import as_markdown

DOCS = Path(__file__).resolve().parent
DRAWN = {
    "NormSoftmax()": fa.NormSoftmax(),
    "CosFace(0.35)": fa.CosFace(0.35),
    "ArcFace(0.5)": fa.ArcFace(0.5),
    'ArcFace(0.5, boundary="none")': fa.ArcFace(0.5, boundary="none"),
    "SphereFace(1.7)": fa.SphereFace(1.7),
}


def with_table(page: str) -> str:
    """Return the page with the registry's table between its markers."""
    table = as_markdown().strip()
    return re.sub(r"(<!-- margins -->\n).*?(<!-- /margins -->)", lambda m: f"{m[1]}{table}\n{m[2]}", page, flags=re.S)


def draw(path: Path) -> None:
    """Draw modified cosine and derivative by the cosine against the angle, for the plain margins."""
    figure, axes = pyplot().subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    angles = torch.linspace(0.02, math.pi - 0.02, 400, dtype=torch.float64)
    for name, margin in DRAWN.items():
        cosines = angles.cos().requires_grad_()
        modified = margin(cosines)
        (slope,) = torch.autograd.grad(modified.sum(), cosines)
        for axis, values in zip(axes, (modified.detach(), slope), strict=True):
            axis.plot(angles.rad2deg().numpy(), values.numpy(), label=name)
    axes[0].set(
        xlabel="angle θ to the class center, degrees", ylabel="modified cosine f(θ)", title="target's logit ÷ s"
    )
    axes[1].set(xlabel="angle θ to the class center, degrees", ylabel="df / d cos θ", title="derivative", ylim=(-1, 6))
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    page = DOCS / "margins.md"
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")
    draw(DOCS / "margins.png")
