"""`MarginHead` in a plain training loop."""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import fused_arcface as fa

IDENTITIES, DIM = 100, 64


def batches(steps: int, size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield noisy copies of one vector for each identity, and their labels."""
    prototypes = torch.randn(IDENTITIES, 32)
    for _ in range(steps):
        labels = torch.randint(IDENTITIES, (size,))
        yield prototypes[labels] + 0.3 * torch.randn(size, 32), labels


def main(steps: int) -> None:
    """Train a small net, then name the classes of a batch."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, DIM))
    head = fa.MarginHead(DIM, IDENTITIES, margin=fa.ArcFace(0.5), scale=16.0)  # 64 from 10,000 identities on
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.02, momentum=0.9)
    for step, (images, labels) in enumerate(batches(steps)):
        loss, stats = head(backbone(images), labels, return_stats=True)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5.0)  # the backbone alone: see docs/troubleshooting.md
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}, accuracy {stats.correct.float().mean().item():.2f}")
    cosines, classes = head.topk(backbone(images), k=3)
    print("the first row is nearest to", classes[0].tolist(), "by cosines", cosines[0].tolist())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args().steps)
