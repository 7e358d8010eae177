"""Optimizer state that user code drops, resets or replaces: another warm-up, or taken over, or an error with the remedy."""

import copy
from collections import defaultdict

import lightning.pytorch as pl
import pytest
import torch
from ranks import run_trainers
from test_strategy import Messages
from trainers import Classifier, fit, same_params

from lightning_onebit import FixedStep, OneBitDDPStrategy, Phase, PhaseSwitch

WARMUP, COMPRESSED = Phase.WARMUP, Phase.COMPRESSED
FREEZE, AT = 4, 6


def compress(model=None, *, strategy="onebit_ddp", callbacks=(), batches=12, **kwargs):
    return fit(strategy, 2, batches=batches, model=model, callbacks=[PhaseSwitch(FixedStep(FREEZE)), *callbacks], **kwargs)


class Saves(pl.Callback):
    """After the batch of the freeze, and later."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx + 1 in (FREEZE, AT):
            trainer.save_checkpoint(self.folder / f"{batch_idx + 1}.ckpt")


class Drops(Classifier):
    def __init__(self, edit):
        super().__init__()
        self.edit = edit

    def on_load_checkpoint(self, checkpoint):
        self.edit(checkpoint["optimizer_states"])


def all_states(states):
    states.clear()


def those_of_the_head(states):
    for position in (4, 5):
        del states[0]["state"][position]


def test_a_checkpoint_without_optimizer_state_begins_another_warmup(tmp_path):
    def fn(rank):
        compress(callbacks=[Saves(tmp_path)])
        for step, edit, space, missing in [
            (FREEZE, all_states, "update", "'body.0.weight', 'body.0.bias', 'body.2.weight' and 3 more"),
            (FREEZE, those_of_the_head, "update", "'head.weight', 'head.bias'"),
            (AT, all_states, "update", "'body.0.weight', 'body.0.bias', 'body.2.weight' and 3 more"),
            (AT, those_of_the_head, "update", "'head.weight', 'head.bias'"),
            (AT, those_of_the_head, "momentum", "'head.weight', 'head.bias'"),
        ]:
            with Messages() as messages:
                _, recorder = compress(
                    Drops(edit), strategy=OneBitDDPStrategy(space=space), ckpt_path=tmp_path / f"{step}.ckpt", batches=14
                )
            left = 14 - step
            assert recorder.phases == [WARMUP] * (FREEZE - 1) + [COMPRESSED] * (left - FREEZE + 1), (step, edit)
            assert rank or messages.count(f"the optimizer's state of {missing} is missing now") == 1, messages.texts
            assert all(p.isfinite().all() for p in recorder.params[-1])
        untouched = compress(Drops(lambda states: None), ckpt_path=tmp_path / f"{AT}.ckpt")[1]
        assert set(untouched.phases) == {COMPRESSED}
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


class Replaces(pl.Callback):
    """Does something to the optimizer between two batches of the compressed phase."""

    def __init__(self, change):
        self.change = change

    def on_train_start(self, trainer, pl_module):
        self.initial = copy.deepcopy(trainer.optimizers[0].state_dict())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == AT:
            assert trainer.strategy.phase is COMPRESSED
            self.change(trainer.optimizers[0], self.initial)


def load_own(optimizer, initial):
    optimizer.load_state_dict(optimizer.state_dict())


def load_twice_the_momentum(optimizer, initial):
    state_dict = copy.deepcopy(optimizer.state_dict())
    for entry in state_dict["state"].values():
        entry["exp_avg"] *= 20
    optimizer.load_state_dict(state_dict)


def load_initial(optimizer, initial):
    optimizer.load_state_dict(initial)


def clear(optimizer, initial):
    optimizer.state.clear()


def put_another(optimizer, initial):
    optimizer.state = defaultdict(dict)


def test_state_that_is_replaced_in_the_compressed_phase_is_taken_over_or_warmed_up_again():
    def fn(rank):
        plain = compress()[1]
        results = {}
        for change in (load_own, load_twice_the_momentum, load_initial, clear, put_another):
            with Messages() as messages:
                _, recorder = compress(callbacks=[Replaces(change)])
            results[change.__name__] = recorder.params
            taken_over = change in (load_own, load_twice_the_momentum)
            later = recorder.phases[AT + 1 :]
            assert later == ([COMPRESSED] * 5 if taken_over else [WARMUP] * 3 + [COMPRESSED] * 2), change
            assert rank or messages.count("was replaced: going on from the new one") == taken_over
            assert rank or messages.count("is missing now") == (not taken_over)
            assert same_params(recorder.params[: AT + 1], plain.params[: AT + 1])
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(results["load_own"][-1], plain.params[-1], strict=True))
        assert not torch.allclose(results["load_twice_the_momentum"][-1][0], plain.params[-1][0], atol=1e-3)
        return results

    first, second = run_trainers(2, fn)
    assert all(same_params(first[name], second[name]) for name in first)


def test_state_cannot_be_looked_up_and_it_is_said_where_it_is():
    def look(optimizer, initial):
        optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"].zero_()

    def fn(rank):
        with pytest.raises(RuntimeError, match=r"is empty in the compressed phase.*HINT: read `optimizer.state_dict\(\)`"):
            compress(callbacks=[Replaces(look)])
        copies = []
        compress(callbacks=[Replaces(lambda optimizer, initial: copies.append(copy.deepcopy(optimizer)))])
        assert type(copies[0].state) is defaultdict

    run_trainers(2, fn)
