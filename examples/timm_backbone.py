"""A timm net as the backbone. Needs `pip install ".[timm]"`."""

import argparse

import timm
import torch

import fused_arcface as fa

IDENTITIES, SIZE = 1000, 64


def main(steps: int, name: str) -> None:
    """Train a net of timm without its classifier."""
    torch.manual_seed(0)
    backbone = timm.create_model(name, pretrained=False, num_classes=0)  # num_classes=0: features, no classifier
    head = fa.MarginHead(backbone.num_features, IDENTITIES, margin=fa.CosFace(0.35), scale=32.0)
    groups = [{"params": backbone.parameters()}, {"params": head.parameters(), "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.05)
    for step in range(steps):
        images, labels = torch.randn(8, 3, SIZE, SIZE), torch.randint(IDENTITIES, (8,))
        loss = head(backbone(images), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5.0)
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--name", default="resnet18", help="any name in timm.list_models()")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.name)
