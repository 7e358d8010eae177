"""The norm of the mean gradient, from gradients that nobody averages.

A random-sign sketch (the count sketch of Charikar, Chen and Farach-Colton, 2002; as a norm estimator: Alon, Matias and
Szegedy, 1996): each element is multiplied by a random sign and added to one of k buckets. The map is linear, so the mean of
the ranks' sketches is the sketch of their mean; and the squared norm of a sketch estimates that of the vector without
bias, with a relative standard deviation of at most sqrt(2 / k), 1.1% for k = 16384 (half of that for the norm), whatever
the vector. Up to k elements it is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_onebit.coefficients import Coefficients
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.engine.buckets import Buckets
from lightning_onebit.flat import flat_gradient, flat_view, unflatten_like
from lightning_onebit.methods import parameters_of
from lightning_onebit.quantize.memory import StepInputs

SKETCH_NUMEL = 16384
SMALLEST_SKETCH_NUMEL = 4096
ELEMENTS_PER_BUCKET = 1024
"""Of a model between, one float of the sketch for so many elements: 1/32 of the bytes of their signs."""
MOST_ROWS_PER_DRAW = 256
PROGRAMS_PER_MULTIPROCESSOR = 4
"""Of a kernel that sketches a bucket. Each works on one block after the other, and only others can hide how long it
waits for memory. Each has a sketch of its own, 64 KiB of the largest ones. Chosen from that, not measured."""


def sketch_numel(numel: int) -> int:
    """Size of a sketch for ``numel`` elements: a power of two, from 4096 (1.1% deviation of the norm) to 16384 (0.6%)."""
    wanted = 1 << max(0, (numel // ELEMENTS_PER_BUCKET).bit_length() - 1)
    return min(max(wanted, SMALLEST_SKETCH_NUMEL), SKETCH_NUMEL)


def sketch_programs(device: torch.device) -> int:
    """How many programs sketch a bucket at a time on ``device``; a few where kernels are interpreted."""
    on_gpu = device.type == "cuda"
    return PROGRAMS_PER_MULTIPROCESSOR * (torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1)


class NormSketch:
    """A sketch of a list of tensors, seen as one long vector.

    Element e lies in row e div k. A row is added to the buckets as a whole, rotated by a random amount, so that what
    is large in the same columns of many rows (a layer whose inputs are sparse) does not end up in the same few buckets.
    The element in bucket b of row r gets the sign ``a[b + r] * t[r]``, both random. With a alone the products of
    signs would repeat from bucket to bucket, and the buckets' errors add up where neighbours are alike (a layer behind a
    ReLU); with t alone they would be the same in all buckets. Together, the products of any two pairs of elements are
    uncorrelated, for k / 2 rows at most; then all is drawn anew. That is what the bound on the deviation needs.

    Args:
        seed: determines what is random: the same on all ranks, another at every step.
        device: where the tensors are.
        numel: k, the number of buckets; even.
    """

    def __init__(self, seed: int, *, device: torch.device, numel: int = SKETCH_NUMEL) -> None:
        self.numel = numel
        self.buckets = torch.zeros(numel, dtype=torch.float32, device=device)
        """The sketch: float32 ``[k]``. Average it over the ranks before :meth:`norm`."""
        self._generator = torch.Generator().manual_seed(seed)
        self._element = 0
        self._rows_per_draw = min(numel // 2, MOST_ROWS_PER_DRAW)
        self._draws = 0
        self._draw_()

    def add_(self, tensors: Iterable[Tensor | None], numels: Iterable[int]) -> None:
        """Append tensors to the vector.

        Args:
            tensors: floating point, any shape; ``None`` stands for zeros.
            numels: their numbers of elements, the same on all ranks: they fix every element's place.
        """
        for tensor, numel in zip(tensors, numels, strict=True):
            if tensor is not None:
                self._fold_(tensor.detach().reshape(-1), self._element)
            self._element += numel

    def norm(self) -> Tensor:
        """Estimate of the vector's L2 norm, 0-d."""
        return _norm(self.buckets)

    def _fold_(self, flat: Tensor, element: int) -> None:
        """Add a flat tensor whose first element is number ``element`` of the vector."""
        done = 0
        while done < flat.numel():
            row, column = divmod(element + done, self.numel)
            part = flat[done : done + self.numel - column]
            self._fold_part_(part.float(), row, column)
            done += part.numel()

    def _fold_part_(self, part: Tensor, row: int, column: int) -> None:
        """Add a piece that does not reach beyond its row."""
        draw, row = divmod(row, self._rows_per_draw)
        while self._draws <= draw:
            self._draw_()
        bucket = (column + self._rotations[row]) % self.numel
        before_end = self.numel - bucket
        self._add_signed_(part[:before_end], row, bucket)
        if part.numel() > before_end:
            self._add_signed_(part[before_end:], row, 0)

    def _add_signed_(self, part: Tensor, row: int, bucket: int) -> None:
        numel = part.numel()
        signs = self._bucket_signs[row + bucket : row + bucket + numel]
        self.buckets[bucket : bucket + numel].addcmul_(part, signs, value=self._row_signs[row])

    def _draw_(self) -> None:
        k, rows, generator = self.numel, self._rows_per_draw, self._generator
        signs = torch.randint(0, 2, (k + rows,), generator=generator, dtype=torch.int8).mul_(2).sub_(1)
        # On after its end as at its beginning: each rotation is a slice then.
        self._bucket_signs = signs[:k].to(device=self.buckets.device, dtype=torch.float32).repeat(2)
        self._row_signs: list[int] = signs[k:].tolist()
        self._rotations: list[int] = torch.randint(0, k, (rows,), generator=generator).tolist()
        self._draws += 1


