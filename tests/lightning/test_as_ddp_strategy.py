"""What Lightning's own tests ask of DDPStrategy, asked of ours, in the compressed phase where that makes a difference."""

import copy
import inspect
import pickle
from datetime import timedelta

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from ranks import run_trainers
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler, TensorDataset
from trainers import BATCH_SIZE, CLASSES, FEATURES, Classifier, Recorder, data, fit, make_trainer, same_params

from lightning_onebit import FixedStep, OneBitDDPFabricStrategy, OneBitDDPStrategy, Phase, PhaseSwitch

WARMUP, COMPRESSED = Phase.WARMUP, Phase.COMPRESSED
FREEZE = 4


def run(strategy="onebit_ddp", world_size=2, **kwargs):
    callbacks = [PhaseSwitch(FixedStep(FREEZE)), *kwargs.pop("callbacks", [])]
    return fit(strategy, world_size, callbacks=callbacks, **kwargs)


def trainer_of(strategy, **kwargs):
    return make_trainer(strategy, kwargs.pop("devices", 2), **kwargs)


# The string, the launcher, the process group


@pytest.mark.parametrize("unused", [None, False, True])
@pytest.mark.parametrize(
    ("name", "launcher", "start_method"),
    [
        ("onebit_ddp", _SubprocessScriptLauncher, "popen"),
        ("onebit_ddp_spawn", _MultiProcessingLauncher, "spawn"),
        ("onebit_ddp_fork", _MultiProcessingLauncher, "fork"),
        ("onebit_ddp_notebook", _MultiProcessingLauncher, "fork"),
    ],
)
def test_a_string_means_what_it_means_for_ddp(name, launcher, start_method, unused):
    suffix = "" if unused is None else f"_find_unused_parameters_{str(unused).lower()}"
    strategy = trainer_of(f"{name}{suffix}").strategy
    stock = trainer_of(f"{name}{suffix}".removeprefix("onebit_")).strategy
    assert type(strategy) is OneBitDDPStrategy
    assert type(strategy.launcher) is type(stock.launcher) is launcher
    assert strategy._start_method == stock._start_method == start_method
    assert strategy.launcher.is_interactive_compatible == stock.launcher.is_interactive_compatible
    assert strategy._ddp_kwargs == {**stock._ddp_kwargs, "bucket_cap_mb": None}
    assert (strategy.num_processes, strategy.root_device) == (2, torch.device("cpu"))
    assert strategy.distributed_sampler_kwargs == stock.distributed_sampler_kwargs


