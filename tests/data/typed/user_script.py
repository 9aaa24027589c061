"""A user's script under strict type checkers: every line is what a user would write."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import fused_arcface as fa


def train(backbone: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Train a step with each head, and return the last loss."""
    head = fa.MarginHead(512, 1000, margin=fa.ArcFace(0.5, boundary="none"), scale=64.0)
    embeddings: Tensor = backbone(images)
    loss: Tensor = head(embeddings, labels)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without types
    loss, stats = head(embeddings, labels, return_stats=True)
    loss = head(embeddings, (labels, labels.flip(0), 0.7))
    loss = head(embeddings, labels, sample_weight=torch.ones(len(labels)), reduction="sum")
    accuracy: Tensor = stats.correct.float().mean()

    partial = fa.PartialFC(512, 1000, center_optimizer=fa.CenterSGD(lr=0.1, momentum_dtype=torch.int8))
    loss = partial(embeddings, labels, loss_weight=0.5)
    loss, stats = partial(embeddings, labels, return_stats=True, loss_weight=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(partial.center_optimizer, 30)
    scheduler.step()

    each: Tensor = fa.margin_softmax_loss(embeddings, head.weight, labels, margin=fa.CosFace(0.35), reduction="none")
    loss, stats = fa.margin_softmax_loss(embeddings, head.weight, labels, return_stats=True, backend="torch")
    own: Tensor = fa.margin_softmax_loss(embeddings, head.weight, labels, margin=lambda cosine: cosine - 0.3)

    saved: Path = fa.checkpoint.save(Path("checkpoints"), partial, backbone=backbone, epoch=1)
    fa.checkpoint.load(str(saved), partial, backbone=backbone)
    embedder: nn.Module = fa.load_embedder(Path("runs/first"))
    reasons: dict[str, str | None] = fa.backends.available()
    print(embedder, reasons, own.item(), each.shape, accuracy.item(), head.logits(embeddings), head.topk(embeddings, 5))
    return loss.item()
