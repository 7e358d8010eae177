"""What Triton's kernels need beside a bucket's flat memory: tables by block and by parameter, and one way to launch.

A kernel works on a whole bucket in one launch, one program per block. Where a block lies stands in a table that is made
once. Where its parameter and gradient lie, and the numbers of the step, stand in a second one, which is sent once per
step. The device is never waited for.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from lightning_onebit.coefficients import Coefficients
from lightning_onebit.flat import send_
from lightning_onebit.quantize.layout import BITS_PER_BYTE, SCALE_NBYTES
from lightning_onebit.quantize.memory import BucketMemory, StepInputs

# Columns of the block table, int64 [blocks, BLOCK_COLUMNS]; a power of two, so that a row lies in one memory transaction.
PARAMETER = tl.constexpr(0)  # index among all parameters
SLOT = tl.constexpr(1)  # row in the step's table: index among the bucket's parameters
START = tl.constexpr(2)  # first element in the parameter
NUMEL = tl.constexpr(3)
OFFSET = tl.constexpr(4)  # first element in flat memory
SCALE = tl.constexpr(5)  # place of the scale among the float32 of the messages of all chunks
SIGN = tl.constexpr(6)  # first byte of the signs in the same messages
BLOCK_COLUMNS = tl.constexpr(8)

# Columns of the step's table, 8 bytes each, [parameters of the bucket, STEP_COLUMNS]: addresses are int64, numbers float64.
GRADIENT = tl.constexpr(0)  # 0 if there is none
PARAM = tl.constexpr(1)
FIRST_NUMBER = 2
(
    BETA, WEIGHT, KAPPA, EPS, SIGN_OF_GRADIENT, COUPLED_DECAY, SHRINK, STEP_SIZE, LARGEST_MOVE, NESTEROV, SQUARE_DECAY,
    ROOT_R,
) = (
    tl.constexpr(FIRST_NUMBER + Coefficients._fields.index(name))
    for name in (
        "beta", "weight", "kappa", "eps", "sign", "coupled_decay", "shrink", "step_size", "largest_move", "nesterov",
        "square_decay", "root_r",
    )
)  # fmt: skip
STEP_COLUMNS = tl.constexpr(FIRST_NUMBER + len(Coefficients._fields))

ELEMENTS_PER_WARP = 256
"""Compiled for sm_90, blocks of 2048, encode and apply need 64 and 92 registers per thread; with 512, 128 and 191, for as
many blocks at a time but half the warps. Chosen from that, not measured."""
MAX_WARPS = 16

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float64: tl.float64,
}


class BucketTables:
    """Both tables of one bucket, on its device. Get it with :func:`tables_of`.

    Args:
        memory: the bucket.
    """

    def __init__(self, memory: BucketMemory) -> None:
        layout = memory.layout
        self._codes = layout.codes
        self.members: NDArray[np.int64] = np.unique(layout.parameter)
        """The bucket's parameters, int64 ``[parameters of the bucket]``."""
        self._member_list: list[int] = self.members.tolist()
        rows = np.zeros((layout.num_blocks, BLOCK_COLUMNS.value), dtype=np.int64)
        rows[:, PARAMETER.value] = layout.parameter
        rows[:, SLOT.value] = np.searchsorted(self.members, layout.parameter)
        rows[:, START.value] = layout.start
        rows[:, NUMEL.value] = layout.numel
        rows[:, OFFSET.value] = layout.offset[:-1]
        rows[:, SCALE.value] = layout.scale_byte // SCALE_NBYTES
        rows[:, SIGN.value] = layout.sign_byte
        self.blocks = torch.empty(rows.shape, dtype=torch.int64, device=memory.device)
        """The block table."""
        send_(self.blocks, rows)
        self.numbers = torch.zeros(len(self.members), STEP_COLUMNS.value, dtype=torch.float64, device=memory.device)
        """The step's table, read as float64."""
        self.addresses = self.numbers.view(torch.int64)
        """The same memory, read as int64."""
        self._sent: NDArray[np.int64] | None = None
        self._step: weakref.ref[StepInputs] | None = None
        self._places: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._places_on_device: Tensor | None = None

    def update_(self, step: StepInputs) -> None:
        """Send addresses and numbers of ``step``, in one copy, if they are not on the device already."""
        params = [step.params[p] for p in self._member_list]
        gradients = [step.gradients[p] for p in self._member_list]
        dtypes = {tensor.dtype for tensor in params}.union(g.dtype for g in gradients if g is not None)
        assert len(dtypes) == 1, "parameters of a bucket, and their gradients, have one dtype"
        rows = np.empty(tuple(self.numbers.shape), dtype=np.float64)
        addresses = rows.view(np.int64)
        addresses[:, GRADIENT.value] = [0 if gradient is None else gradient.data_ptr() for gradient in gradients]
        addresses[:, PARAM.value] = [param.data_ptr() for param in params]
        rows[:, FIRST_NUMBER:] = step.numbers[self.members]
        if self._sent is None or not np.array_equal(addresses, self._sent):
            send_(self.addresses, addresses)
            self._sent = addresses
        self._step = weakref.ref(step)

    @cached_property
    def code_places(self) -> Tensor:
        """Of each block in the messages of second moments of all chunks: the place of its scale among their float32, and the
        first byte of its codes; int64 ``[blocks, 2]``."""
        places = np.stack([self._codes.scale_byte // SCALE_NBYTES, self._codes.element_byte], axis=1)
        on_device = torch.empty(places.shape, dtype=torch.int64, device=self.blocks.device)
        send_(on_device, places)
        return on_device

    def by_member(self, numbers: NDArray[np.float64]) -> Tensor:
        """Numbers of all parameters, ``[parameters, ...]``: those of the bucket's, sent; float64."""
        own = np.ascontiguousarray(numbers[self.members], dtype=np.float64)
        on_device = torch.empty(own.shape, dtype=torch.float64, device=self.blocks.device)
        send_(on_device, own)
        return on_device

    def has(self, step: StepInputs) -> bool:
        """Whether what was sent last is of ``step``."""
        return self._step is not None and self._step() is step

    def places(self, first_places: NDArray[np.int64]) -> Tensor:
        """``first_places`` of the bucket's parameters, int64 ``[parameters of the bucket]``, sent if they are others."""
        chosen = np.ascontiguousarray(first_places[self.members], dtype=np.int64)
        if self._places_on_device is None or not np.array_equal(chosen, self._places):
            self._places_on_device = torch.empty(len(chosen), dtype=torch.int64, device=self.blocks.device)
            send_(self._places_on_device, chosen)
            self._places = chosen
        return self._places_on_device


_TABLES: weakref.WeakKeyDictionary[BucketMemory, BucketTables] = weakref.WeakKeyDictionary()


def tables_of(memory: BucketMemory) -> BucketTables:
    """The tables of ``memory``, made at first use."""
    if memory not in _TABLES:
        _TABLES[memory] = BucketTables(memory)
    return _TABLES[memory]


def is_aligned(flat: Tensor) -> bool:
    """Whether a flat tensor in the order of memory begins where the largest loads can begin."""
    return flat.data_ptr() % 16 == 0


def param_dtype(tables: BucketTables, step: StepInputs) -> Any:
    """Triton's name of the dtype that all parameters of the bucket have; of their gradients as well."""
    return TRITON_DTYPES[step.params[int(tables.members[0])].dtype]


def any_number(step: StepInputs, name: str) -> bool:
    """Whether a number of the step is not 0 for some parameter, of any bucket."""
    return bool(step.numbers[:, Coefficients._fields.index(name)].any())


# ---- launches

_counters: list[Counter[str]] = []


@contextmanager
def count_launches() -> Iterator[Counter[str]]:
    """Count the launches of kernels in the block of the ``with`` statement, on all threads, by the kernel's name."""
    counter: Counter[str] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters[:] = [each for each in _counters if each is not counter]


def launch(kernel: Any, programs: int, memory: BucketMemory, *arguments: Any, **constants: Any) -> None:
    """Launch ``kernel`` once, with tiles of the bucket's block size; not at all without programs.

    Args:
        kernel: a Triton kernel. Its argument ``BYTES`` is given here: the rows of a tile ``[BYTES, 8]``.
        programs: how many.
        memory: the bucket.
        arguments: of the kernel.
        constants: its constants.
    """
    if programs == 0:
        return
    for counter in _counters:
        counter[kernel.__name__] += 1
    # Triton launches on the current device, and a thread that the caller started has device 0.
    with torch.cuda.device_of(memory.error):
        kernel[(programs,)](*arguments, **constants, **tile_options(memory.layout.block_size))


def tile_options(block_size: int) -> dict[str, Any]:
    """The size of a tile, and how a kernel that works on it is compiled."""
    padded = triton.next_power_of_2(block_size)
    num_warps = min(max(padded // ELEMENTS_PER_WARP, 1), MAX_WARPS)
    # Without fusion: what decides a bit must not be rounded otherwise than in the reference. One stage: loads stay in place.
    return {"BYTES": padded // BITS_PER_BYTE, "num_warps": num_warps, "num_stages": 1, "enable_fp_fusion": False}


@triton.jit
def square_factors(numbers, step_row):  # type: ignore[no-untyped-def]
    """``sign root_r sqrt(1 - square_decay)``, and that root: float64, as :class:`Coefficients` has them."""
    root_weight = tl.sqrt(1.0 - tl.load(numbers + step_row + SQUARE_DECAY))
    factor = tl.load(numbers + step_row + SIGN_OF_GRADIENT) * tl.load(numbers + step_row + ROOT_R) * root_weight
    return factor, root_weight


def block_kernel(places: Sequence[str]) -> Any:
    """``triton.jit`` that compiles one kernel for all values of the integers named ``places``."""
    return triton.jit(do_not_specialize=list(places))
