"""Whether Triton's kernels compute on this device, with this version of Triton, what the reference computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from lightning_onebit.coefficients import Coefficients, RefreshNumbers
from lightning_onebit.quantize.layout import plan_buckets
from lightning_onebit.quantize.memory import BucketMemory, Messages, StepInputs
from lightning_onebit.quantize.reference import ReferenceKernels, pack_bits
from lightning_onebit.quantize.tensor_sketch import TensorSketch
from lightning_onebit.quantize.triton import TritonKernels
from lightning_onebit.quantize.triton_gradients import SketchDraws, add_parts_, draw_sketch, gather_, scale_, sketch_

CPU = torch.device("cpu")
BLOCK_SIZE = 2048
NUMELS = (2 * BLOCK_SIZE + 13, 5, 700)
SKETCH_NUMEL, ROWS_PER_DRAW = 2048, 2
SKETCH_TOLERANCE = 1e-4
"""The sketch alone is a sum in float32, in another order."""
SQUARES_TOLERANCE = 1e-6


class KernelMismatchError(RuntimeError):
    """A kernel of Triton fails, or computes something else than the reference."""


_checked: dict[torch.device, KernelMismatchError | None] = {}


def check_kernels(device: torch.device) -> None:
    """Compare each kernel with the reference, on one small bucket; once per device and process. Waits for the GPU.

    Raises:
        KernelMismatchError: names the kernel, and what is different. At each call, not only at the first one.
        torch.OutOfMemoryError: if there is no room for the comparison, of which nothing is known then.
    """
    if device not in _checked:
        try:
            _compare_all(device)
        except KernelMismatchError as error:
            _checked[device] = error
        else:
            _checked[device] = None
    verdict = _checked[device]
    if verdict is not None:
        raise verdict


@contextmanager
def _running(kernel: str, device: torch.device) -> Iterator[None]:
    """What fails within is a failure of ``kernel``, unless memory has run out, for which no kernel is to blame."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise KernelMismatchError(f"Triton's kernel '{kernel}' fails on {device}: {error!r}") from error


def _compare_all(device: torch.device) -> None:
    memory, step = _bucket(device), _step(device)
    expected_memory, expected_step = _bucket(CPU), _step(CPU)
    pairs = ((TritonKernels(), memory, step), (ReferenceKernels(), expected_memory, expected_step))
    for name in ("encode", "serve", "apply"):
        with _running(name, device):
            for kernels, each_memory, each_step in pairs:
                if name == "encode":
                    kernels.encode_(each_memory, 0, each_step, commit=False)
                elif name == "serve":
                    kernels.serve_(each_memory, each_step, commit=False)
                else:
                    each_memory.turn_results_()
                    kernels.apply_(each_memory, 0, each_step, commit=True)
        for (what, one), other in zip(
            _written(memory, step).items(), _written(expected_memory, expected_step).values(), strict=True
        ):
            _compare(name, what, one, other, device)
    _compare_gradients(memory, step, expected_step)
    _compare_variance(device)
    _compare_sketches(device)


def _compare_variance(device: torch.device) -> None:
    """A step in which D is a code and v_i is renewed, and a refresh."""
    pairs: list[tuple[TritonKernels | ReferenceKernels, BucketMemory, StepInputs, Messages]] = []
    for kernels, where in ((TritonKernels(), device), (ReferenceKernels(), CPU)):
        memory = _bucket(where, renews=True)
        pairs.append((kernels, memory, _step(where), memory.variance_messages()))
    correction = np.linspace(1.0, 2.0, len(NUMELS))
    numbers = RefreshNumbers(correction, np.linspace(0.8, 0.9, len(NUMELS)), np.full(len(NUMELS), 1e-8))
    for name in ("encode", "encode_variance", "serve_variance", "apply_variance"):
        with _running(name, device):
            for kernels, memory, step, messages in pairs:
                if name == "encode":
                    kernels.encode_(memory, 0, step, commit=True)
                elif name == "encode_variance":
                    kernels.encode_variance_(memory, messages, correction)
                elif name == "serve_variance":
                    messages.received.copy_(messages.sent[: messages.wire.chunk_nbytes].repeat(2))
                    kernels.serve_variance_(memory, messages)
                else:
                    messages.result.copy_(messages.sent)
                    messages.result[: messages.wire.chunk_nbytes] = messages.served
                    kernels.apply_variance_(memory, messages, numbers)
        (_, memory, _, messages), (_, expected, _, expected_messages) = pairs
        for what in ("error", "second_moment", "second_moment_residual", "rms_code", "rms_scale"):
            _compare(name, what, getattr(memory, what), getattr(expected, what), device)
        for what in ("sent", "served"):
            _compare(name, what, getattr(messages, what), getattr(expected_messages, what), device)


