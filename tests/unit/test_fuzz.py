"""Whatever bytes come: what is received decodes, within its memory; a checkpoint is loaded, or refused with one error."""

import copy
import json
import math
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from buckets import random_layouts
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_onebit.checkpoint.parts import PROBLEMS, PartError, Parts
from lightning_onebit.checkpoint.state import CHECKPOINT_KEY, PartContent, load_errors, read_header, restore, shared_state
from lightning_onebit.coefficients import Coefficients
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.comm.topology import Topology
from lightning_onebit.config import CompressionConfig
from lightning_onebit.engine.optimizer import CompressedOptimizer
from lightning_onebit.engine.ranges import ElementRange, add_ranges_, merged
from lightning_onebit.quantize.cpu import CpuKernels
from lightning_onebit.quantize.memory import BucketMemory, StepInputs
from lightning_onebit.quantize.reference import ReferenceKernels

GUARD = 64
"""Elements on either side that nobody may touch."""


# The wire


NUMELS = [37, 0, 3, 160]
NUM_RANKS = 3

(LAYOUT,) = random_layouts(NUMELS, block_size=16, num_chunks=NUM_RANKS)
any_messages = st.binary(min_size=LAYOUT.message_nbytes, max_size=LAYOUT.message_nbytes)


def both_kernels():
    return ReferenceKernels(), CpuKernels(block_size=16, dtype=torch.float32)


def make_memory():
    return BucketMemory(
        LAYOUT,
        share=range(NUM_RANKS),
        chunk=1,
        has_rms=False,
        keeps_before=True,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def guarded_step():
    """Parameters with other memory around them, and a step that makes them the average: x = 0 x + u."""
    memories = [torch.full((numel + 2 * GUARD,), 7.0) for numel in NUMELS]
    params = [memory[GUARD : GUARD + numel] for memory, numel in zip(memories, NUMELS, strict=True)]
    return memories, StepInputs(
        params=params,
        gradients=[None] * len(NUMELS),
        numbers=np.array([Coefficients(beta=0.0, weight=1.0, shrink=0.0, step_size=-1.0)] * len(NUMELS)),
        flags=torch.tensor([0] + [1] * len(NUMELS), dtype=torch.int32),
    )


def as_message(content):
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


@settings(max_examples=150, deadline=None)
@given(content=any_messages)
def test_any_message_decodes_to_its_scales_with_signs(content):
    """Infinite and NaN scales as well; nothing beyond the parameters is written. All kernels agree."""
    results = []
    for kernels in both_kernels():
        memory, (memories, step) = make_memory(), guarded_step()
        memory.result.copy_(as_message(content))
        kernels.apply_(memory, 0, step, commit=False)
        for each in memories:
            assert (each[:GUARD] == 7).all()
            assert (each[len(each) - GUARD :] == 7).all()
        results.append(torch.cat(list(step.params)))
    scales = as_message(content).view(torch.float32)[torch.from_numpy(LAYOUT.scale_byte // 4)]
    expected = scales.abs().repeat_interleave(torch.from_numpy(LAYOUT.numel))
    for result in results:
        assert torch.equal(result.abs().nan_to_num(-1), expected.nan_to_num(-1))
    assert torch.equal(results[0].nan_to_num(-1), results[1].nan_to_num(-1))


@settings(max_examples=100, deadline=None)
@given(content=any_messages)
def test_a_server_takes_any_messages(content):
    """Or refuses them; the message that it sends lies within its own chunk, and its bits are those of the reference."""
    for kernels in both_kernels():
        memory, (_, step) = make_memory(), guarded_step()
        memory.received.copy_(as_message(content))
        with suppress(FloatingPointError):  # infinite scales: the one documented error
            kernels.serve_(memory, step, commit=False)
        assert not memory.server_error.any()
        assert not memory.result.any()


# Parts of a checkpoint


def frozen(shapes=((5, 3), (4,), (), (70,)), world_size=2):
    """A compressed optimizer of one of two ranks that have not exchanged anything yet, with errors."""
    generator = torch.Generator().manual_seed(3)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    optimizer = torch.optim.Adam(params, lr=1e-2)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    params[3].grad[:9] = 0  # late ones
    optimizer.step()
    communicator = Communicator()
    communicator.world_size = world_size  # of which the other is not there
    compressed = CompressedOptimizer(optimizer, CompressionConfig(block_size=16), communicator, {})
    for run in (*compressed.state.worker_errors(), *compressed.state.server_errors()):
        run.values.copy_(torch.randn(run.values.shape, generator=generator))
    return compressed


HEADER = {
    "version": 3,
    "phase": "COMPRESSED",
    "is_pending": False,
    "save_id": "0123456789abcdef",
    "has_gradients": False,
    "world_size": 2,
    "local_world_size": 1,
    "block_size": 16,
    "space": "update",
    "ddp_buckets": [],
    "optimizer_steps": [7],
}


@pytest.fixture(scope="module")
def saved():
    """A folder with a part, what it holds as bytes, and the optimizer that it is of."""
    folder = Path(tempfile.mkdtemp())
    compressed = frozen()
    content = PartContent()
    content.add_optimizer(compressed)
    parts = Parts(folder / "x.ckpt")
    parts.write(HEADER["save_id"], 0, content.meta, content.arrays)
    yield parts, Path(parts.path(HEADER["save_id"], 0)).read_bytes(), compressed
    shutil.rmtree(folder)


def values(compressed):
    return [run.values.clone() for run in (*compressed.state.worker_errors(), *compressed.state.server_errors())]


mutations = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "insert", "repeat", "zero"]), st.floats(0, 1), st.integers(0, 255)),
    min_size=1,
    max_size=4,
)


