"""insightface's PartialFC and PartialFCAdamW of 2022: a sampled step changes the sampled class centers alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_arcface.compat import insightface

KINDS: list[tuple[Any, Any, dict[str, float]]] = [
    (insightface.PartialFC, torch.optim.SGD, {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01}),
    (insightface.PartialFCAdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
]
every_kind = pytest.mark.parametrize(("head_class", "optimizer_class", "options"), KINDS)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 5, generator=generator), torch.randint(40, (6,), generator=generator)


@every_kind
def test_only_sampled_centers_move(head_class: Any, optimizer_class: Any, options: dict[str, float]) -> None:
    """As the original does it: a parameter of the sampled rows alone, whose state is put back after the step."""
    head = head_class(insightface.CosFace(16.0, 0.2), 5, 40, sample_rate=0.4)
    optimizer = optimizer_class(head.parameters(), **options)
    right = head.weight.detach().clone()
    state: dict[str, torch.Tensor] = {}
    for step in range(6):
        head.zero_grad()
        head(*batch(step), optimizer).backward()
        rows = head.weight_index
        assert 0 < len(rows) < 40
        activated = torch.nn.Parameter(right[rows].clone())
        activated.grad = head.weight.grad[rows]
        own = optimizer_class([activated], **options)
        if state:
            own.state[activated] = {n: each[rows].clone() if each.dim() else each.clone() for n, each in state.items()}
        own.step()
        optimizer.step()
        right[rows] = activated.detach()
        for name, each in own.state[activated].items():
            if isinstance(each, torch.Tensor):
                whole = state.setdefault(name, torch.zeros(40, 5) if each.dim() else each.clone())
                if each.dim():
                    whole[rows] = each
                else:
                    whole.copy_(each)
        torch.testing.assert_close(head.weight.detach(), right, rtol=1e-5, atol=1e-7)


@every_kind
def test_all_classes_are_the_second_version(head_class: Any, optimizer_class: Any, options: dict[str, float]) -> None:
    heads = [head_class(insightface.ArcFace(), 5, 40), insightface.PartialFC_V2(insightface.ArcFace(), 5, 40)]
    for index, head in enumerate(heads):
        optimizer = optimizer_class(head.parameters(), **options)
        for step in range(3):
            optimizer.zero_grad()
            (head(*batch(step), optimizer) if index == 0 else head(*batch(step))).backward()
            optimizer.step()
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert list(heads[0].state_dict()) == ["weight"]


def test_another_optimizer_is_refused() -> None:
    head = insightface.PartialFC(insightface.ArcFace(), 5, 40)
    with pytest.raises(TypeError, match=r"optimizer must be torch\.optim\.SGD; got AdamW"):
        head(*batch(0), torch.optim.AdamW(head.parameters()))
    head = insightface.PartialFCAdamW(insightface.ArcFace(), 5, 40)
    with pytest.raises(TypeError, match=r"optimizer must be torch\.optim\.Adam or AdamW; got SGD"):
        head(*batch(0), torch.optim.SGD(head.parameters(), lr=0.1))
