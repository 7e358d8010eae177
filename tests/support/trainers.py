"""A small Lightning run, to be executed on forked ranks."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

FEATURES, CLASSES, BATCH_SIZE = 12, 5, 8

needs_complex_gloo = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="gloo does not send complex numbers in torch 2.6, and in between it was not tried",
)


def adam(module):
    return torch.optim.Adam(module.parameters(), lr=1e-2)


class Classifier(pl.LightningModule):
    """An MLP on Gaussian data. ``configure`` makes optimizers from the module."""

    logs_loss = False
    """Also without a logger, for callbacks: a tenth of the time of a batch as small as these."""

    def __init__(self, configure=None, hidden=16):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(FEATURES, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh())
        self.head = nn.Linear(hidden, CLASSES)
        self.configure = configure or adam

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.head(self.body(x)), y)
        if self.logs_loss or (self._trainer is not None and self._trainer.loggers):
            self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.head(self.body(x)), y), sync_dist=True)

    def configure_optimizers(self):
        return self.configure(self)


class Stepwise(Classifier):
    """Data by step: Lightning does not fast-forward a loader when it resumes within an epoch."""

    def training_step(self, batch, batch_idx):
        return super().training_step(self.batch(batch_idx), batch_idx)

    def batch(self, batch_idx):
        generator = torch.Generator().manual_seed(1000 * self.global_rank + batch_idx)
        x = torch.randn(BATCH_SIZE, FEATURES, generator=generator)
        return x, x.argmax(1) % CLASSES


class Recorder(pl.Callback):
    """Keeps, after every batch, the parameters and the phase."""

    def __init__(self):
        self.params, self.phases = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.params.append([p.detach().clone() for p in pl_module.parameters()])
        self.phases.append(getattr(trainer.strategy, "phase", None))


def data(batches, ranks=1):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batches * BATCH_SIZE * ranks, FEATURES, generator=generator)
    y = (x @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(1)
    return DataLoader(TensorDataset(x, y), batch_size=BATCH_SIZE)


def make_trainer(strategy, world_size, *, callbacks=(), num_nodes=1, **kwargs):
    options = {
        "accelerator": "cpu",
        "devices": world_size // num_nodes,
        "num_nodes": num_nodes,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
        **kwargs,
    }
    return pl.Trainer(strategy=strategy, callbacks=list(callbacks), **options)


def fit(strategy, world_size, *, batches=10, configure=None, callbacks=(), model=None, ckpt_path=None, **kwargs):
    """Train for ``batches`` batches per rank and epoch; returns the trainer and the recorder."""
    recorder = Recorder()
    trainer = make_trainer(strategy, world_size, callbacks=[*callbacks, recorder], **kwargs)
    trainer.fit(Classifier(configure) if model is None else model, data(batches, world_size), ckpt_path=ckpt_path)
    return trainer, recorder


def same_params(first, second):
    """Whether two recorded histories are bitwise equal."""
    return len(first) == len(second) and all(
        torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)
    )
