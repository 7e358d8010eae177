"""The user's module: found by its path, and its forward and backward measured on its ``example_input_array``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_onebit.doctor.clock import Clock

EXAMPLE = "package.module:Class or file.py:Class, of something that is a module, or gives one when called without arguments"


def load_module(path: str) -> nn.Module:
    """The module at ``path``.

    Raises:
        ValueError: says what was wrong with the path, and what is allowed.
    """
    source, _, name = path.rpartition(":")
    if not source or not name:
        raise ValueError(
            f"Invalid module path: {path!r}. Must be {EXAMPLE}. HINT: for a number of parameters, --params 340M."
        )
    try:
        found = _import(source)
        for part in name.split("."):
            found = getattr(found, part)
        module = found() if inspect.isclass(found) or not isinstance(found, nn.Module) else found
    except Exception as error:
        raise ValueError(
            f"Cannot make the module {path!r}: {type(error).__name__}: {error}. It must be {EXAMPLE}. HINT: write a function"
            " without arguments that returns your model, or pass --params and --backward instead."
        ) from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"{path!r} gave a {type(module).__name__}, not a torch.nn.Module. It must be {EXAMPLE}.")
    return module


def _import(source: str) -> Any:
    if not source.endswith(".py"):
        sys.path.insert(0, "")
        return importlib.import_module(source)
    file = Path(source)
    if not file.is_file():
        raise FileNotFoundError(f"no file {source}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    sys.path.insert(0, str(file.parent))  # what lies beside it
    spec.loader.exec_module(module)
    return module


def measure_module(module: nn.Module, clock: Clock) -> tuple[float, float]:
    """Seconds of forward and backward on ``module.example_input_array``.

    The loss is the sum of the means of all outputs: a real one, of a few classes, takes little more.

    Raises:
        ValueError: if there is no example, or nothing that can be differentiated comes out.
    """
    example = getattr(module, "example_input_array", None)
    if example is None:
        raise ValueError(
            f"{type(module).__name__} has no example_input_array, so its backward cannot be measured. HINT: set it to a"
            " batch of the size you train with, or pass --backward SECONDS."
        )
    device = clock.device
    module.to(device).train()
    example = _moved(example, device)
    outputs: list[Tensor] = []

    def forward() -> None:
        module.zero_grad(set_to_none=True)
        output = module(**example) if isinstance(example, dict) else module(*_as_tuple(example))
        means = [tensor.float().mean() for tensor in _tensors(output) if tensor.requires_grad]
        if not means:
            raise ValueError(
                f"No output of {type(module).__name__} depends on its parameters. HINT: pass --backward SECONDS."
            )
        outputs[:] = [torch.stack(means).sum()]

    def backward() -> None:
        outputs.pop().backward()

    pairs = clock.medians([forward, backward])
    module.zero_grad(set_to_none=True)
    return pairs[0], pairs[1]


def trained_shapes(module: nn.Module) -> list[tuple[int, ...]]:
    """Of the parameters that are trained, in their order."""
    return [tuple(p.shape) for p in module.parameters() if p.requires_grad]


def _as_tuple(example: Any) -> tuple[Any, ...]:
    return tuple(example) if isinstance(example, (tuple, list)) else (example,)


def _moved(example: Any, device: torch.device) -> Any:
    if isinstance(example, Tensor):
        return example.to(device)
    if isinstance(example, dict):
        return {name: _moved(each, device) for name, each in example.items()}
    return tuple(_moved(each, device) for each in example) if isinstance(example, (tuple, list)) else example


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for each in output.values():
            yield from _tensors(each)
    elif isinstance(output, (tuple, list)):
        for each in output:
            yield from _tensors(each)