def test_every_argument_of_ddp_is_accepted():
    """And each is where DDPStrategy has it; but those that ask for another communication."""
    names = [
        p.name for p in inspect.signature(DDPStrategy.__init__).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    given = {
        "accelerator": pl.accelerators.CPUAccelerator(),
        "parallel_devices": [torch.device("cpu")] * 3,
        "cluster_environment": LightningEnvironment(),
        "checkpoint_io": TorchCheckpointIO(),
        "precision_plugin": pl.plugins.DoublePrecision(),
        "process_group_backend": "gloo",
        "timeout": timedelta(seconds=77),
        "start_method": "fork",
    }
    refused = {"ddp_comm_state", "ddp_comm_hook", "ddp_comm_wrapper", "model_averaging_period"}
    assert set(names) == {"self", *given, *refused}
    ours, stock = OneBitDDPStrategy(**given, static_graph=True), DDPStrategy(**given, static_graph=True)
    for name in ("_accelerator", "parallel_devices", "cluster_environment", "_checkpoint_io", "_precision_plugin"):
        assert getattr(ours, name) is getattr(stock, name) is not None
    for name in ("process_group_backend", "_timeout", "_start_method", "num_processes"):
        assert getattr(ours, name) == getattr(stock, name)
    assert ours._ddp_kwargs["static_graph"] is True
    positional = OneBitDDPStrategy(*list(given.values())[:5])
    assert positional._precision_plugin is given["precision_plugin"]


@pytest.mark.parametrize("kind", [OneBitDDPStrategy, OneBitDDPFabricStrategy])
def test_arguments_that_ask_for_another_communication_are_refused(kind):
    hooks = ("ddp_comm_hook", "ddp_comm_state", "ddp_comm_wrapper", "model_averaging_period")
    for name in (*hooks, "process_group", "device_mesh", "mixed_precision", "delay_all_reduce_named_params"):
        with pytest.raises(ValueError, match=f"{kind.__name__} does its own .* combined with {name}=.* HINT: leave it out"):
            kind(**{name: object()})


def test_the_timeout_and_backend_are_those_of_all_process_groups():
    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            groups = [dist.group.WORLD, trainer.strategy._phases.groups.peers.group]
            assert groups[0] is not groups[1]
            backends = [group._get_backend(torch.device("cpu")) for group in groups]
            self.timeouts = [backend.options._timeout for backend in backends]
            self.names = [dist.get_backend(group) for group in groups]

    def fn(rank):
        look = Look()
        strategy = OneBitDDPStrategy(timeout=timedelta(seconds=77), process_group_backend="gloo")
        run(strategy, callbacks=[look])
        assert look.timeouts == [timedelta(seconds=77)] * 2
        assert look.names == ["gloo", "gloo"]

    run_trainers(2, fn)


def test_processes_that_others_started_are_not_started_again(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # else Lightning sets it

    class External(LightningEnvironment):
        creates_processes_externally = True

    strategy = OneBitDDPStrategy(cluster_environment=External(), parallel_devices=[torch.device("cpu")] * 2)
    strategy._configure_launcher()
    assert strategy.launcher.launch(lambda: "launched here") == "launched here"
    assert not strategy.launcher.procs


def test_it_can_be_registered_under_another_name_and_subclassed():
    class Mine(OneBitDDPStrategy):
        pass

    io = TorchCheckpointIO()
    StrategyRegistry.register("mine", Mine, checkpoint_io=io, block_size=64)
    try:
        strategy = trainer_of("mine").strategy
        assert (type(strategy), strategy.checkpoint_io, strategy.config.block_size) == (Mine, io, 64)
        assert repr(strategy).startswith("Mine(phase=WARMUP")
    finally:
        StrategyRegistry.remove("mine")


def test_it_is_pickled_and_copied_before_a_run():
    """Spawned processes get it pickled."""
    for copied in (
        pickle.loads(pickle.dumps(OneBitDDPStrategy(block_size=64))),
        copy.deepcopy(OneBitDDPStrategy(block_size=64)),
    ):
        assert copied.config.block_size == 64
        assert repr(copied) == repr(OneBitDDPStrategy(block_size=64))


# The model and its wrapper


def test_the_model_is_wrapped_while_it_is_fitted():
    """With our hook, on the CPU too; process groups are there when user hooks run; afterwards all is unwrapped."""

    class Looking(Classifier):
        def setup(self, stage):
            assert dist.is_initialized()

        def configure_optimizers(self):
            assert isinstance(self.trainer.strategy.model, DistributedDataParallel)
            return super().configure_optimizers()

        def on_train_start(self):
            wrapper = self.trainer.strategy.model
            assert wrapper.module is self
            assert wrapper.find_unused_parameters is True
            assert wrapper._get_ddp_logging_data()["comm_hook"] == "phase_hook"
            assert self.trainer.model is wrapper

        def on_validation_start(self):
            if self.trainer.state.fn != "fit":
                assert self.trainer.strategy.model is self

        def on_train_end(self):
            assert self.trainer.strategy.phase is COMPRESSED

    def fn(rank):
        model = Looking()
        trainer, _ = run(OneBitDDPStrategy(find_unused_parameters=True), model=model)
        assert trainer.strategy.model is trainer.model is model
        trainer.validate(model, data(3, 2), verbose=False)
        assert trainer.strategy.phase is COMPRESSED

    run_trainers(2, fn)


def test_layers_made_in_configure_model_are_trained():
    class Late(Classifier):
        def __init__(self):
            super().__init__()
            self.head = None

        def configure_model(self):
            if self.head is None:
                self.head = nn.Linear(16, CLASSES)

    def fn(rank):
        model = Late()
        _, recorder = run(model=model)
        assert recorder.phases[-1] is COMPRESSED
        assert len(recorder.params[-1]) == 6
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


@pytest.mark.parametrize("frozen", [False, True])
def test_parameters_that_ddp_ignores(frozen):
    """It would not average them, as a compressed optimizer does: refused, unless they are not trained."""

    class Ignoring(Classifier):
        def __init__(self):
            super().__init__()
            self._ddp_params_and_buffers_to_ignore = ["head.bias"]
            self.head.bias.requires_grad_(not frozen)

    def fn(rank):
        if frozen:
            assert run(model=Ignoring())[1].phases[-1] is COMPRESSED
        else:
            with pytest.raises(ValueError, match=r"told to ignore the parameter 'head.bias'.*HINT: leave it out there"):
                run(model=Ignoring())

    run_trainers(2, fn)


def test_unused_parameters_are_explained_and_the_advice_keeps_compression():
    class Unused(Classifier):
        def training_step(self, batch, batch_idx):
            if batch_idx < FREEZE + 2:
                return super().training_step(batch, batch_idx)
            return self.body(batch[0]).sum()

    def fn(rank):
        with pytest.raises(RuntimeError, match="parameters that were not used in producing the loss") as caught:
            run(model=Unused())
        assert "strategy='onebit_ddp_find_unused_parameters_true'" in str(caught.value)
        assert "strategy=OneBitDDPStrategy(find_unused_parameters=True)" in str(caught.value)
        _, recorder = run("onebit_ddp_find_unused_parameters_true", model=Unused())
        assert recorder.phases[-1] is COMPRESSED
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


NEW_DDP_OPTIONS = {
    "batched_grad_copy": {"batched_grad_copy": True},
    "bucket_cap_mb_list": {"bucket_cap_mb_list": [1, 1]},
    "forward_sync_buffers": {"forward_sync_buffers": False},
    "init_sync": {"init_sync": False},
    "skip_all_reduce_unused_params": {"skip_all_reduce_unused_params": True, "find_unused_parameters": True},
}


@pytest.mark.parametrize("name", NEW_DDP_OPTIONS)
def test_newer_options_of_ddp_change_no_bit_of_the_compressed_phase(name):
    if name not in inspect.signature(DistributedDataParallel.__init__).parameters:
        pytest.skip(f"this torch has no DistributedDataParallel({name}=)")

    def fn(rank):
        assert same_params(run(OneBitDDPStrategy(**NEW_DDP_OPTIONS[name]))[1].params, run()[1].params)

    run_trainers(2, fn)


def test_zero_redundancy_optimizer_is_refused():
    """It shards Adam's state, and has a step of its own."""

    def configure(module):
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(module.parameters(), optimizer_class=torch.optim.Adam, lr=0.1)

    def fn(rank):
        with pytest.raises(ValueError, match="ZeroRedundancyOptimizer cannot be compressed"):
            run(configure=configure)

    run_trainers(2, fn)


# Data


class Loaders(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        self.train = trainer.train_dataloader.sampler

    def on_validation_batch_end(self, trainer, *_):
        self.validation = trainer.val_dataloaders.sampler


class Validated(Classifier):
    def val_dataloader(self):
        return data(3, 1)  # an odd number of batches for two ranks


def test_loaders_get_samplers_of_the_rank():
    def fn(rank):
        loaders = Loaders()
        run(model=Validated(), callbacks=[loaders])
        for sampler in (loaders.train, loaders.validation):
            assert isinstance(sampler, DistributedSampler)
            assert (sampler.num_replicas, sampler.rank) == (2, rank)
        assert (loaders.train.shuffle, loaders.validation.shuffle) == (True, False)
        run(model=Validated(), callbacks=[loaders], use_distributed_sampler=False)
        assert isinstance(loaders.train, SequentialSampler)

    run_trainers(2, fn)


def test_ranks_may_validate_different_numbers_of_batches():
    """No collective of ours runs in evaluation."""

    class Uneven(Classifier):
        def validation_step(self, batch, batch_idx):
            self.seen = batch_idx + 1

        def val_dataloader(self):
            return data(2 + 3 * self.global_rank)

    def fn(rank):
        model = Uneven()
        _, recorder = run(model=model, batches=5, max_epochs=3, use_distributed_sampler=False)
        assert model.seen == 2 + 3 * rank
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


def test_no_data_and_no_steps_are_no_error():
    def fn(rank):
        assert run(limit_train_batches=0)[0].global_step == 0
        assert run(max_steps=0)[0].global_step == 0
        assert run(max_steps=7)[1].phases == [WARMUP] * (FREEZE - 1) + [COMPRESSED] * (8 - FREEZE)

    run_trainers(2, fn)


def test_iterable_datasets_of_unknown_length():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            generator = torch.Generator().manual_seed(dist.get_rank())
            while True:
                yield torch.randn(FEATURES, generator=generator), torch.randint(CLASSES, (), generator=generator)

    def fn(rank):
        recorder = Recorder()
        trainer = make_trainer("onebit_ddp", 2, callbacks=[PhaseSwitch(FixedStep(FREEZE)), recorder], max_steps=10)
        trainer.fit(Classifier(), DataLoader(Stream(), batch_size=BATCH_SIZE))
        assert recorder.phases[-1] is COMPRESSED
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


# Collectives of the user


@pytest.mark.parametrize("overlap", [False, True])
def test_collectives_of_the_user_work_between_ours(overlap):
    """In every hook, of the strategy and of torch, while exchanges may be on their way in another thread."""

    class Talking(Classifier):
        def talk(self):
            strategy, rank = self.trainer.strategy, self.global_rank
            mine = torch.tensor([float(rank + 1)])
            assert strategy.reduce(mine.clone(), reduce_op="mean").item() == 1.5
            assert strategy.reduce(mine.clone(), reduce_op="sum").item() == 3.0
            assert strategy.broadcast({"from": rank}, src=1) == {"from": 1}
            assert strategy.reduce_boolean_decision(rank == 0, all=False)
            assert not strategy.reduce_boolean_decision(rank == 0, all=True)
            assert self.all_gather(mine).flatten().tolist() == [1.0, 2.0]
            dist.all_reduce(mine)
            assert mine.item() == 3.0
            strategy.barrier()
            self.talks = getattr(self, "talks", 0) + 1

        def training_step(self, batch, batch_idx):
            self.talk()
            return super().training_step(batch, batch_idx)

        def on_before_zero_grad(self, optimizer):
            self.talk()

        def on_train_batch_end(self, *_):
            self.talk()

        def on_train_batch_start(self, *_):
            self.talk()

    def fn(rank):
        model = Talking()
        _, recorder = run(OneBitDDPStrategy(overlap=overlap), model=model)
        assert model.talks == 40
        assert recorder.phases[-1] is COMPRESSED
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)
    assert same_params(first, run_trainers(2, lambda rank: run()[1].params)[0])


# Several, one after the other


def test_trainers_take_turns_in_one_process():
    """Two of ours and a stock one, each with process groups of its own, whichever was last."""

    def fn(rank):
        trainers, models = [], []
        for strategy in ("onebit_ddp", "ddp", "onebit_ddp"):
            switch = [PhaseSwitch(FixedStep(FREEZE))] if strategy != "ddp" else []
            recorder = Recorder()
            trainers.append((make_trainer(strategy, 2, callbacks=[*switch, recorder]), recorder))
            models.append(Classifier())
        for epoch in (1, 2):
            for (trainer, _), model in zip(trainers, models, strict=True):
                trainer.fit_loop.max_epochs = epoch
                trainer.fit(model, data(10, 2))
        (_, one), (_, dense), (_, other) = trainers
        assert same_params(one.params, other.params)
        assert one.phases == other.phases
        assert one.phases[-1] is COMPRESSED
        assert same_params(dense.params[:FREEZE], one.params[:FREEZE])
        return one.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


# Checkpoints


def test_rank_zero_alone_writes_and_all_can_read(tmp_path):
    class Counting(TorchCheckpointIO):
        saved = 0

        def save_checkpoint(self, *args, **kwargs):
            self.saved += 1
            super().save_checkpoint(*args, **kwargs)

    def fn(rank):
        io = Counting()
        best = pl.callbacks.ModelCheckpoint(tmp_path, filename="best", save_weights_only=False)
        trainer, _ = run(OneBitDDPStrategy(checkpoint_io=io), callbacks=[best], enable_checkpointing=True)
        assert io.saved == (1 if rank == 0 else 0)
        before = [p.detach().clone() for p in trainer.lightning_module.parameters()]
        trainer.validate(Classifier(), data(3, 2), ckpt_path="best", verbose=False)
        loaded = Classifier.load_from_checkpoint(tmp_path / "best.ckpt")
        assert same_params([list(loaded.parameters())], [before])

    run_trainers(2, fn)


def test_saving_after_the_run_is_saving_at_its_last_batch(tmp_path):
    """The strategy has let go of its memory by then."""

    class SaveLast(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "during.ckpt")

    def fn(rank):
        trainer, _ = run(callbacks=[SaveLast()])
        assert not trainer.strategy._phases.compressed
        state = trainer.optimizers[0].state
        assert all(set(entry) == {"step", "exp_avg", "exp_avg_sq"} for entry in state.values())
        trainer.save_checkpoint(tmp_path / "after.ckpt")
        resumed = run(batches=20, ckpt_path=tmp_path / "after.ckpt", max_epochs=2)[1]
        assert set(resumed.phases) == {COMPRESSED}

    run_trainers(2, fn)
    during, after = (torch.load(tmp_path / f"{when}.ckpt", weights_only=True) for when in ("during", "after"))
    assert during["lightning_onebit"].pop("save_id") != after["lightning_onebit"].pop("save_id")
    for key in ("state_dict", "optimizer_states", "lightning_onebit"):
        first, second = (torch.utils._pytree.tree_flatten(checkpoint[key]) for checkpoint in (during, after))
        assert first[1] == second[1]
        for a, b in zip(first[0], second[0], strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_batch_of_one_sample_and_a_scalar_parameter():
    class Scaled(Classifier):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))

        def training_step(self, batch, batch_idx):
            return self.scale * super().training_step((batch[0][:1], batch[1][:1]), batch_idx)

    def fn(rank):
        return run(model=Scaled())[1].params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)
    assert first[-1][0].ndim == 0
    assert first[-1][0] != first[FREEZE][0]


def test_a_dataset_of_one_batch():
    def fn(rank):
        recorder = Recorder()
        trainer = make_trainer("onebit_ddp", 2, callbacks=[PhaseSwitch(FixedStep(FREEZE)), recorder])
        trainer.fit(Classifier(), DataLoader(TensorDataset(torch.randn(2, FEATURES), torch.zeros(2, dtype=torch.long))))
        assert recorder.phases == [WARMUP]

    run_trainers(2, fn)
