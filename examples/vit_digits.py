"""Train a small vision transformer on scikit-learn's handwritten digits, and validate with torchmetrics.

    python examples/vit_digits.py
    python examples/vit_digits.py --strategy ddp        # the same, dense

The accuracy is a `torchmetrics` metric: every rank counts its share of the held-out images, and what is logged is the
accuracy over all of them. Nothing in the module knows about compression.
"""

from __future__ import annotations

import argparse
import os

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_onebit  # noqa: F401  # registers "onebit_ddp"

CLASSES = 10
PATCH = 2
PATCHES = (8 // PATCH) ** 2


class ViT(pl.LightningModule):
    """Dosovitskiy et al. 2020 (arXiv 2010.11929), for images of 8 x 8 pixels; the mean of the patches is classified."""

    def __init__(self, d_model: int = 64, layers: int = 2, heads: int = 4, lr: float = 1e-3) -> None:
        super().__init__()
        self.lr = lr
        self.patches = nn.Conv2d(1, d_model, PATCH, stride=PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn(PATCHES, d_model))
        layer = nn.TransformerEncoderLayer(
            d_model, heads, 4 * d_model, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(d_model), enable_nested_tensor=False)
        self.head = nn.Linear(d_model, CLASSES)
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Images [batch, 1, 8, 8] to logits [batch, 10]."""
        patches = self.patches(images).flatten(2).transpose(1, 2)  # [batch, patches, d_model]
        return self.head(self.encoder(patches + self.positions).mean(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("val_accuracy", self.accuracy, prog_bar=True)  # the metric itself, so that Lightning reduces it over ranks

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def digits(batch_size: int) -> tuple[DataLoader, DataLoader]:
    """Four fifths of 1797 images to train on, the rest held out. Lightning gives each rank its share of both."""
    data = load_digits()
    images = torch.from_numpy(data.images).float().div(8.0).sub(1.0).unsqueeze(1)
    labels = torch.from_numpy(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out, training = order[:360], order[360:]
    return (
        DataLoader(TensorDataset(images[training], labels[training]), batch_size=batch_size, shuffle=True, drop_last=True),
        DataLoader(TensorDataset(images[held_out], labels[held_out]), batch_size=batch_size),
    )


def main() -> float:
    """Train, and return the held-out accuracy: the same number on every rank."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--strategy", choices=["ddp", "onebit_ddp"], default="onebit_ddp")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=2, help="per node (default: %(default)s)")
    parser.add_argument("--num-nodes", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32, help="images per rank and step (default: %(default)s)")
    settings = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread per rank: more get in each other's way on two cores

    pl.seed_everything(1)
    trainer = pl.Trainer(
        strategy=settings.strategy,
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        max_epochs=settings.epochs,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(ViT(), *digits(settings.batch_size))
    accuracy = float(trainer.callback_metrics["val_accuracy"])
    if trainer.is_global_zero:
        print(f"accuracy on 360 held-out digits: {accuracy:.4f}, {trainer.world_size} ranks")
    return accuracy


if __name__ == "__main__":
    main()
