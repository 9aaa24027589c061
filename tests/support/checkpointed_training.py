"""A training that is saved and loaded, and a checkpoint of the first format."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import fused_arcface as fa

FORMAT_1 = Path(__file__).parents[1] / "data" / "checkpoint_format_1"
"""A checkpoint that two ranks wrote with torch 2.13, before format 2; expected.json has its contents."""

D, CLASSES, ROWS = 6, 37, 12


class Run:
    """A backbone under data parallelism beside a head, trained on the same batches by any number of ranks."""

    def __init__(self, options: dict, ordinary: bool) -> None:
        dtype = options["dtype"]
        recipe = None if ordinary else fa.CenterSGD(0.05, weight_decay=1e-3)
        self.head = fa.PartialFC(D, CLASSES, seed=4, center_optimizer=recipe, **options)
        self.dtype, self.ranks = dtype, self.head.ranks
        torch.manual_seed(8)
        self.backbone = nn.Linear(5, D, dtype=dtype)
        self.wrapped = nn.parallel.DistributedDataParallel(self.backbone) if self.ranks.group else self.backbone
        parameters = [*self.backbone.parameters(), *([self.head.weight] if ordinary else [])]
        self.optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        if options.get("sample_rate", 1) < 1 and ordinary:
            self.optimizer = torch.optim.SGD(parameters, lr=0.05)  # momentum would move rows outside the sample
        driven = [self.optimizer, *([] if ordinary else [self.head.center_optimizer])]
        self.schedulers = [torch.optim.lr_scheduler.StepLR(each, 4, 0.7) for each in driven]

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            generator = torch.Generator().manual_seed(100 + self.head.step)
            x = torch.randn(ROWS, 5, generator=generator, dtype=torch.float64).to(self.dtype)
            y = torch.randint(0, CLASSES, (ROWS,), generator=generator)
            world_size, rank = self.ranks.world_size, self.ranks.rank
            part = slice(ROWS * rank // world_size, ROWS * (rank + 1) // world_size)
            self.optimizer.zero_grad()
            loss = self.head(self.wrapped(x[part]), y[part])
            loss.backward()
            self.optimizer.step()
            if self.head.center_optimizer is not None:
                self.head.center_optimizer.step()
            for scheduler in self.schedulers:
                scheduler.step()
            losses.append(loss.item())
        return losses

    def others(self) -> dict:
        named = {f"scheduler{index}": each for index, each in enumerate(self.schedulers)}
        return {"backbone": self.backbone, "optimizer": self.optimizer, **named}
