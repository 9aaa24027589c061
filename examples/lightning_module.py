"""A LightningModule with `PartialFC`, on one process or several: schedules, two losses, and all of it saved."""

import argparse
import tempfile
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import fused_arcface as fa

IDENTITIES, DIM = 1000, 64


class Recognizer(lightning.LightningModule):
    """A backbone that Lightning optimizes, and a head that updates its centers itself."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder  # of checkpoints, the same for every rank
        self.backbone = nn.Linear(32, DIM)
        self.head: fa.PartialFC | None = None

    def configure_model(self) -> None:
        """Build the head here: the process group exists by now."""
        if self.head is None:
            self.head = fa.PartialFC(DIM, IDENTITIES, center_optimizer=fa.CenterSGD(lr=0.1))
            self.center_schedule = torch.optim.lr_scheduler.StepLR(self.head.center_optimizer, step_size=1000)
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, ["head.weight"])

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Return the sum of two losses. The class centers see the weight of theirs only as an argument."""
        embeddings = self.backbone(batch[0])
        loss = self.head(embeddings, batch[1], loss_weight=0.5) + 0.01 * embeddings.square().mean()
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, *_: object) -> None:
        """Step the schedule that Lightning does not know."""
        self.center_schedule.step()

    def parts(self) -> dict[str, Any]:
        """Return what a checkpoint has beside the head."""
        optimizer = self.optimizers().optimizer
        return {"backbone": self.backbone, "optimizer": optimizer, "center_schedule": self.center_schedule}

    def on_train_start(self) -> None:
        """Go on with the run of the folder, if there is one."""
        if fa.checkpoint.latest(self.folder):
            fa.checkpoint.load(self.folder, self.head, **self.parts())

    def on_train_end(self) -> None:
        """Save all ranks' shards and everything else."""
        fa.checkpoint.save(self.folder, self.head, **self.parts())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of the backbone alone."""
        return torch.optim.SGD(self.backbone.parameters(), lr=0.1, momentum=0.9)


def main(steps: int) -> None:
    """Train for some steps."""
    lightning.seed_everything(0)
    rows = TensorDataset(torch.randn(2048, 32), torch.randint(IDENTITIES, (2048,)))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_steps=steps, accelerator="auto", devices=1, enable_model_summary=False, **options)
    with tempfile.TemporaryDirectory() as folder:  # a run of your own has a folder that stays
        trainer.fit(Recognizer(folder), DataLoader(rows, batch_size=64, shuffle=True))
    print(f"{steps} steps, loss {trainer.callback_metrics['loss'].item():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    main(parser.parse_args().steps)
