"""What ranks must have in common is compared before anything can hang, and the difference is named on all of them."""

import json
import re
import time
from datetime import timedelta

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.strategies import DDPStrategy
from ranks import run_ranks, run_trainers
from test_precision import mixed16
from test_several_optimizers import Messages
from torch import nn
from trainers import Classifier, data, fit, same_params

from lightning_onebit import (
    DivergenceGuard,
    FixedStep,
    OneBitDDPFabricStrategy,
    OneBitDDPStrategy,
    Phase,
    PhaseSwitch,
)
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.consistency import agreement as module
from lightning_onebit.consistency import settings
from lightning_onebit.consistency.agreement import ADVISORY, RanksDisagree, agreement, differences
from lightning_onebit.lightning import phase_controller

CPU = torch.device("cpu")


# The exchange of settings


def agree(stating, failure=None):
    with agreement(Communicator(), CPU, about="things") as stated:
        stated.update(stating)
        if failure is not None:
            raise failure


def test_ranks_that_say_the_same_need_one_small_all_reduce():
    def fn(rank):
        communicator = Communicator()
        with agreement(communicator, CPU, about="things") as stated:
            stated.update({f"setting {i}": "x" * 100 for i in range(100)})
        return communicator.counters.collectives, communicator.counters.bytes_sent

    for collectives, bytes_sent in run_ranks(3, fn):
        assert collectives == 1
        assert bytes_sent < 50


def test_differences_are_named_on_all_ranks_whatever_the_number_of_settings():
    def fn(rank):
        stated = {"colour": "red" if rank != 1 else "grün", "size": str(min(rank, 1)), "same": "1"}
        if rank == 2:
            stated.update({f"only here {i}": "x" * 1000 for i in range(10)})
        with pytest.raises(RanksDisagree) as raised:
            agree(stated)
        agree({"afterwards": "all is well"})
        return str(raised.value)

    messages = run_ranks(3, fn)
    assert messages[0] == messages[1] == messages[2]
    assert messages[0].startswith(
        "The ranks differ in things:\n"
        "  colour: red on ranks 0, 2, but grün on rank 1\n"
        "  size: 0 on rank 0, but 1 on ranks 1, 2\n"
        "  only here 0: none on ranks 0, 1, but xxx"
    )
    assert "\n  and 7 more\nHINT: start all ranks with the same code" in messages[0]


def test_the_order_of_settings_matters_to_no_message_and_one_that_is_missing_is_named():
    assert differences([{"a": "1", "b": "2"}, {"b": "2", "a": "1"}]) == []
    assert differences([{"a": "1"}, {"a": "1"}, {"a": "2"}, {}] + [{"a": "3"}] * 5) == [
        "a: 1 on ranks 0, 1, but 2 on rank 2, but none on rank 3, but 3 on ranks 4, 5, 6 and 2 more"
    ]


def test_the_failure_of_a_rank_ends_all_and_its_own_error_is_kept():
    def fn(rank):
        failing = {0: None, 1: KeyError("lost"), 2: ValueError("worse")}[rank]
        expected = RanksDisagree if failing is None else type(failing)
        with pytest.raises(expected) as raised:
            agree({"setting": str(rank)}, failing)
        with pytest.raises(ZeroDivisionError):  # of all alike
            agree({"setting": str(rank)}, ZeroDivisionError("no"))
        return str(raised.value)

    messages = run_ranks(3, fn)
    assert messages[0] == (
        "All ranks stop, because some of them failed (things):\n  rank 1: KeyError: 'lost'\n  rank 2: ValueError: worse"
    )
    assert messages[1:] == ["'lost'", "worse"]


def test_an_own_error_is_kept_where_the_others_cannot_be_told():
    class Broken:
        def all_reduce_max_(self, tensor):
            raise RuntimeError("Connection closed by peer")

    with pytest.raises(KeyError, match="lost"), agreement(Broken(), CPU, about="things"):
        raise KeyError("lost")
    with (
        pytest.raises(RuntimeError, match="could not compare things: Connection closed by peer"),
        agreement(Broken(), CPU, about="things"),
    ):
        pass


