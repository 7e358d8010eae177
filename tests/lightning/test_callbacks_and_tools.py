"""Lightning's callbacks and tools in the compressed phase: what they do under DDP, they do here."""

import gc
import threading
import warnings
import weakref

import lightning.pytorch as pl
import psutil
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
)
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.tuner import Tuner
from ranks import run_trainers
from test_strategy import Messages
from torch import nn
from trainers import CLASSES, FEATURES, Classifier, Recorder, data, fit, make_trainer, same_params

from lightning_onebit import CommMonitor, FixedStep, OneBitDDPStrategy, Phase, PhaseSwitch
from lightning_onebit.lightning import phase_controller

WARMUP, COMPRESSED = Phase.WARMUP, Phase.COMPRESSED
FREEZE = 4


def run(**kwargs):
    """A run on two ranks whose last batches are compressed."""
    callbacks = [PhaseSwitch(FixedStep(FREEZE)), *kwargs.pop("callbacks", [])]
    return fit(kwargs.pop("strategy", "onebit_ddp"), 2, callbacks=callbacks, **kwargs)


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def equal(first, second):
    return same_params([first], [second])


def test_no_batch_asks_for_what_is_computed_of_all_parameters(monkeypatch):
    """Callbacks look at the strategy after each batch: to ask whether a protocol fits would compute its properties."""
    asked, step_nbytes = [], phase_controller.step_nbytes

    def counting(*args, **kwargs):
        asked.append(args)
        return step_nbytes(*args, **kwargs)

    monkeypatch.setattr(phase_controller, "step_nbytes", counting)

    def fn(rank):
        counts = []
        for batches in (8, 24):
            asked.clear()
            run(callbacks=[CommMonitor()], batches=batches)
            counts.append(len(asked))
        return counts

    for short, long in run_trainers(2, fn):
        assert 0 < short == long


# Averaging of weights: both callbacks copy the module


@pytest.mark.skipif(not hasattr(pl.callbacks, "EMAWeightAveraging"), reason="Lightning 2.6 brings it")
def test_ema_is_the_average_of_the_compressed_trajectory():
    decay = 0.8

    def fn(rank):
        ema = pl.callbacks.EMAWeightAveraging(decay=decay)
        trainer, recorder = run(callbacks=[ema], batches=20)
        assert recorder.phases[-1] is COMPRESSED
        average = recorder.params[0]
        for params in recorder.params[1:]:
            average = [decay * a + (1 - decay) * p for a, p in zip(average, params, strict=True)]
        final = weights(trainer.lightning_module)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(final, average, strict=True))
        return final, recorder.params

    (first, trajectory), (second, other) = run_trainers(2, fn)
    assert equal(first, second)
    assert same_params(trajectory, other)


class Normalized(Classifier):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.Tanh())
        self.head = nn.Linear(16, CLASSES)


@pytest.mark.parametrize(("model", "tolerance"), [(Classifier, 1e-6), (Normalized, 2e-3)])
def test_swa_averages_the_compressed_trajectory(model, tolerance):
    """With batch norm Lightning runs an epoch more, and ends it, under any strategy, with one step of its own (lr 1e-3)."""

    class EpochStarts(pl.Callback):
        def __init__(self):
            self.params = []

        def on_train_epoch_start(self, trainer, pl_module):
            self.params.append(weights(pl_module))

    def fn(rank):
        starts = EpochStarts()
        swa = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=2, annealing_epochs=1)
        module = model()
        # `starts` comes first: it sees the weights before SWA takes its average.
        _, recorder = run(callbacks=[starts, swa], batches=5, max_epochs=4, model=module)
        assert recorder.phases[-1] is COMPRESSED
        final = weights(module)
        for value, same in zip(final, zip(*starts.params[1:4], strict=True), strict=True):
            assert torch.allclose(value, torch.stack(same).mean(0), atol=tolerance)
        return final

    first, second = run_trainers(2, fn)
    assert equal(first, second)


# Callbacks that decide, save and log


