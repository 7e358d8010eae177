"""What only a GPU can tell: kernels against the reference, their time against a copy, memory.

    python benchmarks/gpu.py --json > gpu.json
    python benchmarks/gpu.py --interpret      the parts that Triton's interpreter can run, on a machine without a GPU

Each part runs in a process of its own, with a limit of its own, all within 8 minutes, and says whether it passed. What a
part needs and is not installed is named, and the part is skipped. The exit code is 0 only if every part has passed. Nothing
is installed, and nothing but this machine reached.

comparison    every bit of messages, errors, averages and parameters equals the reference's, on the CPU
check         the check that the library makes at first use
bandwidth     time of each kernel on one bucket, against ``Tensor.copy_`` that moves as many bytes
launching     time of the processor for a step of a bucket of 400 tensors, and kernels launched
memory        bytes per element that stay allocated for a bucket, and what a step allocates besides
graph         whether a CUDA graph of a step can be captured and replayed; either answer passes
step          a compressed step with clipping of BERT-large's 398 tensors, as rank 0 of 8 whose messages go nowhere: launches
              and waits of the host by torch's profiler, time and memory per parameter beside AdamW's
trainer       a Trainer's run on two ranks over gloo, both on the one GPU: all ranks hold the same bits
syncbn        the same with SyncBatchNorm
nccl          a Trainer's run on one rank over NCCL
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parents[1]
WARM_UP, REPETITIONS = 5, 30
RANKS = 8
TOTAL_SECONDS = 470
"""For all parts together."""


@dataclass(frozen=True)
class Part:
    """A part of the kit."""

    measure: Callable[..., dict[str, Any]]
    """Takes the device; returns what is to be written down, or raises."""
    packages: tuple[str, ...] = ("torch", "numpy", "triton")
    in_interpreter: bool = False
    """Whether it runs without a GPU as well."""
    limit_seconds: int = 60


# ---- parts


def comparison(device: Any) -> dict[str, Any]:
    """All dtypes and block sizes with all sorts of tails; scales, spaces, ranks, masks and times of the commit in turn."""
    import torch
    from buckets import ADAM, CPU, assert_same, copy_of_memory, copy_of_step, random_layouts, random_memory, random_step

    from lightning_onebit.quantize.reference import ReferenceKernels
    from lightning_onebit.quantize.triton import TritonKernels

    others = cycle(
        (scale, space, early, masked)
        for scale, space in (("l2", "update"), ("l1", "momentum"), ("l1", "update"), ("l2", "momentum"))
        for early, masked in ((False, True), (True, False))
    )
    renewed = ADAM._replace(square_decay=0.99, root_r=0.7)
    coefficients = cycle(
        [renewed, renewed._replace(coupled_decay=0.01), ADAM._replace(sign=-1.0, nesterov=0.9, shrink=0.99)]
    )
    ranks, compared = cycle([2, 5, 1, 3]), []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for block_size in (8, 24, 64, 2048, 16384):
            scale, space, early, masked = next(others)
            numels = [1, 7, 8, 9, block_size - 1, block_size, block_size + 1, 2 * block_size + 13]
            chunks = next(ranks)
            [layout] = random_layouts(numels, block_size=block_size, num_chunks=chunks)
            errors = torch.float64 if dtype == torch.float64 else torch.float32
            renews = space == "update"
            settings: dict[str, Any] = {"chunk": chunks - 1, "masked": masked or renews, "renews": renews, "dtype": errors}
            memory = random_memory(layout, **settings, seed=block_size)
            step = random_step(numels, dtype=dtype, coefficients=next(coefficients), sits_out=[5], missing=[2])
            pairs = []
            for kernels, where in ((TritonKernels, device), (ReferenceKernels, CPU)):
                pairs.append((copy_of_memory(memory, where), copy_of_step(step, where)))
                run_step(kernels(scale=scale, space=space), *pairs[-1], early=early)
            if renews:
                compare_refreshes(layout, settings, device)
                compare_sketches(layout, settings, step, device)
            case = f"{dtype} {block_size} {scale} {space} early={early} masked={masked} ranks={chunks}"
            try:
                assert_same(*pairs)
            except AssertionError as error:
                raise AssertionError(f"{case}: {error}") from error
            compared.append(case)
    return {"equal": compared}


def compare_refreshes(layout: Any, settings: dict[str, Any], device: Any) -> None:
    """Of all ranks, which exchange by copying."""
    import numpy as np
    from buckets import CPU, assert_same_bits, copy_of_memory, random_memory, refresh_

    from lightning_onebit.quantize.reference import ReferenceKernels
    from lightning_onebit.quantize.triton import TritonKernels

    ranks, outcomes = range(layout.num_chunks), []
    for kernels, where in ((TritonKernels(), device), (ReferenceKernels(), CPU)):
        memories = [copy_of_memory(random_memory(layout, **{**settings, "chunk": rank}, seed=rank), where) for rank in ranks]
        refresh_(kernels, memories, np.linspace(1.0, 3.0, int(layout.parameter.max()) + 1))
        outcomes.append(memories)
    for ours, expected in zip(*outcomes, strict=True):
        for name in ("second_moment", "second_moment_residual", "rms_code", "rms_scale"):
            assert_same_bits(getattr(ours, name), getattr(expected, name), name)


def compare_sketches(layout: Any, settings: dict[str, Any], step: Any, device: Any) -> None:
    """Of a bucket, to which its programs add in any order."""
    from buckets import CPU, assert_same_bits, copy_of_memory, copy_of_step, random_memory

    from lightning_onebit.quantize.reference import ReferenceKernels
    from lightning_onebit.quantize.tensor_sketch import TensorSketch
    from lightning_onebit.quantize.triton import TritonKernels

    numels, outcomes = [p.numel() for p in step.params], []
    for kernels, where in ((TritonKernels(), device), (TritonKernels(), device), (ReferenceKernels(), CPU)):
        sketch = TensorSketch(7, range(len(numels)), numels, dtype=kernels.sketch_dtype, device=where)
        memory = copy_of_memory(random_memory(layout, **settings), where)
        kernels.sketch_tensors_(memory, 0, copy_of_step(step, where), sketch)
        outcomes.append(sketch)
    ours, again, expected = outcomes
    assert_same_bits(ours.numbers, again.numbers, "sketch, once more")
    assert_same_bits(ours.values, expected.values, "sketch")
    assert_same_bits(ours.sums[2:], expected.sums[2:], "counts of the sketch")
    difference = (ours.squares().cpu() - expected.squares()).abs() / expected.squares().clamp_(min=1e-9)
    assert float(difference.max()) < 1e-9, difference


def check(device: Any) -> dict[str, Any]:
    from lightning_onebit.quantize.triton_check import check_kernels

    start = time.perf_counter()
    check_kernels(device)
    return {"seconds": time.perf_counter() - start}


def bandwidth(device: Any) -> dict[str, Any]:
    import torch

    numel = 2**26
    results = {}
    for title, numels in {"one tensor": [numel], "400 tensors": [numel // 400 // 8 * 8] * 400}.items():
        for name, (nbytes, call) in calls(numels, device).items():
            kernel, copy = (seconds(each) for each in (call, copy_of(nbytes, device)))
            results[f"{name}, {title}"] = {
                "nbytes": nbytes,
                "seconds": kernel,
                "copy_seconds": copy,
                "share_of_copy_bandwidth": copy / kernel,
            }
        torch.cuda.empty_cache()
    return results


def launching(device: Any) -> dict[str, Any]:
    import torch

    from lightning_onebit.quantize.triton import TritonKernels
    from lightning_onebit.quantize.triton_tables import count_launches

    memory, step = bucket([5000] * 400, device)
    kernels = TritonKernels()
    run_step(kernels, memory, step, early=False)
    torch.cuda.synchronize()
    with count_launches() as launched:
        start = time.perf_counter()
        for _ in range(REPETITIONS):
            step.gradients = [gradient.clone() for gradient in step.gradients]  # new addresses, as after zero_grad
            run_step(kernels, memory, step, early=False)
        passed = (time.perf_counter() - start) / REPETITIONS
    torch.cuda.synchronize()
    per_step = {name: count / REPETITIONS for name, count in launched.items()}
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")  # a wait for the GPU raises
    try:
        run_step(kernels, memory, step, early=False)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return {"seconds_of_processor": passed, "launches": per_step, "host_waits": 0}


def memory(device: Any) -> dict[str, Any]:
    import torch

    from lightning_onebit.quantize.triton import TritonKernels

    numel = 2**26
    before = torch.cuda.memory_allocated()
    kept, step = bucket([numel], device)
    tensors = torch.cuda.memory_allocated() - before - sum(x.numel() * 8 for x in step.params)
    run_step(TritonKernels(), kept, step, early=False)
    tables = torch.cuda.memory_allocated() - before - sum(x.numel() * 8 for x in step.params) - tensors
    torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated()
    run_step(TritonKernels(), kept, step, early=False)
    peak = torch.cuda.max_memory_allocated() - allocated
    return {
        "bucket_bytes_per_element": tensors / numel,
        "table_bytes_per_element": tables / numel,
        "bytes_allocated_by_a_step": peak,
    }


def graph(device: Any) -> dict[str, Any]:
    import torch

    from lightning_onebit.quantize.triton import TritonKernels

    kept, step = bucket([100_000, 70], device)
    run_step(TritonKernels(), kept, step, early=False)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(captured):
            run_step(TritonKernels(), kept, step, early=False)
        captured.replay()
        torch.cuda.synchronize()
    except RuntimeError as error:
        return {"captured": False, "why": str(error).splitlines()[0]}
    return {"captured": True}


def step(device: Any) -> dict[str, Any]:
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from lightning_onebit.checkpoint.state import PartContent, shared_state
    from lightning_onebit.comm.primitives import Communicator
    from lightning_onebit.config import CompressionConfig
    from lightning_onebit.engine.optimizer import CompressedOptimizer
    from lightning_onebit.quantize.triton_tables import count_launches
    from lightning_onebit.refresh_schedule import SKETCH_STEPS, is_refresh_due

    on_gpu = device.type == "cuda"
    if not on_gpu:
        use_interpreted_kernels()
    # On the CPU two buckets, and two ranks with a block of each.
    ranks, numels = (RANKS, bert_large_numels()) if on_gpu else (2, [128, 128])
    config = CompressionConfig() if on_gpu else CompressionConfig(block_size=64, bucket_cap_mb=128 * 4 / 2**20)
    params = [torch.nn.Parameter(torch.randn(numel, device=device)) for numel in numels]
    optimizer = torch.optim.AdamW(params, lr=1e-4, **({"fused": True} if on_gpu else {}))
    for p in params:
        p.grad = torch.randn_like(p)
    result: dict[str, Any] = {"parameters": sum(numels)}

    def allocated(name: str) -> None:
        if on_gpu:
            result[f"bytes_per_parameter, {name}"] = round(torch.cuda.memory_allocated() / sum(numels), 2)

    optimizer.step()
    allocated("dense")
    if on_gpu:
        result["seconds, AdamW"] = seconds(optimizer.step)
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())

    class Echo(Communicator):
        """Every rank says what this one does. The group by itself would leave messages as they are, whatever that is."""

        copies = 0

        def all_to_all_(self, received: Any, sent: Any, **_: Any) -> None:
            received.copy_(sent)
            self.copies += 1

        def all_gather_(self, gathered: Any, part: Any) -> None:
            gathered.view(ranks, -1).copy_(part.view(1, -1))
            self.copies += 1

    communicator = Echo()
    compressed = CompressedOptimizer(optimizer, config, communicator, {})

    def compressed_step() -> None:
        compressed.clip_grad_norm_(1.0)
        assert compressed.step(), "the step was skipped"

    def go_on_to_an_ordinary_step() -> None:
        """Of which there are many: nothing is sketched but for clipping, and no second moment renewed."""
        for _ in range(2 * SKETCH_STEPS):  # at first, so many are sketched
            if not compressed._sketched_sets and not is_refresh_due(compressed._steps + 1, config.variance_refresh):
                break
            compressed_step()
        assert not compressed._sketched_sets, compressed._steps
        if on_gpu:
            torch.cuda.synchronize()

    def ordinary_step() -> None:
        start = time.perf_counter()
        with count_launches() as launched:
            compressed_step()
        if on_gpu:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
        result["launches"] = dict(launched)

    taken: list[float] = []
    compressed_step()
    allocated("compressed")
    result["buckets"] = sum(len(each.buckets.memories) for each in compressed._sets)
    for _ in range(10 if on_gpu else 1):
        go_on_to_an_ordinary_step()
        ordinary_step()
    # Encode, serve, apply; sketch and scale, which clip. A rank may be the server of no block of a bucket.
    assert len(result["launches"]) == 5, result
    assert {n for name, n in result["launches"].items() if "serve" not in name} == {result["buckets"]}, result
    if on_gpu:
        result["seconds, compressed without network"] = sorted(taken)[len(taken) // 2]
        go_on_to_an_ordinary_step()
        communicator.copies = 0
        result |= profiled(ordinary_step)
        result["of which by the pretended network"] = communicator.copies
        assert result["launches by the profiler"] - communicator.copies <= 200, result
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        PartContent().add_optimizer(compressed)
        shared_state([compressed])
        saving = (torch.cuda.max_memory_allocated() - before) / sum(numels)
        result["bytes_per_parameter, for a checkpoint"] = round(saving, 2)
        assert saving < 0.5, result  # a parameter or a mask at a time
    dist.destroy_process_group()
    return result


def profiled(call: Callable[[], object]) -> dict[str, Any]:
    """Launches, copies and waits of the host in one call, by torch's profiler."""
    import torch
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
    counts = {event.key: event.count for event in profiler.key_averages()}
    launches = sum(n for key, n in counts.items() if "LaunchKernel" in key)
    copies = sum(n for key, n in counts.items() if key.startswith(("cudaMemcpy", "cudaMemset")))
    # The profiler itself ends with a cudaDeviceSynchronize.
    waits = {key: n for key, n in counts.items() if "Synchronize" in key and "Device" not in key}
    return {"launches by the profiler": launches + copies, "of which copies": copies, "waits of the host": waits}