def test_other_versions_of_what_we_stand_on_are_only_worth_a_warning():
    def fn(rank):
        with Messages() as messages:
            agree({f"{ADVISORY}torch": f"2.{rank}", "setting": "same"})
        with pytest.raises(RanksDisagree) as raised:
            agree({f"{ADVISORY}torch": f"2.{rank}", "setting": str(rank)})
        assert "torch" not in str(raised.value)
        return [text for text in messages.texts if "software" in text]

    first, second = run_ranks(2, fn)
    assert first == ["The ranks differ in software: version of torch: 2.0 on rank 0, but 2.1 on rank 1."]
    assert second == []


def test_no_digest_is_negative_and_every_difference_changes_it():
    """Or the largest would not tell the smallest."""
    digests = [module._digest({"a": str(i)}) for i in range(200)]
    assert all(0 <= word < 2**62 for digest in digests for word in digest)
    assert len({json.dumps(digest) for digest in digests}) == 200
    assert all(0 <= module.short_digest({"a": str(i)}) < 2**31 for i in range(200))


# In a Trainer


class Freezing(Classifier):
    def __init__(self, frozen=True, **options):
        super().__init__(**options)
        self.body[0].bias.requires_grad_(not frozen)


class Reordered(Classifier):
    def __init__(self):
        super().__init__()
        self.body, self.head = self._modules.pop("body"), self._modules.pop("head")
        head, body = self.head, self.body
        del self.head, self.body
        self.head, self.body = head, body


class Larger(Classifier):
    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(3, 3)


class Validated(Classifier):
    def val_dataloader(self):
        return data(2)


