"""CenterSGD inside Lightning's automatic optimization and Accelerate, on two processes: a schedule and a loss weight
reach the class centers, and a run that is saved and resumed is the run that was not interrupted."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.distributed_helpers import run_ranks
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import fused_arcface as fa

pytest.importorskip("lightning")
pytest.importorskip("accelerate")

STEPS, LR, LOSS_WEIGHT = 6, 0.2, 0.3


def falling(step: int) -> float:
    return 1 / (1 + step)


def rows(step: int) -> list[Tensor]:
    """Eight rows of all ranks, or this rank's half of them."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 5, dtype=torch.float64, generator=generator)
    y = torch.randint(11, (8,), generator=generator)
    if not dist.is_initialized():
        return [x, y]
    half = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    return [x[half], y[half]]


def backbone() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, 6).double()


def head() -> fa.PartialFC:
    centers = fa.CenterSGD(lr=LR, momentum=0.9, weight_decay=1e-3)
    return fa.PartialFC(6, 11, margin=fa.CosFace(0.2), scale=8.0, center_optimizer=centers, dtype=torch.float64)


def losses(net: Any, own: fa.PartialFC, batch: list[Tensor]) -> Tensor:
    """Two tasks: the head's loss, weighted, and the size of the embeddings."""
    embeddings = net(batch[0])
    return own(embeddings, batch[1], loss_weight=LOSS_WEIGHT) + embeddings.square().mean()


def outcome(net: nn.Module, own: fa.PartialFC) -> dict[str, Tensor]:
    assert own.center_optimizer is not None
    lr = torch.tensor(own.center_optimizer.param_groups[0]["lr"])
    return {"net": net.weight.detach().clone(), "centers": own.full_weight(), "lr": lr, "step": torch.tensor(own.step)}


def plain() -> dict[str, Tensor]:
    """One process, with torch.optim.SGD on the gradient of the weighted sum."""
    net = backbone()
    own = fa.PartialFC(6, 11, margin=fa.CosFace(0.2), scale=8.0, dtype=torch.float64)
    optimizers = [
        torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
        torch.optim.SGD([own.weight], lr=LR, momentum=0.9, weight_decay=1e-3),
    ]
    schedules = [LambdaLR(each, falling) for each in optimizers]
    for step in range(STEPS):
        embeddings = net(rows(step)[0])
        loss = LOSS_WEIGHT * own(embeddings, rows(step)[1]) + embeddings.square().mean()
        for each in optimizers:
            each.zero_grad()
        # The centers follow the head's loss itself: its weight is that of the loss among others.
        loss.backward()
        for each in [*optimizers, *schedules]:
            each.step()
    return {"net": net.weight.detach(), "centers": own.weight.detach()}


def lightning_module(folder: str, first: int) -> Any:
    import lightning.pytorch as lightning
    from torch.nn.parallel import DistributedDataParallel

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = backbone(), None

        def configure_model(self) -> None:
            if self.head is None:
                self.head = head()
                self.center_schedule = LambdaLR(self.head.center_optimizer, falling)
                DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, ["head.weight"])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.backbone.parameters(), lr=0.1, momentum=0.9)
            schedule = LambdaLR(optimizer, falling)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        def parts(self) -> dict[str, Any]:
            return {
                "backbone": self.backbone,
                "optimizer": self.optimizers().optimizer,
                "schedule": self.lr_schedulers(),
                "center_schedule": self.center_schedule,
            }

        def on_train_start(self) -> None:
            if first:
                fa.checkpoint.load(folder, self.head, **self.parts())

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return losses(self.backbone, self.head, batch)

        def on_train_batch_end(self, *_: object) -> None:
            self.center_schedule.step()

        def on_train_end(self) -> None:
            fa.checkpoint.save(folder, self.head, **self.parts())

    return Module()


def with_lightning(folder: str, first: int, last: int) -> dict[str, Tensor]:
    import lightning.pytorch as lightning

    module = lightning_module(folder, first)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **quiet,
    )
    loader = torch.utils.data.DataLoader([rows(step) for step in range(first, last)], batch_size=None)
    trainer.fit(module, loader)
    return outcome(module.backbone, module.head)


def with_accelerate(folder: str, first: int, last: int) -> dict[str, Tensor]:
    from accelerate import Accelerator

    accelerator, own = Accelerator(cpu=True), head()
    net = backbone()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    schedules = [LambdaLR(optimizer, falling), LambdaLR(own.center_optimizer, falling)]
    parts = {"backbone": net, "optimizer": optimizer, "schedule": schedules[0], "center_schedule": schedules[1]}
    if first:
        fa.checkpoint.load(folder, own, **parts)
    prepared, prepared_optimizer = accelerator.prepare(net, optimizer)
    for step in range(first, last):
        loss = losses(prepared, own, rows(step))
        prepared_optimizer.zero_grad()
        accelerator.backward(loss)
        prepared_optimizer.step()
        for each in schedules:
            each.step()
    fa.checkpoint.save(folder, own, **parts)
    return outcome(net, own)


def run_all(folder: str) -> dict[str, dict[str, Tensor]]:
    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "test"}
    results = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notes of the frameworks about small runs on a CPU
        for name, run in (("lightning", with_lightning), ("accelerate", with_accelerate)):
            results[name] = run(f"{folder}/{name}", 0, STEPS)
            run(f"{folder}/{name} in parts", 0, 3)
            results[f"{name}, resumed"] = run(f"{folder}/{name} in parts", 3, STEPS)
    return results


@pytest.mark.slow
@pytest.mark.distributed
def test_schedule_loss_weight_and_resuming(tmp_path: Path) -> None:
    right = plain()
    for part in run_ranks(2, run_all, str(tmp_path)):
        for name, found in part.items():
            assert found["step"] == STEPS and found["lr"].item() == pytest.approx(LR * falling(STEPS)), name
            for key, expected in right.items():
                torch.testing.assert_close(found[key], expected, rtol=1e-9, atol=1e-11, msg=f"{name}: {key}")
