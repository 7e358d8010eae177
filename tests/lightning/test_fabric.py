"""The strategy for Fabric, on forked ranks: the same communication as in a Trainer."""

import copy
import gc
import threading
import warnings
import weakref

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning import fabric
from lightning.fabric import Fabric
from lightning.fabric.strategies import STRATEGY_REGISTRY, DDPStrategy
from ranks import run_ranks, run_trainers
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler
from trainers import Classifier, adam, data, fit, same_params

from lightning_onebit import FixedStep, OneBitDDPFabricStrategy, Phase, PhaseSwitch, VarianceStability
from lightning_onebit.consistency.agreement import RanksDisagree
from lightning_onebit.lightning import optimizer_steps

WARMUP, COMPRESSED = Phase.WARMUP, Phase.COMPRESSED
FREEZE = 5


def ours(freeze=FREEZE, **options):
    return OneBitDDPFabricStrategy(criterion=FixedStep(freeze), **options)


class Loop:
    """A training loop as one writes it with Fabric. ``run`` goes on where it stopped; ``params`` holds every step."""

    def __init__(self, strategy, configure=adam, module=None, **fabric_options):
        self.fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, **fabric_options)
        self.fabric.launch()
        self.strategy = self.fabric.strategy
        module = module or Classifier()
        optimizers = configure(module)
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        self.model, *self.optimizers = self.fabric.setup(module, *optimizers)
        self.optimizer = self.optimizers[0]
        self.params, self.phases, self.norms, self.batch = [], [], [], 0

    def run(self, batches=20, *, accumulate=1, clip=None):
        plain = data(20, 2)
        sampler = DistributedSampler(plain.dataset, shuffle=True, seed=0)  # as the Trainer does
        loader = self.fabric.setup_dataloaders(DataLoader(plain.dataset, plain.batch_size, sampler=sampler))
        for index, batch in enumerate(loader):
            if not self.batch <= index < batches:
                continue
            self.batch += 1
            stepping = self.batch % accumulate == 0
            with self.fabric.no_backward_sync(self.model, enabled=not stepping):
                self.fabric.backward(self.model.training_step(batch, index) / accumulate)
            if not stepping:
                continue
            if clip is not None:
                self.norms.append(self.fabric.clip_gradients(self.model, self.optimizer, **clip))
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            self.params.append([p.detach().clone() for p in self.model.parameters()])
            self.phases.append(getattr(self.strategy, "phase", None))
        return self


# The two phases


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}])
def test_warmup_is_bitwise_fabrics_ddp(options):
    def fn(rank):
        dense, compressed = Loop(DDPStrategy(**options)).run(), Loop(ours(100, **options)).run()
        assert set(compressed.phases) == {WARMUP}
        assert same_params(compressed.params, dense.params)

    run_trainers(2, fn)


@pytest.mark.parametrize("options", [{}, {"space": "momentum", "block_size": 16}])
def test_fabric_and_trainer_make_the_same_steps(options):
    """Bitwise, in both phases; so do the two ranks."""
    from lightning_onebit import OneBitDDPStrategy

    def fn(rank):
        fabric = Loop(ours(**options)).run()
        assert fabric.phases == [WARMUP] * (FREEZE - 1) + [COMPRESSED] * (21 - FREEZE)
        switch = PhaseSwitch(FixedStep(FREEZE))
        trainer, recorder = fit(OneBitDDPStrategy(**options), 2, batches=20, callbacks=[switch])
        assert same_params(fabric.params, recorder.params)
        for phase in Phase:
            mine, theirs = fabric.strategy.comm_stats[phase], trainer.strategy.comm_stats[phase]
            assert (mine.steps, mine.dense_equivalent_bytes) == (theirs.steps, theirs.dense_equivalent_bytes)
        return fabric.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


