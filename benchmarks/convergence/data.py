"""The study's data, all of which comes with Python and scikit-learn: sources of the standard library, digits, a table.

Batches depend on (seed, step, rank) only: all methods see the same.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


def generator(seed: int, step: int, rank: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 1009 + rank)


class Text:
    """Word ids of the standard library's sources; a fixed tenth of the files is held out."""

    def __init__(self, vocabulary: int) -> None:
        from gpt_stdlib import is_for_validation, split_words, stdlib_files

        files = stdlib_files()
        words = split_words(path for name, path in files.items() if not is_for_validation(name))
        held_out = split_words(path for name, path in files.items() if is_for_validation(name))
        ids = {word: i for i, (word, _) in enumerate(Counter(words).most_common(vocabulary - 2), start=2)}
        self.mask_id = 0  # and 1 for words outside the vocabulary
        self.train = torch.tensor([ids.get(word, 1) for word in words])
        self.held_out = torch.tensor([ids.get(word, 1) for word in held_out])

    def windows(self, seed: int, step: int, rank: int, size: int, length: int) -> Tensor:
        """[size, length], from anywhere in the training files."""
        starts = torch.randint(len(self.train) - length, (size,), generator=generator(seed, step, rank))
        return self.train[starts[:, None] + torch.arange(length)]

    def held_out_windows(self, size: int, length: int) -> Tensor:
        """[size, length], evenly spaced, the same for every seed."""
        starts = torch.linspace(0, len(self.held_out) - length, size).long()
        return self.held_out[starts[:, None] + torch.arange(length)]


@functools.cache
def text(vocabulary: int) -> Text:
    return Text(vocabulary)


class Digits:
    """scikit-learn's handwritten digits, [n, 1, 8, 8] between 0 and 1; a third is held out, drawn by the seed.

    Training images are shifted by up to ``shift`` pixels; pixels get Gaussian noise of standard deviation ``noise``.
    """

    def __init__(self, seed: int, noise: float, shift: int = 1) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        self.seed, self.noise, self.shift = seed, noise, shift
        cut = len(x) // 3
        self.x, self.y = x[order[cut:]], y[order[cut:]]
        # Held-out images four times, with other noise each: a smoother loss.
        held_out = x[order[:cut]].repeat(4, 1, 1, 1)
        self.held_out_x = held_out + noise * torch.randn(held_out.shape, generator=torch.Generator().manual_seed(seed))
        self.held_out_y = y[order[:cut]].repeat(4)

    def batch(self, step: int, rank: int, size: int, *, largest_label: int = 9) -> tuple[Tensor, Tensor]:
        """Images and labels; labels up to ``largest_label`` only."""
        g = generator(self.seed, step, rank)
        allowed = torch.arange(len(self.y)) if largest_label >= 9 else (self.y <= largest_label).nonzero().view(-1)
        chosen = allowed[torch.randint(len(allowed), (size,), generator=g)]
        padded = F.pad(self.x[chosen], [self.shift] * 4)
        first = torch.randint(2 * self.shift + 1, (2, size, 1), generator=g) + torch.arange(8)
        moved = padded[torch.arange(size)[:, None, None], 0, first[0, :, :, None], first[1, :, None, :]][:, None]
        return moved + self.noise * torch.randn(moved.shape, generator=g), self.y[chosen]


class Rows:
    """A synthetic table: Friedman's first function of ten uniform numbers, effects of two categories, heavy-tailed noise.

    Categories follow Zipf's law, so that some rows of their embeddings have a gradient seldom.
    """

    CATEGORIES = 100

    def __init__(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        rows, held_out = 20_000, 4_000
        self.x = torch.rand(rows, 10, generator=g)
        weights = 1.0 / torch.arange(1, self.CATEGORIES + 1)
        self.categories = torch.multinomial(weights, 2 * rows, replacement=True, generator=g).view(rows, 2)
        effects = torch.randn(2, self.CATEGORIES, generator=g)
        x = self.x.T
        y = 10 * torch.sin(torch.pi * x[0] * x[1]) + 20 * (x[2] - 0.5).square() + 10 * x[3] + 5 * x[4]
        y = y + 2 * effects[0][self.categories[:, 0]] + 2 * effects[1][self.categories[:, 1]]
        normal = torch.randn(2, rows, generator=g)
        noise = normal[0] / (normal[1].abs() + 0.3)  # between Gauss and Cauchy
        self.y = (y - y.mean()) / y.std() + 0.1 * noise
        self.train, self.held_out = slice(held_out, None), slice(0, held_out)
        self.seed = seed

    def batch(self, step: int, rank: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        x, categories, y = self.x[self.train], self.categories[self.train], self.y[self.train]
        chosen = torch.randint(len(y), (size,), generator=generator(self.seed, step, rank))
        return x[chosen], categories[chosen], y[chosen]


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Of two normal distributions with the moments of the rows of ``first`` and ``second``, pixels for features."""
    first, second = first.double(), second.double()
    covariances = first.T.cov(), second.T.cov()
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
    between_means = (first.mean(0) - second.mean(0)).square().sum()
    return float(between_means + covariances[0].trace() + covariances[1].trace() - 2 * roots)
