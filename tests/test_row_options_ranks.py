"""Options of each row, scales and the newer margins on one, two and four ranks: the training of one process.

All cases run in one set of processes for each number of ranks.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import distributed_helpers
from support.head_training import D, own_rows
from torch import Tensor, nn

import fused_arcface as fa
from fused_arcface.margins import LabelMargin
from fused_arcface.parallel.ranks import Ranks

pytestmark = pytest.mark.distributed

ROWS, CLASSES, STEPS = 12, 23, 3


def by_label(cosine: Tensor, labels: Tensor) -> Tensor:
    return cosine - 0.02 * labels * cosine**2


def settled() -> fa.AdaCos:
    """A scale that changes by less than 1 in the last step of this test, which then makes one pass."""
    scale = fa.AdaCos()
    scale.scale.fill_(6.7)
    return scale


UPDATED = {"center_optimizer": fa.CenterSGD(0.1, momentum=0.9, weight_decay=0.01)}

# Options of the head, and the arguments of each call that the rows share out.
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "weights": ({}, ["sample_weight"]),
    "weights, sampled": ({"sample_rate": 0.4}, ["sample_weight"]),
    "weights, updated": (UPDATED | {"sample_rate": 0.4}, ["sample_weight"]),
    "rows": ({}, ["sample_weight", "none"]),
    "sum, updated": (UPDATED, ["sample_weight", "sum"]),
    "mixed": ({}, ["mixed"]),
    "mixed, weights": ({"label_smoothing": 0.1}, ["mixed", "sample_weight"]),
    "mixed, sampled": ({"sample_rate": 0.8, "sub_centers": 2}, ["mixed"]),
    "mixed, updated": (UPDATED, ["mixed"]),
    "mixed, updated, sampled": (UPDATED | {"sample_rate": 0.8, "sub_centers": 2}, ["mixed", "sample_weight"]),
    "learned scale": ({"scale": "learned"}, ["sample_weight"]),
    "learned scale, mixed, rows": ({"scale": "learned", "sample_rate": 0.8}, ["mixed", "none"]),
    "learned scale, updated": (UPDATED | {"scale": "learned"}, []),
    "AdaCos": ({"scale": fa.AdaCos()}, ["sample_weight"]),
    "AdaCos, updated, sampled": (UPDATED | {"scale": fa.AdaCos(), "sample_rate": 0.4}, []),
    "AdaCos, delayed": ({"scale": fa.AdaCos(delayed=True)}, []),
    "AdaCos, in one pass": ({"scale": settled(), "sample_rate": 0.8}, ["mixed", "sample_weight"]),
    "class margins": ({"margin": fa.ClassMargin(torch.linspace(0, 0.5, CLASSES))}, []),
    "class margins, sampled": ({"margin": fa.ClassMargin(torch.linspace(0, 0.5, CLASSES)), "sample_rate": 0.4}, []),
    "function of labels, updated": (UPDATED | {"margin": LabelMargin(by_label), "sample_rate": 0.4}, []),
    **{
        f"{name}{kind}": (options | {"margin": margin}, names)
        for name, margin in {
            "continuous": fa.ArcFace(0.9, "continuous"),
            "InterTopK": fa.InterTopK(fa.CosFace(0.2), penalty=0.1, k=3),
            "MV-Softmax AM": fa.MVSoftmax(fa.CosFace(0.2), t=1.3),
            "SphereFace2": fa.SphereFace2(kind="arc", bias=-1.0),
            "UniFace": fa.UniFace(bias=2.0),
        }.items()
        for kind, options, names in (
            ("", {}, ["sample_weight"]),
            (", sampled", {"sample_rate": 0.4, "sub_centers": 2}, ["none"]),
            (", updated", UPDATED | {"sample_rate": 0.4}, ["sample_weight"]),
        )
    },
}


def arguments(names: list[str], step: int) -> tuple[Tensor, Any, dict[str, Any], Tensor]:
    """Embeddings, targets and options of all ranks' rows, and the gradient by each row's loss."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, D, generator=generator, dtype=torch.float64)
    y = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    y[step] = -100
    target: Any = y
    if "mixed" in names:
        second = y.roll(1)
        second[5] = y[5]
        target = (y, second, torch.rand(ROWS, generator=generator, dtype=torch.float64))
    given: dict[str, Any] = {}
    if "sample_weight" in names:
        given["sample_weight"] = torch.rand(ROWS, generator=generator, dtype=torch.float64)
    given["reduction"] = next((name for name in names if name in ("sum", "none")), "mean")
    return x, target, given, torch.rand(ROWS, generator=generator, dtype=torch.float64)


