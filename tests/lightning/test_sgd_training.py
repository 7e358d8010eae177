"""torch.optim.SGD in a Trainer and in Fabric: starts compressed, or after dense steps, or beside an Adam; checkpoints."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from ranks import run_trainers
from test_fabric import Loop
from test_several_optimizers import Apart
from test_strategy import Messages
from trainers import Classifier, Stepwise, fit, same_params

from lightning_onebit import FixedStep, OneBitDDPFabricStrategy, OneBitDDPStrategy, Phase, PhaseSwitch
from lightning_onebit.checkpoint.state import CHECKPOINT_KEY

WARMUP, COMPRESSED = Phase.WARMUP, Phase.COMPRESSED
BATCHES = 12
UNUSED = {"find_unused_parameters": True}
SAID = "SGD has no second moment that must settle first: compressing from step 1 on"


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)


def plain_sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.05)


def nesterov(module):
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)


class Steps(pl.Callback):
    """``optimizer_steps`` at the start, and after every batch."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, pl_module):
        self.seen.append(trainer.strategy.optimizer_steps)

    def on_train_batch_end(self, trainer, *_):
        self.seen.append(trainer.strategy.optimizer_steps)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_run_with_sgd_alone_makes_no_dense_step_and_says_so(world_size):
    def fn(rank):
        with Messages() as messages:
            trainer, recorder = fit("onebit_ddp", world_size, batches=BATCHES, configure=sgd)
        assert messages.count(SAID) == (rank == 0)
        assert messages.count("never compressed") == 0
        assert recorder.phases == [COMPRESSED] * BATCHES
        stats = trainer.strategy.comm_stats
        assert (stats[WARMUP].steps, stats[COMPRESSED].steps) == (0, BATCHES)
        assert stats[WARMUP].bytes_sent == stats[WARMUP].baseline_bytes_sent  # to time dense exchanges
        assert trainer.strategy.optimizer_steps == BATCHES
        return recorder.params

    first, *others = run_trainers(world_size, fn)
    assert all(same_params(first, other) for other in others)
    assert all((a != b).any() for a, b in zip(first[0], first[-1], strict=True))


def test_fixed_step_makes_as_many_dense_steps_bitwise_ddps():
    def fn(rank):
        dense = fit("ddp", 2, batches=BATCHES, configure=nesterov)[1]
        with Messages() as messages:
            recorder = fit("onebit_ddp", 2, batches=BATCHES, configure=nesterov, callbacks=[PhaseSwitch(FixedStep(4))])[1]
        assert recorder.phases == [WARMUP] * 3 + [COMPRESSED] * (BATCHES - 3)  # after batch 4 the phase has changed
        assert same_params(recorder.params[:4], dense.params[:4])
        assert not same_params(recorder.params[4:], dense.params[4:])
        assert messages.count("compressing after step 4: 4 of 4 warm-up steps are done") == (rank == 0)
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


class Both(Apart):
    """Adam and SGD, one network each."""

    def __init__(self):
        super().__init__((torch.optim.Adam, lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9)))


def test_beside_an_adam_sgd_is_switched_with_it():
    def fn(rank):
        with Messages() as messages:
            trainer, recorder = fit(
                OneBitDDPStrategy(**UNUSED), 2, batches=BATCHES, model=Both(), callbacks=[PhaseSwitch(FixedStep(4))]
            )
        assert messages.count(SAID) == messages.count("are never compressed") == 0
        assert recorder.phases == [WARMUP] * 3 + [COMPRESSED] * (BATCHES - 3)
        assert len(trainer.strategy.compressed_optimizers) == 2
        assert same_params(recorder.params[:4], fit(DDPStrategy(**UNUSED), 2, batches=BATCHES, model=Both())[1].params[:4])
        # The default criterion waits for Adam's second moment.
        phases = fit(OneBitDDPStrategy(**UNUSED), 2, batches=BATCHES, model=Both())[1].phases
        assert set(phases) == {WARMUP}
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


class FreezeAtStart(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        trainer.strategy.freeze_variance()


def test_freezing_by_hand_before_the_first_step():
    """Allowed where nothing needs a warm-up; with one process as well, where all is exact."""

    def fn(rank):
        options = {"batches": BATCHES, "configure": sgd}
        by_hand = fit("onebit_ddp", 2, callbacks=[PhaseSwitch(FixedStep(1000)), FreezeAtStart()], **options)[1]
        assert by_hand.phases == [COMPRESSED] * BATCHES
        assert same_params(by_hand.params, fit("onebit_ddp", 2, **options)[1].params)
        with pytest.raises(RuntimeError, match="before the first optimizer step of Adam"):
            fit(OneBitDDPStrategy(**UNUSED), 2, batches=BATCHES, model=Both(), callbacks=[FreezeAtStart()])

    run_trainers(2, fn)

    def alone(rank):
        recorder = fit("onebit_ddp", 1, batches=BATCHES, configure=nesterov, callbacks=[FreezeAtStart()])[1]
        exact = fit("ddp", 1, batches=BATCHES, configure=nesterov)[1]
        assert recorder.phases == [COMPRESSED] * BATCHES
        for ours, torchs in zip(recorder.params, exact.params, strict=True):
            assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(ours, torchs, strict=True))

    run_trainers(1, alone)


