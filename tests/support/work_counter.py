"""Counts what a GPU and its host would have to do, on tensors of the CPU: launches, collectives, waits of the host.

A **launch** is one of Triton's, or an operation of torch that is no view and no allocation; a foreach call over k tensors
counts k, a copy from the host 1. A **wait** is what brings a value of the device to the host. All tensors are the device's,
but for those that are made on the host: by ``torch.tensor`` without a device, by a random generator of the CPU, and what is
computed from such alone; ``.to(device)`` sends them.
"""

from __future__ import annotations

import functools
from collections import Counter
from contextlib import ExitStack, contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.quantize import triton_tables

NO_LAUNCH = ("empty", "detach", "lift_fresh", "is_pinned", "_reshape_alias", "alias", "_local_scalar_dense", "new_empty")
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive")
WAITING_METHODS = (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy)


class WorkCounter:
    """``events`` are in order: ``("launch" | "wait" | "collective", name)``, of the time spent within :meth:`counting`.

    Args:
        monkeypatch: pytest's.
    """

    def __init__(self, monkeypatch):
        self.events = []
        self._depth = 0
        self._host = {}
        counter = self

        count, launch = Communicator._count, triton_tables.launch

        def count_collective(communicator, nbytes, seconds):
            counter.note("collective", "")
            count(communicator, nbytes, seconds)

        def count_launch(kernel, programs, *arguments, **constants):
            if programs:
                counter.note("launch", kernel.__name__)
            with torch._C._DisableTorchDispatch():
                launch(kernel, programs, *arguments, **constants)

        monkeypatch.setattr(Communicator, "_count", count_collective)
        from lightning_onebit.quantize import triton, triton_gradients, triton_sketch, triton_variance

        for module in (triton, triton_gradients, triton_sketch, triton_variance):
            monkeypatch.setattr(module, "launch", count_launch)

    def note(self, kind, name, times=1):
        if self._depth > 0:
            self.events.extend([(kind, name)] * times)

    def counts(self):
        """How many of each kind, but for what comes before ``start`` of :attr:`events`."""
        return {kind: sum(each == kind for each, _ in self.events) for kind in ("launch", "collective", "wait")}

    def by_name(self):
        return Counter(self.events)

    @contextmanager
    def counting(self):
        """Count within; may be nested."""
        with ExitStack() as stack:
            if self._depth == 0:
                stack.enter_context(_Operations(self))
                stack.enter_context(_Functions(self))
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1

    @contextmanager
    def pausing(self):
        """Do not count within."""
        depth, self._depth = self._depth, -(10**6)
        try:
            yield
        finally:
            self._depth = depth

    def within(self, function, unless=lambda: False):
        """``function``, counted while it runs. Of its arguments, ``closure`` is not."""

        @functools.wraps(function)
        def counted(*args, **kwargs):
            if unless():
                return function(*args, **kwargs)
            depth, self._depth = self._depth, max(self._depth, 0)
            try:
                with self.counting():
                    return function(*args, **kwargs)
            finally:
                self._depth = depth

        return counted

    def is_host(self, tensor):
        return tensor.untyped_storage()._cdata in self._host

    def mark(self, tensor, *, host):
        key = tensor.untyped_storage()._cdata
        if host:
            self._host[key] = tensor  # kept alive, so that no other storage gets its place
        else:
            self._host.pop(key, None)


class _Operations(TorchDispatchMode):
    def __init__(self, counter):
        super().__init__()
        self._counter = counter

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, counter = kwargs or {}, self._counter
        out = func(*args, **kwargs)
        tensors = list(_tensors_of((*args, *kwargs.values())))
        on_host = all(counter.is_host(x) for x in tensors) if tensors else kwargs.get("generator") is not None
        name = func._schema.name.split("::")[1]
        if on_host:
            for x in _tensors_of((out,)):
                counter.mark(x, host=True)
        elif func.namespace == "aten":
            if name.startswith(WAITS):
                counter.note("wait", name)
            if not func.is_view and not name.startswith(NO_LAUNCH):
                times = len(args[0]) if name.startswith("_foreach") else 1
                counter.note("launch", name, times)
        return out


def _tensors_of(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors_of(value)


class _Functions(TorchFunctionMode):
    def __init__(self, counter):
        super().__init__()
        self._counter = counter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, counter = kwargs or {}, self._counter
        out = func(*args, **kwargs)
        if func is torch.tensor:
            host = kwargs.get("device") is None
            counter.mark(out, host=host)
            if not host:
                counter.note("launch", "send")
        elif func is torch.Tensor.to and counter.is_host(args[0]):
            if any(isinstance(x, torch.device) for x in (*args[1:], *kwargs.values())):
                counter.mark(out, host=False)
                counter.note("launch", "send")
        elif func in WAITING_METHODS and not counter.is_host(args[0]):
            counter.note("wait", func.__name__)
        return out


class NoKernel:
    """Stands for a kernel of Triton: does nothing, but counts."""

    def __init__(self, name):
        self.__name__, self.launches = name, 0

    def __getitem__(self, grid):
        def call(*arguments, **constants):
            self.launches += 1

        return call


def replace_kernels(monkeypatch):
    """Replace all kernels by :class:`NoKernel`; returns them by name."""
    from lightning_onebit.quantize import triton, triton_gradients, triton_sketch, triton_variance

    kernels = {}
    for module, names in (
        (triton, ("encode", "serve", "apply")),
        (triton_gradients, ("gather", "scale", "sketch", "add_parts")),
        (triton_sketch, ("sketch_tensors",)),
        (triton_variance, ("encode_variance", "serve_variance", "apply_variance")),
    ):
        for name in names:
            kernels[f"_{name}_kernel"] = NoKernel(f"_{name}_kernel")
            monkeypatch.setattr(module, f"_{name}_kernel", kernels[f"_{name}_kernel"])
    return kernels
