"""What carries out exchanges beside other work: order, failures, and that it changes no result."""

import contextlib
import threading
import time

import pytest
import torch
from ranks import run_trainers
from test_engine import WARMUP_STEPS, compressed_steps, make_optimizer, params_of, warm_up
from thread_ranks import exchange_groups, run_threads
from trainers import fit

from lightning_onebit import FixedStep, PhaseSwitch
from lightning_onebit.comm.exchanger import InlineExchanger, StreamExchanger, ThreadExchanger, make_exchanger
from lightning_onebit.config import CompressionConfig
from lightning_onebit.engine.optimizer import CompressedOptimizer


@pytest.fixture
def exchanger():
    exchanger = ThreadExchanger()
    yield exchanger
    exchanger.close()
    assert not exchanger._thread.is_alive()


def test_works_in_order_and_in_another_thread(exchanger):
    done = []

    def work(i):
        time.sleep(0.01 * (3 - i))
        done.append((i, threading.current_thread().name))

    exchanges = [exchanger.submit(lambda i=i: work(i)) for i in range(3)]
    exchanges[-1].wait()
    assert done == [(i, "onebit-exchanger") for i in range(3)]
    assert all(exchange.done() for exchange in exchanges)


def test_a_failure_reaches_the_waiting_thread_and_all_later_work_fails_with_it(exchanger):
    done = []

    def fail():
        raise OSError("the cable is unplugged")

    exchanges = [exchanger.submit(work) for work in (lambda: done.append(1), fail, lambda: done.append(2))]
    exchanges[0].wait()
    for exchange in exchanges[1:]:
        with pytest.raises(RuntimeError, match="the cable is unplugged") as info:
            exchange.wait()
        assert isinstance(info.value.__cause__, OSError)
    assert done == [1]


def test_ctrl_c_during_an_exchange_in_the_main_thread_is_no_failed_exchange():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        InlineExchanger().submit(interrupted)


def test_inline_exchanger_has_done_it_when_it_returns():
    done = []
    exchange = InlineExchanger().submit(lambda: done.append(1))
    assert done == [1]
    assert exchange.done()

    def fail():
        raise ValueError("no")

    with pytest.raises(RuntimeError, match="no"):
        InlineExchanger().submit(fail).wait()