class Validated(Classifier):
    """A validation loss that gets worse from the third validation on, and differs by rank."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        epoch = self.current_epoch
        self.log("score", float(abs(epoch - 2)) + 0.1 * self.global_rank, sync_dist=True)

    def val_dataloader(self):
        return data(2, 2)


def test_early_stopping_and_best_checkpoints(tmp_path):
    def fn(rank):
        stop = EarlyStopping("score", patience=1)
        best = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="score", save_top_k=2, save_last=True)
        callbacks = [stop, best]
        trainer, recorder = run(callbacks=callbacks, batches=5, max_epochs=9, model=Validated(), enable_checkpointing=True)
        assert trainer.current_epoch == 4  # epoch 2 is the best, 3 is no better
        assert recorder.phases[-1] is COMPRESSED
        assert stop.stopped_epoch == 3
        # Back to the best one, in the phase that it was saved in.
        again, resumed = run(batches=5, max_epochs=5, model=Validated(), ckpt_path=best.best_model_path)
        assert set(resumed.phases) == {COMPRESSED}
        assert again.strategy.optimizer_steps == 25
        return recorder.params, resumed.params

    first, second = run_trainers(2, fn)
    assert all(same_params(a, b) for a, b in zip(first, second, strict=True))
    assert {path.name for path in tmp_path.iterdir()} >= {"epoch=2.ckpt", "last.ckpt"}
    assert len(list(tmp_path.glob("*.ckpt"))) == 3
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        f"{p.name}.onebit" for p in tmp_path.glob("*.ckpt")
    }


def test_monitors_log_beside_ours(tmp_path):
    """Learning rate, throughput, device and time, with both progress bars."""

    def fn(rank, bar):
        logger = pl.loggers.CSVLogger(tmp_path / bar.__name__, name="", version="")
        throughput = ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]), window_size=5)
        timer = Timer(duration={"hours": 1})
        monitors = [CommMonitor(), LearningRateMonitor("step"), throughput, timer, DeviceStatsMonitor(), bar()]
        options = {"log_every_n_steps": 5, "enable_progress_bar": True}
        frozen = OneBitDDPStrategy(variance_refresh=None)  # in a model as small as this, refreshes are most of the bytes
        trainer, _ = run(strategy=frozen, callbacks=monitors, batches=20, logger=logger, **options)
        assert trainer.progress_bar_metrics["less_sent"] > 3  # the sketches of step 16 are in it
        assert timer.time_elapsed("train") > 0

    for bar in (pl.callbacks.TQDMProgressBar, pl.callbacks.RichProgressBar):
        run_trainers(2, fn, bar)
        metrics = (tmp_path / bar.__name__ / "metrics.csv").read_text()
        expected = ["lr-Adam", "onebit/compression_ratio", "train/device/batches_per_sec", "on_train_batch_end/cpu_percent"]
        for name in expected:
            assert name in metrics.splitlines()[0], name


def test_timer_stops_a_compressed_run_on_all_ranks_alike():
    class Short(Timer):
        """Its time is over on rank 1 first."""

        def time_elapsed(self, stage="train"):
            last_batch = 9 if self.trainer.global_rank == 0 else 5
            return 2.0 if self.trainer.fit_loop.epoch_loop.batch_idx >= last_batch else 0.0

        def setup(self, trainer, *args, **kwargs):
            self.trainer = trainer

    def fn(rank):
        _, recorder = run(callbacks=[Short(duration={"seconds": 1})], batches=20)
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)
    assert len(first) == 10


def test_async_checkpoints_hold_what_the_training_thread_collected(tmp_path):
    def fn(rank):
        saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1)
        plugins = [AsyncCheckpointIO()]
        run(callbacks=[saving], batches=16, plugins=plugins, enable_checkpointing=True, max_epochs=1)
        _, resumed = run(batches=16, ckpt_path=tmp_path / "step=8.ckpt")
        assert set(resumed.phases) == {COMPRESSED}
        return resumed.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)
    saved = torch.load(tmp_path / "step=16.ckpt", weights_only=True)
    assert all(entry["signs"].any() for entry in saved["lightning_onebit"]["optimizers"][0].values())


def test_gradients_and_their_norm_can_be_logged(tmp_path):
    """In hooks, as under DDP; in the compressed phase they are this rank's own."""

    class Logging(Classifier):
        def on_before_optimizer_step(self, optimizer):
            self.log_dict(pl.utilities.grad_norm(self, norm_type=2))

        def on_after_backward(self):
            self.log("bias_gradient", self.head.bias.grad.abs().max(), sync_dist=True)

    def fn(rank):
        trainer, recorder = run(model=Logging())
        return {k: v.item() for k, v in trainer.callback_metrics.items()}, recorder.params

    (first, params), (second, others) = run_trainers(2, fn)
    assert first["grad_2.0_norm_total"] != second["grad_2.0_norm_total"]
    assert first["bias_gradient"] == second["bias_gradient"]
    assert same_params(params, others)


