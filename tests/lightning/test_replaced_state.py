"""Optimizer state that user code drops, resets or replaces: another warm-up, or taken over, or an error with the remedy."""

import copy
import functools
from collections import defaultdict

import lightning.pytorch as pl
import pytest
import torch
from ranks import run_trainers
from test_strategy import Messages
from trainers import Classifier, Stepwise, fit, same_params

from lightning_onebit import FixedStep, OneBitDDPStrategy, Phase, PhaseSwitch
from lightning_onebit.consistency.agreement import RanksDisagree
from lightning_onebit.engine import optimizer as engine

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
        plain = compress(strategy=OneBitDDPStrategy(variance_refresh=None))[1]
        results = {}
        for change in (load_own, load_twice_the_momentum, load_initial, clear, put_another):
            with Messages() as messages:
                _, recorder = compress(callbacks=[Replaces(change)], strategy=OneBitDDPStrategy(variance_refresh=None))
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


class Refreshes(pl.Callback):
    """Right after the freeze, and after the state was replaced: when it is still to be frozen."""

    def __init__(self):
        self.collecting = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == AT:
            load_own(trainer.optimizers[0], None)
        if batch_idx + 1 in (FREEZE, AT + 1):
            trainer.strategy.refresh_variance()
        if batch_idx in (FREEZE, AT + 1):
            self.collecting += [each.is_collecting for each in trainer.strategy._phases.compressed.values()]


def test_a_refresh_is_of_the_state_that_the_next_step_freezes():
    def fn(rank):
        refreshes = Refreshes()
        compress(callbacks=[refreshes], strategy=OneBitDDPStrategy(variance_refresh=None), batches=AT + 2)
        assert refreshes.collecting == [True, True]

    run_trainers(2, fn)


def test_state_cannot_be_looked_up_and_it_is_said_where_it_is():
    looks = [
        lambda state, p: state[p]["exp_avg"].zero_(),
        lambda state, p: state.get(p),
        lambda state, p: state.setdefault(p, {}),
        lambda state, p: state.pop(p, None),
        lambda state, p: state.__delitem__(p),
        lambda state, p: p in state,
    ]

    def fn(rank):
        for look in looks:

            def looks_at_first(optimizer, initial, look=look):
                look(optimizer.state, optimizer.param_groups[0]["params"][0])

            with pytest.raises(RuntimeError, match=r"is empty in the compressed phase.*HINT: read `optimizer.state_dict"):
                compress(callbacks=[Replaces(looks_at_first)])
        copies = []
        compress(callbacks=[Replaces(lambda optimizer, initial: copies.append(copy.deepcopy(optimizer)))])
        assert type(copies[0].state) is defaultdict

    run_trainers(2, fn)


# State that is replaced in a checkpoint, or before one is written


class Late(Stepwise):
    """Feature 0 is zero until after the freeze: late coordinates."""

    def batch(self, batch_idx):
        x, y = super().batch(batch_idx)
        x[:, 0] *= batch_idx > FREEZE
        return x, y


class WithTwoOptimizers(Late):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), lr=1e-2) for part in (self.body, self.head)]


def with_sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def edit(state, second_moments=True):
    """Second moments everywhere, and the momentum of one parameter: tensors anew, as the old ones may be in use."""
    for entry in state.values() if second_moments else ():
        if "exp_avg_sq" in entry:
            entry["exp_avg_sq"] = entry["exp_avg_sq"] * 4
    name = "exp_avg" if "exp_avg" in next(iter(state.values())) else "momentum_buffer"
    state[0][name] = state[0][name] * -20


class Edits(pl.Callback):
    """Loads an edited state after a batch; saves before, and after."""

    def __init__(self, folder=None, edit=None):
        self.folder, self.edit, self.states = folder, edit, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        optimizer = trainer.optimizers[-1]
        if batch_idx == AT:
            if self.folder is not None:
                trainer.save_checkpoint(self.folder / "before.ckpt")
            if self.edit is not None:
                state_dict = copy.deepcopy(optimizer.state_dict())
                self.edit(state_dict["state"])
                optimizer.load_state_dict(state_dict)
            if self.folder is not None:
                trainer.save_checkpoint(self.folder / "after.ckpt")
        self.states.append(copy.deepcopy(optimizer.state_dict()["state"]))

    def on_train_start(self, trainer, pl_module):
        self.at_start = copy.deepcopy(trainer.optimizers[-1].state_dict()["state"])