def mutated(content, changes):
    content = bytearray(content)
    for kind, where, byte in changes:
        place = int(where * (len(content) - 1)) if content else 0
        if kind == "flip" and content:
            content[place] ^= byte or 1
        elif kind == "cut":
            del content[place : place + 1 + byte]
        elif kind == "insert":
            content[place:place] = bytes([byte])
        elif kind == "repeat":
            content[place:place] = content[place : place + byte]
        elif kind == "zero":
            content[place : place + byte] = bytes(len(content[place : place + byte]))
    return bytes(content)


def load(parts, content, compressed):
    Path(parts.path(HEADER["save_id"], 0)).write_bytes(content)
    before = values(compressed)
    problems = load_errors([compressed], [0], HEADER, parts, Topology(num_nodes=2, node_rank=0))
    assert set(problems.values()) <= set(PROBLEMS)
    after = values(compressed)
    assert all(torch.isfinite(value).all() for value in after)
    if 0 in problems:  # nothing of it was used
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for run, value in zip((*compressed.state.worker_errors(), *compressed.state.server_errors()), before, strict=True):
        run.values.copy_(value)
    return problems


def test_a_part_that_is_whole_is_used(saved):
    parts, content, compressed = saved
    assert 0 not in load(parts, content, compressed)


@settings(max_examples=400, deadline=None)
@given(changes=mutations)
def test_a_mutated_part_is_used_or_refused(saved, changes):
    parts, content, compressed = saved
    load(parts, mutated(content, changes), compressed)


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=300))
def test_any_file_is_refused(saved, content):
    parts, _, compressed = saved
    assert load(parts, content, compressed)[0] == "damaged"


texts = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["numels", "worker", "late"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(["numels", "worker", "server", "late"]), text=texts)
def test_any_meta_is_used_or_refused(saved, name, text):
    """Well-formed archives with checksums, whose description says something else."""
    parts, _, compressed = saved
    content = PartContent()
    content.add_optimizer(compressed)
    content.meta["optimizers"][0][name] = text
    parts.write(HEADER["save_id"], 0, content.meta, content.arrays)
    written = Path(parts.path(HEADER["save_id"], 0)).read_bytes()
    load(parts, written, compressed)


def test_a_part_cannot_run_code(saved):
    """An array of objects would be a pickle."""

    class Evil:
        def __reduce__(self):
            return os.system, ("echo executed > /tmp/onebit-evil",)

    parts, _, _ = saved
    path = Path(parts.path(HEADER["save_id"], 0))
    meta = json.dumps({"version": 2, "save_id": HEADER["save_id"], "rank": 0, "optimizers": [], "gradients": []})
    with path.open("wb") as file:
        np.savez(file, meta=np.array([Evil()], dtype=object))
    with pytest.raises(PartError, match="damaged"), parts.read(HEADER["save_id"], 0):
        pass
    with path.open("wb") as file:
        np.savez(file, meta=np.frombuffer(meta.encode(), np.uint8), evil=np.array([Evil()], dtype=object))
    with parts.read(HEADER["save_id"], 0) as part, pytest.raises(PartError, match="damaged"):
        part.array("evil", dtype=object)
    assert not Path("/tmp/onebit-evil").exists()