def test_a_second_model_after_the_first_is_told_what_the_switch_waits_for(monkeypatch):
    monkeypatch.setattr(optimizer_steps, "IDLE_STEPS", 10)

    def fn(rank):
        fabric = Fabric(accelerator="cpu", devices=2, strategy=ours(5))
        fabric.launch()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for steps in (3, 12):
                module = Classifier()
                model, optimizer = fabric.setup(module, adam(module))
                for index, batch in enumerate(data(steps)):
                    fabric.backward(model.training_step(batch, index))
                    optimizer.step()
                    optimizer.zero_grad()
        assert fabric.strategy.phase is WARMUP
        told = [str(w.message) for w in caught if "has made no step while others made 10" in str(w.message)]
        assert len(told) == (rank == 0)
        fabric.strategy.teardown()

    run_trainers(2, fn)


def test_accumulation_without_sync_equals_larger_batches():
    def fn(rank):
        accumulated = Loop(ours(3)).run(accumulate=2)
        assert accumulated.phases == [WARMUP] * 2 + [COMPRESSED] * 8
        expected = fit("onebit_ddp", 2, batches=20, accumulate_grad_batches=2, callbacks=[PhaseSwitch(FixedStep(3))])[1]
        assert same_params(accumulated.params, expected.params[1::2])
        return accumulated.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


def test_clipping_by_norm_means_the_same_as_under_ddp():
    """With the learning rate 0 both see the same gradients: norms agree within 3%, and bitwise between ranks."""

    def standing(module):
        return torch.optim.Adam(module.parameters(), lr=0.0)

    def fn(rank):
        dense, compressed = (Loop(s, standing).run(clip={"max_norm": 0.05}) for s in ("ddp", ours()))
        assert compressed.phases[FREEZE:] == [COMPRESSED] * (20 - FREEZE)
        return torch.stack(dense.norms), torch.stack(compressed.norms)

    (dense, norms), (_, others) = run_trainers(2, fn)
    assert torch.equal(norms, others)
    assert torch.equal(norms[:FREEZE], dense[:FREEZE])
    assert torch.allclose(norms, dense, rtol=0.03)


def test_clipped_gradients_are_what_is_compressed():
    def fn(rank):
        loop = Loop(ours()).run(clip={"max_norm": 0.05})
        switch = {"callbacks": [PhaseSwitch(FixedStep(FREEZE))]}
        assert same_params(loop.params, fit("onebit_ddp", 2, batches=20, gradient_clip_val=0.05, **switch)[1].params)
        by_value = Loop(ours()).run(clip={"clip_val": 0.01})
        switch = {"callbacks": [PhaseSwitch(FixedStep(FREEZE))], "gradient_clip_algorithm": "value"}
        assert same_params(by_value.params, fit("onebit_ddp", 2, batches=20, gradient_clip_val=0.01, **switch)[1].params)

        with pytest.raises(ValueError, match=r"Invalid norm_type: inf\. Must be 2, as .*leave norm_type out"):
            loop.fabric.clip_gradients(loop.model, loop.optimizer, max_norm=1.0, norm_type="inf")
        for p in loop.model.parameters():
            p.grad = torch.full_like(p, torch.nan if rank == 1 else 1.0)
        with pytest.raises(RuntimeError, match="infinite or NaN"):  # on both ranks
            loop.fabric.clip_gradients(loop.model, loop.optimizer, max_norm=1.0)
        before = [p.detach().clone() for p in loop.model.parameters()]
        loop.fabric.clip_gradients(loop.model, loop.optimizer, max_norm=1.0, error_if_nonfinite=False)
        with pytest.warns(UserWarning, match="all ranks skip this step") if rank == 0 else warnings.catch_warnings():
            loop.optimizer.step()
        assert same_params([before], [list(loop.model.parameters())])

    run_trainers(2, fn)


class InfiniteOnRank1(Classifier):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * torch.inf if dist.get_rank() == 1 and batch_idx in (2, 9, 13) else loss


