"""The whole of it: an ordinary Lightning script, with one string changed. Two processes on this machine's CPU.

python examples/minimal.py
"""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_onebit  # noqa: F401  # registers the strategies


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 1))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.layers(x), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main() -> None:
    pl.seed_everything(0)
    x = torch.randn(8192, 64)
    data = DataLoader(TensorDataset(x, x[:, :8].prod(dim=1, keepdim=True).tanh()), batch_size=16, shuffle=True)
    trainer = pl.Trainer(strategy="onebit_ddp", accelerator="cpu", devices=2, max_epochs=1, logger=False)
    trainer.fit(Regression(), data)


if __name__ == "__main__":
    main()