class Normalizing(Classifier):
    """Without parameters and buffers: what is seen is how it communicates, or does not."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(16, affine=False, track_running_stats=False)


class WithBuffer(Classifier):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))


class DoesNotFit(Classifier):
    def to(self, *args, **kwargs):
        raise MemoryError("the device is full")


def made_by(kind, **options):
    return lambda module: kind(module.parameters(), **{"lr": 1e-2, **options})


def fail(module):
    raise LookupError("no such optimizer")


def two_groups(module):
    return torch.optim.Adam(
        [{"params": module.body.parameters()}, {"params": module.head.parameters(), "lr": 1e-3}], lr=1e-2
    )


def strategy(**options):
    return {"strategy": lambda: OneBitDDPStrategy(timeout=timedelta(seconds=20), **options)}


def model(kind, **options):
    return {"model": lambda: kind(**options)}


def configure(fn):
    return {"model": lambda: Classifier(fn)}


def says(name, first, second):
    return f"{name}: {first} on rank 0, but {second} on rank 1"


ADAM, GROUP = "torch.optim.adam.Adam", "optimizer 0, Adam, group"
FIRST = "body.0.weight [16, 12] float32"
BIAS = "body.0.bias [16] float32"
# What rank 1 does otherwise, and the line of the message.
MISMATCHES = {
    "sizes": (model(Classifier, hidden=24), says("parameter 0", FIRST, "body.0.weight [24, 12] float32")),
    "order": (model(Reordered), says("parameter 0", FIRST, "head.weight [5, 16] float32")),
    "number": (model(Larger), says("number of parameters", 6, 8)),
    "frozen": (model(Freezing), says("parameter 1", BIAS, f"{BIAS} frozen")),
    "buffers": (model(WithBuffer), says("buffer 0", "none", "mean [4] float32")),
    "batch norm": (model(Normalizing), says("batch normalization", "none", "BatchNorm1d")),
    "does not fit": (model(DoesNotFit), "rank 1: MemoryError: the device is full"),
    "block size": (strategy(block_size=64), says("block_size", 2048, 64)),
    "space": (strategy(space="momentum"), says("space", "'update'", "'momentum'")),
    "bucket": (strategy(bucket_cap_mb=3), says("bucket_cap_mb", None, 3)),
    "overlap": (strategy(overlap=True), says("overlap", "'auto'", True)),
    "skips": (strategy(max_skipped_steps=7), says("max_skipped_steps", 100, 7)),
    "unused": (strategy(find_unused_parameters=True), says("find_unused_parameters", "none", True)),
    "lr": (configure(made_by(torch.optim.Adam, lr=2e-2)), says(f"{GROUP} 0, lr", 0.01, 0.02)),
    "betas": (
        configure(made_by(torch.optim.Adam, betas=(0.9, 0.99))),
        says(f"{GROUP} 0, betas", (0.9, 0.999), (0.9, 0.99)),
    ),
    "AdamW": (configure(made_by(torch.optim.AdamW)), says("optimizer 0", ADAM, "torch.optim.adamw.AdamW")),
    "SGD": (configure(made_by(torch.optim.SGD)), says("optimizer 0", ADAM, "torch.optim.sgd.SGD")),
    "RMSprop": (
        configure(made_by(torch.optim.RMSprop)),
        "rank 1: ValueError: The optimizer torch.optim.rmsprop.RMSprop cannot be",
    ),
    "failure": (configure(fail), "rank 1: LookupError: no such optimizer"),
    "groups": (configure(two_groups), says(f"{GROUP} 1, lr", "none", 0.001)),
    "criterion": ({"callbacks": [PhaseSwitch(FixedStep(9))]}, says("criterion", "FixedStep(n=4)", "FixedStep(n=9)")),
    "clipping": ({"gradient_clip_val": 0.5}, says("gradient_clip_val", None, 0.5)),
    "clip algorithm": (
        {"gradient_clip_algorithm": "value"},
        says("gradient_clip_algorithm", None, "<GradClipAlgorithmType.VALUE: 'value'>"),
    ),
    "accumulation": ({"accumulate_grad_batches": 2}, says("accumulate_grad_batches", 1, 2)),
    "steps": ({"max_steps": 3}, says("max_steps", -1, 3)),
    "scale": ({"plugins": [mixed16(init_scale=4.0)]}, "loss scaling: none on rank 0, but {'scale': 4.0"),
    "precision": ({"precision": "bf16-mixed"}, says("precision", "32-true", "bf16-mixed")),
    "batches": ({"limit_train_batches": 3}, says("limit_train_batches", 1.0, 3)),
    "evaluations": (
        model(Validated),
        says("evaluations", "none", "val_check_interval=1.0, check_val_every_n_epoch=1, limit_val_batches=1.0"),
    ),
    "guard": (
        {"callbacks": [PhaseSwitch(FixedStep(4)), DivergenceGuard(7)]},
        says("every_n_steps of DivergenceGuard", 100, 7),
    ),
}


def start(options, batches=6):
    defaults = {**strategy(), **model(Classifier), "callbacks": [PhaseSwitch(FixedStep(4))]}
    options = {**defaults, **options}
    network = options.pop("model")()
    return fit(options.pop("strategy")(), 2, batches=batches, model=network, **options)


def test_every_mismatch_at_set_up_is_named_on_all_ranks_and_none_hangs():
    """One after the other in the same processes: whatever was refused has left the process group in order."""

    def fn(rank):
        for name, (options, line) in MISMATCHES.items():
            begin = time.monotonic()
            failed = line.startswith("rank 1: ") and rank == 1
            with pytest.raises(Exception) as raised:  # noqa: PT011
                start(options if rank == 1 else {})
            assert isinstance(raised.value, RanksDisagree) != failed, (name, raised.value)
            text = f"rank 1: {raised.type.__name__}: {raised.value}" if failed else str(raised.value)
            assert line in text, (name, text)
            assert time.monotonic() - begin < 10
        return start({})[1].params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


def test_what_may_differ_is_not_refused(monkeypatch):
    def fn(rank):
        if rank == 1:
            monkeypatch.setattr(settings.torch, "__version__", "2.99")
            monkeypatch.setattr(settings.platform, "python_version", lambda: "3.99")
        torch.manual_seed(rank)
        with Messages() as messages:
            recorder = start({**strategy(gradient_as_bucket_view=bool(rank)), "val_check_interval": 2 if rank else 1.0})[1]
        assert messages.count("The ranks differ in software: version of torch") == (rank == 0)
        return recorder.params

    first, second = run_trainers(2, fn)
    assert same_params(first, second)


def test_another_version_of_this_package_is_refused(monkeypatch):
    def fn(rank):
        if rank == 1:
            monkeypatch.setattr(settings, "__version__", "99.0")
        with pytest.raises(RanksDisagree, match=r"lightning_onebit: \d.* on rank 0, but 99.0 on rank 1"):
            start({})

    run_trainers(2, fn)


def test_a_run_costs_four_small_all_reduces_beside_training(monkeypatch):
    """For the model, for optimizers, and two at the switch; none in ordinary batches."""
    compared = []
    original = module.exchange_if_different

    def counting(*args):
        compared.append(args)
        return original(*args)

    def fn(rank):
        monkeypatch.setattr(module, "exchange_if_different", counting)
        trainer, _ = start({}, batches=12)
        assert trainer.strategy.phase is Phase.COMPRESSED
        return len(compared)

    assert run_trainers(2, fn) == [4, 4]


def test_ddp_on_one_rank_ends_both_with_the_time_limit():
    """DDP itself waits for something else than we do; neither can know. The docs say so."""

    def fn(rank):
        timeout = timedelta(seconds=3)
        mine = OneBitDDPStrategy(timeout=timeout) if rank == 0 else DDPStrategy(timeout=timeout)
        begin = time.monotonic()
        hint = "could not compare model or strategy.*whether all use the same strategy" if rank == 0 else None
        with pytest.raises(RuntimeError, match=hint):
            fit(mine, 2)
        assert time.monotonic() - begin < 30

    run_trainers(2, fn)


# During the run


def test_a_schedule_that_differs_is_found_at_the_next_compressed_step():
    """Ranks would drift apart, each with its own learning rate; under DDP they do, unnoticed."""

    class Drifting(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 7:
                trainer.optimizers[0].param_groups[0]["lr"] = 1e-2 / (1 + trainer.global_rank)

    def fn(rank):
        for overlap in (False, True):
            network = Classifier()
            callbacks = [PhaseSwitch(FixedStep(4)), Drifting()]
            with pytest.raises(RanksDisagree, match=f"optimizer's settings:\n  {says('Adam, group 0, lr', 0.01, 0.005)}"):
                start({**strategy(overlap=overlap), "callbacks": callbacks, "model": lambda network=network: network}, 12)
            assert all(p.isfinite().all() for p in network.parameters())

    run_trainers(2, fn)


@pytest.mark.parametrize("batch", [2, 6])
def test_parameters_that_begin_to_train_on_one_rank_only_end_the_run_on_all(batch):
    """In warm-up and in the compressed phase; without a word, one rank would wait for the other in another collective."""

    class Unfreezing(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, _, batch_idx):
            if batch_idx == batch and trainer.global_rank == 1:
                pl_module.body[0].bias.requires_grad_(True)

    def fn(rank):
        with pytest.raises(RanksDisagree, match=f"from this batch on:\n  {says('begin to train', 'none', 'body.0.bias')}"):
            start({**model(Freezing), "callbacks": [PhaseSwitch(FixedStep(4)), Unfreezing()]}, batches=10)

    run_trainers(2, fn)


@pytest.mark.parametrize("where", ["check_moments", "CompressedOptimizer"])
def test_a_rank_that_cannot_switch_ends_all(monkeypatch, where):
    def full(*_, **__):
        raise MemoryError("no room for errors")

    def fn(rank):
        if rank == 1:
            monkeypatch.setattr(phase_controller, where, full)
        with pytest.raises(MemoryError if rank else RanksDisagree, match="no room for errors"):
            start({})

    run_trainers(2, fn)


def test_fabric_compares_as_well():
    def fn(rank):
        def run(kind=Classifier, freeze=4, lr=1e-2, **options):
            mine = OneBitDDPFabricStrategy(criterion=FixedStep(freeze), **options)
            fabric = Fabric(accelerator="cpu", devices=2, strategy=mine)
            fabric.launch()
            network = kind()
            fabric.setup(network, torch.optim.Adam(network.parameters(), lr=lr))

        for options, line in [
            ({"kind": Larger}, says("number of parameters", 6, 8)),
            ({"freeze": 5}, says("criterion", "FixedStep(n=4)", "FixedStep(n=5)")),
            ({"block_size": 64}, says("block_size", 2048, 64)),
            ({"total_steps": 9}, says("total_steps", None, 9)),
            ({"lr": 2e-2}, says("lr", 0.01, 0.02)),
        ]:
            with pytest.raises(RanksDisagree, match=re.escape(line)):
                run(**(options if rank == 1 else {}))
        run()

    run_trainers(2, fn)
