"""A model with a PartialFC inside a wrapper that makes all ranks' parameters alike: an error that names the cure; and
with the cure, the training of one process.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import distributed_helpers
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import fused_arcface as fa

pytestmark = pytest.mark.distributed

D, CLASSES, STEPS, LR = 6, 12, 4, 0.5


class Model(nn.Module):
    """A backbone and a head: images and labels in, the loss out."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.backbone = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, D)).double()
        self.head = fa.PartialFC(D, CLASSES, dtype=torch.float64, **options)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x), y)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Model()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.inner(x, y)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's rows of a joint batch of 8; all of them without ranks."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(0, CLASSES, (8,), generator=generator)
    return (x[dist.get_rank() :: 2], y[dist.get_rank() :: 2]) if dist.is_initialized() else (x, y)


def train(model: Model, loss_of: Callable[..., torch.Tensor], backward: Any = torch.Tensor.backward) -> Model:
    """The model after some steps of SGD."""
    parameters = [*model.backbone.parameters(), *([] if model.head.center_optimizer else [model.head.weight])]
    optimizer = torch.optim.SGD(parameters, lr=LR, foreach=False)
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(loss_of(*batch(step)))
        optimizer.step()
    return model


def state_of(model: Any) -> dict[str, torch.Tensor]:
    """The backbone's parameters and all class centers."""
    state = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value.detach().clone()
        for name, value in model.backbone.state_dict().items()
    }
    return {**state, "head": model.head.full_weight()}


def ignore(model: nn.Module) -> None:
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["head.weight"])


def wrapped(kind: str) -> Any:
    """A call of a wrapped model whose head nothing protects."""
    model = Model(center_optimizer=fa.CenterSGD(LR, momentum=0) if kind == "ddp, CenterSGD" else None)
    if kind == "fsdp2":
        return fully_shard(model)
    if kind == "fsdp2, unlike shards":
        model.head = fa.PartialFC(D, 11, dtype=torch.float64)
        return fully_shard(model)
    if kind == "fsdp1, beside it":
        FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        return lambda x, y: model.head(torch.ones(len(y), D, dtype=torch.float64), y)
    if kind == "fsdp1":
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    if kind == "fsdp1, original parameters":
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    if kind == "ddp, frozen":
        model.head.requires_grad_(False)
    if kind == "ddp, nested":
        return DistributedDataParallel(Outer())
    if kind == "accelerate":
        return accelerator().prepare(model)
    if kind == "replicate":
        from torch.distributed._composable.replicate import replicate

        return replicate(model)
    if kind == "zero":
        return after_a_step_of_zero(model)
    if kind == "ddp, after a step":
        model(*batch(0)).backward()
    ddp = DistributedDataParallel(model)
    if kind == "ddp, after a step":
        return lambda x, y: model.head(ddp.module.backbone(x), y)
    if kind == "ddp, beside it":
        return lambda x, y: model.head(ddp.module.backbone(x), y)
    if kind == "ddp, evaluated":
        return lambda x, _: model.head.topk(ddp.module.backbone(x), 2)
    return torch.compile(ddp, backend="eager") if kind == "ddp, compiled" else ddp


def after_a_step_of_zero(model: Model) -> Model:
    """A model after a step of an optimizer that keeps each parameter's state on one rank, and broadcasts the result."""
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=LR)
    model(*batch(0)).backward()
    optimizer.step()
    return model


def accelerator() -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True)


def cured(kind: str) -> dict[str, torch.Tensor]:
    """The result of training with the line that the error names."""
    model = Model(center_optimizer=fa.CenterSGD(LR, momentum=0) if kind == "ddp, CenterSGD" else None)
    if kind == "fsdp2":
        fully_shard(model, ignored_params={model.head.weight})
        return state_of(train(model, model))
    if kind == "fsdp1":
        options = {"device_id": torch.device("cpu"), "use_orig_params": True}
        wrapper = FullyShardedDataParallel(model, ignored_states=[model.head.weight], **options)
        train(model, wrapper)
        with FullyShardedDataParallel.summon_full_params(wrapper):
            return state_of(model)
    if kind == "accelerate":
        prepared = accelerator().prepare(model.backbone)  # the head outside
        return state_of(train(model, lambda x, y: model.head(prepared(x), y), accelerator().backward))
    ignore(model)
    if kind == "accelerate, ignored":
        return state_of(train(model, accelerator().prepare(model), accelerator().backward))
    return state_of(train(model, DistributedDataParallel(model)))


