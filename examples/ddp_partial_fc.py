"""A backbone under DistributedDataParallel, and class centers split over the ranks.

torchrun --nproc-per-node 2 examples/ddp_partial_fc.py
"""

import argparse
import os
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.nn  # an import after init_process_group would keep the group, and gloo's threads, alive
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fused_arcface as fa

IDENTITIES, DIM = 10_000, 64


def train(steps: int, folder: str) -> None:
    """Train on this rank's own rows, and save what all ranks hold."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)  # the same net on every rank
    backbone = DistributedDataParallel(nn.Linear(32, DIM).to(device))  # the backbone alone, never the head
    centers = fa.CenterSGD(lr=0.1, weight_decay=5e-4)
    head = fa.PartialFC(DIM, IDENTITIES, sample_rate=0.2, center_optimizer=centers, device=device)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1 + dist.get_rank())  # other rows on every rank
    for _ in range(steps):
        labels = torch.randint(IDENTITIES, (32,), device=device)
        images = torch.randn(32, 32, device=device)
        loss = head(backbone(images), labels)  # own rows in, the mean over all ranks out
        optimizer.zero_grad()
        loss.backward()  # updates the class centers
        optimizer.step()
    path = fa.checkpoint.save(folder, head, backbone=backbone.module, optimizer=optimizer, epoch=1)
    if dist.get_rank() == 0:
        print(f"{steps} steps, loss {loss.item():.3f}; saved {path.name} with {head.num_classes} centers", flush=True)


def main() -> None:
    """Start the ranks, train, and end them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)  # rank 0's, a folder that all ranks see
    train(steps, folder[0])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
