"""The strategy in a Trainer, on forked ranks."""

import logging
import time
import warnings

import lightning.pytorch as pl
import pytest
import torch
from ranks import run_trainers
from torch import nn
from trainers import Classifier, data, fit, make_trainer, same_params

from lightning_onebit import (
    CommMonitor,
    DivergenceGuard,
    FixedStep,
    OneBitDDPStrategy,
    Phase,
    PhaseSwitch,
    VarianceStability,
)

WARMUP, COMPRESSED = Phase.WARMUP, Phase.COMPRESSED


def two_groups(kind, **options):
    def configure(module):
        groups = [
            {"params": module.body.parameters(), "lr": 1e-2},
            {"params": module.head.parameters(), "lr": 3e-3, "betas": (0.8, 0.99), "weight_decay": 0.1},
        ]
        return kind(groups, **options)

    return configure


class Messages(logging.Handler):
    """Everything that was logged or warned, as text."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())

    def __enter__(self):
        self._logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
        self._logger.addHandler(self)
        self._catcher = warnings.catch_warnings(record=True)
        self._warnings = self._catcher.__enter__()
        warnings.simplefilter("always")
        return self

    def __exit__(self, *exc_info):
        self.texts.extend(str(w.message) for w in self._warnings)
        self._catcher.__exit__(*exc_info)
        self._logger.removeHandler(self)

    def count(self, text):
        return sum(text in message for message in self.texts)


# Warm-up


@pytest.mark.parametrize(
    ("configure", "ddp_options"),
    [
        (two_groups(torch.optim.Adam), {}),
        (two_groups(torch.optim.Adam, foreach=True), {"bucket_cap_mb": 0.001}),
        (two_groups(torch.optim.Adam, fused=True), {"gradient_as_bucket_view": True}),
        (two_groups(torch.optim.AdamW), {"find_unused_parameters": True}),
        (two_groups(torch.optim.AdamW, foreach=True, maximize=True), {"static_graph": True}),
        (two_groups(torch.optim.AdamW, fused=True), {"broadcast_buffers": False}),
    ],
)
def test_warmup_is_bitwise_ddp(configure, ddp_options):
    """On three ranks, where the order of a sum matters, as it does not on two."""
    world_size = 3

    def fn(rank):
        dense = fit(pl.strategies.DDPStrategy(**ddp_options), world_size, configure=configure)[1]
        ours = fit(OneBitDDPStrategy(**ddp_options), world_size, configure=configure)[1]
        assert set(ours.phases) == {WARMUP}
        assert len(ours.params) == 10
        assert same_params(ours.params, dense.params)

    run_trainers(world_size, fn)


# Both phases


@pytest.mark.parametrize(("world_size", "space"), [(2, "momentum"), (3, "update")])
def test_ranks_agree_bitwise_in_both_phases(world_size, space):
    class Momentum(pl.Callback):
        def __init__(self):
            self.trace = []

        def on_train_batch_end(self, trainer, *_):
            self.trace.append([s["exp_avg"].clone() for s in trainer.optimizers[0].state_dict()["state"].values()])

    def fn(rank):
        momentum = Momentum()
        strategy = OneBitDDPStrategy(block_size=16, space=space)
        callbacks = [PhaseSwitch(FixedStep(5)), momentum]
        _, recorder = fit(strategy, world_size, batches=20, callbacks=callbacks, configure=two_groups(torch.optim.AdamW))
        assert recorder.phases == [WARMUP] * 4 + [COMPRESSED] * 16
        return recorder.params, momentum.trace

    outcomes = run_trainers(world_size, fn)
    for params, momenta in outcomes[1:]:
        assert same_params(params, outcomes[0][0])
        assert same_params(momenta, outcomes[0][1])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_fixed_step_counts_optimizer_steps(accumulate):
    def fn(rank):
        trainer, recorder = fit(
            "onebit_ddp",
            2,
            batches=12 * accumulate,
            callbacks=[PhaseSwitch(FixedStep(7))],
            accumulate_grad_batches=accumulate,
        )
        stats = trainer.strategy.comm_stats
        assert (stats[WARMUP].steps, stats[COMPRESSED].steps) == (7, 5)
        assert trainer.strategy.optimizer_steps == 12
        # The phase is that after the batch: it changes with the one that completes step 7.
        assert recorder.phases.index(COMPRESSED) == 7 * accumulate - 1
        return recorder.params

    first, second = run_trainers(2, fn)
    # While gradients accumulate nothing moves.
    assert same_params(first, second)


def test_accumulation_equals_larger_batches():
    """Two micro-batches of 8 are one batch of 16, up to rounding, in the compressed phase as well."""

    def micro_batch(rank, index):
        generator = torch.Generator().manual_seed(100 * index + rank)
        x = torch.randn(8, 12, generator=generator, dtype=torch.float64)
        return x, torch.randint(5, (8,), generator=generator)

    class Micro(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(micro_batch(self.global_rank, batch_idx), batch_idx)

    class Whole(Classifier):
        def training_step(self, batch, batch_idx):
            halves = [micro_batch(self.global_rank, 2 * batch_idx + i) for i in range(2)]
            return super().training_step([torch.cat(parts) for parts in zip(*halves, strict=True)], batch_idx)

    def fn(rank):
        def run(model, **kwargs):
            return fit("onebit_ddp", 2, callbacks=[PhaseSwitch(FixedStep(3))], precision="64-true", model=model, **kwargs)[1]

        accumulated = run(Micro(), batches=20, accumulate_grad_batches=2)
        whole = run(Whole(), batches=10)
        assert whole.phases[-1] is accumulated.phases[-1] is COMPRESSED
        for a, b in zip(accumulated.params[-1], whole.params[-1], strict=True):
            assert torch.allclose(a, b, atol=1e-9)

    run_trainers(2, fn)


def test_bytes_are_counted_against_dense():
    def fn(rank):
        model = Classifier(hidden=256)
        frozen = OneBitDDPStrategy(variance_refresh=None)
        trainer, _ = fit(frozen, 2, batches=20, callbacks=[PhaseSwitch(FixedStep(5))], model=model)
        stats = trainer.strategy.comm_stats
        numel = sum(p.numel() for p in model.parameters())
        assert stats[WARMUP].dense_equivalent_bytes == 5 * 4 * numel
        assert stats[COMPRESSED].dense_equivalent_bytes == 15 * 4 * numel
        in_steps = stats[WARMUP].bytes_sent - stats[WARMUP].baseline_bytes_sent
        assert stats[WARMUP].dense_equivalent_bytes <= in_steps <= 1.01 * 5 * 4 * numel
        assert 29 < stats.compression_ratio < 32
        assert stats.bytes_sent == stats[WARMUP].bytes_sent + stats[COMPRESSED].bytes_sent
        assert stats.seconds_waited > 0

    run_trainers(2, fn)


def test_trains_as_well_as_adam():
    """On a problem learned to the end, the final loss of both lies together. Longer studies are in benchmarks/."""

    def final_losses(strategy, callbacks=()):
        def fn(rank):
            trainer, _ = fit(strategy, 2, batches=30, max_epochs=8, callbacks=callbacks)
            validation = trainer.validate(trainer.lightning_module, data(20, 2), verbose=False)
            return validation[0]["val_loss"]

        return run_trainers(2, fn)[0]

    adam = final_losses("ddp")
    compressed = final_losses("onebit_ddp", [PhaseSwitch(FixedStep(60))])
    assert compressed < adam * 1.1 + 0.02


# The switch


class EndWhenCompressed(pl.Callback):
    def on_train_batch_start(self, trainer, *_):
        trainer.should_stop = trainer.strategy.phase is COMPRESSED


@pytest.mark.parametrize(
    ("refresh", "first", "last"),
    [
        ("auto", 20, 20),  # dense steps: the run has less than 1000
        (None, 40, 48),  # two windows of 20 steps to 30% of the run
    ],
)
def test_default_switch_appears_once_and_its_criterion_freezes(refresh, first, last):
    def fn(rank):
        with Messages() as messages:
            strategy, options = OneBitDDPStrategy(variance_refresh=refresh), {"batches": 40, "max_epochs": 4}
            trainer, recorder = fit(strategy, 2, callbacks=[EndWhenCompressed()], **options)
            assert [type(c.criterion) for c in trainer.callbacks if isinstance(c, PhaseSwitch)] == [VarianceStability]
        assert recorder.phases[-1] is COMPRESSED
        assert first <= recorder.phases.index(COMPRESSED) <= last
        if rank == 0:
            assert messages.count("Using PhaseSwitch() with its default criterion") == 1
            assert messages.count("freezing the second moment after step") == 1
        return recorder.phases

    phases = run_trainers(2, fn)
    assert phases[0] == phases[1]


def test_ranks_switch_at_the_same_step_when_clock_and_data_differ():
    class Skewed(Classifier):
        def training_step(self, batch, batch_idx):
            time.sleep(0.01 * self.global_rank)
            return (1 + 10 * self.global_rank) * super().training_step(batch, batch_idx)

    def fn(rank):
        switch = PhaseSwitch(VarianceStability(tolerance=0.5, window=5, patience=2, min_steps=0, max_steps=None))
        return fit("onebit_ddp", 2, batches=40, model=Skewed(), callbacks=[switch])[1].phases

    first, second = run_trainers(2, fn)
    assert first == second
    assert COMPRESSED in first


def test_growing_second_moment_never_passes_and_the_end_says_so():
    """The doubt about the paper's premise: here v grows all the time, so its one-sided test would pass at once."""

    class Growing(Classifier):
        def training_step(self, batch, batch_idx):
            return 2.0**batch_idx * super().training_step(batch, batch_idx)

    def fn(rank):
        switch = PhaseSwitch(VarianceStability(max_steps=None))
        with Messages() as messages:
            strategy = OneBitDDPStrategy(variance_refresh="auto")
            _, recorder = fit(strategy, 2, batches=40, model=Growing(), callbacks=[switch])
        assert set(recorder.phases) == {WARMUP}
        if rank == 0:
            assert messages.count("never compressed anything") == 1
            assert messages.count("so D will change by") == 1

    run_trainers(2, fn)


