"""Constant work (DESIGN 3, invariant 12): what a batch costs on a GPU depends on the number of buckets only.

The Trainer, DDP and the engine are real; the kernels do nothing, and the process group (torch's "fake" one) pretends to have
other ranks. So thousands of tensors and many ranks can be counted on a CPU.
"""

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

pytest.importorskip("triton", minversion="3.4")  # before, its interpreter lacks an operation
from interpreter import use_triton
from work_counter import WorkCounter, replace_kernels

from lightning_onebit import FixedStep, OneBitDDPStrategy, Phase, PhaseSwitch
from lightning_onebit.checkpoint.manager import CheckpointManager
from lightning_onebit.comm.exchanger import InlineExchanger
from lightning_onebit.comm.primitives import Communicator, completed_future
from lightning_onebit.config import CompressionConfig
from lightning_onebit.engine.buckets import Buckets
from lightning_onebit.engine.optimizer import CompressedOptimizer
from lightning_onebit.lightning import phase_controller
from lightning_onebit.quantize import memory

NUMEL, BUCKETS, BLOCK_SIZE = 96_000, 4, 64
COUNTED_BATCH = 3


class Elsewhere(LightningEnvironment):
    """This process is rank 0; the others do not exist."""

    creates_processes_externally = True

    def __init__(self, world_size):
        super().__init__()
        self._size = world_size

    def world_size(self):
        return self._size

    def set_world_size(self, size):
        pass


