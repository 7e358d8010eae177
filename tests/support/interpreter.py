"""Triton's interpreter: several times as fast, and in the engine instead of the kernels for CPUs."""

from __future__ import annotations

import functools
import threading

import triton.language as tl


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


def use_triton(monkeypatch, kernels=None):
    """Have the engine take the path of a GPU for tensors on the CPU: interpreted kernels that read flags on the device.

    Args:
        monkeypatch: pytest's.
        kernels: called as ``kernels(scale=..., space=...)``; by default :class:`TritonKernels`.
    """
    from lightning_onebit.engine import buckets
    from lightning_onebit.quantize import triton, triton_gradients, triton_tables

    kernels = kernels or triton.TritonKernels
    patch_once(monkeypatch)
    # The interpreter changes Triton's modules while a kernel runs: one thread at a time.
    lock = threading.RLock()

    def launch(*arguments, **constants):
        with lock:
            triton_tables.launch(*arguments, **constants)

    for module in (triton, triton_gradients):
        monkeypatch.setattr(module, "launch", launch)

    def make_kernels(config, *, device, dtype):
        return kernels(scale=config.scale, space=config.space)

    monkeypatch.setattr(buckets, "make_kernels", make_kernels)
