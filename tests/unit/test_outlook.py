"""What a run says of itself: at the start what will happen, at the end why nothing did."""

import logging
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import EarlyStopping, Timer
from ranks import run_ranks
from thread_ranks import run_threads
from torch import nn

from lightning_onebit import FixedStep, Observation, OneBitDDPStrategy, PhaseSwitch, VarianceStability, Verdict
from lightning_onebit.comm.stats import ring_all_reduce_nbytes
from lightning_onebit.config import CompressionConfig
from lightning_onebit.engine.optimizer import CompressedOptimizer
from lightning_onebit.freeze.criteria import Plan
from lightning_onebit.lightning.callbacks.phase_switch import of_each
from lightning_onebit.lightning.compressible import CompressibleOptimizers
from lightning_onebit.lightning.outlook import outlook, remark_on_shares, step_nbytes, why_still_in_warmup
from lightning_onebit.lightning.process_groups import find_topology
from lightning_onebit.quantize.tensor_sketch import WIDTH

SWITCHING = Path(__file__).parents[2] / "docs/switching.md"


def default(total_steps, refresh):
    """The plan of the default criterion."""
    return VarianceStability().plan(total_steps=total_steps, beta2=0.999, refresh=refresh)


@pytest.mark.parametrize(
    ("plan", "total_steps", "said"),
    [
        (
            FixedStep(70).plan(total_steps=1000, beta2=0.999),
            1000,
            "The first 70 optimizer steps of 1000 are plain DDP; from then on a step sends about",
        ),
        (
            FixedStep(70).plan(total_steps=math.inf, beta2=0.999),
            math.inf,
            "The first 70 optimizer steps are plain DDP; from then on",
        ),
        (
            default(10_000, "auto"),
            10_000,
            "The first 20 to 35 optimizer steps of 10000 are plain DDP, as the criterion decid",
        ),
        (
            default(math.inf, 64),
            math.inf,
            "The first 20 to 35 optimizer steps are plain DDP, as the criterion decides; from",
        ),
        (default(1000, "auto"), 1000, "The first 20 optimizer steps of 1000 are plain DDP; from then on"),
        (default(1000, None), 1000, "The first 100 to 300 optimizer steps of 1000 are plain DDP, as the criterion decides"),
        (default(math.inf, None), math.inf, "At least the first 200 optimizer steps are plain DDP, until the criterion"),
        (default(15, "auto"), 15, "All 15 optimizer steps of this run are warm-up, that is plain DDP."),
        (Plan(every=1, start=70), 1000, "At least the first 70 optimizer steps of 1000 are plain DDP, until the criterion"),
        (
            Plan(every=9, min_steps=100, max_steps=300),
            1000,
            "The first 100 to 300 optimizer steps of 1000 are plain DDP, as",
        ),
        (Plan(every=9, min_steps=100, max_steps=100), 1000, "The first 100 optimizer steps of 1000 are plain DDP; from"),
        (Plan(every=9, min_steps=100), math.inf, "At least the first 100 optimizer steps are plain DDP, until"),
        (
            FixedStep(70).plan(total_steps=70, beta2=0.999),
            70,
            "All 70 optimizer steps of this run are warm-up, that is plain",
        ),
        (Plan(every=9, min_steps=100, max_steps=300), 80, "All 80 optimizer steps of this run are warm-up"),
    ],
)
def test_the_first_line_says_how_long_the_run_is_dense_and_what_it_sends_then(plan, total_steps, said):
    line = outlook(plan, total_steps=total_steps, ratio=31.46)
    assert line.startswith(said)
    assert "bfloat16" not in line
    rounded = outlook(plan, total_steps=total_steps, ratio=31.46, precision="bf16")
    assert rounded == line.replace("plain DDP", "DDP with gradients rounded to bfloat16")
    assert ("31.5 times fewer bytes" in line) == (not line.startswith("All"))