def _compare_sketches(device: torch.device) -> None:
    """Sketches of tensors: equal bit for bit, but for sums of squares, which are of float64."""
    sketches = []
    with _running("sketch_tensors", device):
        for kernels, where in ((TritonKernels(), device), (ReferenceKernels(), CPU)):
            sketch = TensorSketch(1, range(len(NUMELS)), NUMELS, dtype=torch.int64, device=where)
            kernels.sketch_tensors_(_bucket(where, renews=True), 0, _step(where), sketch)
            sketches.append(sketch)
    one, other = sketches
    _compare("sketch_tensors", "a sketch", one.values.flatten(), other.values.flatten(), device)
    _compare("sketch_tensors", "a count", one.sums[2:].flatten(), other.sums[2:].flatten(), device)
    _compare("sketch_tensors", "a sum of squares", one.squares(), other.squares(), device, SQUARES_TOLERANCE)


def _compare_gradients(memory: BucketMemory, step: StepInputs, expected_step: StepInputs) -> None:
    device, factor = memory.device, torch.full((), 0.37)
    gradient = ReferenceKernels()._flat(_bucket(CPU), (0, memory.layout.num_blocks), list(expected_step.gradients))
    flat = torch.zeros_like(gradient, device=device)
    sizes = {"total_numel": sum(NUMELS), "numel": SKETCH_NUMEL, "rows_per_draw": ROWS_PER_DRAW}
    draws, expected_draws = (draw_sketch(0, **sizes, device=each) for each in (device, CPU))
    partial = torch.zeros(2, SKETCH_NUMEL, device=device)
    first_places = np.cumsum([0, *NUMELS[:-1]])
    total = torch.empty(SKETCH_NUMEL, device=device)
    with _running("gather", device):
        gather_(flat, memory, step, 0.37)
    with _running("sketch", device):
        sketch_(partial, memory, step, draws, first_places)
    with _running("add_parts", device):
        add_parts_(total, partial, memory)
    with _running("scale", device):
        scale_(memory, step, factor.to(device))
    _compare("gather", "the gradient", flat, gradient * factor, device)
    # The sketch was made of gradients as they were before they were scaled.
    _compare("sketch", "the sketch", partial.sum(dim=0), _sketch(expected_step, expected_draws), device, SKETCH_TOLERANCE)
    _compare("add_parts", "a sum", total, partial[0].cpu() + partial[1].cpu(), device)
    for p, (one, other) in enumerate(zip(step.gradients, expected_step.gradients, strict=True)):
        if one is not None and other is not None:
            _compare("scale", f"gradient {p}", one, other * factor, device)


def _compare(kernel: str, what: str, actual: Tensor, expected: Tensor, device: torch.device, tolerance: float = 0.0) -> None:
    actual = actual.cpu()
    # NaN differs from everything.
    different = (~((actual - expected).abs() <= tolerance) if tolerance else actual != expected).nonzero().flatten()
    if len(different):
        first = int(different[0])
        raise KernelMismatchError(
            f"Triton's kernel '{kernel}' differs from the reference on {device}: {what}, in {len(different)} of"
            f" {actual.numel()} elements, such as number {first}: {actual[first].item()} instead of {expected[first].item()}"
        )


