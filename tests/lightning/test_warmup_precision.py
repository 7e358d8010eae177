"""``warmup_precision``: what gradients travel as before the switch."""

import contextlib
import os
import socket
import struct
import sys

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from ranks import run_trainers
from torch import nn
from trainers import Classifier, data, fit, same_params

from lightning_onebit import FixedStep, OneBitDDPFabricStrategy, OneBitDDPStrategy, Phase, PhaseSwitch
from lightning_onebit.comm.stats import ring_all_reduce_nbytes

TCPI_BYTES_SENT = 200
"""Its place in Linux' ``struct tcp_info``: 64 bits."""


def tcp_bytes_sent():
    """Bytes of payload that this process has sent by the TCP connections that it holds, as the kernel counts them."""
    total = 0
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("=Q", info, TCPI_BYTES_SENT)[0]
    return total


class Bytes(PhaseSwitch):
    """A switch that notes what TCP has sent, and what was counted, after the first and the last batch of its warm-up."""

    def __init__(self, steps):
        super().__init__(FixedStep(steps + 100))
        self.steps, self.seen = steps, {}

    def on_train_batch_end(self, trainer, pl_module, *rest):
        super().on_train_batch_end(trainer, pl_module, *rest)
        step = trainer.strategy.optimizer_steps
        if step in (2, self.steps):
            self.seen[step] = (tcp_bytes_sent(), trainer.strategy.comm_stats.bytes_sent)


class Sent:
    """Dtypes of what ``all_reduce`` was given meanwhile."""

    def __enter__(self):
        self.dtypes, self._stock = [], dist.all_reduce

        def all_reduce(tensor, *args, **kwargs):
            self.dtypes.append(tensor.dtype)
            return self._stock(tensor, *args, **kwargs)

        dist.all_reduce = all_reduce
        return self

    def __exit__(self, *_):
        dist.all_reduce = self._stock


def trained(warmup_precision, world_size, *, steps=4, batches=4, **kwargs):
    strategy = OneBitDDPStrategy(warmup_precision=warmup_precision, block_size=16)
    return fit(strategy, world_size, batches=batches, callbacks=[PhaseSwitch(FixedStep(steps))], **kwargs)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how many bytes a connection has sent")
@pytest.mark.parametrize("world_size", [2, 3])
def test_bf16_halves_the_bytes_that_tcp_sends_and_what_is_counted_is_what_was_sent(world_size):
    def fn(rank):
        sent = {}
        for precision in ("fp32", "bf16"):
            switch = Bytes(6)
            strategy = OneBitDDPStrategy(warmup_precision=precision)
            model = Classifier(hidden=256)
            fit(strategy, world_size, batches=6, callbacks=[switch], model=model)
            (wire, counted), (wire_before, counted_before) = switch.seen[6], switch.seen[2]
            sent[precision] = counted - counted_before
            assert wire - wire_before == pytest.approx(sent[precision], rel=0.05)
            numel = sum(p.numel() for p in model.parameters())
            each = ring_all_reduce_nbytes((4 if precision == "fp32" else 2) * numel, world_size)
            assert sent[precision] == pytest.approx(4 * each, rel=0.001)
            warmup = strategy.comm_stats[Phase.WARMUP]
            assert warmup.dense_equivalent_bytes == pytest.approx(
                6 * ring_all_reduce_nbytes(4 * numel, world_size), rel=1e-4
            )
        assert sent["bf16"] == pytest.approx(sent["fp32"] / 2, rel=0.001)

    run_trainers(world_size, fn)


def test_bf16_is_the_mean_of_the_ranks_gradients_rounded_and_the_same_on_all_ranks():
    def fn(rank):
        gradients = []

        class Model(Classifier):
            def on_before_optimizer_step(self, optimizer):
                gradients.append(torch.cat([p.grad.reshape(-1) for p in self.parameters()]))

        for warmup_precision in ("fp32", "bf16"):
            trained(warmup_precision, 3, batches=1, model=Model())
        exact, rounded = gradients
        assert torch.equal(rounded, rounded.bfloat16().float())
        assert 0 < (rounded - exact).norm() < 2.0**-8 * exact.norm()
        return rounded

    first, *others = run_trainers(3, fn)
    assert all(torch.equal(first, other) for other in others)


def test_fp32_is_ddp_bitwise_and_bf16_is_not():
    def fn(rank):
        ddp = fit("ddp", 2, batches=4)[1]
        assert same_params(ddp.params, trained("fp32", 2)[1].params)
        assert not same_params(ddp.params, trained("bf16", 2)[1].params)

    run_trainers(2, fn)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
def test_gradients_of_any_width_travel_as_bfloat16_and_only_in_warmup(precision):
    def fn(rank):
        with Sent() as sent:
            trained("bf16", 2, steps=2, batches=5, precision=precision)
        # No gradient is averaged after the switch, and beside gradients only int64 travels by all_reduce.
        assert sent.dtypes.count(torch.bfloat16) == 2
        assert not {torch.float32, torch.float64}.intersection(sent.dtypes)

    run_trainers(2, fn)


def test_what_is_averaged_beside_compressed_gradients_travels_as_it_is():
    def both(module):
        return [torch.optim.Adam(module.body.parameters()), torch.optim.Adagrad(module.head.parameters())]

    class Both(Classifier):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

    def fn(rank):
        with Sent() as sent:
            trained("bf16", 2, steps=2, batches=5, model=Both(both))
        assert sent.dtypes.count(torch.bfloat16) == 2
        assert sent.dtypes.count(torch.float32) == 3

    run_trainers(2, fn)


def test_a_resumed_warmup_is_bitwise_the_uninterrupted_one(tmp_path):
    """On three ranks the last bits depend on how DDP cuts its buckets."""

    def fn(rank):
        def train(**kwargs):
            strategy = OneBitDDPStrategy(warmup_precision="bf16", bucket_cap_mb=0.001)
            return fit(strategy, 3, batches=4, callbacks=[PhaseSwitch(FixedStep(100))], **kwargs)

        whole = train(max_epochs=2)[1]
        train(max_epochs=1)[0].save_checkpoint(tmp_path / "half.ckpt")
        resumed = train(max_epochs=2, ckpt_path=tmp_path / "half.ckpt")[1]
        assert same_params(whole.params[4:], resumed.params)

    run_trainers(3, fn)


def test_fabric_takes_it_too():
    def fn(rank):
        with Sent() as sent:
            strategy = OneBitDDPFabricStrategy(criterion=FixedStep(2), warmup_precision="bf16")
            fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
            fabric.launch()
            torch.manual_seed(0)
            module = nn.Linear(12, 5)
            model, optimizer = fabric.setup(module, torch.optim.Adam(module.parameters()))
            for x, y in fabric.setup_dataloaders(data(4, 2)):
                fabric.backward(nn.functional.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
            assert strategy.phase is Phase.COMPRESSED
            strategy.teardown()
        assert sent.dtypes.count(torch.bfloat16) == 2

    run_trainers(2, fn)


@pytest.mark.parametrize("strategy", [OneBitDDPStrategy, OneBitDDPFabricStrategy])
def test_anything_else_is_refused_at_construction(strategy):
    with pytest.raises(ValueError, match=r"Invalid warmup_precision: 'fp16'\. Must be 'fp32'.*'bf16'"):
        strategy(warmup_precision="fp16")
