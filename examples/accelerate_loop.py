"""Accelerate: pass the backbone and its optimizer to `prepare()`, never the head. Saves all of it and resumes.

python examples/accelerate_loop.py, or accelerate launch examples/accelerate_loop.py
"""

import argparse
import tempfile

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fused_arcface as fa

IDENTITIES, DIM = 1000, 64


def main(steps: int) -> None:
    """Train for some steps."""
    torch.manual_seed(0)
    accelerator = Accelerator()  # makes the process group; build the head after it
    backbone = nn.Linear(32, DIM)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9)
    rows = TensorDataset(torch.randn(64 * steps, 32), torch.randint(IDENTITIES, (64 * steps,)))
    head = fa.PartialFC(DIM, IDENTITIES, center_optimizer=fa.CenterSGD(lr=0.1), device=accelerator.device)
    schedules = [torch.optim.lr_scheduler.LinearLR(each, 1, 0.1, steps) for each in (optimizer, head.center_optimizer)]
    parts = {"backbone": backbone, "optimizer": optimizer, "schedule": schedules[0], "center_schedule": schedules[1]}
    prepared, optimizer, loader = accelerator.prepare(backbone, optimizer, DataLoader(rows, batch_size=64))
    for images, labels in loader:
        embeddings = prepared(images)
        # Two losses: the class centers see the weight of theirs only as an argument.
        loss = head(embeddings, labels, loss_weight=0.5) + 0.01 * embeddings.square().mean()
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(backbone.parameters(), 5.0)
        optimizer.step()
        for each in schedules:
            each.step()
    if accelerator.num_processes == 1:  # with several, they share one folder
        with tempfile.TemporaryDirectory() as folder:
            fa.checkpoint.save(folder, head, **parts, epoch=1)
            assert fa.checkpoint.load(folder, head, **parts) == {"epoch": 1}
    accelerator.print(f"{len(loader)} steps, loss {loss.item():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    main(parser.parse_args().steps)