@pytest.mark.parametrize("clip", [None, {"max_norm": 0.05}, {"clip_val": 0.01}])
def test_all_loss_scalers_skip_alike(clip):
    """precision="16-mixed", with infinities on one rank in both phases: the Trainer's steps, bitwise."""

    def fn(rank):
        def precision(kind):
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
            return {"plugins": [kind("16-mixed", device="cpu", scaler=scaler)]}

        fabric_clip = {**clip, "error_if_nonfinite": False} if clip else None
        fabric_precision = precision(fabric.plugins.precision.MixedPrecision)
        loop = Loop(ours(), module=InfiniteOnRank1(), **fabric_precision).run(clip=fabric_clip)
        assert loop.strategy.optimizer_steps == 17
        assert loop.phases[-1] is COMPRESSED
        trainer_clip = {"gradient_clip_val": next(iter(clip.values()))} if clip else {}
        if clip and "clip_val" in clip:
            trainer_clip["gradient_clip_algorithm"] = "value"
        options = {"batches": 20, "callbacks": [PhaseSwitch(FixedStep(FREEZE))], "model": InfiniteOnRank1()}
        _, recorder = fit("onebit_ddp", 2, **options, **trainer_clip, **precision(pl.plugins.MixedPrecision))
        assert same_params(loop.params, recorder.params)
        return loop.params, fabric_precision["plugins"][0].scaler.get_scale()

    (first, scale), (second, other) = run_trainers(2, fn)
    assert same_params(first, second)
    assert scale == other


def test_closures_and_schedulers_work_as_ever():
    def fn(rank):
        loop = Loop(ours()).run()
        scheduler = torch.optim.lr_scheduler.StepLR(loop.optimizer, 1)
        x, y = next(iter(data(1)))

        def closure():
            loop.optimizer.zero_grad()
            loss = loop.model.training_step((x, y), 0)
            loop.fabric.backward(loss)
            return loss

        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*lr_scheduler.step.*")
            assert loop.optimizer.step(closure) > 0
            scheduler.step()
        assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
        with pytest.raises(RuntimeError, match=r"the optimizer that `fabric.setup` returned"):
            loop.optimizer.optimizer.step()

    run_trainers(2, fn)


def test_several_optimizers():
    def pair(module):
        return [torch.optim.Adam(module.body.parameters(), 1e-2), torch.optim.AdamW(module.head.parameters(), 1e-2)]

    def fn(rank):
        loop = Loop(ours(), pair).run()
        assert loop.phases == [WARMUP] * (FREEZE - 1) + [COMPRESSED] * (21 - FREEZE)
        assert [loop.strategy.comm_stats[phase].steps for phase in Phase] == [2 * FREEZE, 2 * (20 - FREEZE)]
        return loop.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


# The switch


def test_switching_by_hand_and_back_and_what_is_printed():
    def fn(rank):
        loop = Loop(ours(1000, variance_refresh=None))
        with pytest.raises(RuntimeError, match="before the first optimizer step"):
            loop.strategy.freeze_variance()
        loop.run(5)
        assert "phase=WARMUP, optimizer_steps=5" in repr(loop.strategy)
        loop.strategy.freeze_variance()
        loop.run(12)
        assert "phase=COMPRESSED, optimizer_steps=12" in repr(loop.strategy)
        assert "flat, 2 ranks" in repr(loop.strategy)
        with pytest.raises(RuntimeError, match="Cannot set up an optimizer in the compressed phase"):
            loop.fabric.setup_optimizers(adam(Classifier()))
        loop.strategy.resume_warmup()
        loop.run(20)
        assert [loop.strategy.comm_stats[phase].steps for phase in Phase] == [13, 7]
        assert loop.strategy.comm_stats.compression_ratio > 1
        loop.strategy.teardown()
        assert "onebit-lane" not in [thread.name for thread in threading.enumerate()]
        assert len(dist.distributed_c10d._world.pg_map) == 1
        wrapped_by_ddp, params = weakref.ref(loop.model._forward_module), loop.params
        del loop
        gc.collect()
        assert wrapped_by_ddp() is None
        return params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


def test_the_default_criterion_knows_the_length_of_the_run_from_the_user(caplog):
    def fn(rank):
        def phases(**options):
            # In momentum space nothing is renewed, so the second moment would have to settle.
            criterion = VarianceStability(min_steps=0, tolerance=1e-9, max_steps=0.3)
            strategy = OneBitDDPFabricStrategy(criterion=criterion, space="momentum", **options)
            return Loop(strategy).run().phases, strategy.switch._plan.remarks

        without, remarks = phases()
        assert set(without) == {WARMUP}
        assert remarks[0].startswith("The length of the run is not known")
        known, _ = phases(total_steps=20)
        assert known.index(COMPRESSED) == 5  # 30% of 20 steps

    run_trainers(2, fn)
    with pytest.raises(ValueError, match="Invalid total_steps: 0"):
        OneBitDDPFabricStrategy(total_steps=0)