# Tools that run the loops in another way


class WithRate(Classifier):
    def __init__(self):
        super().__init__(lambda module: torch.optim.Adam(module.parameters(), lr=module.lr))
        self.lr = 1e-2


@pytest.mark.parametrize("how", ["tuner", "callback"])
def test_learning_rate_finder_leaves_nothing_behind(how):
    """Not even if user code freezes during the search: then the run goes on as if there had been none."""

    class Freezing(WithRate):
        def on_train_batch_end(self, *_):
            if not self.trainer.callbacks[1:] and self.trainer.strategy.optimizer_steps == 3:
                self.trainer.strategy.freeze_variance()

    def fn(rank):
        options = {"num_training": 12, "min_lr": 1e-2, "max_lr": 2e-2, "early_stop_threshold": None}
        recorder, switch = Recorder(), PhaseSwitch(FixedStep(FREEZE))
        model = Freezing()
        if how == "tuner":
            trainer = make_trainer("onebit_ddp", 2, callbacks=[switch, recorder])
            Tuner(trainer).lr_find(model, data(10, 2), update_attr=False, **options)
            assert trainer.strategy.phase is WARMUP
            assert trainer.strategy.optimizer_steps == 0
            trainer.fit(model, data(10, 2))
        else:
            options["num_training_steps"] = options.pop("num_training")
            finder = LearningRateFinder(update_attr=False, **options)
            trainer = fit("onebit_ddp", 2, callbacks=[finder, switch, recorder], model=model)[0]
            assert len(finder.optimal_lr.results["loss"]) >= 10
        assert trainer.strategy.optimizer_steps == 10
        without = run(model=WithRate())[1]
        assert recorder.phases == without.phases
        assert same_params(recorder.params, without.params)

    run_trainers(2, fn)


def test_batch_size_scaling_is_refused_as_under_ddp():
    def fn(rank):
        trainer = make_trainer("onebit_ddp", 2)
        with pytest.raises(ValueError, match="not supported with distributed strategies"):
            Tuner(trainer).scale_batch_size(Classifier(), data(4, 2))

    run_trainers(2, fn)


def test_another_fit_of_the_same_trainer_is_as_long_as_it_is():
    """The Trainer counts on, the strategy begins anew."""

    def fn(rank):
        trainer = make_trainer("onebit_ddp", 2, callbacks=[PhaseSwitch(FixedStep(4))])
        trainer.fit(Classifier(), data(6, 2))
        trainer.fit_loop.max_epochs = 3
        with Messages() as messages:
            trainer.fit(Classifier(), data(6, 2))
        assert trainer.strategy.optimizer_steps == 12
        assert rank or messages.count("The first 4 optimizer steps of 12 are plain DDP") == 1

    run_trainers(2, fn)


def test_without_an_optimizer_it_says_so():
    class Nothing(Classifier):
        def configure_optimizers(self):
            return None

    def fn(rank):
        with pytest.raises(ValueError, match="There is no optimizer: nothing can be compressed"):
            fit("onebit_ddp", 2, model=Nothing())

    run_trainers(2, fn)