@pytest.mark.parametrize(
    ("plan", "verdict", "steps", "said"),
    [
        (
            FixedStep(70).plan(total_steps=50, beta2=0.9),
            None,
            50,
            "(50 of 70 warm-up steps are done).*lower the number of Fixed",
        ),
        (
            Plan(every=9, min_steps=100),
            None,
            80,
            "(min_steps=100 is not reached). HINT: train longer, or lower `min_steps`.",
        ),
        (default(19, "auto"), None, 19, "(min_steps=20 is not reached). HINT: train longer, or lower `min_steps`."),
        (Plan(every=1, start=90), None, 80, "(nothing is judged before step 90). HINT: train longer, or lower `start` of"),
        (Plan(every=9, min_steps=9), Verdict(freeze=False, reason="it moves"), 80, "(it moves). HINT: train.*`max_steps`"),
        (Plan(every=90), None, 80, "(nothing was judged). HINT: train longer"),
    ],
)
def test_the_last_line_names_the_setting_that_was_in_the_way(plan, verdict, steps, said):
    line = why_still_in_warmup(plan, verdict, steps=steps)
    assert re.match(re.escape(said).replace(r"\.\*", ".*"), line)
    assert ("max_steps" in line) == (steps >= max(plan.start, plan.min_steps))


@pytest.mark.parametrize(
    ("criterion", "refresh", "callbacks", "total_steps", "said"),
    [
        (
            VarianceStability(max_steps=0.3),
            "auto",
            [EarlyStopping("loss")],
            500,
            "max_steps=0.3: shares are .* 500 .* Should EarlyStopping",
        ),
        (
            VarianceStability(min_steps=0.1, max_steps=None),
            None,
            [Timer("00:01:00:00")],
            500,
            "min_steps=0.1: .* Should Timer end it",
        ),
        (
            VarianceStability(),
            None,
            [EarlyStopping("loss")],
            500,
            r"max_steps='auto' \(30% of the run\): shares are",
        ),
        (VarianceStability(), "auto", [EarlyStopping("loss")], 500, None),  # 35 steps at most
        (VarianceStability(max_steps=0.3), "auto", [], 500, None),
        (VarianceStability(max_steps=0.3), "auto", [EarlyStopping("loss")], math.inf, None),
        (VarianceStability(max_steps=100), None, [EarlyStopping("loss")], 500, None),
        (FixedStep(7), None, [EarlyStopping("loss")], 500, None),
    ],
)
def test_shares_of_a_run_that_may_end_before_are_mentioned(criterion, refresh, callbacks, total_steps, said):
    plan = criterion.plan(total_steps=total_steps, beta2=0.999, refresh=refresh)
    remark = remark_on_shares(plan, callbacks, total_steps=total_steps)
    assert remark is None if said is None else re.match(said, remark)


def test_with_several_optimizers_steps_are_those_of_each():
    assert of_each([None]) == ""
    assert of_each([None, None]) == " of each of 2 optimizers"  # the Trainer's global_step is twice that number


def strategy_for(model, **options):
    """Of whose parameters only the first are compressed."""
    strategy = OneBitDDPStrategy(**options)
    strategy._phases.names.update({p: name for name, p in model.named_parameters()})
    strategy._phases.optimizers = CompressibleOptimizers(compressed=[torch.optim.Adam(model[0].parameters())])
    return strategy


AGREEMENT = 4 * 7  # with one parameter; each has a flag more


@pytest.mark.parametrize("options", [{"variance_refresh": None}, {"variance_refresh": "auto", "space": "momentum"}])
def test_the_expected_ratio_counts_what_stays_dense(options):
    model = nn.ModuleList([nn.Linear(2048, 3, bias=False), nn.Linear(100, 5, bias=False)])
    strategy = strategy_for(model, **options)
    signs, sketch = 2048 * 3 / 8 + 3 * 4 + 4, 4 * (WIDTH + 3) / 16  # the message is a multiple of 8 bytes
    sent = signs + sketch + AGREEMENT
    assert strategy.expected_compression_ratio == pytest.approx(4 * (2048 * 3 + 500) / (sent + 4 * 500))
    model[1].requires_grad_(False)
    assert strategy.expected_compression_ratio == pytest.approx(4 * 2048 * 3 / sent)


