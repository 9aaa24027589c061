"""A LightningModule with `PartialFC`, on one process or several."""

import argparse

import lightning.pytorch as lightning
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import fused_arcface as fa

IDENTITIES, DIM = 1000, 64


class Recognizer(lightning.LightningModule):
    """A backbone that Lightning optimizes, and a head that updates its centers itself."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(32, DIM)
        self.head: fa.PartialFC | None = None

    def configure_model(self) -> None:
        """Build the head here: the process group exists by now."""
        if self.head is None:
            self.head = fa.PartialFC(DIM, IDENTITIES, center_optimizer=fa.CenterSGD(lr=0.1))
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, ["head.weight"])

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Return the loss of a batch."""
        loss = self.head(self.backbone(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of the backbone alone."""
        return torch.optim.SGD(self.backbone.parameters(), lr=0.1, momentum=0.9)


def main(steps: int) -> None:
    """Train for some steps."""
    lightning.seed_everything(0)
    rows = TensorDataset(torch.randn(2048, 32), torch.randint(IDENTITIES, (2048,)))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_steps=steps, accelerator="auto", devices=1, enable_model_summary=False, **options)
    trainer.fit(Recognizer(), DataLoader(rows, batch_size=64, shuffle=True))
    print(f"{steps} steps, loss {trainer.callback_metrics['loss'].item():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    main(parser.parse_args().steps)
