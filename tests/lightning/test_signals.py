"""How requests of signals reach all ranks: with the compressed step, or by an all-reduce after a batch without one."""

import os
import signal

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from ranks import run_trainers
from trainers import Classifier, data, make_trainer

from lightning_onebit import FixedStep, OneBitDDPStrategy, PhaseSwitch

WARMUP_STEPS, BATCHES = 3, 9


class Watch(Callback):
    """Counts, by batch, the all-reduces that only ask for signals; rank 1 may get one before or after a batch's step."""

    def __init__(self, rank, ask_at=None, after_step=False):
        self.asked, self.batches = [], 0
        self._at, self._after = (ask_at if rank == 1 else None), after_step

    def _count(self, trainer):
        return trainer.strategy._signals._communicator.counters.collectives

    def on_after_backward(self, trainer, module):
        if not self._after and self.batches == self._at:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_end(self, trainer, *_):
        if self._after and self.batches == self._at:
            os.kill(os.getpid(), signal.SIGTERM)
        self.asked.append(self._count(trainer))
        self.batches += 1


def run(rank, watch, **options):
    trainer = make_trainer(OneBitDDPStrategy(), 2, callbacks=[PhaseSwitch(FixedStep(WARMUP_STEPS)), watch], **options)
    trainer.fit(Classifier(), data(BATCHES, 2))


def test_in_the_compressed_phase_no_message_is_sent_for_signals_alone():
    """Once per batch in the warm-up and at the first compressed batch; then the step's own message says it."""

    def fn(rank):
        watch = Watch(rank)
        run(rank, watch)
        return watch.asked

    asked = run_trainers(2, fn)
    assert asked == [[1, 2, 3, 4, 4, 4, 4, 4, 4]] * 2


def test_batches_without_a_step_are_followed_by_a_message():
    def fn(rank):
        watch = Watch(rank)
        run(rank, watch, accumulate_grad_batches=2)
        return watch.asked

    # Steps are made at the end of every second batch; the fourth is the first compressed one, after batch 7.
    asked = run_trainers(2, fn)
    assert asked == [[1, 2, 3, 4, 5, 6, 7, 8, 8]] * 2


@pytest.mark.parametrize(
    ("at", "after_step", "last"),
    [
        (1, False, 3),  # in the warm-up: told at the start of batch 2, the last one
        (5, False, 7),  # told with the step of batch 5; batch 6 is the last one
        (5, True, 8),  # told with the step of batch 6
        (3, False, 5),  # told with the first compressed step
    ],
)
def test_sigterm_to_one_rank_ends_all_after_the_same_batch(at, after_step, last):
    def fn(rank):
        watch = Watch(rank, at, after_step)
        with pytest.raises(SIGTERMException):
            run(rank, watch)
        return watch.batches

    batches = run_trainers(2, fn)
    assert batches == [last] * 2
