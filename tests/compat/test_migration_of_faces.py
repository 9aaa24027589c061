"""The migration page on other face recognition projects, against their heads in this test's words."""

from __future__ import annotations

import math
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_arcface as fa

TEXT = (Path(__file__).parents[2] / "docs" / "migration.md").read_text(encoding="utf-8")
N, D, C = 40, 16, 11


def block(section: str, kind: str) -> str:
    body = TEXT.partition(f"\n### {section}\n")[2].partition("\n##")[0]
    (found,) = (code for code in re.findall(r"```python\n(.*?)```", body, re.DOTALL) if code.startswith(f"# {kind}\n"))
    return found


def given() -> dict[str, Any]:
    """Return embeddings with cosines to their centers from -0.99 to 0.99, and norms from 10 to 30."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(N) % C
    centers = F.normalize(torch.randn(C, D, generator=draw))
    off = torch.randn(N, D, generator=draw)
    off = F.normalize(off - (off * centers[labels]).sum(1, keepdim=True) * centers[labels])
    cosine = torch.linspace(-0.99, 0.99, N)[:, None]
    norms = 10 + 20 * torch.rand(N, 1, generator=draw)
    embeddings = norms * (cosine * centers[labels] + (1 - cosine**2).sqrt() * off)
    names = {"embeddings": embeddings.requires_grad_(), "labels": labels, "num_classes": C, "centers": centers}
    return {"torch": torch, "math": math, **names}


class ArcLogits(nn.Module):
    """face.evoLVe's ArcFace."""

    def __init__(self, in_features: int, out_features: int, device_id: None, s: float = 64.0, m: float = 0.5) -> None:
        super().__init__()
        self.weight, self.s, self.m = nn.Parameter(torch.empty(out_features, in_features)), s, m

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        cosine = F.linear(F.normalize(x), F.normalize(self.weight))
        phi = cosine * math.cos(self.m) - (1 - cosine**2).sqrt() * math.sin(self.m)
        phi = torch.where(cosine > math.cos(math.pi - self.m), phi, cosine - math.sin(math.pi - self.m) * self.m)
        return self.s * torch.where(F.one_hot(label, cosine.shape[1]) > 0, phi, cosine)


class AdaLogits(nn.Module):
    """AdaFace's head: unit embeddings and their norms to logits."""

    t: Tensor
    batch_mean: Tensor
    batch_std: Tensor

    def __init__(self, embedding_size: int, classnum: int, t_alpha: float) -> None:
        super().__init__()
        self.kernel, self.t_alpha = nn.Parameter(torch.empty(embedding_size, classnum)), t_alpha
        for name, value in (("t", 0.0), ("batch_mean", 20.0), ("batch_std", 100.0)):
            self.register_buffer(name, torch.full((1,), value))

    def forward(self, x: Tensor, norms: Tensor, label: Tensor) -> Tensor:
        cosine = (x @ (self.kernel / self.kernel.norm(dim=0))).clamp(-1 + 1e-3, 1 - 1e-3)
        norms = norms.detach().clip(0.001, 100)
        self.batch_mean = norms.mean() * self.t_alpha + (1 - self.t_alpha) * self.batch_mean
        self.batch_std = norms.std() * self.t_alpha + (1 - self.t_alpha) * self.batch_std
        quality = (0.333 * (norms - self.batch_mean) / (self.batch_std + 1e-3)).clip(-1, 1)
        turned = (cosine.acos() - 0.4 * quality).clip(1e-3, math.pi - 1e-3).cos() - 0.4 - 0.4 * quality
        return 64.0 * torch.where(F.one_hot(label, cosine.shape[1]) > 0, turned, cosine)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, contents in (("head", {"AdaFace": AdaLogits}), ("head.metrics", {"ArcFace": ArcLogits})):
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("section", ["Heads that return logits", "AdaFace and MagFace"])
def test_before_and_after_agree(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    before, after = given(), given()
    made, _, used = block(section, "before").partition("logits = ")
    exec(made, before)
    weight = next(before["head"].parameters())
    transposed = weight.shape == (D, C)
    with torch.no_grad():
        weight.copy_(before["centers"].T if transposed else before["centers"])
    exec(f"logits = {used}", before)
    made, mark, used = block(section, "after").partition("loss")
    exec(made, after)
    with torch.no_grad():
        after["head"].weight.copy_(after["centers"])
    exec(mark + used, after)
    torch.testing.assert_close(after["loss"], before["loss"], rtol=1e-5, atol=1e-5)
    theirs = torch.autograd.grad(before["loss"], (before["embeddings"], weight), retain_graph=True)
    ours = torch.autograd.grad(after["loss"], (after["embeddings"], after["head"].weight), retain_graph=True)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1], theirs[1].T if transposed else theirs[1], rtol=1e-4, atol=1e-5)
    if "top_5" in after:
        cosines = F.normalize(after["embeddings"]) @ after["centers"].T
        found = cosines.topk(5).indices == after["labels"][:, None]
        assert 0 < after["top_1"] == found[:, :1].any(1).float().mean()
        assert after["top_1"] < after["top_5"] == found.any(1).float().mean() < 1
        focal = (1 - torch.exp(-F.cross_entropy(before["logits"], before["labels"]))) ** 2 * before["loss"]
        (code,) = re.findall(r"is a function of the mean: `(.*?)`", TEXT)
        torch.testing.assert_close(eval(code, after), focal, rtol=1e-5, atol=1e-5)