def test_forced_switch_warns_with_the_reason():
    def fn(rank):
        switch = PhaseSwitch(VarianceStability(tolerance=1e-9, window=3, min_steps=0, max_steps=10))
        with Messages() as messages:
            strategy = OneBitDDPStrategy(variance_refresh=None)
            _, recorder = fit(strategy, 2, batches=15, callbacks=[switch])
        assert recorder.phases.index(COMPRESSED) == 9
        if rank == 0:
            said = "after step 10: max_steps is reached at step 10 although the second moment may still move"
            assert messages.count(f"freezing the second moment {said}") == 1

    run_trainers(2, fn)


def test_learning_rate_warmup_holds_the_switch_back_where_nothing_is_renewed():
    def configure(module):
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 25))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def fn(rank):
        def first_compressed(**options):
            switch = PhaseSwitch(VarianceStability(tolerance=10.0, window=2, patience=2, min_steps=0, max_steps=30))
            with Messages() as messages:
                strategy = OneBitDDPStrategy(**options)
                _, recorder = fit(strategy, 2, batches=32, configure=configure, callbacks=[switch])
            assert messages.count("lr_scheduler.step()") == 0
            is_without_effect = options == {"variance_refresh": "auto", "space": "momentum"}
            said = messages.count("variance_refresh='auto' is None with space='momentum'")
            assert said == (is_without_effect and rank == 0)
            return recorder.phases.index(COMPRESSED)

        assert 25 <= first_compressed(variance_refresh=None) <= 29
        assert 25 <= first_compressed(variance_refresh="auto", space="momentum") <= 29  # where "auto" is None
        assert first_compressed(variance_refresh="auto") < 10

    run_trainers(2, fn)


