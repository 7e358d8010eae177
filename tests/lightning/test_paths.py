"""How many files and functions a reader meets: on the way of a gradient to its parameter, and at a phase switch."""

import threading

import lightning.pytorch as pl
import pytest
import torch
from call_counter import CallCounter, Function, files, listed
from ranks import run_trainers
from trainers import fit

from lightning_onebit import FixedStep, OneBitDDPStrategy, Phase, PhaseSwitch
from lightning_onebit.comm.stats import PhaseCounters
from lightning_onebit.config import CompressionConfig
from lightning_onebit.quantize.layout import num_blocks

GRADIENT_FILES, GRADIENT_FUNCTIONS, SWITCH_FILES = 18, 80, 25
"""What there is, with a frozen second moment; it must not grow. The goal is 8, 25 and 12: agreement, counting and exchange
lie beside the formula. (17, 82 and 23 before there was a refresh, which shares modules with the step: spans and roots.)"""

# Batches: steps 0 to 2 are warm-up; what freezing leaves to do comes with the next step.
WARMUP_BATCH, LAST_WARMUP_BATCH, GRADIENT_BATCH, COMPRESSED_BATCH = 1, 2, 5, 7


class Watch(pl.Callback):
    """Notes what is entered in some batches. Must come before the package's own callbacks.

    ``gradient``: from the beginning of backward to the end of the batch. ``batches``: by their number, from the end of the
    batch before to that of this one.
    """

    def __init__(self, counter):
        self.counter, self.gradient, self.batches = counter, [], {}

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.fit_loop.epoch_loop.batch_idx == GRADIENT_BATCH:
            assert trainer.strategy.phase is Phase.COMPRESSED
            self.counter.start()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == GRADIENT_BATCH:
            self.gradient = self.counter.stop()
        if batch_idx in (WARMUP_BATCH, LAST_WARMUP_BATCH + 1, COMPRESSED_BATCH):
            self.batches[batch_idx] = self.counter.stop()
        assert trainer.strategy.phase is (Phase.WARMUP if batch_idx <= LAST_WARMUP_BATCH else Phase.COMPRESSED)
        if batch_idx + 1 in (WARMUP_BATCH, LAST_WARMUP_BATCH + 1, COMPRESSED_BATCH):
            self.counter.start()


def ways(overlap):
    """Of rank 0: the way of a gradient, and what the phase switch enters beside what every batch does."""

    def fn(rank):
        with CallCounter() as counter:
            watch = Watch(counter)
            callbacks = [watch, PhaseSwitch(FixedStep(LAST_WARMUP_BATCH + 1))]
            fit(
                OneBitDDPStrategy(overlap=overlap, variance_refresh=None),
                2,
                batches=COMPRESSED_BATCH + 1,
                callbacks=callbacks,
            )
        ordinary = {*watch.batches[WARMUP_BATCH], *watch.batches[COMPRESSED_BATCH]}
        switch = [f for f in watch.batches[LAST_WARMUP_BATCH + 1] if f not in ordinary]
        return [tuple(f) for f in watch.gradient], [tuple(f) for f in switch]  # plain, so that they can be sent

    return [[Function(*f) for f in way] for way in run_trainers(2, fn)[0]]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_gradient_takes_a_short_way_to_its_parameter(overlap):
    """From DDP's hook through the exchange, in whatever thread, to the step of its parameter."""
    gradient = ways(overlap)[0]
    assert any("hook" in f.name for f in gradient), listed(gradient)  # else the window was a wrong one
    assert len(files(gradient)) <= GRADIENT_FILES, listed(gradient)
    assert len(gradient) <= GRADIENT_FUNCTIONS, listed(gradient)


def test_a_phase_switch_takes_a_short_way():
    """From the end of the last dense batch to that of the first compressed one, less what ordinary batches enter too.

    So it makes no difference how much of the work is left to the first compressed step.
    """
    switch = ways(overlap=False)[1]
    assert any("freeze" in f.name for f in switch), listed(switch)
    assert len(files(switch)) <= SWITCH_FILES, listed(switch)


def test_what_counts():
    """Functions of the package in all threads of the block; no getters, and nothing generated."""
    with CallCounter() as counter:
        CompressionConfig().bucket_numel(1)
        with counter.noting() as found:
            CompressionConfig(block_size=64).bucket_numel(1)
            PhaseCounters()
            torch.zeros(3)
        assert [f.name.split(":")[0].split(".")[-1] for f in found] == ["is_integer", "__post_init__", "bucket_numel"]
        assert files(found) == ["arguments.py", "config.py"]
        with counter.noting() as found:
            thread = threading.Thread(target=num_blocks, args=(10, 8))
            thread.start()
            thread.join()
        assert files(found) == ["quantize/layout.py"]
        with counter.noting() as found:
            assert OneBitDDPStrategy.phase.fget is not None
            OneBitDDPStrategy().phase  # noqa: B018
        names = [f.name.split(".")[-1] for f in found]
        assert "phase" not in names
        assert not any(name.startswith("<") for name in names)
    before = len(counter._codes)
    num_blocks(10, 8)
    assert len(counter._codes) == before
