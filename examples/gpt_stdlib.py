"""A small GPT and its text: the sources of Python's standard library, which every reader of this already has.

An ordinary LightningModule and an ordinary LightningDataModule. Nothing here knows about compression:

    from lightning.pytorch import Trainer
    import lightning_onebit  # registers "onebit_ddp"

    Trainer(strategy="onebit_ddp", accelerator="cpu", devices=2, max_steps=600).fit(GPT(), datamodule=StdlibSources())
"""

from __future__ import annotations

import math
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

Batch = tuple[Tensor, Tensor]
"""Word ids [batch, context] and, for each position, the id of the word that follows."""

# Model


class Block(nn.Module):
    """A pre-norm transformer block: causal self-attention, then a two-layer perceptron, each added to its input."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.attention_out = nn.Linear(d_model, d_model)
        self.norm_mlp = nn.LayerNorm(d_model)
        self.mlp_in = nn.Linear(d_model, 4 * d_model)
        self.mlp_out = nn.Linear(4 * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` and the result are [batch, context, d_model]."""
        batch, context, d_model = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, context, 3, self.heads, d_model // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, context, d_model / heads]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, context, d_model))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm_mlp(x))))


class GPT(pl.LightningModule):
    """A decoder-only transformer with learned positions whose output layer is its word embedding.

    Args:
        vocabulary_size: number of words.
        context: number of words that it sees at once.
        d_model: width; a multiple of ``heads``.
        layers: number of blocks.
        heads: attention heads per block.
        lr: the largest learning rate: reached after a linear warm-up, then a cosine down to a tenth of it.
        lr_warmup_steps: optimizer steps of that warm-up.
    """

    def __init__(
        self,
        *,
        vocabulary_size: int = 3000,
        context: int = 64,
        d_model: int = 128,
        layers: int = 2,
        heads: int = 4,
        lr: float = 3e-3,
        lr_warmup_steps: int = 50,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.lr_warmup_steps = lr, lr_warmup_steps
        self.words = nn.Embedding(vocabulary_size, d_model)
        self.positions = nn.Embedding(context, d_model)
        self.blocks = nn.ModuleList(Block(d_model, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(d_model)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # Layers that write into the residual stream start smaller: their outputs add up (GPT-2).
                residual = name.endswith(("attention_out.weight", "mlp_out.weight"))
                scale = 1.0 / math.sqrt(parameter.shape[1])
                nn.init.normal_(parameter, std=scale / math.sqrt(2 * layers) if residual else scale)

    def forward(self, words: Tensor) -> Tensor:
        """Word ids [batch, context] to logits [batch, context, vocabulary_size]."""
        x = self.words(words) + self.positions.weight[: words.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.words.weight)

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy per word, in nats."""
        words, next_words = batch
        return F.cross_entropy(self(words).flatten(0, 1), next_words.flatten())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        total = float(self.trainer.estimated_stepping_batches)

        def factor(step: int) -> float:
            if step < self.lr_warmup_steps:
                return (step + 1) / self.lr_warmup_steps
            progress = (step - self.lr_warmup_steps) / max(1.0, total - self.lr_warmup_steps)
            return 0.55 + 0.45 * math.cos(math.pi * min(1.0, progress))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


# Data

UNKNOWN = "<unk>"
WORD = re.compile(r"\n *|[^\W\d]\w*|\d+|[^\w\s]")
"""A line break with the indentation that follows, an identifier or keyword, a number, or one other character."""

NOT_THE_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "lib2to3"}
TABLES = {"encodings", "pydoc_data", "entities.py", "stringprep.py"}
"""Names of folders and files: data rather than code."""


def stdlib_files() -> dict[str, Path]:
    """The sources of the running Python's standard library by name, relative to its folder, in the order of their names.

    Raises:
        FileNotFoundError: if this Python came without them.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    files = {
        name: paths[name]
        for name in sorted(paths)
        if not (NOT_THE_LIBRARY | TABLES).intersection(name.split("/")) and not name.startswith("_sysconfigdata")
    }
    if not files:
        raise FileNotFoundError(f"No sources of the standard library in {root}. HINT: use a Python that comes with them.")
    return files


def is_for_validation(name: str) -> bool:
    """A fixed tenth of all names: other files, of another Python version, do not change where a file belongs."""
    return zlib.crc32(name.encode()) % 10 == 0


def split_words(paths: Iterable[Path]) -> list[str]:
    """All words of the files, one file after the other."""
    return [word for path in paths for word in WORD.findall(path.read_text(encoding="utf-8", errors="replace"))]


class Windows(Dataset[Batch]):
    """Stretches of ``context`` words, side by side, with the words that follow."""

    def __init__(self, ids: Tensor, context: int) -> None:
        self.ids, self.context = ids, context

    def __len__(self) -> int:
        return (len(self.ids) - 1) // self.context

    def __getitem__(self, index: int) -> Batch:
        start = index * self.context
        window = self.ids[start : start + self.context + 1]
        return window[:-1], window[1:]


class StdlibSources(pl.LightningDataModule):
    """Python's standard library as word ids; a fixed tenth of the files is kept for validation.

    The text, so the loss too, depends on the version of Python that runs this. Nothing is written to disk.

    Args:
        vocabulary_size: the most frequent words of the training files, and one for all others.
        context: words per window.
        batch_size: windows per rank and step.
        validation_windows: windows to validate on, evenly spaced over the validation files.
    """

    def __init__(
        self,
        *,
        vocabulary_size: int = 3000,
        context: int = 64,
        batch_size: int = 16,
        validation_windows: int = 512,
    ) -> None:
        super().__init__()
        self.vocabulary_size, self.context, self.batch_size = vocabulary_size, context, batch_size
        self.validation_windows = validation_windows

    def setup(self, stage: str) -> None:
        files = stdlib_files()
        words = split_words(path for name, path in files.items() if not is_for_validation(name))
        frequent = [word for word, _ in Counter(words).most_common(self.vocabulary_size - 1)]
        self.vocabulary = [UNKNOWN, *frequent]
        self._ids = {word: i for i, word in enumerate(self.vocabulary)}
        self.train_ids = self.encode(words)
        self.validation_ids = self.encode(split_words(path for name, path in files.items() if is_for_validation(name)))

    def encode(self, words: list[str]) -> Tensor:
        """Ids of words, int64; 0 for those outside the vocabulary."""
        return torch.tensor([self._ids.get(word, 0) for word in words])

    def train_dataloader(self) -> DataLoader[Batch]:
        # Lightning gives each rank its share, in an order that `seed_everything` decides.
        return DataLoader(Windows(self.train_ids, self.context), batch_size=self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        windows = Windows(self.validation_ids, self.context)
        spaced = range(0, len(windows), max(1, len(windows) // self.validation_windows))[: self.validation_windows]
        return DataLoader(torch.utils.data.Subset(windows, spaced), batch_size=self.batch_size)