def _target(cosine: Tensor, m: float) -> Tensor:
    """Return ``cos(θ + m)`` as these projects write it."""
    return cosine * math.cos(m) - (1 - cosine**2).sqrt() * math.sin(m)


Formula = Callable[[Tensor, float], Tensor]
FORMULAS: dict[str, list[Formula]] = {
    "`ArcFace`, `Arcface`": [lambda c, m: torch.where(c > -math.cos(m), _target(c, m), c - m * math.sin(m))],
    "the same with `easy_margin": [lambda c, m: torch.where(c > 0, _target(c, m), c)],
    "ElasticFace's `ArcFace`": [lambda c, m: (c.acos() + m).cos()],
    "AdaFace's `ArcFace`": [lambda c, m: (c.acos() + m).clip(1e-4, math.pi - 1e-4).cos()],
    "FaceX-Zoo's `ArcFace`": [lambda c, m: torch.where(c > math.cos(math.pi - m), _target(c, m), c)],
    "`AM_Softmax`": [lambda c, m: c - m],
    "`MultiMarginProduct": [
        lambda c, m: torch.where(c > -math.cos(0.2), _target(c, 0.2), c - 0.2 * math.sin(0.2)) - 0.35
    ],
    "`SphereFace(m=4)`": [lambda c, m: c + (_folded(c, 4.0) - c) / (1 + 5.0)],
    "`MV_Softmax": [lambda c, m: torch.where(c > m, c - m, c), lambda c, m: torch.where(c > 0, _target(c, m), c)],
    "`SVXSoftmax": [lambda c, m: c - m],
    "opensphere's": [
        lambda c, m: (c.clamp(-1 + 1e-5, 1 - 1e-5).acos() + m).clamp(1e-5, 3.14159).cos(),
        lambda c, m: _folded(c, m),
    ],
}


def _folded(cosine: Tensor, m: float) -> Tensor:
    """Return SphereFace's ``(-1)^k cos(mθ) - 2k``."""
    theta = cosine.acos()
    k = (m * theta / math.pi).floor()
    return (-1.0) ** k * (m * theta).cos() - 2 * k


@pytest.mark.parametrize("name", FORMULAS)
def test_the_table_of_margins(name: str) -> None:
    """Each margin of the table is the formula of the project's code, from near 0° to near 180°."""
    (row,) = [line for line in TEXT.splitlines() if line.startswith("| ") and name in line.split(" | ")[0]]
    expressions = re.findall(r"`((?:fa\.|lambda).*?)`", row.split(" | ")[1])
    values = {"fa": fa, "torch": torch, "math": math, "m": 1.2 if name == "opensphere's" else 0.5, "a": 0.2, "b": 0.35}
    cosine = torch.linspace(-0.9999, 0.9999, 2001, dtype=torch.float64)
    assert len(expressions) == len(FORMULAS[name])
    for code, formula in zip(expressions, FORMULAS[name], strict=True):
        margin = eval(code.replace("λ", "5.0"), values)
        right = formula(cosine, values["m"])
        torch.testing.assert_close(margin(cosine), right, rtol=0, atol=1e-5)


def test_a_learned_margin_of_each_class() -> None:
    """AdaM-Softmax's row: the loss of its logits, and the gradient of its parameter."""
    names = given()
    adam = nn.Parameter(torch.linspace(0.3, 0.4, C))
    (code,) = re.findall(r"\| `AdaM-Softmax`.* \| `(.*?)` \|", TEXT)
    margin = eval(code, {"fa": fa, "adam": adam})
    ours = fa.margin_softmax_loss(names["embeddings"], names["centers"], names["labels"], margin=margin, scale=30.0)
    one_hot = F.one_hot(names["labels"], C)
    logits = 30.0 * (F.normalize(names["embeddings"]) @ names["centers"].T - one_hot * adam)
    theirs = F.cross_entropy(logits, names["labels"])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(loss, adam)[0] for loss in (ours, theirs)), rtol=1e-4, atol=1e-5)


def test_their_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps of AdaFace's loop, a checkpoint of Lightning, and four more steps in either project."""
    monkeypatch.chdir(tmp_path)
    images = torch.randn(8, N, 6, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(N) % C
    torch.manual_seed(2)
    net, theirs = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, D)), AdaLogits(D, C, 0.01)
    nn.init.normal_(theirs.kernel)
    optimizer = torch.optim.SGD([*net.parameters(), theirs.kernel], lr=0.1, momentum=0.9)

    def step(i: int) -> float:
        norms = net(images[i]).norm(dim=1, keepdim=True)
        loss = F.cross_entropy(theirs(net(images[i]) / norms, norms, labels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    for i in range(4):
        step(i)
    state = {f"head.{name}": each for name, each in theirs.state_dict().items()}
    torch.save({"state_dict": state, "optimizer_states": [optimizer.state_dict()]}, "last.ckpt")
    backbone = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, D))
    backbone.load_state_dict(net.state_dict())
    after: dict[str, Any] = {"torch": torch, "backbone": backbone, "embeddings": torch.empty(0, D), "num_classes": C}
    exec(block("Resume their training", "after"), after)
    for i in range(4, 8):
        loss = after["head"](backbone(images[i]), labels)
        after["optimizer"].zero_grad()
        loss.backward()
        after["optimizer"].step()
        assert loss.item() == pytest.approx(step(i), rel=1e-5)
    torch.testing.assert_close(after["head"].weight, theirs.kernel.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after["head"].margin.norm_mean, theirs.batch_mean.squeeze())