class Freezes(pl.Callback):
    """One rank is never switched."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx + 1 == FREEZE:
            trainer.strategy.freeze_variance()


class EditsWhenLoading(pl.Callback):
    def __init__(self, edit):
        self.edit = edit

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        self.edit(checkpoint["optimizer_states"][-1]["state"])


def same_states(first, second, close=False):
    def same(a, b):
        return torch.allclose(a, b, rtol=1e-4) if close else torch.equal(a, b)

    return all(
        first[i].keys() == second[i].keys()
        and all(same(value, second[i][name]) for name, value in first[i].items() if isinstance(value, torch.Tensor))
        for i in {*first, *second}
    )


@pytest.mark.parametrize(
    ("world_size", "model", "options", "precision", "edits_second_moments"),
    [
        (2, Late, {}, None, True),
        (1, Late, {}, None, False),
        (1, Late, {}, None, True),
        (2, Late, {"overlap": True}, "bf16-true", False),
        (2, Late, {"space": "momentum"}, None, True),
        (2, lambda: Late(with_sgd), {}, None, False),
        (2, WithTwoOptimizers, {}, None, True),
    ],
    ids=["adam", "one rank, momentum", "one rank", "bf16, overlap, momentum", "momentum space", "sgd", "two optimizers"],
)
def test_state_that_is_edited_in_a_checkpoint_is_taken_over_as_in_the_run(
    tmp_path, world_size, model, options, precision, edits_second_moments
):
    """Edited in the run, edited when loading, and edited in the run before saving: the same steps, bit for bit."""

    def fn(rank):
        engine.REFRESH_STEPS = 8
        edit_some = functools.partial(edit, second_moments=edits_second_moments)

        def go(*callbacks, ckpt_path=None):
            callbacks = [PhaseSwitch(FixedStep(FREEZE)) if world_size > 1 else Freezes(), *callbacks]
            with Messages() as messages:
                recorder = fit(
                    OneBitDDPStrategy(**options),
                    world_size,
                    batches=12,
                    model=model(),
                    callbacks=callbacks,
                    ckpt_path=ckpt_path,
                    precision=precision,
                )[1]
            assert set(recorder.phases[FREEZE:]) == {COMPRESSED}
            return recorder.params, messages.count("was replaced: going on from the new one")

        edited = Edits(tmp_path, edit_some)
        expected, announced = go(edited)
        assert announced == (rank == 0)
        for path, callbacks in [("before.ckpt", [EditsWhenLoading(edit_some)]), ("after.ckpt", [])]:
            loaded = Edits()
            params, announced = go(*callbacks, loaded, ckpt_path=tmp_path / path)
            assert same_states(loaded.at_start, edited.states[AT]), path  # as a stock optimizer would have it
            assert announced == (rank == 0)
            assert same_params(params, expected[AT + 1 :]), path
        return expected

    results = run_trainers(world_size, fn)
    assert same_params(results[0], results[-1])


def test_errors_and_second_moments_of_late_coordinates_stay_when_state_is_replaced():
    """The momentum is added to the worker errors, as at a freeze: beta u."""

    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == AT:
                self.before = self.look(trainer)
                load_own(trainer.optimizers[0], None)
                trainer.strategy._phases.take_over_replaced_state()
                self.after = self.look(trainer)

        def look(self, trainer):
            (compressed,) = trainer.strategy._phases.compressed.values()
            (memory,), (late,) = compressed._sets[0].buckets.memories, compressed._sets[0].late
            u = compressed._sets[0].buckets.last_average(memory)
            return [t.clone() for t in (memory.error, u, memory.server_error, late.places, late.second_moment)]

    def fn(rank):
        looks = Looks()
        compress(Late(), callbacks=[looks], batches=AT + 2, strategy=OneBitDDPStrategy(variance_refresh=None))
        error, u, server_error, places, second_moment = looks.before
        assert all(t.any() for t in looks.before)
        assert torch.allclose(looks.after[0], error + 0.9 * u, atol=1e-5)
        assert not looks.after[1].any()
        assert torch.equal(looks.after[2], server_error)
        assert torch.equal(looks.after[3], places)
        assert torch.equal(looks.after[4], second_moment)

    run_trainers(2, fn)


def test_one_process_that_loads_its_own_state_goes_on_as_it_was():
    """Of two optimizers the first does, and stays the first. What a single rank has for errors is u: not to be applied."""

    class Loads(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == AT:
                load_own(trainer.optimizers[0], None)
            if batch_idx == AT + 1:
                self.order = [trainer.optimizers.index(optimizer) for optimizer in trainer.strategy._phases.compressed]

    def fn(rank):
        loads = Loads()
        plain, loaded = (
            fit(OneBitDDPStrategy(), 1, batches=AT + 3, model=WithTwoOptimizers(), callbacks=[Freezes(), *more])[1].params
            for more in ([], [loads])
        )
        assert loads.order == [0, 1]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(loaded[-1], plain[-1], strict=True))

    run_trainers(1, fn)


def test_state_of_another_run_and_with_other_blocks_is_taken_over(tmp_path):
    """What has the stock momentum in its errors already, as blocks have another size, must not get it twice."""

    def fn(rank):
        for seed in (0, 1):
            (tmp_path / str(seed)).mkdir(exist_ok=True)
            model = Late()
            torch.manual_seed(seed)
            for p in model.parameters():
                p.data.normal_(0, 0.3)
            callbacks = [PhaseSwitch(FixedStep(FREEZE)), Edits(tmp_path / str(seed))]
            fit(OneBitDDPStrategy(variance_refresh=None), 2, batches=AT + 2, model=model, callbacks=callbacks)
        other = torch.load(tmp_path / "1" / "before.ckpt", weights_only=True)["optimizer_states"]

        class TakesAnother(pl.Callback):
            def on_load_checkpoint(self, trainer, pl_module, checkpoint):
                checkpoint["optimizer_states"] = copy.deepcopy(other)

        growth = []
        for block_size in (2048, 64):
            after = Edits()
            callbacks = [PhaseSwitch(FixedStep(FREEZE)), TakesAnother(), after]
            with Messages() as messages:
                fit(
                    OneBitDDPStrategy(block_size=block_size, variance_refresh=None),
                    2,
                    batches=AT + 2,
                    model=Late(),
                    callbacks=callbacks,
                    ckpt_path=tmp_path / "0" / "before.ckpt",
                )
            assert messages.count("was replaced: going on from the new one") == (rank == 0)
            assert same_states(after.at_start, other[0]["state"])
            for entry, before in zip(after.states[-1].values(), other[0]["state"].values(), strict=True):
                corrections = [1 - 0.999 ** float(state["step"]) for state in (entry, before)]
                v_hats = [s["exp_avg_sq"] / c for s, c in zip((entry, before), corrections, strict=True)]
                assert torch.allclose(*v_hats, rtol=1e-5)
            momenta = [torch.cat([e["exp_avg"].view(-1) for e in s.values()]) for s in (after.states[-1], other[0]["state"])]
            growth.append((momenta[0].norm() / momenta[1].norm()).item())
        assert growth[0] < 1.5 * (1 + 0.9 / 2)  # the scales of servers
        assert growth[1] == pytest.approx(growth[0], rel=0.1)

    run_trainers(2, fn)


def test_another_dtype_is_no_edit_and_another_number_of_steps_is_one(tmp_path):
    """torch loads `step` as it is."""

    def set_steps(number_of, state):
        for entry in state.values():
            entry["step"] = torch.tensor(number_of(int(entry["step"])))

    def fn(rank):
        def go(*callbacks, **options):
            callbacks = [PhaseSwitch(FixedStep(FREEZE)), *callbacks]
            with Messages() as messages:
                recorder = fit("onebit_ddp", 2, batches=AT + 4, model=Late(), callbacks=callbacks, **options)[1]
            return recorder.params, messages.count("was replaced: going on from the new one")

        expected = go(Edits(tmp_path))[0]
        for number_of, is_edit in ((lambda step: step, False), (lambda step: step + 100, True)):
            edits = EditsWhenLoading(functools.partial(set_steps, number_of))
            params, announced = go(edits, ckpt_path=tmp_path / "before.ckpt")
            assert announced == (is_edit and rank == 0)
            assert same_params(params, expected[AT + 1 :]) != is_edit

    run_trainers(2, fn)


@pytest.mark.parametrize("overlap", [False, True])
def test_what_one_rank_replaces_alone_ends_all_and_is_named(overlap):
    """Under DDP the ranks would drift apart."""

    class Alone(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == AT and trainer.global_rank == 1:
                load_own(trainer.optimizers[0], None)

    def fn(rank):
        with pytest.raises(RanksDisagree, match="times that its state was replaced: 0 on rank 0, but 1 on rank 1"):
            compress(callbacks=[Alone()], strategy=OneBitDDPStrategy(overlap=overlap))

    run_trainers(2, fn)


# Between the freeze and the first compressed step, which may be several batches

ACCUMULATE = 3


class InTheWindow(pl.Callback):
    """Acts after the first micro-batch behind the freeze, and keeps the state after every one."""

    def __init__(self, act=None, at=FREEZE * ACCUMULATE):
        self.act, self.at, self.states, self.momenta = act, at, [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.at and self.act is not None:
            self.act(trainer)
        self.states.append(copy.deepcopy(trainer.optimizers[0].state_dict()["state"]))


def load_edited(trainer):
    state_dict = copy.deepcopy(trainer.optimizers[0].state_dict())
    edit(state_dict["state"])
    trainer.optimizers[0].load_state_dict(state_dict)


@pytest.mark.parametrize("overlap", [False, True])
def test_until_the_first_compressed_step_state_is_that_of_the_warmup(overlap):
    def fn(rank):
        def go(act=None, strategy=None, **kwargs):
            window = InTheWindow(act, **kwargs)
            strategy = strategy or OneBitDDPStrategy(overlap=overlap)
            options = {"batches": 24, "accumulate_grad_batches": ACCUMULATE, "model": Late()}
            recorder = fit(strategy, 2, callbacks=[PhaseSwitch(FixedStep(FREEZE)), window], **options)[1]
            return recorder, window.states

        first = FREEZE * ACCUMULATE  # micro-batch behind the freeze
        plain, plain_states = go(strategy="ddp")
        untouched_states = go()[1]
        for micro_batch in range(first, first + ACCUMULATE - 1):
            assert same_states(untouched_states[micro_batch], plain_states[micro_batch])
        late, states = go(load_edited)
        assert same_states(states[first], states[first + 1])
        assert not same_states(states[first], plain_states[first])
        assert same_params(late.params, go(load_edited, at=first - 1)[0].params)
        if overlap:
            return
        back = go(lambda trainer: trainer.strategy.resume_warmup())[0]
        upto = first + ACCUMULATE
        assert same_params(back.params[:first], plain.params[:first])
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(back.params[upto], plain.params[upto], strict=True))
        cleared, _ = go(lambda trainer: trainer.optimizers[0].state.clear(), at=first - 1)
        assert cleared.phases[first - 1 :] == [COMPRESSED] + [WARMUP] * 11 + [COMPRESSED]
        with pytest.raises(RuntimeError, match="HINT: do it between a step and the next backward"):
            go(lambda trainer: trainer.optimizers[0].state.clear())

    run_trainers(2, fn)


def test_gradients_that_are_dropped_with_the_state_are_mentioned(tmp_path):
    def fn(rank):
        class Save(pl.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                if batch_idx == 6 * ACCUMULATE:
                    trainer.save_checkpoint(tmp_path / "waiting.ckpt")

        options = {"accumulate_grad_batches": ACCUMULATE, "batches": 24}
        compress(callbacks=[Save()], **options)
        with Messages() as messages:
            compress(Drops(all_states), ckpt_path=tmp_path / "waiting.ckpt", **options)
        assert messages.count("next compressed phase, gradients that waited for a step are dropped") == (rank == 0)

    run_trainers(2, fn)
