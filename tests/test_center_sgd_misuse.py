"""CenterSGD with settings, groups and weights that it cannot follow, and in a step without rows."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fused_arcface as fa

D, C = 70, 40


def head_of(momentum: float = 0.9, **options: Any) -> fa.PartialFC:
    return fa.PartialFC(D, C, scale=16.0, center_optimizer=fa.CenterSGD(0.1, momentum, 0.01), **options)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, D, generator=generator), torch.arange(6)


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("sample_rate", [1.0, 0.4])
@pytest.mark.parametrize("margin", [fa.ArcFace(), fa.InterTopK(fa.ArcFace(0.3), k=2), fa.CurricularFace()], ids=repr)
@pytest.mark.parametrize(("dtype", "sub_centers"), [(torch.float32, 1), (torch.float64, 1), (torch.float32, 2)])
def test_a_step_without_rows_decays(
    backend: str, sample_rate: float, margin: Any, dtype: torch.dtype, sub_centers: int
) -> None:
    """The sum over no rows is 0, and so is its gradient: ``w - lr·weight_decay·w``, as torch.optim.SGD has it."""
    head = head_of(
        margin=copy.deepcopy(margin), sample_rate=sample_rate, dtype=dtype, sub_centers=sub_centers, backend=backend
    )
    before = head.weight.detach().clone()
    used = [torch.full((1 << size,), math.nan) for size in range(4, 18)]
    del used  # a kernel that reads memory that it has not written then finds NaN
    head(torch.zeros(0, D, dtype=dtype), torch.zeros(0, dtype=torch.int64), reduction="sum").backward()
    is_used = torch.zeros(C, dtype=torch.bool)
    is_used[head.sampled] = True
    expected = torch.where(is_used.repeat_interleave(sub_centers)[:, None], before - 0.1 * 0.01 * before, before)
    torch.testing.assert_close(head.weight.detach(), expected, rtol=1e-6, atol=0)


WRONG = [
    ("lr", math.nan, r"lr must be in \[0, inf\); got nan"),
    ("lr", -0.1, r"lr must be in \[0, inf\); got -0.1"),
    ("lr", math.inf, r"lr must be in \[0, inf\); got inf"),
    ("momentum", 1.5, r"momentum must be in \[0, 1.0\); got 1.5"),
    ("weight_decay", math.inf, r"weight_decay must be in \[0, inf\); got inf"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_settings_out_of_range_are_refused_where_they_come_in(name: str, value: float, message: str) -> None:
    head, (x, y) = head_of(), batch()
    head(x, y).backward()
    before = copy.deepcopy(head.state_dict())
    state = copy.deepcopy(before)
    state["center_optimizer.settings"][["lr", "momentum", "weight_decay"].index(name)] = value
    with pytest.raises(RuntimeError, match=message):
        head.load_state_dict(state)
    of_optimizer = head.center_optimizer.state_dict()
    of_optimizer["param_groups"][0][name] = value
    with pytest.raises(ValueError, match=message):
        head.center_optimizer.load_state_dict(of_optimizer)
    for key, tensor in head.state_dict().items():
        assert torch.equal(tensor, before[key])
    head.center_optimizer.param_groups[0][name] = value  # what a schedule may do
    with pytest.raises(ValueError, match=message):
        head(x, y)
    assert torch.equal(head.weight, before["weight"])


def test_a_negative_step_is_refused() -> None:
    head = head_of()
    state = head.state_dict() | {"step": torch.tensor(-1)}
    with pytest.raises(RuntimeError, match=r"step must be >= 0; got -1"):
        head.load_state_dict(state)
    assert head.step == 0


@pytest.mark.parametrize("rate", [torch.tensor(0.05), torch.tensor(0.05, dtype=torch.float64).numpy()], ids=type)
def test_a_rate_may_be_a_number_of_torch_or_numpy(rate: Any) -> None:
    heads, (x, y) = [head_of(), head_of()], batch()
    for head, value in zip(heads, (rate, float(rate)), strict=True):
        head.center_optimizer.param_groups[0]["lr"] = value
        head(x, y).backward()
    assert torch.equal(heads[0].weight, heads[1].weight)


def test_momentum_in_a_head_without_memory_for_it_is_refused() -> None:
    head, (x, y) = head_of(momentum=0.0), batch()
    head.center_optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ValueError, match=r"momentum must stay 0 in a head that was built without it.*got 0.9"):
        head(x, y)


def test_a_second_group_of_parameters_is_refused() -> None:
    head = head_of()
    with pytest.raises(fa.CenterUpdateError, match="give other parameters to an optimizer of their own"):
        head.center_optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert len(head.center_optimizer.param_groups) == 1


class _Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _weight_norm(head: nn.Module) -> None:
    nn.utils.weight_norm(head, "weight")


MADE_OF_OTHERS: dict[str, Callable[[nn.Module], object]] = {
    "parametrize": lambda head: nn.utils.parametrize.register_parametrization(head, "weight", _Twice()),
    "spectral_norm": lambda head: parametrizations.spectral_norm(head, "weight"),
    "prune": lambda head: prune.l1_unstructured(head, "weight", 0.5),
    "weight_norm": _weight_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("how", MADE_OF_OTHERS)
def test_a_weight_made_of_others_is_refused_or_has_a_gradient(how: str) -> None:
    """CenterSGD would change a copy, and nothing would learn. An ordinary optimizer gets the gradient."""
    x, y = batch()
    head = head_of()
    MADE_OF_OTHERS[how](head)
    with pytest.raises(fa.CenterUpdateError, match="weight must be a parameter of the head with CenterSGD"):
        head(x, y)
    ordinary = fa.PartialFC(D, C, scale=16.0)
    MADE_OF_OTHERS[how](ordinary)
    ordinary(x, y).backward()
    assert all(parameter.grad is not None for parameter in ordinary.parameters())


def _assigned(head: fa.PartialFC) -> None:
    head.load_state_dict({name: tensor.clone() for name, tensor in head.state_dict().items()}, assign=True)


def _swapped(head: fa.PartialFC) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        head.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


ANEW: dict[str, Callable[[fa.PartialFC], object]] = {
    "assigned": _assigned,
    "to_empty": lambda head: head.to_empty(device="cpu").reset_parameters(),
    "swapped": _swapped,
}


@pytest.mark.parametrize("how", ANEW)
def test_clipping_is_refused_after_the_weight_was_made_anew(how: str) -> None:
    """Torch puts a plain parameter in the place of the centers, and clipping would silently leave that out."""
    head, (x, y) = head_of(), batch()
    ANEW[how](head)
    head(x.to(head.weight.dtype), y).backward()
    with pytest.raises(fa.CenterUpdateError, match="clip"):
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
