"""What PartialFC's ``state_dict()`` holds: a run goes on from whatever people save, to the bit."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support import distributed_helpers
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import fused_arcface as fa
from fused_arcface import checkpoint
from fused_arcface.compat import insightface

D, C = 70, 40
OPTIMIZERS = {
    "ordinary": None,
    "fp32": fa.CenterSGD(0.1, weight_decay=1e-3),
    "int8": fa.CenterSGD(0.1, momentum_dtype=torch.int8),
    "no momentum": fa.CenterSGD(0.1, momentum=0.0),
}
KEYS = {
    "ordinary": {"weight", "step"},
    "fp32": {"weight", "step", "center_optimizer.momentum_buffer", "center_optimizer.settings"},
    "int8": {
        "weight",
        "step",
        "center_optimizer.momentum_buffer",
        "center_optimizer.momentum_scale",
        "center_optimizer.settings",
    },
    "no momentum": {"weight", "step", "center_optimizer.settings"},
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def make(name: str = "fp32", **options: Any) -> fa.PartialFC:
    return fa.PartialFC(D, C, sample_rate=0.4, scale=16.0, center_optimizer=OPTIMIZERS[name], **options)


def train(head: fa.PartialFC, first: int, last: int) -> list[Tensor]:
    """Steps ``first`` to ``last``: the losses and which classes were sampled. The learning rate falls with the step."""
    seen = []
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        x, y = torch.randn(6, D, generator=generator), torch.randint(0, C, (6,), generator=generator)
        loss = head(x, y)
        loss.backward()
        if head.center_optimizer is None:
            with torch.no_grad():
                head.weight.sub_(0.1 * head.weight.grad.to_dense())
            head.weight.grad = None
        else:
            head.center_optimizer.param_groups[0]["lr"] *= 0.9
        seen += [loss.detach(), head.sampled]
    return seen


def through_torch(state: dict[str, Tensor]) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_safetensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return safetensors.torch.load(safetensors.torch.save(state))  # what Accelerate writes


def expect_the_same_run(head: fa.PartialFC, resumed: fa.PartialFC) -> None:
    for mine, right in zip(train(resumed, 3, 6), train(head, 3, 6), strict=True):
        assert torch.equal(mine, right)
    assert torch.equal(resumed.weight, head.weight)


@every_optimizer
@pytest.mark.parametrize("store", [through_torch, through_safetensors], ids=["torch", "safetensors"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_run_goes_on(name: str, store: Callable[..., dict[str, Tensor]], assign: bool) -> None:
    head, other = make(name), make(name)
    train(head, 0, 3)
    train(other, 0, 1)  # neither fresh nor where the other is
    state = store(head.state_dict())
    assert set(state) == KEYS[name]
    other.load_state_dict(state, assign=assign)
    expect_the_same_run(head, other)


@every_optimizer
def test_weight_alone_begins_a_run(name: str) -> None:
    """Strictly loaded: step 0, zero momentum, the constructor's learning rate."""
    trained, fresh = make(name), make(name)
    train(trained, 0, 3)
    weight = {"weight": trained.weight.detach().clone()}
    train(fresh, 0, 0)
    used = make(name)
    train(used, 0, 2)
    if used.center_optimizer is not None:
        used.center_optimizer.param_groups[0]["lr"] = 0.1
    for head in (fresh, used):
        assert head.load_state_dict(weight, strict=True).missing_keys == []
    for mine, right in zip(train(used, 0, 3), train(fresh, 0, 3), strict=True):
        assert torch.equal(mine, right)


@pytest.mark.parametrize("order", ["head first", "optimizer first"])
def test_the_momentum_is_in_one_place(order: str) -> None:
    head, other = make("int8"), make("int8")
    train(head, 0, 3)
    of_head, of_optimizer = copy.deepcopy(head.state_dict()), copy.deepcopy(head.center_optimizer.state_dict())
    assert (
        of_optimizer["state"] == {} and of_optimizer["param_groups"][0]["lr"] == of_head["center_optimizer.settings"][0]
    )
    loads = [lambda: other.load_state_dict(of_head), lambda: other.center_optimizer.load_state_dict(of_optimizer)]
    for load in loads if order == "head first" else reversed(loads):
        load()
    expect_the_same_run(head, other)


def test_an_optimizers_state_of_an_earlier_version() -> None:
    """It had the momentum, the head's had the weight alone."""
    head, other = make("int8"), make("int8")
    train(head, 0, 3)
    momentum = {name: tensor.clone() for name, tensor in head.center_optimizer.bind(head.weight).items()}
    old = {**copy.deepcopy(head.center_optimizer.state_dict()), "state": {0: momentum}}
    other.load_state_dict({"weight": head.weight.detach().clone()})
    other.center_optimizer.load_state_dict(old)
    other.step = head.step
    expect_the_same_run(head, other)