# State


def test_resuming_in_the_compressed_phase_is_bitwise(tmp_path):
    """Right after the freeze and later; and the file is a stock one to Fabric's DDP."""

    def fn(rank):
        loop = Loop(ours())
        for saved in (FREEZE, 12):
            loop.run(saved)
            assert loop.strategy.phase is COMPRESSED
            state = {"model": loop.model, "optimizer": loop.optimizer, "batch": loop.batch}
            loop.fabric.save(tmp_path / f"{saved}.ckpt", state)
        loop.run()

        resumed = Loop(ours())
        for saved in (FREEZE, 12):  # the second time from within the compressed phase
            state = {"model": resumed.model, "optimizer": resumed.optimizer, "batch": 0}
            resumed.fabric.load(tmp_path / f"{saved}.ckpt", state)
            assert (state["batch"], resumed.strategy.optimizer_steps) == (saved, saved)
            assert resumed.strategy.phase is COMPRESSED
            resumed.batch = saved
            before = len(resumed.params)
            resumed.run()
            assert set(resumed.phases[before:]) == {COMPRESSED}
            assert same_params(resumed.params[before:], loop.params[saved:])

        dense = Loop("ddp")
        dense.fabric.load(tmp_path / "12.ckpt", {"model": dense.model, "optimizer": dense.optimizer, "batch": 0})
        dense.run()
        assert all(torch.isfinite(p).all() for p in dense.params[-1])
        return resumed.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)
    torch.load(tmp_path / "12.ckpt", weights_only=True)


def test_resuming_while_a_second_moment_is_collected_is_bitwise(tmp_path):
    """For a refresh that was asked for with ``variance_refresh=None``; with two optimizers."""

    def two(module):
        return [torch.optim.Adam(module.body.parameters(), lr=1e-2), torch.optim.AdamW(module.head.parameters(), lr=1e-2)]

    def second_moments(loop):
        states = [optimizer.state_dict()["state"] for optimizer in loop.optimizers]
        return [entry["exp_avg_sq"] / (1 - 0.999 ** float(entry["step"])) for state in states for entry in state.values()]

    def fn(rank):
        path, asked = tmp_path / "saved.ckpt", FREEZE - 2
        loop = Loop(ours(asked, variance_refresh=None), two)
        with pytest.raises(RuntimeError, match="in warm-up"):
            loop.strategy.refresh_variance()
        loop.run(asked)
        frozen = second_moments(loop)
        loop.strategy.refresh_variance()
        loop.run(10)
        saved = {f"optimizer {i}": optimizer for i, optimizer in enumerate(loop.optimizers)}
        loop.fabric.save(path, {"model": loop.model, "batch": loop.batch, **saved})
        loop.run(asked + 15)
        assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(second_moments(loop), frozen, strict=True))
        loop.run(asked + 16)
        renewed = second_moments(loop)
        assert not any(torch.allclose(a, b, rtol=1e-2) for a, b in zip(renewed, frozen, strict=True))
        loop.run()

        resumed = Loop(ours(asked, variance_refresh=None), two)
        state = {f"optimizer {i}": optimizer for i, optimizer in enumerate(resumed.optimizers)}
        resumed.fabric.load(path, {"model": resumed.model, "batch": 0, **state})
        resumed.batch = 10
        resumed.run()
        assert same_params(resumed.params, loop.params[10:])
        return loop.params, renewed

    (params, renewed), (others, other_renewed) = run_trainers(2, fn)
    assert same_params(params, others)
    assert all(torch.equal(a, b) for a, b in zip(renewed, other_renewed, strict=True))


