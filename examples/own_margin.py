"""A margin of your own: any differentiable function of the target's cosines, here with a trained parameter."""

import argparse

import torch
from torch import Tensor, nn

import fused_arcface as fa

IDENTITIES, DIM = 1000, 64


class SoftMargin(nn.Module):
    """`cos θ − m·sigmoid((cos θ − c)/0.1)`: no margin for rows that are still far from their center."""

    def __init__(self, margin: float) -> None:
        super().__init__()
        self.margin = margin
        self.knee = nn.Parameter(torch.tensor(0.2))  # trained with the head

    def forward(self, cosine: Tensor) -> Tensor:
        """Return modified cosines (N,) of the target's cosines (N,)."""
        return cosine - self.margin * torch.sigmoid((cosine - self.knee) / 0.1)


def main(steps: int) -> None:
    """Train with the margin, and show where its knee went."""
    torch.manual_seed(0)
    backbone = nn.Linear(32, DIM)
    head = fa.MarginHead(DIM, IDENTITIES, margin=SoftMargin(0.3), scale=32.0)
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.02, momentum=0.9)
    prototypes = torch.randn(IDENTITIES, 32)
    for _ in range(steps):
        labels = torch.randint(IDENTITIES, (64,))
        loss = head(backbone(prototypes[labels] + 0.1 * torch.randn(64, 32)), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5.0)
        optimizer.step()
    print(f"loss {loss.item():.3f}, knee {head.margin.knee.item():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