def test_a_head_without_memory() -> None:
    head = make("int8")
    train(head, 0, 3)
    state = copy.deepcopy(head.state_dict())
    for assign in (True, False):
        other = make("int8", device="meta")
        if not assign:
            other.to_empty(device="cpu")
        other.load_state_dict(copy.deepcopy(state), assign=assign)
        expect_the_same_run(copy.deepcopy(head), other)


def test_a_transposed_momentum_is_taken_as_it_reads() -> None:
    head, other = make(), make()
    train(head, 0, 3)
    state = copy.deepcopy(head.state_dict())
    state["center_optimizer.momentum_buffer"] = state["center_optimizer.momentum_buffer"].T.contiguous().T
    other.load_state_dict(state, assign=True)
    expect_the_same_run(head, other)


@every_optimizer
def test_copies_and_pickles(name: str) -> None:
    head = make(name)
    train(head, 0, 3)
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        expect_the_same_run(copy.deepcopy(head), other)


@pytest.mark.parametrize("name", ["fp32", "int8"])
def test_a_head_that_an_earlier_version_pickled_whole(name: str) -> None:
    """Such a head has the names of the optimizer and the class centers from before there was center_optimizer.py."""
    head = make(name)
    train(head, 0, 3)
    content = pickle.dumps(head, protocol=2)  # with names as text, as torch.save writes them
    for new, old in {
        b"center_optimizer\nCentersUpdatedInBackward\n": b"center_sgd\nCentersUpdatedInBackward\n",
        b"center_sgd\nSGDOfCenters\n": b"center_sgd\nCenterOptimizer\n",
    }.items():
        assert new in content
        content = content.replace(new, old)
    expect_the_same_run(head, pickle.loads(content))


def test_other_dtypes_keep_the_momentum() -> None:
    head = make("int8").to(torch.bfloat16)
    train(head.float(), 0, 2)
    before = {name: tensor.clone() for name, tensor in head.state_dict().items() if "momentum" in name}
    after = head.to(torch.bfloat16).state_dict()
    assert head.weight.dtype == torch.bfloat16
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor)


class Model(nn.Module):
    """As Lightning and Accelerate see it: the head inside a module with a backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(4, D), make("int8")


def test_inside_a_model(tmp_path: Path) -> None:
    model = Model()
    train(model.head, 0, 3)
    state = copy.deepcopy(model.state_dict())
    assert set(state) == {"backbone.weight", "backbone.bias"} | {f"head.{name}" for name in KEYS["int8"]}
    plain, through_dcp, through_checkpoint = Model(), Model(), Model()
    plain.load_state_dict(state)
    set_model_state_dict(through_dcp, copy.deepcopy(get_model_state_dict(model)))
    checkpoint.save(tmp_path, model.head, model=model)
    checkpoint.load(tmp_path, through_checkpoint.head, model=through_checkpoint)
    for other in (plain, through_dcp, through_checkpoint):
        expect_the_same_run(copy.deepcopy(model.head), other.head)


def test_refusals_change_nothing() -> None:
    head = make("int8")
    train(head, 0, 2)
    before = copy.deepcopy(head.state_dict())
    refused = {
        "Missing key": {name: tensor for name, tensor in before.items() if name != "center_optimizer.momentum_buffer"},
        "Unexpected key": before | {"other": torch.zeros(1)},
        r"momentum_buffer must be \(40, 70\) torch.int8; got \(40, 70\) torch.float32": before
        | {"weight": torch.zeros(C, D), "center_optimizer.momentum_buffer": torch.zeros(C, D)},
        "size mismatch for weight": before | {"weight": torch.zeros(3, D), "step": torch.tensor(9)},
    }
    for message, state in refused.items():
        with pytest.raises(RuntimeError, match=message):
            head.load_state_dict(state)
        if "key" not in message:  # torch loads what it knows before it names missing or unexpected keys
            for name, tensor in head.state_dict().items():
                assert torch.equal(tensor, before[name])
        head.load_state_dict(before)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        make("ordinary").load_state_dict(before)


def test_insightfaces_state_is_its_own() -> None:
    head = insightface.PartialFC_V2(insightface.ArcFace(), D, C, sample_rate=0.4)
    x, y = torch.randn(6, D), torch.arange(6)
    head(x, y)
    assert set(head.state_dict()) == {"weight"} and head.step == 1
    head.load_state_dict(head.state_dict())
    assert head.step == 0
    with pytest.raises(RuntimeError, match="Unexpected key"):
        head.load_state_dict(make("ordinary").state_dict())


def on_a_rank(folder: Path) -> bool:
    """Each rank saves and loads its own shard's rows."""
    head, other = make("int8"), make("int8")
    train(head, 0, 3)
    file = folder / f"rank{head.ranks.rank}.pt"
    torch.save(head.state_dict(), file)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.state_dict()["center_optimizer.momentum_buffer"].shape == (head.num_local, D) and head.num_local < C
    expect_the_same_run(head, other)
    return True


@pytest.mark.distributed
def test_each_rank_has_its_shard(tmp_path: Path) -> None:
    assert distributed_helpers.run_ranks(2, on_a_rank, tmp_path) == [True, True]
