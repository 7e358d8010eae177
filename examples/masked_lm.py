"""Train a small BERT of `transformers` on Python's standard library: some words are hidden, and it has to guess them.

    python examples/masked_lm.py

The model is made from a `transformers` configuration, with random weights: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os

import lightning.pytorch as pl
import torch
from gpt_stdlib import StdlibSources
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

import lightning_onebit  # noqa: F401  # registers "onebit_ddp"

VOCABULARY_SIZE = 3000
CONTEXT = 64
HIDDEN_SHARE = 0.15
NOT_ASKED = -100
"""Label of a word that does not count in the loss of `transformers`."""


class MaskedLM(pl.LightningModule):
    """Devlin et al. 2018 (arXiv 1810.04805), whose hidden words are all replaced by the mask.

    Args:
        d_model: width; a multiple of 4, the number of attention heads.
        layers: number of blocks.
        lr: learning rate, after a linear warm-up over ``lr_warmup_steps`` steps.
    """

    def __init__(self, d_model: int = 128, layers: int = 2, lr: float = 2e-3, lr_warmup_steps: int = 50) -> None:
        super().__init__()
        self.lr, self.lr_warmup_steps = lr, lr_warmup_steps
        config = BertConfig(
            vocab_size=VOCABULARY_SIZE + 1,  # the last word is the mask
            hidden_size=d_model,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=4 * d_model,
            max_position_embeddings=CONTEXT,
            type_vocab_size=1,
        )
        self.bert = BertForMaskedLM(config)

    def on_fit_start(self) -> None:
        # The ranks share a seed, but neither the words that are hidden nor dropout.
        torch.manual_seed(torch.initial_seed() + self.global_rank)

    def loss(self, words: Tensor) -> Tensor:
        """Cross-entropy per hidden word of ``words [batch, context]``, in nats."""
        hidden = torch.rand(words.shape, device=words.device) < HIDDEN_SHARE
        labels = words.masked_fill(~hidden, NOT_ASKED)
        return self.bert(input_ids=words.masked_fill(hidden, VOCABULARY_SIZE), labels=labels).loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch[0])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch[0]), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / self.lr_warmup_steps, total_iters=self.lr_warmup_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16, help="windows per rank and step (default: %(default)s)")
    parser.add_argument("--d-model", type=int, default=128)
    settings = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread per rank: more get in each other's way on two cores

    pl.seed_everything(1)
    sources = StdlibSources(vocabulary_size=VOCABULARY_SIZE, context=CONTEXT, batch_size=settings.batch_size)
    trainer = pl.Trainer(
        strategy="onebit_ddp",
        accelerator="cpu",
        devices=2,
        max_steps=settings.steps,
        val_check_interval=max(1, settings.steps // 4),
        check_val_every_n_epoch=None,
        limit_val_batches=8,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(MaskedLM(settings.d_model), datamodule=sources)
    if trainer.is_global_zero:
        print(f"validation loss: {float(trainer.callback_metrics['val_loss']):.3f}")


if __name__ == "__main__":
    main()