class ResumeWarmup(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 3:
            trainer.strategy.resume_warmup()


def test_a_warmup_that_was_resumed_ends_at_once():
    def fn(rank):
        # PhaseSwitch is added at the end: after the recorder, which sees the phase that this callback has left.
        recorder = fit("onebit_ddp", 2, batches=6, configure=sgd, callbacks=[ResumeWarmup()])[1]
        assert recorder.phases == [COMPRESSED] * 3 + [WARMUP] + [COMPRESSED] * 2
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


def overlapped(**options):
    return OneBitDDPStrategy(overlap=True, **options)


def test_overlapped_is_deferred_bitwise():
    def fn(rank):
        options = {"batches": BATCHES, "configure": nesterov}
        deferred = fit(OneBitDDPStrategy(overlap=False), 2, **options)[1]
        assert same_params(fit(overlapped(bucket_cap_mb=0.001), 2, **options)[1].params, deferred.params)

    run_trainers(2, fn)


# Checkpoints


class SaveAt(pl.Callback):
    """Saves after a number of batches, on all ranks, and keeps what error feedback held then."""

    def __init__(self, path, batch):
        self.path, self.batch, self.outstanding = path, batch, None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx + 1 == self.batch:
            trainer.save_checkpoint(self.path)
            if isinstance(trainer.strategy, OneBitDDPStrategy):
                for compressed in trainer.strategy._phases.compressed.values():
                    self.outstanding = list(compressed.state.outstanding().values())


def same_bits(first, second):
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


class Late(Stepwise):
    """Feature 0 is zero up to batch 5: late coordinates, which begin at step 64 at the earliest."""

    def batch(self, batch_idx):
        x, y = super().batch(batch_idx)
        x[:, 0] *= batch_idx >= 5
        return x, y


def state_of(strategy):
    """Errors, averages and masks of this rank."""
    state = []
    for compressed in strategy._phases.compressed.values():
        state += [each.values.clone() for each in (*compressed.state.worker_errors(), *compressed.state.server_errors())]
        state += [value.clone() for entry in compressed.state.shared_state().values() for _, value in sorted(entry.items())]
    return state


class State(pl.Callback):
    def on_train_end(self, trainer, pl_module):
        self.state = state_of(trainer.strategy)


@pytest.mark.parametrize(
    ("configure", "freeze", "saves"),
    [(sgd, None, (1, 62, 66)), (nesterov, 4, (2, 4, 7)), (plain_sgd, 4, (2, 5)), (plain_sgd, None, (3,))],
)
def test_resuming_in_a_trainer_is_bitwise(tmp_path, configure, freeze, saves):
    """In warm-up (FixedStep must count on), right after it, in the compressed phase, before and after a refresh."""
    batches = 70 if 62 in saves else 10

    def run(callbacks=(), ckpt_path=None):
        last, steps = State(), Steps()
        switch = [] if freeze is None else [PhaseSwitch(FixedStep(freeze))]
        recorder = fit(
            "onebit_ddp", 2, batches=batches, callbacks=[*switch, last, steps, *callbacks], model=Late(configure),
            ckpt_path=ckpt_path,
        )[1]  # fmt: skip
        return recorder, last.state, steps.seen

    def fn(rank):
        full, state, steps = run([SaveAt(tmp_path / f"{k}.ckpt", k) for k in saves])
        assert steps == list(range(batches + 1))
        for k in saves:
            resumed, resumed_state, resumed_steps = run(ckpt_path=tmp_path / f"{k}.ckpt")
            assert resumed_steps == steps[k:], k  # right after the resume as well
            assert resumed.phases == full.phases[k:], k
            assert same_params(resumed.params, full.params[k:]), k
            assert len(state) == len(resumed_state) > 10
            assert all(same_bits(a, b) for a, b in zip(resumed_state, state, strict=True)), k

    run_trainers(2, fn)


def test_the_state_is_that_of_stock_sgd_and_goes_both_ways_with_plain_ddp(tmp_path):
    def fn(rank):
        options = {"batches": 10, "configure": nesterov}
        fit("onebit_ddp", 2, callbacks=[SaveAt(tmp_path / "ours.ckpt", 6)], **options)
        checkpoint = torch.load(tmp_path / "ours.ckpt", weights_only=True)
        assert checkpoint[CHECKPOINT_KEY]["optimizer_steps"] == [6]
        module = Classifier()
        stock = nesterov(module)
        stock.load_state_dict(checkpoint["optimizer_states"][0])
        for p in module.parameters():
            assert stock.state[p]["momentum_buffer"].abs().max() > 0
        fit("ddp", 2, ckpt_path=tmp_path / "ours.ckpt", **options)

        # From plain DDP the Trainer's own number counts, as SGD's state has none: FixedStep(7) lets one more step be dense.
        fit("ddp", 2, callbacks=[SaveAt(tmp_path / "ddp.ckpt", 6)], **options)
        steps = Steps()
        recorder = fit(
            "onebit_ddp", 2, callbacks=[steps, PhaseSwitch(FixedStep(8))], ckpt_path=tmp_path / "ddp.ckpt", **options
        )[1]
        assert steps.seen == [6, 7, 8, 9, 10]
        assert recorder.phases == [WARMUP] + [COMPRESSED] * 3

    run_trainers(2, fn)


class Made(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        self.at_start = list(trainer.strategy._phases.steps.made.values())


def test_from_plain_ddp_with_an_adam_beside_the_rest_of_the_steps_is_sgds(tmp_path):
    def fn(rank):
        path = tmp_path / "ddp.ckpt"
        fit(DDPStrategy(**UNUSED), 2, batches=10, model=Both(), callbacks=[SaveAt(path, 4)])
        made = Made()
        fit(OneBitDDPStrategy(**UNUSED), 2, batches=4, model=Both(), ckpt_path=path, callbacks=[made])
        assert made.at_start == [4, 4]

    run_trainers(2, fn)


class Outstanding(pl.Callback):
    """What error feedback holds right after a resume."""

    def on_train_batch_start(self, trainer, *_):
        if not hasattr(self, "first"):
            (compressed,) = trainer.strategy._phases.compressed.values()
            self.first = list(compressed.state.outstanding().values())


@pytest.mark.parametrize(("old", "new"), [(2, 3), (3, 2)])
def test_another_world_size_keeps_the_mean_worker_error_and_the_server_error(tmp_path, old, new):
    path = tmp_path / "5.ckpt"

    def save(rank):
        at = SaveAt(path, 5)
        fit("onebit_ddp", old, batches=10, model=Stepwise(sgd), callbacks=[at])
        return at.outstanding

    def resume(rank):
        now = Outstanding()
        fit("onebit_ddp", new, batches=10, model=Stepwise(sgd), callbacks=[now], ckpt_path=path)
        return now.first

    before, after = run_trainers(old, save)[0], run_trainers(new, resume)
    for outstanding in after:
        for a, b in zip(outstanding, before, strict=True):
            assert b.abs().max() > 0
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


# Fabric


class LoopOf(Loop):
    def save(self, path):
        self.fabric.save(path, {"model": self.model, "optimizer": self.optimizer})

    def load(self, path, batch):
        self.fabric.load(path, {"model": self.model, "optimizer": self.optimizer})
        self.batch = batch
        return self


def test_fabric_makes_no_dense_step_and_the_trainers_steps_bitwise():
    def fn(rank):
        with Messages() as messages:
            loop = LoopOf(OneBitDDPFabricStrategy(), configure=nesterov).run()
        assert messages.count(SAID) == (rank == 0)
        assert loop.phases == [COMPRESSED] * 20
        stats = loop.strategy.comm_stats
        assert (stats[WARMUP].steps, stats[COMPRESSED].steps) == (0, 20)
        assert stats[WARMUP].bytes_sent == stats[WARMUP].baseline_bytes_sent > 0  # to time dense exchanges
        assert same_params(loop.params, fit("onebit_ddp", 2, batches=20, configure=nesterov)[1].params)
        return loop.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


@pytest.mark.parametrize(("freeze", "save"), [(None, 6), (5, 3), (5, 8)])
def test_resuming_in_fabric_is_bitwise(tmp_path, freeze, save):
    def strategy():
        return OneBitDDPFabricStrategy(criterion=None if freeze is None else FixedStep(freeze))

    def fn(rank):
        first = LoopOf(strategy(), configure=nesterov).run(save)
        first.save(tmp_path / "checkpoint")
        full = first.run(20)
        resumed = LoopOf(strategy(), configure=nesterov).load(tmp_path / "checkpoint", save)
        assert resumed.strategy.optimizer_steps == save
        resumed.run(20)
        assert resumed.strategy.optimizer_steps == 20
        assert resumed.phases == full.phases[save:]
        assert same_params(resumed.params, full.params[save:])
        pairs = zip(state_of(resumed.strategy), state_of(full.strategy), strict=True)
        assert all(same_bits(a, b) for a, b in pairs)

    run_trainers(2, fn)