@pytest.mark.parametrize("bucket_cap_mb", [0.0005, 0.002, None])
@pytest.mark.parametrize("space", ["update", "momentum"])
def test_the_thread_changes_no_bit(bucket_cap_mb, space):
    def fn(communicator, threaded):
        optimizer = make_optimizer(torch.optim.AdamW, torch.float32)
        warm_up(optimizer, WARMUP_STEPS, 3)
        config = CompressionConfig(block_size=8, bucket_cap_mb=bucket_cap_mb, space=space)
        exchanger = ThreadExchanger() if threaded else InlineExchanger()
        groups = exchange_groups(communicator) if threaded else None
        compressed = CompressedOptimizer(optimizer, config, communicator, {}, groups=groups, exchanger=exchanger)
        history = []
        for _ in compressed_steps(optimizer, compressed, communicator.rank, range(WARMUP_STEPS, WARMUP_STEPS + 30)):
            history.append([p.detach().clone() for p in params_of(optimizer)])
        exchanger.close()
        return history

    for threaded, inline in zip(run_threads(3, fn, True), run_threads(3, fn, False), strict=True):
        for a, b in zip(threaded, inline, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_no_thread_is_left_after_a_fit():
    def fn(rank):
        fit("onebit_ddp", 2, callbacks=[PhaseSwitch(FixedStep(3))])
        assert "onebit-exchanger" not in [thread.name for thread in threading.enumerate()]

    run_trainers(2, fn)


class FakeCuda:
    """Stands for ``torch.cuda`` where there is none: notes who waits for what, in order."""

    def __init__(self):
        self.log, self.complete, self.seconds = [], False, 100.0
        fake = self

        class Stream:
            def __init__(self, device=None, name="side"):
                self.device, self.name = device, name

            def wait_stream(self, other):
                fake.log.append(f"{self.name} waits for {other.name}")

            def wait_event(self, event):
                fake.log.append(f"{self.name} waits for what {event.stream.name} had")
                fake.seconds += 7.0

        class Event:
            def __init__(self, enable_timing=False):
                self.enable_timing = enable_timing

            def record(self, stream):
                self.stream, self.seconds = stream, fake.seconds

            def elapsed_time(self, other):
                return 1000.0 * (other.seconds - self.seconds)

            def query(self):
                return fake.complete

        self.Stream, self.Event = Stream, Event
        self.current = Stream(name="main")

    def current_stream(self, device=None):
        return self.current

    @contextlib.contextmanager
    def stream(self, stream):
        previous, self.current = self.current, stream
        yield
        self.current = previous


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    for name in ("Stream", "Event", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


def test_stream_exchanger_orders_streams_and_never_blocks_the_host(cuda):
    exchanger = StreamExchanger(torch.device("cuda", 0))
    exchange = exchanger.submit(lambda: cuda.log.append(f"work on {cuda.current.name}"))
    assert not exchange.done()
    cuda.complete = True
    assert exchange.done()
    exchange.wait()
    assert cuda.log == ["side waits for main", "work on side", "main waits for what side had"]


def test_the_time_waited_is_that_of_the_stream_and_known_when_it_is_over(cuda, exchanger):
    def work():
        cuda.seconds += 3.0

    on_stream = StreamExchanger(torch.device("cuda", 0)).submit(work)
    on_stream.wait()
    assert on_stream.seconds() is None
    cuda.complete = True
    assert on_stream.seconds() == (7.0, 3.0)
    in_thread = exchanger.submit(lambda: time.sleep(0.2))
    in_thread.wait()
    waited, taken = in_thread.seconds()
    assert 0.1 < waited < 2.0
    assert 0.2 <= taken < 2.0
    hidden = exchanger.submit(lambda: time.sleep(0.2))
    time.sleep(0.3)
    hidden.wait()
    waited, taken = hidden.seconds()
    assert waited < 0.1
    assert 0.2 <= taken < 2.0
    waited, taken = InlineExchanger().submit(lambda: time.sleep(0.01)).seconds()
    assert waited == taken >= 0.01


def test_waits_are_counted_once_each_when_they_are_known():
    class Waits:
        def __init__(self, *answers):
            self.answers = list(answers)

        def seconds(self):
            waited = self.answers.pop(0)
            return None if waited is None else (waited, 2 * waited)

    def fn(communicator):
        optimizer = make_optimizer(torch.optim.Adam, torch.float32)
        warm_up(optimizer, WARMUP_STEPS, 1)
        compressed = CompressedOptimizer(optimizer, CompressionConfig(block_size=64), communicator, {})
        counters, before = communicator.counters, communicator.counters.seconds_waited
        seen = []
        for waited in ([Waits(1.0), Waits(None, None, 16.0)], [Waits(2.0)], []):
            compressed._waited += waited
            compressed._count_waits()
            seen.append(counters.seconds_waited - before)
        assert seen == pytest.approx([1.0, 3.0, 19.0])
        assert counters.seconds_exchanging == pytest.approx(before + 38.0, abs=0.5)
        assert not compressed._waited

    run_threads(1, fn)


def test_stream_exchanger_fails_all_later_work_after_a_failure(cuda):
    exchanger = StreamExchanger(torch.device("cuda", 0))

    def fail():
        raise OSError("no route")

    failed, later = exchanger.submit(fail), exchanger.submit(lambda: cuda.log.append("never"))
    for exchange in (failed, later):
        with pytest.raises(RuntimeError, match="no route"):
            exchange.wait()
    assert "never" not in cuda.log


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_stream_exchanger_on_a_gpu():
    device = torch.device("cuda")
    exchanger, source = make_exchanger(device), torch.randn(1 << 24, device=device)
    result = torch.zeros_like(source)
    source.mul_(2)
    exchange = exchanger.submit(lambda: result.copy_(source))
    exchange.wait()
    assert torch.equal(result, source)