def test_two_switches_are_refused():
    class Bringing(Classifier):
        def configure_callbacks(self):
            return [PhaseSwitch()]

    def of_the_trainer(rank):
        with pytest.raises((ValueError, RuntimeError), match="PhaseSwitch"):
            fit("onebit_ddp", 2, callbacks=[PhaseSwitch(), PhaseSwitch()])

    def of_the_module_too(rank):
        with pytest.raises(ValueError, match="Found 2 PhaseSwitch callbacks"):
            fit("onebit_ddp", 2, callbacks=[type("Other", (PhaseSwitch,), {})()], model=Bringing())

    # In processes of their own: a rank that is late would meet the store of the run that another has left.
    run_trainers(2, of_the_trainer)
    run_trainers(2, of_the_module_too)


def test_switch_of_the_module_is_used():
    class Bringing(Classifier):
        def configure_callbacks(self):
            return [PhaseSwitch(FixedStep(2))]

    def fn(rank):
        # The module's callbacks run after the Trainer's, so the recorder sees the new phase one batch later.
        assert fit("onebit_ddp", 2, model=Bringing())[1].phases == [WARMUP] * 2 + [COMPRESSED] * 8

    run_trainers(2, fn)


def test_switching_by_hand_and_back():
    class ByHand(PhaseSwitch):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 4:
                trainer.strategy.freeze_variance()
                trainer.strategy.freeze_variance()  # no effect
            if batch_idx == 9:
                trainer.strategy.resume_warmup()
            if batch_idx == 14:
                trainer.strategy.freeze_variance()

    def fn(rank):
        trainer, recorder = fit("onebit_ddp", 2, batches=20, callbacks=[ByHand(FixedStep(1))])
        stats = trainer.strategy.comm_stats
        assert (stats[WARMUP].steps, stats[COMPRESSED].steps) == (10, 10)
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