def trainer(device: Any, *, sync_batchnorm: bool = False) -> dict[str, Any]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    ranks = []
    for rank in range(2):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "NODE_RANK": str(rank)}
        variables = {**os.environ, **place, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--rank", "batchnorm" if sync_batchnorm else "plain"]
        if device.type == "cpu":
            command.append("--interpret")
        ranks.append(subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    try:
        outputs = [rank.communicate()[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output[-4000:]
    first, second = map(last_outcome, outputs)
    assert first["parameters"] == second["parameters"], (first, second)
    return first


def syncbn(device: Any) -> dict[str, Any]:
    return trainer(device, sync_batchnorm=True)


def nccl(device: Any) -> dict[str, Any]:
    return train("nccl", 1, on_gpu=True, sync_batchnorm=False)


def train(backend: str, ranks: int, *, on_gpu: bool, sync_batchnorm: bool) -> dict[str, Any]:
    """A short run on this rank; with clipping, so that all kernels of the flat path run."""
    import torch
    from lightning.pytorch import Callback
    from torch import nn
    from trainers import Classifier, data, make_trainer

    from lightning_onebit import FixedStep, OneBitDDPStrategy, Phase, PhaseSwitch

    class Watch(Callback):
        kernels: ClassVar[set[str]] = set()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            for each in trainer.strategy._phases.compressed.values():
                self.kernels |= each.kernel_names

    strategy, watch = OneBitDDPStrategy(process_group_backend=backend), Watch()
    model = Classifier(hidden=16)
    model.logs_loss = True
    if sync_batchnorm:
        model.body.append(nn.BatchNorm1d(16))
    options = {"gradient_clip_val": 1.0, "sync_batchnorm": sync_batchnorm, "use_distributed_sampler": True}
    callbacks, accelerator = [PhaseSwitch(FixedStep(4)), watch], "gpu" if on_gpu else "cpu"
    trainer = make_trainer(strategy, ranks, num_nodes=ranks, accelerator=accelerator, callbacks=callbacks, **options)
    trainer.fit(model, data(8, ranks))
    assert strategy.phase is Phase.COMPRESSED
    state = torch.cat([p.detach().cpu().flatten() for p in model.parameters()])
    assert bool(state.isfinite().all())
    names = sorted(watch.kernels)
    assert ranks == 1 or names == ["triton"], names
    digest = hashlib.sha256(state.numpy().tobytes()).hexdigest()
    return {
        "parameters": digest,
        "steps": trainer.global_step,
        "kernels": names,
        "loss": float(trainer.callback_metrics["train_loss"]),
    }


LIGHTNING = ("torch", "numpy", "triton", "lightning", "torchmetrics")
PARTS = {
    "check": Part(check, in_interpreter=True, limit_seconds=60),
    "comparison": Part(comparison, in_interpreter=True, limit_seconds=150),
    "bandwidth": Part(bandwidth, limit_seconds=80),
    "launching": Part(launching),
    "memory": Part(memory),
    "graph": Part(graph),
    "step": Part(step, in_interpreter=True, limit_seconds=90),
    "trainer": Part(trainer, (*LIGHTNING, "pytest"), in_interpreter=True, limit_seconds=90),
    "syncbn": Part(syncbn, (*LIGHTNING, "pytest"), limit_seconds=60),
    "nccl": Part(nccl, (*LIGHTNING, "pytest"), limit_seconds=60),
}


# ---- what they share


def bert_large_numels() -> list[int]:
    """Of the 398 tensors of BertForPreTraining, large: 336 million elements."""
    width, wide = 1024, 4096
    embeddings = [30522 * width, 512 * width, 2 * width, width, width]
    layer = [width * width, width] * 4 + [width, width, wide * width, wide, width * wide, width, width, width]
    return embeddings + layer * 24 + [width * width, width, width * width, width, width, width, 30522, 2 * width, 2]


def use_interpreted_kernels() -> None:
    """Have the engine take the path of a GPU for tensors on the CPU."""
    from interpreter import use_triton

    class Patch:
        setattr = staticmethod(setattr)

    use_triton(Patch())


def run_step(kernels: Any, memory: Any, step: Any, *, early: bool) -> None:
    kernels.encode_(memory, 0, step, commit=early)
    kernels.serve_(memory, step, commit=early)
    memory.turn_results_()
    kernels.apply_(memory, 0, step, commit=not early)


def bucket(numels: list[int], device: Any, *, renews: bool = False) -> tuple[Any, Any]:
    """Float32, update space, ``RANKS`` ranks. No value matters; all are finite."""
    import numpy as np
    import torch

    from lightning_onebit.coefficients import Coefficients
    from lightning_onebit.quantize.layout import plan_buckets
    from lightning_onebit.quantize.memory import BucketMemory, StepInputs

    [layout] = plan_buckets(numels, block_size=2048, num_chunks=RANKS, bucket_numel=sum(numels))
    memory = BucketMemory(
        layout, share=range(RANKS), chunk=0, has_rms=True, keeps_before=True, renews=renews, dtype=torch.float32,
        device=device,
    )  # fmt: skip
    memory.set_rms_(torch.empty(layout.flat_numel, device=device).uniform_(0.5, 1.0))
    if memory.second_moment is not None:
        memory.second_moment.uniform_(0.5, 1.0)
    numbers = Coefficients(beta=0.9, weight=0.1, kappa=31.6, eps=1e-8, step_size=1e-3, square_decay=0.999, root_r=0.7)
    params, gradients = ([torch.randn(numel, device=device) for numel in numels] for _ in range(2))
    flags = torch.ones(1 + len(numels), dtype=torch.int32, device=device)
    flags[0] = 0
    step = StepInputs(
        params=params, gradients=gradients, numbers=np.array([numbers] * len(numels), dtype=np.float64), flags=flags
    )
    return memory, step


def calls(numels: list[int], device: Any) -> dict[str, tuple[int, Callable[[], None]]]:
    """By kernel: bytes that have to be read or written once, and a call of it."""
    import numpy as np
    import torch

    from lightning_onebit.coefficients import RefreshNumbers
    from lightning_onebit.engine.clipping import sketch_programs
    from lightning_onebit.quantize.tensor_sketch import TensorSketch
    from lightning_onebit.quantize.triton import TritonKernels
    from lightning_onebit.quantize.triton_gradients import draw_sketch, gather_, scale_, sketch_

    memory, step = bucket(numels, device)
    kernels, numel = TritonKernels(), sum(numels)
    flat, one = torch.zeros(memory.layout.flat_numel, device=device), torch.ones((), device=device)
    draws = draw_sketch(0, total_numel=numel, numel=16384, rows_per_draw=256, device=device)
    partial = torch.zeros(sketch_programs(device), 16384, device=device)
    places = np.cumsum([0, *numels[:-1]])
    tensor, chunk_tensor = 4 * numel, 4 * len(memory.server_error)
    messages, message = memory.layout.message_nbytes, memory.layout.chunk_nbytes
    encode, serve = 3 * tensor + 2 * messages, chunk_tensor + messages + message
    late = 6 * tensor + 3 * messages + 2 * chunk_tensor + messages + message
    renewing, _ = bucket(numels, device, renews=True)
    refresh, correction = renewing.variance_messages(), np.full(len(numels), 1.5)
    numbers = RefreshNumbers(correction, np.full(len(numels), 0.9), np.full(len(numels), 1e-8))
    for codes in (refresh.received, refresh.result):
        codes.fill_(0x3F)
    code, code_message = numel, refresh.wire.chunk_nbytes
    sketch = TensorSketch(0, places.tolist(), numels, dtype=kernels.sketch_dtype, device=device)
    return {
        "encode, renewed": (encode - tensor + code, lambda: kernels.encode_(renewing, 0, step, commit=False)),
        "apply, renewed": (late + tensor + code, lambda: kernels.apply_(renewing, 0, step, commit=True)),
        "encode_variance": (tensor + code, lambda: kernels.encode_variance_(renewing, refresh, correction)),
        "serve_variance": (
            2 * chunk_tensor + (RANKS + 1) * code_message,
            lambda: kernels.serve_variance_(renewing, refresh),
        ),
        "apply_variance": (4 * tensor + 4 * code + messages, lambda: kernels.apply_variance_(renewing, refresh, numbers)),
        "sketch_tensors": (tensor + code, lambda: kernels.sketch_tensors_(renewing, 0, step, sketch)),
        "encode": (encode, lambda: kernels.encode_(memory, 0, step, commit=False)),
        "encode at once": (encode + tensor, lambda: kernels.encode_(memory, 0, step, commit=True)),
        "serve": (serve, lambda: kernels.serve_(memory, step, commit=False)),
        "serve at once": (serve + chunk_tensor, lambda: kernels.serve_(memory, step, commit=True)),
        "apply": (late, lambda: kernels.apply_(memory, 0, step, commit=True)),
        "apply, committed at once": (2 * tensor + messages, lambda: kernels.apply_(memory, 0, step, commit=False)),
        "gather": (2 * tensor, lambda: gather_(flat, memory, step)),
        "scale": (2 * tensor, lambda: scale_(memory, step, one)),
        "sketch": (tensor, lambda: sketch_(partial, memory, step, draws, places)),
    }


def copy_of(nbytes: int, device: Any) -> Callable[[], object]:
    """A call that reads and writes ``nbytes`` in all."""
    import torch

    source = torch.zeros(max(nbytes // 2, 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def seconds(call: Callable[[], object]) -> float:
    """Median time of a call on the GPU, in seconds."""
    import torch

    for _ in range(WARM_UP):  # the first one compiles
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPETITIONS)]
    torch.cuda._sleep(10_000_000)  # so that the GPU always has the next call already
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) / 1000 for start, end in events)[REPETITIONS // 2]


def import_without_lightning() -> None:
    """Make the package's modules importable without its ``__init__``: that needs Lightning, which takes seconds."""
    if "lightning_onebit" not in sys.modules:
        package = types.ModuleType("lightning_onebit")
        package.__path__ = [str(ROOT / "lightning_onebit")]
        sys.modules["lightning_onebit"] = package


def missing_packages(part: Part) -> list[str]:
    return [name for name in part.packages if importlib.util.find_spec(name) is None]


def run(part: Part, device: Any) -> dict[str, Any]:
    if missing := missing_packages(part):
        return {"status": "skipped", "why": f"not installed: {', '.join(missing)}"}
    start = time.perf_counter()
    try:
        outcome = {"status": "passed", "result": part.measure(device)}
    except Exception as error:
        outcome = {"status": "failed", "why": str(error), "traceback": traceback.format_exc()}
    return {**outcome, "part_seconds": round(time.perf_counter() - start, 1)}


def run_apart(name: str, seconds: float, *, interpret: bool) -> dict[str, Any]:
    """Run a part in a process of its own, so that a failure of any kind is that part's only."""
    if seconds < 5:
        return {"status": "failed", "why": f"no time was left within {TOTAL_SECONDS} s"}
    command = [sys.executable, __file__, "--part", name, *(["--interpret"] if interpret else [])]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=hasattr(os, "killpg")
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"status": "failed", "why": f"not done within {seconds:.0f} s"}
    finally:
        end(process)
    try:
        return last_outcome(output)
    except (IndexError, ValueError):
        return {"status": "failed", "why": f"exit code {process.returncode}", "traceback": errors[-4000:]}


def last_outcome(output: str) -> dict[str, Any]:
    """Of what a process printed. Libraries may have their last word after it."""
    return json.loads([line for line in output.splitlines() if line.startswith("{")][-1])


def end(process: subprocess.Popen[str]) -> None:
    """End a part and all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, ProcessLookupError):
        process.kill()


def describe(name: str, outcome: dict[str, Any]) -> str:
    lines = [f"{name}: {outcome['status']}{': ' + outcome['why'] if 'why' in outcome else ''}"]
    for key, value in outcome.get("result", {}).items():
        if isinstance(value, dict) and "share_of_copy_bandwidth" in value:
            rate = value["nbytes"] / value["seconds"] / 1e9
            value = f"{1000 * value['seconds']:.3f} ms, {rate:.0f} GB/s, {value['share_of_copy_bandwidth']:.0%} of a copy"
        lines.append(f"    {key}: {len(value)} cases" if isinstance(value, list) else f"    {key}: {value}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print results as JSON")
    parser.add_argument("--interpret", action="store_true", help="only what Triton's interpreter can run, on the CPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--rank", choices=("plain", "batchnorm"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "support")]
    if importlib.util.find_spec("torch") is None:
        raise SystemExit("torch is not installed: nothing of this can run.")
    if arguments.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    if not (arguments.rank or (arguments.part and "lightning" in PARTS[arguments.part].packages)):
        import_without_lightning()
    import torch
    from report import environment

    if not arguments.interpret and not torch.cuda.is_available():
        raise SystemExit("torch.cuda.is_available() is False here: this needs a GPU. --interpret runs what can do without.")
    device = torch.device("cpu") if arguments.interpret else torch.device("cuda", torch.cuda.current_device())
    versions = environment("triton")
    if not arguments.interpret:
        versions["hardware"]["gpu"] = torch.cuda.get_device_name(device)
    if arguments.part or arguments.rank:
        if arguments.rank:
            if arguments.interpret:
                use_interpreted_kernels()
            outcome = train("gloo", 2, on_gpu=not arguments.interpret, sync_batchnorm=arguments.rank == "batchnorm")
        else:
            outcome = run(PARTS[arguments.part], device)
        sys.stdout.flush()
        print("\n" + json.dumps(outcome, default=str))
        return 0
    outcomes, deadline = {}, time.monotonic() + TOTAL_SECONDS
    for name in arguments.parts:
        if PARTS[name].in_interpreter or not arguments.interpret:
            limit = PARTS[name].limit_seconds * (4 if arguments.interpret else 1)
            left = deadline - time.monotonic()
            outcomes[name] = run_apart(name, min(limit, left), interpret=arguments.interpret)
            print(f"{name}: {outcomes[name]['status']}", file=sys.stderr, flush=True)
    if arguments.json:
        print(json.dumps({"environment": versions, "parts": outcomes}, indent=1, default=asdict))
    else:
        print(json.dumps(versions), *(describe(*each) for each in outcomes.items()), sep="\n")
    return 0 if all(outcome["status"] == "passed" for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