def test_a_checkpoint_of_the_warmup_leaves_the_compressed_phase(tmp_path):
    def fn(rank):
        loop = Loop(ours()).run(3)
        loop.fabric.save(tmp_path / "it.ckpt", {"model": loop.model, "optimizer": loop.optimizer})
        loop.run(12)
        assert loop.strategy.phase is COMPRESSED
        loop.fabric.load(tmp_path / "it.ckpt", {"model": loop.model, "optimizer": loop.optimizer})
        assert (loop.strategy.phase, loop.strategy.optimizer_steps) == (WARMUP, 3)
        before = len(loop.phases)
        loop.run()
        assert loop.phases[before:] == [WARMUP] * 1 + [COMPRESSED] * 7
        return loop.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


@pytest.mark.parametrize("saves", [("3.ckpt", "12.ckpt"), ("12.ckpt", "14.ckpt"), ("12.ckpt", "none.ckpt")])
def test_ranks_that_load_different_checkpoints_are_told_so(tmp_path, saves):
    """Of different phases, of different steps, and one that has none."""

    def fn(rank):
        loop = Loop(ours())
        for saved in (3, 12, 14):
            loop.run(saved)
            loop.fabric.save(tmp_path / f"{saved}.ckpt", {"model": loop.model, "optimizer": loop.optimizer})
        resumed = Loop(ours())
        state = {"model": resumed.model, "optimizer": resumed.optimizer}
        missing = "none.ckpt" in saves
        with pytest.raises(FileNotFoundError if missing and rank == 1 else RanksDisagree) as caught:
            resumed.fabric.load(tmp_path / saves[rank], state)
        return str(caught.value)

    first, second = run_trainers(2, fn)
    if "none.ckpt" in saves:
        assert "rank 1: FileNotFoundError" in first
    else:
        assert first == second
        assert "The ranks differ in the checkpoint that they load:\n  optimizer steps: " in first


def test_state_that_is_loaded_in_the_compressed_phase_is_taken_over(tmp_path):
    """Stock state as under the Trainer; what `fabric.save` has written, with its header, as by `fabric.load`."""

    def fn(rank):
        plain = Loop(ours(variance_refresh=None)).run()
        results = []
        for factor in (1.0, 20.0):
            loop = Loop(ours(variance_refresh=None)).run(12)
            state_dict = copy.deepcopy(loop.optimizer.state_dict())
            for entry in state_dict["state"].values():
                entry["exp_avg"] *= factor
            loop.optimizer.load_state_dict(state_dict)
            assert loop.strategy.phase is COMPRESSED
            now = loop.optimizer.state_dict()["state"]
            assert all(torch.equal(now[i]["exp_avg"], entry["exp_avg"]) for i, entry in state_dict["state"].items())
            loop.fabric.save(tmp_path / "replaced.ckpt", {"model": loop.model, "optimizer": loop.optimizer})
            loop.run()
            assert set(loop.phases[12:]) == {COMPRESSED}
            resumed = Loop(ours(variance_refresh=None))
            resumed.fabric.load(tmp_path / "replaced.ckpt", {"model": resumed.model, "optimizer": resumed.optimizer})
            resumed.batch = 12
            assert same_params(resumed.run().params, loop.params[12:])
            results.append(loop.params)
        assert same_params(results[0][:12], plain.params[:12])
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(results[0][-1], plain.params[-1], strict=True))
        assert not torch.allclose(results[1][-1][0], plain.params[-1][0], atol=1e-3)

        loop = Loop(ours()).run(3)
        loop.fabric.save(tmp_path / "warmup.ckpt", {"model": loop.model, "optimizer": loop.optimizer})
        loop.run(12)
        loop.optimizer.load_state_dict(torch.load(tmp_path / "warmup.ckpt")["optimizer"])  # no header: compressed on
        loop.run(14)
        assert loop.strategy.phase is COMPRESSED
        loop.fabric.save(tmp_path / "compressed.ckpt", {"model": loop.model, "optimizer": loop.optimizer})
        saved = torch.load(tmp_path / "compressed.ckpt")["optimizer"]
        loop.run(16)
        loop.optimizer.load_state_dict(saved)
        assert loop.strategy.optimizer_steps == saved["lightning_onebit"]["optimizer_steps"][0]
        saved["lightning_onebit"]["phase"] = "WARMUP"  # as after `resume_warmup()`
        loop.optimizer.load_state_dict(saved)
        assert loop.strategy.phase is WARMUP
        loop.run()
        assert loop.strategy.phase is COMPRESSED
        loop.optimizer.state.clear()
        loop.batch = 0
        loop.run(1)
        assert loop.strategy.phase is WARMUP
        return results

    first, second = run_trainers(2, fn)
    assert all(same_params(a, b) for a, b in zip(first, second, strict=True))


