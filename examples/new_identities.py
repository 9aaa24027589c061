"""Fine-tuning with new identities: old centers stay, new ones start at the mean of their embeddings."""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_arcface as fa

OLD, NEW, DIM = 100, 20, 64


def grow(head: fa.MarginHead, embeddings: Tensor, labels: Tensor) -> fa.MarginHead:
    """Return a head with the classes of `head` and those after them, from embeddings (N, D) of the new ones."""
    old = head.weight.detach()
    rows = F.normalize(embeddings)
    means = torch.stack([rows[labels == label].mean(0) for label in range(OLD, OLD + NEW)])
    grown = fa.MarginHead(DIM, OLD + NEW, margin=head.margin, scale=head.scale)
    with torch.no_grad():
        grown.weight.copy_(torch.cat([old, F.normalize(means) * old.norm(dim=1).mean()]))
    return grown


def train(backbone: nn.Module, head: fa.MarginHead, images: Tensor, labels: Tensor, steps: int, lr: float) -> float:
    """Train both for some steps and return the last loss."""
    groups = [{"params": backbone.parameters(), "lr": lr / 10}, {"params": head.parameters()}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    for _ in range(steps):
        batch = torch.randint(len(labels), (64,))
        loss = head(backbone(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5.0)
        optimizer.step()
    return loss.item()


def main(steps: int) -> None:
    """Train on the old identities, then go on with all of them."""
    torch.manual_seed(0)
    labels = torch.arange(OLD + NEW).repeat(10)
    images = torch.randn(OLD + NEW, 32)[labels] + 0.3 * torch.randn(len(labels), 32)
    known = labels < OLD
    backbone = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, DIM))
    head = fa.MarginHead(DIM, OLD, scale=16.0)
    print(f"old identities: loss {train(backbone, head, images[known], labels[known], steps, 0.05):.3f}")
    head = grow(head, backbone(images[~known]).detach(), labels[~known])
    for parameter in backbone.parameters():
        parameter.requires_grad_(False)  # the centers alone, at first
    print(f"all identities, frozen backbone: loss {train(backbone, head, images, labels, steps, 0.01):.3f}")
    for parameter in backbone.parameters():
        parameter.requires_grad_(True)
    print(f"all identities: loss {train(backbone, head, images, labels, steps, 0.01):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=80)
    main(parser.parse_args().steps)