def _norm(sketch: Tensor) -> Tensor:
    # In float32 the squares of a large gradient's buckets would be beyond it.
    return torch.linalg.vector_norm(sketch, dtype=torch.float64).float()


def norm_of_buckets(all_buckets: Sequence[Buckets], communicator: Communicator, *, seed: int) -> Tensor:
    """The norm of the mean of the local gradients, 0-d, the same on all ranks, without a wait for the device. Collective.

    In one launch per bucket, with the same random numbers as :class:`NormSketch`.

    Args:
        all_buckets: of one optimizer, all with device kernels.
        communicator: the ranks.
        seed: of the sketch, the same on all ranks.
    """
    return _sketched_norm(all_buckets, [_gradients_of(buckets) for buckets in all_buckets], communicator, seed)


def clip_buckets_(all_buckets: Sequence[Buckets], communicator: Communicator, max_norm: float, *, seed: int) -> Tensor:
    """Scale the local gradients so that the norm of their mean is at most ``max_norm``, without a wait for the device.

    In one more launch per bucket than :func:`norm_of_buckets`. Collective.

    Args:
        all_buckets: of one optimizer, all with device kernels; gradients of their parameters are scaled in place.
        communicator: the ranks.
        max_norm: as of ``torch.nn.utils.clip_grad_norm_``.
        seed: of the sketch, the same on all ranks.

    Returns:
        The norm before clipping, 0-d, the same on all ranks.
    """
    steps = [_gradients_of(buckets) for buckets in all_buckets]
    norm = _sketched_norm(all_buckets, steps, communicator, seed)
    # As torch. A norm that is not finite must not make NaN of all gradients, and hide where it came from.
    coefficient = (max_norm / (norm.nan_to_num(nan=torch.inf, posinf=torch.inf) + 1e-6)).clamp(max=1.0)
    for buckets, step in zip(all_buckets, steps, strict=True):
        assert buckets.device_kernels is not None
        for memory in buckets.memories:
            buckets.device_kernels.scale_(memory, step, coefficient)
        for p, gradient in zip(buckets.params, step.gradients, strict=True):
            if p.grad is not None and gradient is not None and gradient.data_ptr() != p.grad.data_ptr():
                p.grad.copy_(unflatten_like(gradient, p))  # it had other strides than its parameter
    return norm


def _sketched_norm(
    all_buckets: Sequence[Buckets], steps: Sequence[StepInputs], communicator: Communicator, seed: int
) -> Tensor:
    params = parameters_of(all_buckets[0].optimizer)
    total_numel, device = sum(p.numel() for p in params), all_buckets[0].device
    k = sketch_numel(total_numel)
    place_of = dict(zip(params, np.cumsum([0, *(p.numel() for p in params)]).tolist(), strict=False))
    partial = torch.zeros(sketch_programs(device), k, dtype=torch.float32, device=device)
    draws = None
    for buckets, step in zip(all_buckets, steps, strict=True):
        kernels = buckets.device_kernels
        assert kernels is not None
        if draws is None:
            rows = min(k // 2, MOST_ROWS_PER_DRAW)
            draws = kernels.draw_sketch(seed, total_numel=total_numel, numel=k, rows_per_draw=rows, device=device)
        places = np.array([place_of[p] for p in buckets.params], dtype=np.int64)
        for memory in buckets.memories:
            kernels.sketch_(partial, memory, step, draws, places)
    sketch = partial.sum(dim=0)
    with communicator.counters.counting_sketches():
        communicator.all_reduce_mean_(sketch)
    return _norm(sketch)


def _gradients_of(buckets: Buckets) -> StepInputs:
    """The present gradients for kernels that need no numbers."""
    return StepInputs(
        params=[flat_view(p) for p in buckets.params],
        gradients=[flat_gradient(p) for p in buckets.params],
        numbers=np.zeros((len(buckets.params), len(Coefficients._fields))),
        flags=torch.empty(0, dtype=torch.int32),
    )