def cut(value: Any, part: slice) -> Any:
    if isinstance(value, tuple):
        return tuple(cut(each, part) for each in value)
    return value[part] if isinstance(value, Tensor) else value


def train(name: str) -> dict[str, Any]:
    """A few steps: losses, this rank's gradients as one process would have them, and the centers at the end."""
    options, names = CASES[name]
    scale = copy.deepcopy(options.get("scale", 16.0))
    if scale == "learned":
        scale = nn.Parameter(torch.tensor(9.0, dtype=torch.float64))
    options = options | {"scale": scale, "margin": copy.deepcopy(options.get("margin", fa.ArcFace()))}
    head = fa.PartialFC(D, CLASSES, dtype=torch.float64, seed=5, **options)
    own = list(head.margin.parameters()) if isinstance(head.margin, nn.Module) else []
    world_size = head.ranks.world_size
    result: dict[str, Any] = {"losses": [], "gradients": []}
    for step in range(STEPS):
        x, y, given, upstream = arguments(names, step)
        part = own_rows(world_size, head.ranks.rank, ROWS, step)
        x = x[part].requires_grad_()
        loss = head(x, cut(y, part), **{key: cut(value, part) for key, value in given.items()})
        if given["reduction"] == "none":
            result["gradients"].append(loss.detach())
            loss = (loss * upstream[part]).sum()
        else:
            result["losses"].append(loss.item())
        loss.backward()
        with torch.no_grad():
            for number in (*own, head.scale):
                if isinstance(number, nn.Parameter):
                    number -= 0.5 * number.grad
                    number.grad = None
        if head.center_optimizer is None:
            with torch.no_grad():
                head.weight -= 0.1 * head.weight.grad.to_dense()
            head.weight.grad = None
        result["gradients"].append(x.grad / world_size)
    others = {name: each for name, each in head.state_dict().items() if name.startswith(("scale", "margin"))}
    return result | {"centers": head.full_weight(), "others": others}


def adapt() -> dict[str, Any]:
    """A MarginHead on each rank, as DistributedDataParallel has them, with a scale that adapts: the scales."""
    head = fa.MarginHead(D, CLASSES, dtype=torch.float64, scale=fa.AdaCos())
    with torch.no_grad():
        head.weight.copy_(torch.randn(CLASSES, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    ranks, scales = Ranks(), []
    for step in range(STEPS):
        x, y, _, _ = arguments([], step)
        part = own_rows(ranks.world_size, ranks.rank, ROWS, step)
        head(x[part], y[part])
        scales.append(head.scale.scale.clone())
    return {"scales": torch.cat(scales)}


def train_all() -> dict[str, dict[str, Any]]:
    return {name: train(name) for name in CASES} | {"MarginHead": adapt()}


@pytest.fixture(scope="module", params=[1, 2, 4])
def of_ranks(request: pytest.FixtureRequest) -> list[dict[str, dict[str, Any]]]:
    return distributed_helpers.run_ranks(request.param, train_all)


@pytest.mark.parametrize("name", CASES)
def test_ranks_train_as_one_process(of_ranks: list[dict[str, dict[str, Any]]], name: str) -> None:
    expected, results = train(name), [each[name] for each in of_ranks]
    for result in results:
        torch.testing.assert_close(result["losses"], expected["losses"], rtol=1e-10, atol=0)
        torch.testing.assert_close(result["others"], expected["others"], rtol=1e-10, atol=0)
        torch.testing.assert_close(result["centers"], expected["centers"], rtol=1e-10, atol=1e-12)
    joined = [torch.cat(parts) for parts in zip(*(result["gradients"] for result in results), strict=True)]
    torch.testing.assert_close(joined, expected["gradients"], rtol=1e-10, atol=1e-12)


def test_a_margin_head_adapts_its_scale_to_the_rows_of_all_ranks(of_ranks: list[dict[str, dict[str, Any]]]) -> None:
    expected = adapt()["scales"]
    assert len(expected.unique()) == STEPS
    for each in of_ranks:
        torch.testing.assert_close(each["MarginHead"]["scales"], expected, rtol=1e-10, atol=0)
