"""Triton's interpreter: several times as fast, and in the engine instead of the kernels for CPUs."""

from __future__ import annotations

import functools
import threading

import torch
import triton.language as tl

from lightning_onebit.quantize.reference import ReferenceKernels
from lightning_onebit.quantize.triton_gradients import draw_sketch


def patch_once(monkeypatch):
    """Patch Triton's language once per launch, not at each call of a kernel's function, where nothing is left to patch."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang

    @functools.cache
    def languages(fn):
        return [value for value in fn.__globals__.values() if value is tl or value is tl.core]

    def patch(fn):
        if any(tl.core.is_builtin(language.load) for language in languages(fn)):
            return original(fn)
        return interpreter._LangPatchScope()

    monkeypatch.setattr(interpreter, "_patch_lang", patch)


class LateReferenceKernels(ReferenceKernels):
    """The reference with the interface of kernels for a GPU: for long runs, as the interpreter takes 10 ms per block."""

    name = "late reference"
    reads_flags_on_device = True
    draw_sketch = staticmethod(draw_sketch)

    def gather_(self, flat, memory, step, factor=1.0):
        flat.copy_(self._flat(memory, (0, memory.layout.num_blocks), step.gradients)).mul_(factor)

    def scale_(self, memory, step, coefficient):
        for _, gradient, _ in self._parts(memory, (0, memory.layout.num_blocks), step.gradients, memory.error):
            gradient.mul_(coefficient)

    def sketch_(self, partial, memory, step, draws, first_places):
        k, rows_per_draw = partial.shape[1], draws.rotations.numel() // len(draws.signs)
        for p, gradient, start in self._starts(memory, step):
            place = int(first_places[p]) + start + torch.arange(len(gradient))
            row = place // k
            bucket = (place + draws.rotations[row]) % k
            turn = (bucket + row % rows_per_draw) % k
            sign = draws.signs[row // rows_per_draw, turn] * draws.row_signs[row]
            partial[0].index_add_(0, bucket, gradient.float() * sign)

    def _starts(self, memory, step):
        layout = memory.layout
        for p, start, numel in zip(layout.parameter.tolist(), layout.start.tolist(), layout.numel.tolist(), strict=True):
            if step.gradients[p] is not None:
                yield p, step.gradients[p][start : start + numel], start

    def add_parts_(self, out, parts, memory):
        out.copy_(parts[0])
        for part in parts[1:]:
            out.add_(part)


def use_triton(monkeypatch, kernels=None):
    """Have the engine take the path of a GPU for tensors on the CPU: interpreted kernels that read flags on the device.

    Args:
        monkeypatch: pytest's.
        kernels: called as ``kernels(scale=..., space=...)``; by default :class:`TritonKernels`.
    """
    from lightning_onebit.engine import buckets
    from lightning_onebit.quantize import triton, triton_gradients, triton_sketch, triton_tables, triton_variance

    kernels = kernels or triton.TritonKernels
    patch_once(monkeypatch)
    # The interpreter changes Triton's modules while a kernel runs: one thread at a time.
    lock = threading.RLock()

    def launch(*arguments, **constants):
        with lock:
            triton_tables.launch(*arguments, **constants)

    for module in (triton, triton_gradients, triton_sketch, triton_variance):
        monkeypatch.setattr(module, "launch", launch)

    def make_kernels(config, *, device, dtype):
        return kernels(scale=config.scale, space=config.space)

    monkeypatch.setattr(buckets, "make_kernels", make_kernels)