@pytest.mark.parametrize("switch", ["freeze_variance", "resume_warmup"])
def test_no_switch_within_a_step_as_training_step_is_one(switch):
    """The step would go on in its phase with gradients of the other one: each rank with its own."""

    class WithinStep(Classifier):
        def training_step(self, batch, batch_idx):
            if batch_idx == 4:
                with pytest.raises(RuntimeError, match=rf"{switch}\(\) was called within an optimizer step.* HINT"):
                    getattr(self.trainer.strategy, switch)()
            return super().training_step(batch, batch_idx)

    def fn(rank):
        start = 100 if switch == "freeze_variance" else 2
        trainer, recorder = fit("onebit_ddp", 2, model=WithinStep(), callbacks=[PhaseSwitch(FixedStep(start))])
        assert trainer.global_step == 10
        assert set(recorder.phases[3:]) == {WARMUP if switch == "freeze_variance" else COMPRESSED}
        return recorder.params

    assert same_params(*run_trainers(2, fn))


def test_freezing_outside_a_run_or_too_early_is_explained():
    with pytest.raises(RuntimeError, match=r"running `trainer.fit`"):
        OneBitDDPStrategy().freeze_variance()

    class TooEarly(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            with pytest.raises(RuntimeError, match="before the first optimizer step"):
                trainer.strategy.freeze_variance()

    def fn(rank):
        fit("onebit_ddp", 2, batches=1, callbacks=[TooEarly()])

    run_trainers(2, fn)


# Never silently dense


def test_one_process_says_that_nothing_is_compressed():
    def fn(rank):
        with Messages() as messages:
            _, recorder = fit("onebit_ddp", 1, callbacks=[PhaseSwitch(FixedStep(2))])
        assert messages.count("runs with one process") == 1
        assert messages.count("never compressed anything") == 0
        assert set(recorder.phases) == {WARMUP}
        dense = fit("ddp", 1)[1]
        assert same_params(recorder.params, dense.params)

    run_trainers(1, fn)


def test_one_process_frozen_by_hand_goes_on_unquantized():
    class ByHand(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 4:
                trainer.strategy.freeze_variance()

    def fn(rank):
        _, recorder = fit("onebit_ddp", 1, callbacks=[ByHand()])
        dense = fit("ddp", 1)[1]
        for a, b in zip(recorder.params[-1], dense.params[-1], strict=True):
            assert 0 < (a - b).abs().max() < 0.1

    run_trainers(1, fn)


@pytest.mark.parametrize(
    ("configure", "message"),
    [
        (
            lambda m: torch.optim.RMSprop(m.parameters()),
            r"RMSprop cannot be compressed: a compressed step applies .*Supported are .*Adam.* Beside one",
        ),
        (
            lambda m: type("Mine", (torch.optim.Adam,), {"step": lambda self: None})(m.parameters()),
            "Mine cannot be compressed: it has `step` of its own",
        ),
        (lambda m: torch.optim.Adam(m.parameters(), amsgrad=True), "amsgrad=True"),
        (lambda m: torch.optim.AdamW(m.parameters(), differentiable=True, foreach=False), "differentiable=True"),
    ],
)
def test_unsupported_optimizers_are_an_error_before_training(configure, message):
    class NoBatch(pl.Callback):
        def on_train_start(self, *_):
            raise AssertionError("training has started")

    def fn(rank):
        with pytest.raises(ValueError, match=message):
            fit("onebit_ddp", 2, configure=configure, callbacks=[NoBatch()])

    run_trainers(2, fn)


def test_sparse_gradients_are_an_error_before_training():
    class Sparse(Classifier):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(10, 4, sparse=True)

    def fn(rank):
        with pytest.raises(ValueError, match=r"'words' \(Embedding\) produces sparse gradients"):
            fit("onebit_ddp", 2, model=Sparse())

    run_trainers(2, fn)


@pytest.mark.parametrize("strategy", ["ddp", "auto"])
def test_on_another_strategy_our_callbacks_do_nothing_and_it_is_said_once(strategy, tmp_path):
    """So one string is changed to compare; and a checkpoint of such a run loads here."""

    def fn(rank):
        _, plain = fit(strategy, 1)
        callbacks = [PhaseSwitch(FixedStep(3)), CommMonitor(1), DivergenceGuard(1)]
        with Messages() as messages:
            trainer, recorder = fit(strategy, 1, callbacks=callbacks)
            trainer.validate(trainer.lightning_module, data(2), verbose=False)
        assert same_params(plain.params, recorder.params)
        assert "less_sent" not in trainer.progress_bar_metrics
        assert messages.count("callbacks of lightning_onebit do nothing there") == 1, messages.texts
        trainer.save_checkpoint(tmp_path / "other.ckpt")
        path = tmp_path / "other.ckpt"
        _, resumed = fit("onebit_ddp", 1, callbacks=[PhaseSwitch(FixedStep(3))], ckpt_path=path, max_epochs=2)
        assert set(resumed.phases) == {Phase.WARMUP}  # one process freezes nothing by itself

    run_trainers(1, fn)


def test_raw_optimizer_step_in_the_compressed_phase_is_an_error():
    class Raw(Classifier):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def fn(rank):
        model = Raw()
        model.automatic_optimization = False
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(RuntimeError, match="In the compressed phase the optimizer must step through Lightning"):
                fit("onebit_ddp", 2, model=model, callbacks=[PhaseSwitch(FixedStep(3))])
        early = [w for w in caught if "which is still to come, the optimizer must step through" in str(w.message)]
        assert len(early) == (rank == 0)

    run_trainers(2, fn)


def test_gradients_that_ddp_never_averages_end_the_run_at_the_first_step():
    """Else the ranks would drift apart, as they do under DDP, and nothing would say why."""

    class Bare(Classifier):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx).backward()
            self.optimizers().step()

    def fn(rank):
        model = Bare()
        model.automatic_optimization = False
        with pytest.raises(RuntimeError, match=r"Adam has made a step, but DDP has seen no backward.*manual_backward"):
            fit("onebit_ddp", 2, model=model)

    run_trainers(2, fn)


# Arguments


def test_invalid_arguments_are_explained():
    for options, message in [
        ({"block_size": 100}, "block_size: 100. Must be a multiple of 8"),
        ({"scale": "l3"}, "scale: 'l3'"),
        ({"space": "gradient"}, "space: 'gradient'"),
        ({"overlap": "yes"}, "overlap: 'yes'"),
        ({"hierarchical": "yes"}, "hierarchical: 'yes'"),
        ({"bucket_cap_mb": 0}, "bucket_cap_mb: 0"),
        ({"ddp_comm_hook": print}, "cannot be combined with ddp_comm_hook"),
        ({"model_averaging_period": 3}, "cannot be combined with model_averaging_period"),
    ]:
        with pytest.raises(ValueError, match=message):
            OneBitDDPStrategy(**options)
    with pytest.raises(TypeError, match="Invalid criterion"):
        PhaseSwitch(criterion=100)


def test_strategies_are_registered():
    from lightning.pytorch.strategies import StrategyRegistry

    for name in ("onebit_ddp", "onebit_ddp_spawn", "onebit_ddp_fork", "onebit_ddp_notebook"):
        assert isinstance(StrategyRegistry.get(name), OneBitDDPStrategy)
        for unused in (True, False):
            strategy = StrategyRegistry.get(f"{name}_find_unused_parameters_{str(unused).lower()}")
            assert strategy._ddp_kwargs["find_unused_parameters"] is unused
    OneBitDDPStrategy.register_strategies(StrategyRegistry)  # again: no effect
    assert isinstance(pl.Trainer(strategy="onebit_ddp", devices=1, accelerator="cpu").strategy, OneBitDDPStrategy)


# Neighbours


def test_monitor_logs_to_every_logger(tmp_path):
    def fn(rank):
        logger = pl.loggers.CSVLogger(tmp_path, name="", version="")
        callbacks = [PhaseSwitch(FixedStep(10)), CommMonitor(every_n_steps=5)]
        frozen = OneBitDDPStrategy(variance_refresh=None)  # so that steps are alike, but for sketches at step 16
        trainer, _ = fit(frozen, 2, batches=20, callbacks=callbacks, logger=logger, model=Classifier(hidden=128))
        assert "less_sent" in trainer.progress_bar_metrics
        return logger.experiment.metrics if rank == 0 else None

    run_trainers(2, fn)
    lines = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    rows = [row for row in rows if row["onebit/sent_mib"]]
    assert [float(row["onebit/compressed_phase"]) for row in rows] == [0, 1, 1, 1]
    ratios = [float(row["onebit/compression_ratio"]) for row in rows]
    assert ratios[0] == pytest.approx(1, abs=0.01)
    assert ratios[1] == pytest.approx(1, abs=0.01)
    assert 25 < ratios[2] < 32
    sent, sketches = (float(rows[3][f"onebit/{name}_mib"]) for name in ("sent", "sketch"))
    assert 0 < sketches < sent
    assert 25 < float(rows[3]["onebit/dense_equivalent_mib"]) / (sent - sketches) < 32


def test_unused_parameters_and_a_nonfinite_loss_do_not_stop_the_run():
    class Patchy(Classifier):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(12, 5)

        def training_step(self, batch, batch_idx):
            x, y = batch
            logits = self.head(self.body(x))
            if batch_idx % 3 == 0:
                logits = logits + self.extra(x)
            loss = nn.functional.cross_entropy(logits, y)
            return loss * float("nan") if batch_idx == 15 and self.global_rank == 1 else loss

    def fn(rank):
        with Messages() as messages:
            _, recorder = fit(
                "onebit_ddp_find_unused_parameters_true",
                2,
                batches=30,
                model=Patchy(),
                callbacks=[PhaseSwitch(FixedStep(8))],
            )
        assert same_params(recorder.params[14:15], recorder.params[15:16])
        assert not same_params(recorder.params[15:16], recorder.params[16:17])
        if rank == 0:
            assert messages.count("all ranks skip this step") == 1
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


def test_validation_test_and_prediction_alone_and_several_fits():
    def fn(rank):
        trainer = make_trainer("onebit_ddp", 2, callbacks=[PhaseSwitch(FixedStep(3))])
        model = Classifier()
        trainer.validate(model, data(2, 2), verbose=False)
        assert trainer.strategy.phase is WARMUP
        trainer.fit(model, data(6, 2))
        assert trainer.strategy.phase is COMPRESSED
        trainer.fit_loop.max_epochs = 2
        trainer.fit(model, data(6, 2))
        # A new fit makes new optimizers: it starts with a warm-up of its own.
        assert trainer.strategy.comm_stats[WARMUP].steps == 3
        assert trainer.strategy.phase is COMPRESSED
        return [p.detach().clone() for p in model.parameters()]

    first, second = run_trainers(2, fn)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_two_optimizers_in_manual_optimization():
    class Pair(Classifier):
        def __init__(self):
            super().__init__(
                lambda m: [torch.optim.Adam(m.body.parameters(), 1e-2), torch.optim.AdamW(m.head.parameters(), 1e-2)]
            )
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

    def fn(rank):
        trainer, recorder = fit("onebit_ddp", 2, batches=20, model=Pair(), callbacks=[PhaseSwitch(FixedStep(6))])
        stats = trainer.strategy.comm_stats
        assert (stats[WARMUP].steps, stats[COMPRESSED].steps) == (12, 28)
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


def test_gradients_stay_local_after_the_switch():
    """User hooks see and may change what is compressed."""

    class Looking(pl.Callback):
        def __init__(self):
            self.grads = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.grads.append(pl_module.head.bias.grad.clone())

    def fn(rank):
        looking = Looking()
        fit("onebit_ddp", 2, batches=8, callbacks=[PhaseSwitch(FixedStep(4)), looking])
        return looking.grads

    first, second = run_trainers(2, fn)
    assert [torch.equal(a, b) for a, b in zip(first, second, strict=True)] == [True] * 4 + [False] * 4


def test_ddp_options_change_no_bit_of_the_compressed_phase():
    """With two ranks, where the order of a dense sum cannot matter either."""
    every = [
        {"bucket_cap_mb": 0.001},
        {"gradient_as_bucket_view": True},
        {"static_graph": True},
        {"find_unused_parameters": True},
        {"broadcast_buffers": False, "gradient_as_bucket_view": True, "bucket_cap_mb": 0.0005},
    ]

    def fn(rank):
        def params(**ddp_options):
            strategy = OneBitDDPStrategy(block_size=16, **ddp_options)
            recorder = fit(strategy, 2, batches=16, callbacks=[PhaseSwitch(FixedStep(4))])[1]
            assert recorder.phases[-1] is COMPRESSED
            return recorder.params

        plain = params()
        for options in every:
            assert same_params(params(**options), plain), options

    run_trainers(2, fn)


def test_rows_of_an_embedding_that_never_occur_stay_bitwise_as_they_were():
    class Words(Classifier):
        def __init__(self):
            super().__init__(lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.0))
            self.words = nn.Embedding(50, 12)

        def training_step(self, batch, batch_idx):
            x, y = batch
            late = [30] if batch_idx >= 60 and self.global_rank == 1 else []  # takes part after the refresh of step 64
            rows = torch.tensor([1, 4, 9, *late])
            return super().training_step((x + self.words(rows).sum(0), y), batch_idx)

    def fn(rank):
        model = Words()
        initial = model.words.weight.detach().clone()
        fit("onebit_ddp", 2, batches=70, model=model, callbacks=[PhaseSwitch(FixedStep(10))])
        changed = (model.words.weight.detach() != initial).any(dim=1).nonzero().flatten().tolist()
        assert changed == [1, 4, 9, 30]
        return model.words.weight.detach()

    first, second = run_trainers(2, fn)
    assert torch.equal(first, second)