def test_fast_dev_run_is_silent_about_the_switch():
    """It is too short to compress anything, and nobody expects it to."""

    def fn(rank):
        with warnings.catch_warnings(record=True) as caught, Messages() as messages:
            warnings.simplefilter("always")
            _, recorder = run(fast_dev_run=3)
        assert recorder.phases == [WARMUP] * 3
        assert not [w for w in caught if "compress" in str(w.message)]
        assert not messages.count("PhaseSwitch: "), messages.texts
        assert not messages.count("what this run sent"), messages.texts
        assert run(fast_dev_run=6)[1].phases[-1] is COMPRESSED

    run_trainers(2, fn)


def test_overfit_batches_and_sanity_check():
    def fn(rank):
        _, recorder = run(batches=10, max_epochs=4, model=Validated(), overfit_batches=3, num_sanity_val_steps=1)
        assert recorder.phases == [WARMUP] * 3 + [COMPRESSED] * 9
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_other_entry_points_need_no_fit(entry):
    """Attributes exist, nothing is counted or switched; with uneven data as well, and CommMonitor and PhaseSwitch there."""

    class Evaluated(Classifier):
        def test_step(self, batch, batch_idx):
            self.validation_step(batch, batch_idx)

        def predict_step(self, batch, batch_idx):
            return self.head(self.body(batch[0]))

    def fn(rank):
        trainer = make_trainer("onebit_ddp", 2, callbacks=[PhaseSwitch(), CommMonitor()])
        loader = data(5)  # five batches for two ranks
        getattr(trainer, entry)(Evaluated(), loader)
        strategy = trainer.strategy
        assert (strategy.phase, strategy.optimizer_steps) == (WARMUP, 0)
        assert strategy.comm_stats.bytes_sent == 0
        assert "WARMUP" in repr(strategy)
        strategy.resume_warmup()
        with pytest.raises(RuntimeError, match=r"running `trainer.fit`"):
            strategy.freeze_variance()

    run_trainers(2, fn)


def test_several_fits_with_one_trainer():
    """Each starts anew, as its optimizers do; evaluating in between changes nothing."""

    def fn(rank):
        recorder = Recorder()
        trainer = make_trainer("onebit_ddp", 2, callbacks=[PhaseSwitch(FixedStep(FREEZE)), recorder])
        model = Classifier()
        trainer.fit(model, data(10, 2))
        trainer.validate(model, data(3, 2), verbose=False)
        assert trainer.strategy.phase is COMPRESSED
        trainer.fit_loop.max_epochs = 2
        trainer.fit(model, data(10, 2))
        phases = [WARMUP] * (FREEZE - 1) + [COMPRESSED] * (11 - FREEZE)
        assert recorder.phases == phases * 2
        assert [trainer.strategy.comm_stats[phase].steps for phase in Phase] == [FREEZE, 10 - FREEZE]
        second_model = Classifier()
        trainer.fit_loop.max_epochs = 3
        trainer.fit(second_model, data(10, 2))
        assert recorder.phases == phases * 3
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


def test_a_compiled_module_trains_alike():
    """Compiled by AOTAutograd without code generation; Inductor was tried by hand, and takes a minute to warm up."""

    class Silent(Classifier):  # `self.log` in a compiled step is beyond Dynamo, with any strategy
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])

    def fn(rank):
        compiled = run(model=torch.compile(Silent(), backend="aot_eager"))[1]
        assert compiled.phases[-1] is COMPRESSED
        assert same_params(compiled.params, run(model=Silent())[1].params)
        return compiled.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


# Failures


class FailsAt(pl.Callback):
    def __init__(self, batch, error, rank=None):
        self.batch, self.error, self.rank = batch, error, rank

    def on_before_backward(self, trainer, *_):
        if trainer.fit_loop.epoch_loop.batch_idx == self.batch and self.rank in (None, trainer.global_rank):
            raise self.error