@pytest.mark.parametrize(("refresh", "interval"), [("auto", 64), (1, 1), (100, 100)])
def test_the_expected_ratio_counts_refreshes_and_sketches(refresh, interval):
    model = nn.ModuleList([nn.Linear(2048, 300, bias=False)])
    numel = 2048 * 300
    signs, codes, sketch = numel / 8 + 300 * 4, numel + 300 * 4, 4 * (WIDTH + 3)
    expected = 4 * numel / (signs + codes / interval + sketch / 16 + AGREEMENT)
    strategy = strategy_for(model, variance_refresh=refresh)
    assert strategy.expected_compression_ratio == pytest.approx(expected)
    assert (27.9 < expected < 28.1) == (refresh == "auto")
    strategy._phases.optimizers = CompressibleOptimizers(compressed=[torch.optim.SGD(model.parameters())])
    assert strategy.expected_compression_ratio == pytest.approx(4 * numel / (signs + AGREEMENT))  # nothing to renew


@pytest.mark.parametrize(
    ("shapes", "ranks"),
    [([(40,)], 2), *(([(64, 32), (64,), (2, 64), (2,)], ranks) for ranks in (2, 8, 32)), ([(100, 300), (300,)], 8)],
)
def test_the_expected_bytes_are_those_of_a_step(shapes, ranks):
    """Of a model with fewer blocks than ranks, too, where most of what is sent is padding."""
    config, interval = CompressionConfig(variance_refresh=16), 16

    def fn(communicator):
        generator = torch.Generator().manual_seed(communicator.rank)
        params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        optimizer = torch.optim.Adam(params)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        compressed, sent = CompressedOptimizer(optimizer, config, communicator, {}), []
        for _ in range(2 * interval):  # at first there are more sketches
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            compressed.step()
            sent.append(communicator.counters.bytes_sent)
        return (sent[-1] - sent[-1 - interval]) / interval

    expected = step_nbytes([math.prod(s) for s in shapes], config, num_chunks=ranks, has_second_moment=True)
    for measured in run_threads(ranks, fn):
        assert measured == pytest.approx(ring_all_reduce_nbytes(round(expected), ranks), rel=0.02)


@pytest.mark.parametrize(("num_nodes", "num_processes", "said"), [(2, 4, True), (3, 2, True), (1, 4, False), (4, 1, False)])
def test_a_hierarchical_choice_is_announced(num_nodes, num_processes, said, caplog):
    strategy = SimpleNamespace(
        num_nodes=num_nodes, num_processes=num_processes, node_rank=0, local_rank=0, global_rank=0,
        world_size=num_nodes * num_processes, root_device=torch.device("cpu"),
    )  # fmt: skip
    communicator = SimpleNamespace(all_reduce_max_=lambda tensor: None)
    with caplog.at_level(logging.INFO):
        find_topology(strategy, "auto", communicator)
    line = f"hierarchical='auto': the {num_processes} ranks of each of {num_nodes} nodes average their gradients first"
    assert sum(line in record.message for record in caplog.records) == said


def test_the_criterion_of_the_readme_is_one():
    (block,) = re.findall(r"```python\n(from lightning_onebit import Criterion.*?)```", SWITCHING.read_text(), re.DOTALL)
    names = {"Trainer": lambda **options: options["callbacks"]}
    exec(block.replace("\nTrainer(", "\ncallbacks = Trainer("), names)
    (switch,) = names["callbacks"]
    assert isinstance(switch, PhaseSwitch)
    plan = switch.criterion.plan(total_steps=1000, beta2=0.999)
    history = [Observation(step=s, ratios={}, learning_rate=lr) for s, lr in ((10, 0.1), (20, 0.2), (30, 0.2), (40, 0.1))]
    assert [switch.criterion.judge(history[: n + 1], plan).freeze for n in range(4)] == [False, False, False, True]


@pytest.mark.parametrize("kind", [OneBitDDPStrategy, pl.strategies.DDPStrategy])
def test_process_groups_can_be_had_without_a_module(kind):
    def fn(rank):
        options = {"cluster_environment": LightningEnvironment(), "parallel_devices": [torch.device("cpu")] * 2}
        strategy = kind(accelerator=CPUAccelerator(), **options)
        strategy.cluster_environment.set_global_rank(rank)
        os.environ["LOCAL_RANK"] = str(rank)
        strategy.setup_environment()
        total = strategy.reduce(torch.tensor(1.0 + rank), reduce_op="sum")
        strategy.barrier()
        strategy.teardown()
        return float(total), dist.get_world_size()

    assert run_ranks(2, fn, group=False) == [(3.0, 2)] * 2