def test_state_that_is_loaded_between_backward_and_step_counts_for_that_step():
    def fn(rank):
        def replace(loop):
            state_dict = copy.deepcopy(loop.optimizer.state_dict())
            for entry in state_dict["state"].values():
                entry["exp_avg"] *= 20
            loop.optimizer.load_state_dict(state_dict)

        results = []
        for when in ("before backward", "after backward"):
            loop = Loop(ours()).run(12)
            if when == "before backward":
                replace(loop)
            loop.fabric.backward(loop.model.training_step(next(iter(data(1))), 0))
            if when == "after backward":
                replace(loop)
            loop.optimizer.step()
            results.append([p.detach().clone() for p in loop.model.parameters()])
        assert same_params(results[:1], results[1:])

    run_trainers(2, fn)


def test_back_to_warmup_before_the_first_compressed_step():
    """A gradient that is local already becomes the mean, and the momentum is what it was."""

    def fn(rank):
        results = []
        for strategy in (ours(), "ddp"):
            loop = Loop(strategy).run(FREEZE)
            batch = list(data(2))[rank]
            loop.fabric.backward(loop.model.training_step(batch, 0))
            if strategy != "ddp":
                assert loop.strategy.phase is COMPRESSED
                loop.strategy.resume_warmup()
            loop.optimizer.step()
            results.append([p.detach().clone() for p in loop.model.parameters()])
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))

    run_trainers(2, fn)


# Never silently dense


def test_what_cannot_be_compressed_is_an_error_at_setup():
    def fn(rank):
        with pytest.raises(ValueError, match="RMSprop cannot be compressed"):
            Loop("onebit_ddp", lambda module: torch.optim.RMSprop(module.parameters()))
        fabric = Fabric(accelerator="cpu", devices=2, strategy="onebit_ddp")
        fabric.launch()
        with pytest.raises(ValueError, match="produces sparse gradients"):
            fabric.setup_module(nn.Embedding(10, 4, sparse=True))

    run_trainers(2, fn)


def test_one_process_says_that_nothing_is_compressed():
    def fn(rank):
        fabric = Fabric(accelerator="cpu", devices=1, strategy="onebit_ddp")
        fabric.launch()
        module = Classifier()
        with pytest.warns(UserWarning, match="runs with one process"):
            fabric.setup(module, adam(module))

    run_ranks(1, fn, group=False)


def test_strategies_are_registered():
    for name in ("onebit_ddp", "onebit_ddp_spawn", "onebit_ddp_fork", "onebit_ddp_notebook"):
        assert isinstance(STRATEGY_REGISTRY.get(name), OneBitDDPFabricStrategy)
    strategy = STRATEGY_REGISTRY.get("onebit_ddp_find_unused_parameters_true")
    assert strategy._ddp_kwargs["find_unused_parameters"] is True
    OneBitDDPFabricStrategy.register_strategies(STRATEGY_REGISTRY)  # again: no effect


@pytest.mark.parametrize("how", ["the optimizer's own step", "the module's own forward"])
def test_what_would_stay_dense_or_local_ends_at_the_first_step(how):
    """Of an optimizer that steps by itself the switch is never told, and a module beside DDP's averages nothing."""
    expected = {
        "the optimizer's own step": r"For the warm-up to end, the optimizer must step through Lightning",
        "the module's own forward": r"Adam has made a step, but DDP has seen no backward.*`fabric.setup` returned",
    }

    def fn(rank):
        loop = Loop(ours())
        batch = next(iter(data(1)))
        whole = how == "the optimizer's own step"
        module = loop.model if whole else loop.model.module
        loop.fabric.backward(module.training_step(batch, 0))
        with pytest.raises(RuntimeError, match=expected[how]):
            (loop.optimizer.optimizer if whole else loop.optimizer).step()

    run_trainers(2, fn)