def lightning_module(protected: bool) -> Any:
    import lightning.pytorch as lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = Model().backbone
            self.head = None

        def configure_model(self) -> None:
            if self.head is None:
                self.head = Model().head
                if protected:
                    ignore(self)

        def training_step(self, rows: Any, _: int) -> torch.Tensor:
            return self.head(self.backbone(rows[0]), rows[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=LR, foreach=False)

    return Module()


def fit(protected: bool) -> dict[str, torch.Tensor]:
    import lightning.pytorch as lightning

    module = lightning_module(protected)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader([batch(step) for step in range(STEPS)], batch_size=None))
    return state_of(module)


@contextlib.contextmanager
def as_torchrun_does() -> Iterator[None]:
    """The environment by which Lightning and Accelerate know that processes have been started."""
    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "test"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notes of the frameworks about small runs on a CPU
        yield


WRAPPED = [
    "ddp",
    "ddp, frozen",
    "ddp, CenterSGD",
    "ddp, nested",
    "ddp, beside it",
    "ddp, evaluated",
    "accelerate",
    "fsdp2",
    "fsdp2, unlike shards",
    "fsdp1",
    "fsdp1, original parameters",
    "fsdp1, beside it",
    "replicate",
    "zero",
    "ddp, after a step",
]
CURED = ["ddp", "ddp, CenterSGD", "accelerate", "accelerate, ignored", "fsdp2", "fsdp1"]


def run_all() -> dict[tuple[str, str], Any]:
    results: dict[tuple[str, str], Any] = {}

    def record(name: tuple[str, str], case: Callable[[], Any]) -> None:
        try:
            results[name] = case()
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"

    with as_torchrun_does():
        for kind in WRAPPED:
            record(("wrapped", kind), lambda kind=kind: wrapped(kind)(*batch(0)))
        for kind in CURED:
            record(("cured", kind), lambda kind=kind: cured(kind))
        record(("wrapped", "lightning"), lambda: fit(protected=False))
        record(("cured", "lightning"), lambda: fit(protected=True))
    return {name: result if isinstance(result, (str, dict)) else "no error" for name, result in results.items()}


@pytest.fixture(scope="module")
def results() -> list[dict[tuple[str, str], Any]]:
    return distributed_helpers.run_ranks(2, run_all)


@pytest.mark.parametrize("kind", [*WRAPPED, "lightning"])
def test_a_wrapped_head_is_an_error_with_the_cure(results, kind):
    for result in results:
        message = result["wrapped", kind]
        name = "inner.head.weight" if kind == "ddp, nested" else "head.weight"
        assert message.startswith("RuntimeError: PartialFC: "), message
        assert f"_set_params_and_buffers_to_ignore_for_model(model, ['{name}'])" in message
        assert f"fully_shard(model, ignored_params={{model.{name}}})" in message


def compiled() -> str:
    try:
        wrapped("ddp, compiled")(*batch(0))
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.full
def test_a_compiled_wrapper_is_an_error():
    for message in distributed_helpers.run_ranks(2, compiled):
        assert "DistributedDataParallel holds head.weight" in message


@pytest.mark.parametrize("kind", [*CURED, "lightning"])
def test_with_the_cure_the_ranks_train_as_one_process(results, kind):
    model = Model()
    expected = state_of(train(model, model))
    for result in results:
        assert isinstance(result["cured", kind], dict), result["cured", kind]
        torch.testing.assert_close(result["cured", kind], expected, rtol=0, atol=1e-6)


def built_too_early() -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: False)
        model = Model()
    try:
        model(*batch(0))
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_head_from_before_the_group_is_an_error():
    for message in distributed_helpers.run_ranks(2, built_too_early):
        assert message.startswith("PartialFC was built before torch.distributed was initialized")
        assert "configure_model()" in message


def replicas() -> list[bool]:
    """Two shards, each with a replica that DistributedDataParallel keeps alike: that is right."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3]), dist.new_group([0, 2]), dist.new_group([1, 3])]
    rank = dist.get_rank()
    head = fa.PartialFC(D, CLASSES, group=groups[rank // 2])
    wrapper = DistributedDataParallel(head, process_group=groups[2 + rank % 2])
    wrapper(torch.ones(2, D), torch.tensor([0, 7])).backward()
    return [head.num_local == 6, bool(head.weight.grad.any())]


def test_replicas_of_a_shard_may_be_wrapped():
    assert distributed_helpers.run_ranks(4, replicas) == [[True, True]] * 4


def equal_rows() -> bool:
    head = fa.PartialFC(D, CLASSES)
    nn.init.ones_(head.weight)
    return bool(head(torch.ones(2, D), torch.tensor([0, 7])).isfinite())


def test_shards_of_equal_rows_prove_nothing():
    assert distributed_helpers.run_ranks(2, equal_rows) == [True, True]
