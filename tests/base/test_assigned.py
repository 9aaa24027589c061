"""A head's margin and scale, assigned between steps as numbers, parameters, functions and modules in turn."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fused_arcface as fa


@pytest.mark.parametrize("kind", [fa.MarginHead, fa.PartialFC])
def test_each_kind_follows_each_other(kind: type[nn.Module]) -> None:
    head = kind(4, 7, dtype=torch.float64)
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.arange(5)
    margins = [fa.UniFace(bias=2.0), fa.ArcFace(0.3), fa.SphereFace2(), lambda c: c - 0.1, fa.CurricularFace()]
    scales = [nn.Parameter(torch.tensor(9.0)), 16.0, fa.AdaCos(), 8.0, fa.AdaCos(delayed=True), 12.0]
    for name, values in (("margin", [*margins, fa.ArcFace()]), ("scale", [*scales, nn.Parameter(torch.tensor(3.0))])):
        for value in values:
            setattr(head, name, value)
            expected = fa.reference.margin_softmax_loss(
                x, head.weight, y, margin=copy.deepcopy(head.margin), scale=copy.deepcopy(head.scale)
            )
            torch.testing.assert_close(head(x, y), expected, rtol=1e-10, atol=0)
            is_member = isinstance(value, (nn.Parameter, nn.Module))
            assert any(key.split(".")[0] == name for key in head.state_dict()) == is_member
            assert getattr(head, name) is value
        assert head.weight.requires_grad and "weight" in head.state_dict()


def test_what_is_wrong_is_refused_by_the_next_call() -> None:
    head = fa.MarginHead(4, 7, margin=fa.AdaFace(), scale=nn.Parameter(torch.tensor(9.0)))
    head.scale = -1.0
    with pytest.raises(ValueError, match=r"scale must be finite and > 0; got -1\.0"):
        head(torch.randn(2, 4), torch.tensor([0, 1]))
