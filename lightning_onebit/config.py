"""Validated settings of the compression."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lightning_onebit.arguments import is_integer, is_number

Scale = Literal["l2", "l1"]
Space = Literal["update", "momentum"]
WarmupPrecision = Literal["fp32", "bf16"]
VarianceRefresh = int | Literal["auto"] | None

MAX_BLOCK_SIZE = 16384
"""Up to this length torch reduces a block on one thread, so its norm does not depend on the blocks
beside it. Longer blocks would also save nothing: scales are 0.2% of the message at this size."""

MEBIBYTE = 1024 * 1024
FLOAT32_NBYTES = 4
BUCKETS = 4
SMALLEST_BUCKET_NUMEL, LARGEST_BUCKET_NUMEL = 2**20, 2**24
"""Signs of 128 KiB and 2 MiB: large enough for a network's bandwidth to count, not its latency, at 2 to 64 ranks."""


@dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """How tensors are quantized and cut into messages.

    Raises:
        ValueError: if a value lies outside its domain; the message names value, domain and remedy.
    """

    block_size: int = 2048
    """Elements that share one scale. A positive multiple of 8, at most 16384."""

    scale: Scale = "l2"
    """``"l2"``: root mean square of the block, ``"l1"``: mean absolute value."""

    space: Space = "update"
    """What is quantized: ``"update"`` the preconditioned momentum m/D, ``"momentum"`` the momentum m
    itself, as in the 1-bit Adam paper. Has a meaning only for methods with a preconditioner. Elements of a block come out of
    the quantizer equally large, so in momentum space those with a small D get much noise: m/D is clamped to the most that an
    unfrozen Adam could have, and what is cut off is lost."""

    variance_refresh: VarianceRefresh = "auto"
    """When the frozen second moment is renewed: ``"auto"``: often at first, then every 64 steps; a number: every so many
    steps; ``None``: never, as in the 1-bit Adam paper. Belongs to ``space="update"``: in momentum space "auto" is None."""

    bucket_cap_mb: float | None = None
    """Size of one exchange, in MiB of float32 gradient; ``None``: chosen by the bytes on the wire, a quarter of the model,
    between 1 Mi and 16 Mi elements (signs of 128 KiB and 2 MiB), so that exchanges overlap with work without becoming many:
    21 for BERT-large. Each may cover several of DDP's buckets. The result does not depend on it."""

    warmup_precision: WarmupPrecision = "fp32"
    """What gradients travel as in warm-up: ``"fp32"`` as they are, bitwise as under DDP; ``"bf16"`` rounded to bfloat16,
    half the bytes of float32."""

    def __post_init__(self) -> None:
        if not is_integer(self.block_size) or self.block_size % 8 or not 8 <= self.block_size <= MAX_BLOCK_SIZE:
            raise ValueError(
                f"Invalid block_size: {self.block_size!r}. Must be a multiple of 8 between 8 and {MAX_BLOCK_SIZE},"
                " so that every block fills whole bytes. HINT: the default, 2048, suits most models."
            )
        if self.scale not in ("l2", "l1"):
            raise ValueError(
                f"Invalid scale: {self.scale!r}. Must be 'l2' (root mean square) or 'l1' (mean absolute value)."
            )
        if self.space not in ("update", "momentum"):
            raise ValueError(
                f"Invalid space: {self.space!r}. Must be 'update' (compress m/D) or 'momentum' (compress m, the paper's)."
            )
        refresh = self.variance_refresh
        if refresh is not None and refresh != "auto" and not (is_integer(refresh) and refresh >= 1):
            raise ValueError(
                f"Invalid variance_refresh: {refresh!r}. Must be 'auto', a number of steps >= 1, or None (never). HINT:"
                " 'auto' renews often at first."
            )
        if self.warmup_precision not in ("fp32", "bf16"):
            raise ValueError(
                f"Invalid warmup_precision: {self.warmup_precision!r}. Must be 'fp32' (gradients as they are, bitwise as"
                " under DDP) or 'bf16' (half the bytes)."
            )
        if self.space == "momentum" and is_integer(refresh):
            raise ValueError(
                f"Invalid variance_refresh: {refresh} with space='momentum', where momentum travels before it is divided by"
                " D: errors would change their meaning with D. HINT: use space='update', or variance_refresh=None."
            )
        if self.bucket_cap_mb is not None and not (is_number(self.bucket_cap_mb) and 0 < self.bucket_cap_mb < math.inf):
            raise ValueError(
                f"Invalid bucket_cap_mb: {self.bucket_cap_mb!r}. Must be a finite number > 0 (MiB of float32 gradient), or"
                " None: by the size of the model."
            )

    @property
    def renews_variance(self) -> bool:
        """Whether the second moment is renewed during the compressed phase."""
        return self.variance_refresh is not None and self.space == "update"

    def bucket_numel(self, numel: int) -> int:
        """Most elements of a bucket, for ``numel`` elements in all: at least one block."""
        if self.bucket_cap_mb is not None:
            return max(self.block_size, int(self.bucket_cap_mb * MEBIBYTE) // FLOAT32_NBYTES)
        return min(max(numel // BUCKETS, SMALLEST_BUCKET_NUMEL), LARGEST_BUCKET_NUMEL)