def _written(memory: BucketMemory, step: StepInputs) -> dict[str, Tensor]:
    """All that a step writes."""
    errors = {"error": memory.error, "server error": memory.server_error}
    messages = {"message": memory.sent, "served message": memory.served, "average": memory.result}
    return {**messages, **errors, "flags": step.flags, **{f"parameter {p}": x for p, x in enumerate(step.params)}}


def _values(numel: int, seed: float) -> Tensor:
    """Neither regular nor random: the same in all versions of torch. float32, between -1 and 1."""
    return ((torch.arange(numel, dtype=torch.float64) * 0.6180339887498949 + seed).frac() * 2 - 1).float()


def _bucket(device: torch.device, *, renews: bool = False) -> BucketMemory:
    [layout] = plan_buckets(NUMELS, block_size=BLOCK_SIZE, num_chunks=2, bucket_numel=sum(NUMELS))
    memory = BucketMemory(
        layout, share=range(2), chunk=0, has_rms=True, keeps_before=True, renews=renews, dtype=torch.float32, device=CPU
    )
    element = ReferenceKernels()._live(memory, (0, layout.num_blocks), None)
    live = element & (_values(layout.flat_numel, 0.1) > -0.8)
    memory.live = memory.live_before = pack_bits(live)
    memory.error.copy_(torch.where(element, _values(layout.flat_numel, 0.2), 0.0))
    memory.set_rms_(torch.where(live, _values(layout.flat_numel, 0.3).abs() + 1e-9, 0.0))
    if memory.second_moment is not None:
        memory.second_moment.copy_(torch.where(element, _values(layout.flat_numel, 0.35).square(), 0.0))
    memory.server_error.copy_(torch.where(element[memory.chunk_flat], _values(len(memory.server_error), 0.4), 0.0))
    write = ReferenceKernels()._write
    for messages, blocks, seed in [
        (memory.result, (0, layout.num_blocks), 0.5),
        (memory.result_before, (0, layout.num_blocks), 0.6),
        *((message, memory.chunk_blocks, 0.7 + 0.05 * rank) for rank, message in enumerate(memory.received.view(2, -1))),
    ]:
        start, stop = (int(layout.offset[block]) for block in blocks)
        bits = (_values(stop - start, seed) < 0) & live[start:stop]
        write(memory, messages, 0, blocks, bits, _values(blocks[1] - blocks[0], seed).abs())
    if device != CPU:
        for name, value in vars(memory).items():
            if isinstance(value, Tensor):
                setattr(memory, name, value.to(device))
        memory.results = tuple(result.to(device) for result in memory.results)
        memory.device = device
    return memory


def _step(device: torch.device) -> StepInputs:
    numbers = Coefficients(
        beta=0.9,
        weight=0.1,
        kappa=3.0,
        eps=1e-8,
        shrink=0.999,
        step_size=1e-2,
        largest_move=3e-2,
        square_decay=0.99,
        root_r=0.7,
    )
    gradients = [_values(numel, 0.8 + 0.01 * p).to(device) for p, numel in enumerate(NUMELS)]
    return StepInputs(
        params=[_values(numel, 0.9 + 0.01 * p).to(device) for p, numel in enumerate(NUMELS)],
        gradients=[None if p == 1 else gradient for p, gradient in enumerate(gradients)],
        numbers=np.array([numbers] * len(NUMELS), dtype=np.float64),
        flags=torch.tensor([0, 1, 1, 0], dtype=torch.int32).to(device),
    )


def _sketch(step: StepInputs, draws: SketchDraws) -> Tensor:
    """By the definition in :class:`SketchDraws`."""
    place = torch.arange(sum(NUMELS))
    gradient = torch.cat([torch.zeros(n) if g is None else g for g, n in zip(step.gradients, NUMELS, strict=True)])
    row = place // SKETCH_NUMEL
    bucket = (place + draws.rotations[row]) % SKETCH_NUMEL
    sign = draws.signs[row // ROWS_PER_DRAW, (bucket + row % ROWS_PER_DRAW) % SKETCH_NUMEL] * draws.row_signs[row]
    return torch.zeros(SKETCH_NUMEL).index_add_(0, bucket, gradient * sign)