# The entry in the checkpoint


def replaced(value, places, new):
    """``value`` with what lies at a place, deep inside, replaced."""
    if not places or not isinstance(value, dict | list) or not value:
        return new
    value = copy.copy(value)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[places[0] % len(keys)]
    value[key] = replaced(value[key], places[1:], new)
    return value


tensors = st.sampled_from(
    [
        torch.zeros(0),
        torch.zeros(15, dtype=torch.int8),
        torch.full((15,), 127, dtype=torch.int8),
        torch.full((15,), 2**31 - 1, dtype=torch.int32),
        torch.full((70,), -(2**31), dtype=torch.int32),
        torch.tensor([math.nan]),
        torch.tensor([math.inf]),
        torch.tensor([-1.0]),
        torch.zeros(2, dtype=torch.uint8),
        torch.full((9,), 255, dtype=torch.uint8),
        torch.zeros((1, 1)),
    ]
)


@pytest.fixture(scope="module")
def entry():
    return {**HEADER, "optimizers": shared_state([frozen()])}


USED, REFUSED = "used", "refused"


def load_entry(entry):
    """As a run does that resumes: everything that it takes over must leave a usable state."""
    compressed = frozen()
    try:
        header = read_header(entry)
        restore([compressed], header["optimizers"], block_size=header["block_size"])
    except ValueError as error:
        return REFUSED if "HINT" in str(error) else str(error)  # the one that is documented says what to do
    for p, state in compressed.optimizer.state.items():
        assert torch.isfinite(state["exp_avg_sq"]).all()
        assert state["exp_avg_sq"].shape == p.shape
    stock = compressed.optimizer.state_dict()["state"]
    assert all(torch.isfinite(value).all() for state in stock.values() for value in state.values())
    return USED


def test_an_entry_that_is_whole_is_used(entry):
    assert load_entry(entry) == USED


@settings(max_examples=400, deadline=None)
@given(places=st.lists(st.integers(0, 50), max_size=5), new=texts | tensors)
def test_a_mutated_entry_is_used_or_refused(entry, places, new):
    assert load_entry(replaced(entry, places, new)) in (USED, REFUSED)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("world_size", 10**12),
        ("world_size", 0),
        ("local_world_size", 3),
        ("save_id", "../../etc/passwd"),
        ("block_size", 0),
        ("ddp_buckets", [3]),
        ("optimizers", None),
        ("with_state", 3),
        ("with_state", [3]),
    ],
)
def test_what_would_be_dangerous_is_refused(entry, name, value):
    with pytest.raises(ValueError, match=f"{CHECKPOINT_KEY} is damaged.*HINT"):
        read_header({**entry, name: value})


def test_ranges_are_added_where_they_overlap():
    target = ElementRange(10, torch.zeros(10))
    sources = [
        ElementRange(15, torch.arange(100.0, 110.0)),
        ElementRange(0, torch.ones(12)),
        ElementRange(20, torch.ones(3)),
    ]
    add_ranges_([target, ElementRange(30, torch.zeros(2))], [*sources, ElementRange(12, torch.ones(0))])
    assert target.values.tolist() == [1, 1, 0, 0, 0, 100, 101, 102, 103, 104]


def test_neighbouring_ranges_are_merged_on_the_cpu_one_by_one():
    class OnGPU:
        """Whose memory has no room for a copy."""

        def __init__(self, *values):
            self.values = torch.tensor(values)

        def numel(self):
            return len(self.values)

        def cpu(self):
            return self.values

    ranges = [ElementRange(3, OnGPU(1.0, 2.0)), ElementRange(5, OnGPU(3.0)), ElementRange(9, OnGPU(4.0))]
    assert [(start, values.tolist()) for start, values in merged(ranges)] == [(3, [1.0, 2.0, 3.0]), (9, [4.0])]
