"""A backbone sharded by FSDP2, and class centers split over the same ranks.

torchrun --nproc-per-node 2 examples/fsdp2_backbone.py
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fused_arcface as fa

IDENTITIES, DIM = 10_000, 64


def train(steps: int) -> None:
    """Train on this rank's own rows."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, DIM)).to(kind)
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    fully_shard(backbone, mesh=mesh)  # of a model with the head in it: ignored_params={model.head.weight}
    head = fa.PartialFC(DIM, IDENTITIES, center_optimizer=fa.CenterSGD(lr=0.1), device=kind)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1 + dist.get_rank())
    for _ in range(steps):
        loss = head(backbone(torch.randn(32, 32, device=kind)), torch.randint(IDENTITIES, (32,), device=kind))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if dist.get_rank() == 0:
        print(f"{steps} steps, loss {loss.item():.3f}", flush=True)


def main() -> None:
    """Start the ranks, train, and end them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    train(steps)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