class Model(pl.LightningModule):
    def __init__(self, tensors, groups, unseen=0):
        super().__init__()
        mask = torch.ones(tensors, NUMEL // tensors)
        mask[:, :unseen] = 0.0  # elements without a gradient
        self.mask = mask.flatten()
        self.tensors = nn.ParameterList(torch.full((NUMEL // tensors,), 0.1) for _ in range(tensors))
        self._groups = groups

    def training_step(self, batch, batch_idx):
        return (torch.cat(list(self.tensors)).square() * self.mask).mean() * batch.mean()

    def configure_optimizers(self):
        params = list(self.tensors)
        groups = [{"params": params[i :: self._groups], "lr": 1e-3 * (1 + i)} for i in range(self._groups)]
        return torch.optim.AdamW(groups, foreach=True)


def count_batch(monkeypatch, *, tensors, groups, ranks, unseen=0, variance_refresh=None):
    """The events of one batch in the compressed phase, between the strategy's own entry points."""
    with monkeypatch.context() as patch:
        use_triton(patch)
        replace_kernels(patch)
        patch.setattr(phase_controller, "make_exchanger", lambda device: InlineExchanger())
        counter, trainer = WorkCounter(patch), None

        def is_other_batch():
            return trainer is None or trainer.fit_loop.total_batch_idx != COUNTED_BATCH

        for name in ("on_train_batch_start", "pre_backward", "_clip_grad_by_norm"):
            patch.setattr(OneBitDDPStrategy, name, counter.within(getattr(OneBitDDPStrategy, name), is_other_batch))
        patch.setattr(phase_controller, "phase_hook", counter.within(phase_controller.phase_hook, is_other_batch))
        original = OneBitDDPStrategy.optimizer_step

        def optimizer_step(strategy, optimizer, closure, *args, **kwargs):
            def paused():
                with counter.pausing():
                    return closure()

            return original(strategy, optimizer, paused, *args, **kwargs)

        patch.setattr(OneBitDDPStrategy, "optimizer_step", counter.within(optimizer_step, is_other_batch))
        patch.setattr(OneBitDDPStrategy, "check_ranks_agree", lambda _: None)
        patch.setattr(CheckpointManager, "snapshot", lambda _: None)
        # In warm-up: the futures of a fake group hold nothing.
        patch.setattr(Communicator, "all_reduce_mean_future", lambda _, tensor, **__: completed_future(tensor))
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        try:
            strategy = OneBitDDPStrategy(
                block_size=BLOCK_SIZE, bucket_cap_mb=4 * NUMEL / BUCKETS / 2**20, cluster_environment=Elsewhere(ranks),
                variance_refresh=variance_refresh,
            )  # fmt: skip
            trainer = pl.Trainer(
                strategy=strategy, accelerator="cpu", devices=1, num_nodes=ranks, max_steps=COUNTED_BATCH + 1, logger=False,
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
                callbacks=[PhaseSwitch(FixedStep(2))], use_distributed_sampler=False,
            )  # fmt: skip
            trainer.fit(Model(tensors, groups, unseen), torch.utils.data.DataLoader(torch.ones(64), batch_size=4))
            assert strategy.phase is Phase.COMPRESSED
            return counter
        finally:
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def fewest():
    with pytest.MonkeyPatch.context() as patch:
        return count_batch(patch, tensors=4, groups=1, ranks=2)


@pytest.mark.parametrize(
    ("tensors", "groups", "ranks"),
    [(400, 1, 8), (4000, 400, 32)],
)
def test_a_batch_costs_the_same_whatever_the_number_of_tensors_groups_and_ranks(monkeypatch, fewest, tensors, groups, ranks):
    counter = count_batch(monkeypatch, tensors=tensors, groups=groups, ranks=ranks)
    assert counter.by_name() == fewest.by_name()


def test_unseen_elements_cost_the_same_in_any_number_of_tensors(monkeypatch, fewest):
    """Their second moments are gathered bucket by bucket, too."""
    few, many = (
        count_batch(monkeypatch, tensors=tensors, groups=groups, ranks=2, unseen=2)
        for tensors, groups in ((4, 1), (400, 40))
    )
    assert many.by_name() == few.by_name()
    assert few.counts()["wait"] == 1
    assert few.by_name()["launch", "_gather_kernel"] == BUCKETS
    assert few.counts()["launch"] <= fewest.counts()["launch"] + 12 * BUCKETS


@pytest.mark.filterwarnings("ignore:invalid value")  # kernels that do nothing leave memory as it was
def test_a_batch_with_sketch_and_refresh_costs_the_same_in_any_number_of_tensors_groups_and_ranks(monkeypatch, fewest):
    """Step 4 is both sketched and refreshed."""
    few, many = (
        count_batch(monkeypatch, tensors=tensors, groups=groups, ranks=ranks, unseen=2, variance_refresh="auto")
        for tensors, groups, ranks in ((4, 1, 2), (400, 40, 8))
    )
    assert many.by_name() == few.by_name()
    names = few.by_name()
    for kernel in ("sketch_tensors", "encode_variance", "serve_variance", "apply_variance"):
        assert names["launch", f"_{kernel}_kernel"] == BUCKETS
    assert names["launch", "_add_parts_kernel"] == 1
    counts = few.counts()
    assert counts["wait"] == 1
    assert few.events.index(("launch", "_sketch_tensors_kernel")) < [kind for kind, _ in few.events].index("wait")
    assert counts["collective"] == fewest.counts()["collective"] + 2 + 2 * BUCKETS
    assert counts["launch"] <= fewest.counts()["launch"] + 20 * BUCKETS + 40


def test_what_a_batch_costs(fewest):
    names = fewest.by_name()
    for kernel in ("encode", "serve", "apply", "scale", "sketch"):
        assert names["launch", f"_{kernel}_kernel"] == BUCKETS
    counts = fewest.counts()
    assert counts["collective"] == 2 * BUCKETS + 2  # an agreement, and the sketch of the norm
    assert counts["wait"] == 1
    assert counts["launch"] <= 7 * BUCKETS + 30
    kinds = [kind for kind, _ in fewest.events]
    assert kinds.index("wait") > fewest.events.index(("launch", "_apply_kernel"))


def bert_large_numels():
    """Of the 398 tensors of BertForPreTraining, large: 336 million elements."""
    width, wide = 1024, 4096
    embeddings = [30522 * width, 512 * width, 2 * width, width, width]
    attention = [width * width, width] * 4 + [width, width]
    layer = [*attention, wide * width, wide, width * wide, width, width, width]
    heads = [width * width, width, width * width, width, width, width, 30522, 2 * width, 2]
    return embeddings + layer * 24 + heads


class EmptyMemory:
    """Takes torch's place where flat memory is allocated: nothing touches it, so that it takes none of the machine's."""

    zeros = staticmethod(torch.empty)

    def __getattr__(self, name):
        return getattr(torch, name)


def test_launches_of_a_step_of_bert_large(monkeypatch):
    """At most 200 launches with clipping, on 64 ranks; above, that they do not depend on the ranks. Nothing is computed."""
    ranks = 64
    use_triton(monkeypatch)
    replace_kernels(monkeypatch)
    monkeypatch.setattr(memory, "torch", EmptyMemory())
    monkeypatch.setattr(Buckets, "note_live_", lambda *_, **__: None)
    counter = WorkCounter(monkeypatch)
    numels = bert_large_numels()
    assert len(numels) == 398
    params = [nn.Parameter(torch.empty(numel)) for numel in numels]
    for p in params:
        p.grad = torch.empty_like(p)
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        compressed = CompressedOptimizer(
            torch.optim.AdamW(params), CompressionConfig(variance_refresh=None), Communicator(), {}
        )
        compressed.step()  # sends the tables that stay
        with counter.counting():
            compressed.step()
        step = counter.counts()
        with counter.counting():
            compressed.clip_grad_norm_(1.0)
        both = counter.counts()
    finally:
        dist.destroy_process_group()
    (buckets,) = (each.buckets.memories for each in compressed._sets)
    assert len(buckets) == 21
    print(f"BERT-large, {ranks} ranks: {len(buckets)} buckets; a step: {step}; with clipping: {both}")
    assert step == {"launch": 4 * 21 + 8, "collective": 2 * 21 + 1, "wait": 1}
    assert both["launch"] <= 200
    assert both["wait"] == 1
