"""A training script as users of insightface's arcface_torch have it, with nothing changed but the import: two ranks,
checkpoint files by rank, resumed, and compared with insightface's operations in one process.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import distributed_helpers
from torch import distributed, nn

from fused_arcface.checkpoint import convert
from fused_arcface.compat.insightface import ArcFace, CombinedMarginLoss, PartialFC_V2

pytestmark = pytest.mark.distributed

EMBEDDING_SIZE, NUM_CLASSES, BATCH, STEPS_PER_EPOCH = 8, 21, 6, 4


def backbone_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.PReLU(), nn.Linear(16, EMBEDDING_SIZE))


def data(global_step: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The joint batch of a step."""
    generator = torch.Generator().manual_seed(global_step)
    return (
        torch.randn(BATCH * world_size, 5, generator=generator),
        torch.randint(0, NUM_CLASSES, (BATCH * world_size,), generator=generator),
    )


def main(output: str, num_epoch: int, resume: bool, sample_rate: float, fp16: bool, threshold: float) -> list[float]:
    """arcface_torch's train_v2.py without its data loader and logging, for any device."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    backbone = nn.parallel.DistributedDataParallel(
        module=backbone_of(), broadcast_buffers=False, bucket_cap_mb=16, find_unused_parameters=True
    )
    backbone.train()
    backbone._set_static_graph()

    margin_loss = CombinedMarginLoss(64, 1.0, 0.5, 0.0, threshold)
    module_partial_fc = PartialFC_V2(margin_loss, EMBEDDING_SIZE, NUM_CLASSES, sample_rate, False)
    module_partial_fc.train()
    opt = torch.optim.SGD(
        params=[{"params": backbone.parameters()}, {"params": module_partial_fc.parameters()}],
        lr=0.02,
        momentum=0.9,
        weight_decay=5e-4,
    )
    lr_scheduler = torch.optim.lr_scheduler.StepLR(opt, 3, 0.5)

    start_epoch = global_step = 0
    if resume:
        dict_checkpoint = torch.load(os.path.join(output, f"checkpoint_gpu_{rank}.pt"))
        start_epoch, global_step = dict_checkpoint["epoch"], dict_checkpoint["global_step"]
        backbone.module.load_state_dict(dict_checkpoint["state_dict_backbone"])
        module_partial_fc.load_state_dict(dict_checkpoint["state_dict_softmax_fc"])
        opt.load_state_dict(dict_checkpoint["state_optimizer"])
        lr_scheduler.load_state_dict(dict_checkpoint["state_lr_scheduler"])

    amp = torch.amp.GradScaler("cpu", enabled=fp16, init_scale=256.0, growth_interval=100)
    losses = []
    for epoch in range(start_epoch, num_epoch):
        for _ in range(STEPS_PER_EPOCH):
            global_step += 1
            images, labels = data(global_step, world_size)
            img, local_labels = images[rank * BATCH :][:BATCH], labels[rank * BATCH :][:BATCH, None]
            local_embeddings = backbone(img)
            loss: torch.Tensor = module_partial_fc(local_embeddings, local_labels)
            if fp16:
                amp.scale(loss).backward()
                amp.unscale_(opt)
                torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5)
                amp.step(opt)
                amp.update()
            else:
                loss.backward()
                torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5)
                opt.step()
            opt.zero_grad()
            lr_scheduler.step()
            losses.append(loss.item())
        checkpoint = {
            "epoch": epoch + 1,
            "global_step": global_step,
            "state_dict_backbone": backbone.module.state_dict(),
            "state_dict_softmax_fc": module_partial_fc.state_dict(),
            "state_optimizer": opt.state_dict(),
            "state_lr_scheduler": lr_scheduler.state_dict(),
        }
        torch.save(checkpoint, os.path.join(output, f"checkpoint_gpu_{rank}.pt"))
        if rank == 0:
            torch.save(backbone.module.state_dict(), os.path.join(output, "model.pt"))
    return losses


def one_process(weight: torch.Tensor, threshold: float, steps: int) -> tuple[list[float], torch.Tensor]:
    """The same training by insightface's operations over all logits: arccos and cos outside autograd."""
    backbone, weight = backbone_of(), nn.Parameter(weight)
    opt = torch.optim.SGD([*backbone.parameters(), weight], lr=0.02, momentum=0.9, weight_decay=5e-4)
    lr_scheduler, losses = torch.optim.lr_scheduler.StepLR(opt, 3, 0.5), []
    for global_step in range(1, steps + 1):
        images, labels = data(global_step, 2)
        logits = F.linear(F.normalize(backbone(images)), F.normalize(weight)).clamp(-1, 1)
        rows = torch.arange(len(labels))
        if threshold > 0:
            with torch.no_grad():
                dirty = logits > threshold
                dirty[rows, labels] = False
            logits = logits.masked_fill(dirty, 0)
        with torch.no_grad():
            shifted = logits.arccos()
            shifted[rows, labels] += 0.5
            shifted.cos_()
        loss = F.cross_entropy((logits + (shifted - logits).detach()) * 64, labels)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5)
        opt.step()
        lr_scheduler.step()
        losses.append(loss.item())
    return losses, weight.detach()


@pytest.mark.filterwarnings("ignore:PartialFC_V2. CombinedMarginLoss")
@pytest.mark.filterwarnings("ignore:You passed find_unused_parameters")
@pytest.mark.parametrize(("fp16", "threshold"), [(False, 0), (True, 0), (False, 0.2)])
def test_trains_as_insightface_does_and_resumes(tmp_path: Path, fp16: bool, threshold: float) -> None:
    start = PartialFC_V2(ArcFace(), EMBEDDING_SIZE, NUM_CLASSES).weight.detach().clone()
    expected, expected_weight = one_process(start, threshold, 2 * STEPS_PER_EPOCH)
    losses: list[float] = []
    for epoch in (1, 2):
        ranks = distributed_helpers.run_ranks(2, main, str(tmp_path), epoch, epoch > 1, 1.0, fp16, threshold)
        assert ranks[0] == ranks[1]
        losses += ranks[0]
    assert losses == pytest.approx(expected, rel=1e-4)
    states = [torch.load(tmp_path / f"checkpoint_gpu_{rank}.pt") for rank in (0, 1)]
    assert [list(state["state_dict_softmax_fc"]) for state in states] == [["weight"]] * 2
    assert [len(state["state_dict_softmax_fc"]["weight"]) for state in states] == [11, 10]
    together = torch.cat([state["state_dict_softmax_fc"]["weight"] for state in states])
    torch.testing.assert_close(together, expected_weight, rtol=1e-3, atol=1e-4)
    assert convert.read(tmp_path).num_classes == NUM_CLASSES
    assert (tmp_path / "model.pt").exists()


@pytest.mark.filterwarnings("ignore:You passed find_unused_parameters")
def test_trains_on_a_sample(tmp_path: Path) -> None:
    for losses in distributed_helpers.run_ranks(2, main, str(tmp_path), 3, False, 0.5, False, 0):
        assert len(losses) == 3 * STEPS_PER_EPOCH and sum(losses[-4:]) < sum(losses[:4])