def assert_nothing_is_left():
    assert "onebit-lane" not in [thread.name for thread in threading.enumerate()]
    groups = len(dist.distributed_c10d._world.pg_map)
    assert groups == 1  # the default one, which stays under DDP as well


@pytest.mark.parametrize("batch", [2, 6])
@pytest.mark.parametrize(("error", "raised"), [(ValueError("mine"), ValueError), (KeyboardInterrupt(), SystemExit)])
def test_failed_runs_leave_no_thread_and_no_group_and_the_next_one_works(batch, error, raised):
    def fn(rank):
        with pytest.raises(raised):
            run(callbacks=[FailsAt(batch, error)])
        assert_nothing_is_left()
        _, recorder = run()
        assert_nothing_is_left()
        assert recorder.phases[-1] is COMPRESSED
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


class Keeps(pl.Callback):
    """A weak reference to the model that DDP wraps."""

    def on_train_start(self, trainer, pl_module):
        self.wrapper = weakref.ref(trainer.strategy.model)


@pytest.mark.parametrize(("num_nodes", "strategy_options"), [(1, {}), (1, {"overlap": True}), (2, {"hierarchical": True})])
def test_runs_leave_no_memory_and_no_thread_of_a_library_behind(num_nodes, strategy_options):
    """DDP's wrapper has buckets as large as the gradients; gloo starts three threads for each group, unknown to Python."""

    def fn(rank):
        fit("ddp", 2 * num_nodes, num_nodes=num_nodes)
        before = psutil.Process().num_threads()
        for error in (None, ValueError("mine"), None):
            keeps = Keeps()
            callbacks = [PhaseSwitch(FixedStep(FREEZE)), keeps, FailsAt(6 if error else None, error)]
            try:
                fit(OneBitDDPStrategy(**strategy_options), 2 * num_nodes, num_nodes=num_nodes, callbacks=callbacks)
            except ValueError as raised:
                raised.__traceback__ = None
            gc.collect()
            assert keeps.wrapper() is None
            assert psutil.Process().num_threads() == before

    run_trainers(2 * num_nodes, fn, num_nodes=num_nodes)


@pytest.mark.parametrize("strategy_options", [{}, {"overlap": True}])
def test_one_rank_that_fails_stops_the_others(strategy_options):
    """As soon as its process has ended; those raise, and leave nothing behind either."""

    def fn(rank):
        callbacks = [PhaseSwitch(FixedStep(FREEZE)), FailsAt(6, ValueError("mine"), rank=0)]
        with pytest.raises(ValueError if rank == 0 else RuntimeError) as caught:
            fit(OneBitDDPStrategy(**strategy_options), 2, callbacks=callbacks)
        assert_nothing_is_left()
        return str(caught.value)

    first, second = run_trainers(2, fn)
    assert first == "mine"
    assert "losed by peer" in second or "reset by peer" in second


class Kept(OnExceptionCheckpoint):
    def teardown(self, *_):
        """Lightning would remove the file after a run that ended well."""


@pytest.mark.parametrize("failing", [None, 0])
def test_checkpoint_on_exception_resumes_in_the_compressed_phase(tmp_path, failing):
    """Also if one rank alone has failed: it waits for nobody, and its error is the one that is seen."""

    def fail(rank):
        error = ValueError if failing in (None, rank) else RuntimeError
        callbacks = [Kept(tmp_path), FailsAt(6, ValueError("mine"), rank=failing)]
        with pytest.raises(error, match="mine" if error is ValueError else "losed by peer|reset by peer"):
            run(callbacks=callbacks, enable_checkpointing=True)
        assert_nothing_is_left()

    def resume(rank):
        _, resumed = run(ckpt_path=tmp_path / "on_exception.ckpt")
        assert set(resumed.phases) == {COMPRESSED}
        assert len(resumed.phases) == 4
        return resumed.params

    run_trainers(2, fail)
    first, second = run_trainers(2, resume)
    assert same_params(first, second)
