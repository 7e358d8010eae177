"""The study's networks: tens to hundreds of thousands of parameters, a few milliseconds per step of one core."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """A pre-norm transformer block: self-attention, then a two-layer perceptron, each added to its input."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` and the result are [batch, length, width]."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm_mlp(x))))


class Words(nn.Module):
    """A transformer over word ids whose output layer is its embedding: a GPT if ``causal``, else an encoder."""

    def __init__(self, vocabulary: int, context: int, width: int, layers: int, *, causal: bool) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, 4, causal=causal) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                residual = name.endswith(("attention_out.weight", "mlp_out.weight"))
                scale = 1.0 / math.sqrt(p.shape[1])
                nn.init.normal_(p, std=scale / math.sqrt(2 * layers) if residual else scale)

    def forward(self, ids: Tensor) -> Tensor:
        """[batch, length] to logits [batch, length, vocabulary]."""
        x = self.blocks(self.words(ids) + self.positions.weight[: ids.shape[1]])
        return F.linear(self.norm(x), self.words.weight)


class ViT(nn.Module):
    """A vision transformer for images of 8 x 8 pixels in patches of 2 x 2."""

    def __init__(self, width: int = 48, layers: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(Block(width, 4, causal=False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


def cnn(width: int = 16) -> nn.Module:
    """A small ReLU network with group norm."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.GroupNorm(4, width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.GroupNorm(4, 2 * width),
        nn.ReLU(),
        nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1),
        nn.GroupNorm(4, 4 * width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * width, 10),
    )


class VAE(nn.Module):
    """A variational autoencoder for 64 pixels, with perceptrons of one hidden layer."""

    def __init__(self, width: int = 128, latent: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, 64))

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """``images`` [batch, 64] to the cross-entropy of the reconstruction and the KL divergence, each [batch]."""
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        logits = self.decoder(mean + (0.5 * log_variance).exp() * noise)
        reconstruction = F.binary_cross_entropy_with_logits(logits, images, reduction="none").sum(1)
        divergence = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1.0).sum(1)
        return reconstruction, divergence


class Table(nn.Module):
    """A perceptron for rows of numbers and two categories, which have embeddings."""

    def __init__(self, numbers: int, categories: int, width: int = 96) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(categories, 8), nn.Embedding(categories, 8)
        self.layers = nn.Sequential(
            nn.Linear(numbers + 16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
        )

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        """[batch, numbers] and ids [batch, 2] to [batch]."""
        embedded = [self.first(categories[:, 0]), self.second(categories[:, 1])]
        return self.layers(torch.cat([numbers, *embedded], dim=1)).squeeze(1)


def dcgan(width: int = 16, noise: int = 16) -> nn.ModuleDict:
    """Radford et al. 2015 (arXiv 1511.06434), for 8 x 8 pixels. Batch norm without running averages."""

    def norm(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels, track_running_stats=False)

    networks = nn.ModuleDict(
        {
            "generator": nn.Sequential(
                nn.ConvTranspose2d(noise, 2 * width, 4, bias=False),
                norm(2 * width),
                nn.ReLU(),
                nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1, bias=False),
                norm(width),
                nn.ReLU(),
                nn.Conv2d(width, 1, 3, padding=1),
                nn.Tanh(),
            ),
            "discriminator": nn.Sequential(
                nn.Conv2d(1, width, 3, padding=1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False),
                norm(2 * width),
                nn.LeakyReLU(0.2),
                nn.Conv2d(2 * width, 1, 4),
                nn.Flatten(),
            ),
        }
    )
    for module in networks.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, std=0.05)
    return networks
