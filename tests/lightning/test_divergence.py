"""The divergence guard: one bit that differs on one rank is found and named, and nothing else is."""

from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from ranks import run_ranks, run_trainers
from test_fabric import Loop
from test_several_optimizers import Adversaries, adam, rmsprop
from thread_ranks import run_threads
from torch import nn
from torch.nn import functional as F
from trainers import CLASSES, FEATURES, Classifier, data, fit, make_trainer

from lightning_onebit import DivergenceError, DivergenceGuard, FixedStep, OneBitDDPStrategy, Phase, PhaseSwitch
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.config import CompressionConfig
from lightning_onebit.consistency.checksum import CHUNK_NUMEL, MULTIPLIER, Checksum, words
from lightning_onebit.consistency.divergence import difference_between_ranks
from lightning_onebit.engine.optimizer import CompressedOptimizer
from lightning_onebit.flat import flat_view
from lightning_onebit.lightning.fabric_strategy import OneBitDDPFabricStrategy

CPU = torch.device("cpu")
WARMUP, COMPRESSED = Phase.WARMUP, Phase.COMPRESSED
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.complex64, torch.bool]
CHUNK = CHUNK_NUMEL["cpu"]

quick = settings(deadline=None, max_examples=60)


def random_tensor(seed, numel, dtype):
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.rand(numel, generator=generator) < 0.5
    nbytes = numel * torch.empty(0, dtype=dtype).element_size()
    return torch.randint(256, (nbytes,), dtype=torch.uint8, generator=generator).view(dtype)


def flip(tensor, bit):
    """One bit of a dense tensor's memory, in place."""
    flat_view(tensor).view(torch.uint8)[bit // 8] ^= 1 << bit % 8


def coded_or_not(memory):
    """D of a bucket."""
    return memory.rms if memory.rms_code is None else memory.rms_code


def state_of(strategy, p):
    """In the compressed phase: the bucket that holds ``p``, its parts of it, and the late coordinates of all buckets."""
    for compressed in strategy._phases.compressed.values():
        for each in compressed._sets:
            for memory, parts in zip(each.buckets.memories, each.buckets.parts, strict=True):
                own = [part for part in parts if each.buckets.params[part.parameter] is p]
                if own:
                    return memory, own, each.late
    raise LookupError("not compressed")


# The checksum

tensors = st.builds(random_tensor, st.integers(0, 99), st.integers(0, 300), st.sampled_from(DTYPES))


def h(*tensors):
    return int(Checksum(CPU).of(tensors))


@quick
@given(tensors)
def test_it_is_the_weighted_sum_of_the_words(tensor):
    w = words(tensor).tolist()
    expected = sum(pow(MULTIPLIER, i) * x for i, x in enumerate([*w, 1])) % 2**64
    assert h(tensor) % 2**64 == expected
    assert len(w) == tensor.numel() * max(1, tensor.element_size() // 4)


@quick
@given(tensors, st.integers(min_value=0))
def test_every_flipped_bit_is_seen(tensor, bit):
    assume(tensor.numel() and tensor.dtype is not torch.bool)
    flipped = tensor.clone()
    flip(flipped, bit % (8 * tensor.nbytes))
    assert h(flipped) != h(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_bit_counts_at_both_ends_and_where_chunks_meet(dtype):
    tensor = torch.zeros(CHUNK + 3, dtype=dtype)
    checksum, width = Checksum(CPU), 8 * tensor.element_size()
    seen = {int(checksum.of([tensor]))}
    places = [0, 1, CHUNK // 2, CHUNK - 1, CHUNK, CHUNK + 2]
    for bit in [place * width + each for place in places for each in range(width)]:
        flip(tensor, bit)
        seen.add(int(checksum.of([tensor])))
        flip(tensor, bit)
    assert len(seen) == 1 + len(places) * width


@quick
@given(st.integers(0, 99), st.lists(st.integers(0, 2 * CHUNK), min_size=2, max_size=2, unique=True))
def test_two_words_that_changed_places_are_seen(seed, places):
    tensor = random_tensor(seed, 2 * CHUNK + 1, torch.int32)
    swapped = tensor.clone()
    swapped[places] = tensor[places[::-1]]
    assert h(swapped) != h(tensor) or torch.equal(tensor, swapped)


@quick
@given(st.integers(0, 99), st.lists(st.integers(0, 2 * CHUNK), max_size=4))
def test_it_does_not_matter_how_the_words_are_cut(seed, cuts):
    tensor = random_tensor(seed, 2 * CHUNK, torch.float32)
    places = [0, *sorted(cuts), 2 * CHUNK]
    assert h(*(tensor[start:end] for start, end in pairwise(places))) == h(tensor)


@pytest.mark.parametrize("numel", [1, 2, 64, 4096, 3 * CHUNK])
def test_signs_zeros_and_nans_are_told_apart(numel):
    """Changes of the highest bit of many words, which have little room above them."""
    x = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    nan = torch.full_like(x, torch.nan)
    other_nan = nan.view(torch.int32).add(1).view(torch.float32)
    every_second = torch.zeros_like(x)
    every_second[::2] = -0.0
    values = [h(t) for t in (x, -x, x.abs(), torch.zeros_like(x), -torch.zeros_like(x), nan, -nan, other_nan)]
    assert len(set(values)) == len(values) - (numel == 1 and x.item() == x.abs().item())
    assert h(every_second) != h(torch.zeros_like(x))


def test_lengths_and_layouts():
    zeros = [h(torch.zeros(numel)) for numel in range(5)]
    assert len({*zeros, h()}) == 5
    assert h() == h(torch.zeros(0))
    x = torch.arange(24.0).view(2, 3, 2, 2)
    assert h(torch.tensor(3.0)) == h(torch.tensor([3.0]))
    assert h(x.t() if x.dim() == 2 else x.transpose(0, 1)) == h(x)  # in memory order
    assert h(x.to(memory_format=torch.channels_last)) != h(x)
    assert h(x[:, :, :, 0]) == h(x[:, :, :, 0].clone())  # not dense
    assert h(torch.tensor([1.0]).expand(3)) == h(torch.ones(3))
    assert h(torch.zeros(6, dtype=torch.bfloat16)[1:]) == h(torch.zeros(5, dtype=torch.bfloat16))  # not aligned to words


@quick
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20), st.integers(0, 19), st.integers(0, 63))
def test_a_checksum_of_checksums_sees_every_change_of_one(values, which, bit):
    checksums = torch.tensor(values)
    before = int(Checksum(CPU).of_checksums(checksums))
    flip(checksums, 64 * (which % len(values)) + bit)
    assert int(Checksum(CPU).of_checksums(checksums)) != before


# The comparison


def differences(world_size, change):
    """What :func:`difference_between_ranks` says of two parameters, and their momentum, after ``change(rank, tensors)``."""

    def fn(rank):
        tensors = [torch.ones(3), torch.ones(4), torch.ones(3), torch.ones(4)]
        parameters = dict(zip(tensors[:2], ("first", "second"), strict=True))
        state = [(p, "momentum", [m]) for p, m in zip(tensors[:2], tensors[2:], strict=True)]
        change(rank, tensors)
        counters = (communicator := Communicator()).counters
        difference = difference_between_ranks(parameters, state, communicator, CPU)
        return difference, counters.collectives, counters.bytes_sent

    said, collectives, nbytes = zip(*run_ranks(world_size, fn), strict=True)
    assert len(set(said)) == 1
    return said[0], collectives[0], nbytes[0]


def test_without_a_difference_it_takes_one_small_collective():
    assert differences(3, lambda rank, tensors: None) == (None, 1, 2 * 16)


@pytest.mark.parametrize(
    ("world_size", "changed", "text"),
    [
        (3, {1: [0]}, "rank 1 holds other bits than the other ranks, in 1 of 2 parameters. The first of them is 'first': its"
         " value"),
        (3, {0: [3]}, "rank 0 holds other bits than the other ranks, in 1 of 2 parameters. The first of them is 'second':"
         " its momentum"),
        (3, {2: [0, 1, 2]}, "rank 2 holds other bits than the other ranks, in 2 of 2 parameters. The first of them is"
         " 'first': its value and its momentum"),
        (2, {0: [1]}, "rank 1 holds other bits than rank 0 (either may be wrong: there is no majority), in 1 of 2"
         " parameters. The first of them is 'second': its value"),
        (3, {0: [0], 1: [1]}, "ranks 1, 2 hold other bits than rank 0 (either may be wrong: there is no majority), in 2 of 2"
         " parameters. The first of them is 'first': its value"),
        (5, {1: [2], 4: [3]}, "ranks 1, 4 hold other bits than the other ranks, in 2 of 2 parameters. The first of them is"
         " 'first': its momentum"),
    ],
)  # fmt: skip
def test_who_differs_and_where(world_size, changed, text):
    def change(rank, tensors):
        for index in changed.get(rank, []):
            flip(tensors[index], 7)

    assert differences(world_size, change)[:2] == (text, 2)


def test_ranks_with_different_numbers_of_parameters_end_as_well():
    def fn(rank):
        parameters = {torch.ones(2): f"p{i}" for i in range(3 - rank)}
        return difference_between_ranks(parameters, [], Communicator(), CPU)

    assert run_ranks(2, fn) == ["the ranks have different numbers of parameters: [3, 2]"] * 2


# One bit, in a Trainer


class Words(pl.LightningModule):
    """Parameters of many kinds. An embedding, some of whose rows come late, and on the last rank only."""

    def __init__(self, late_after=9):
        super().__init__()
        torch.manual_seed(0)
        self.late_after = late_after
        self.temperature = nn.Parameter(torch.ones(()))
        self.embedding = nn.Embedding(40, FEATURES)
        self.frozen = nn.Linear(FEATURES, FEATURES).requires_grad_(False)
        self.transposed = nn.Parameter(torch.randn(FEATURES, 3).t())
        self.narrow = nn.Parameter(torch.randn(FEATURES, dtype=torch.bfloat16))
        self.empty = nn.Parameter(torch.empty(0))
        self.wide = nn.Parameter(torch.randn(FEATURES, CLASSES, dtype=torch.float64))

    def training_step(self, batch, batch_idx):
        x, y = batch
        is_late = batch_idx >= self.late_after and self.global_rank == self.trainer.world_size - 1
        rows = (x * 4).round().long().clamp(0, 9) + (20 if is_late else 0)
        hidden = self.frozen(self.embedding(rows).mean(1) * self.narrow) * self.temperature + self.transposed.sum(0)
        return F.cross_entropy(hidden.double() @ self.wide, y) + self.empty.sum()

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Probe(pl.Callback):
    """After batches 3 (warm-up) and 8 and 15 (compressed, before and after rows came late): for each target, flips a bit on
    one rank, looks whether all ranks name it, and flips it back."""

    def __init__(self):
        self.found = []
        self.late_second_moments = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx not in (3, 8, 15):
            return
        strategy = trainer.strategy
        for compressed in strategy._phases.compressed.values():
            self.late_second_moments = compressed.state.late_second_moments()
        strategy.check_ranks_agree()
        for index, (name, kind, tensor) in enumerate(self.targets(trainer, pl_module)):
            rank = index % trainer.world_size
            bit = (37 * index) % (8 * tensor.nbytes)
            if trainer.global_rank == rank:
                flip(tensor, bit)
            with pytest.raises(DivergenceError) as caught:
                strategy.check_ranks_agree()
            if trainer.global_rank == rank:
                flip(tensor, bit)
            strategy.check_ranks_agree()
            message = str(caught.value)
            self.found.append(message)
            wrong = rank if trainer.world_size > 2 else 1
            assert f"after optimizer step {batch_idx + 1} rank {wrong} holds" in message, (index, message)
            assert f"in 1 of 8 parameters. The first of them is {name!r}: its {kind}. All" in message
            assert f"last seen to agree after step {batch_idx + 1}." in message
            assert f"a checkpoint of step {batch_idx + 1} or earlier" in message

    @staticmethod
    def targets(trainer, module):
        (optimizer,) = trainer.optimizers
        for name, p in module.named_parameters():
            if not p.numel():
                continue
            yield name, "value", p
            state = optimizer.state.get(p, {}) if trainer.strategy.phase is WARMUP else {}
            if "exp_avg" in state:
                yield name, "momentum", state["exp_avg"]
            if "exp_avg_sq" in state:
                yield name, "second moment", flat_view(state["exp_avg_sq"])[:3]
        if trainer.strategy.phase is WARMUP:
            return
        names = {p: name for name, p in module.named_parameters()}
        for each in trainer.strategy._phases.compressed[optimizer]._sets:
            for part in (part for parts in each.buckets.parts for part in parts):
                name, memory = names[each.buckets.params[part.parameter]], part.memory
                yield name, "momentum", part.average.signs
                yield name, "momentum", part.average.scales
                yield name, "second moment", part.of_bucket(coded_or_not(memory))
                if memory.live is not None:
                    assert memory.live_before is memory.live
                    yield name, "momentum and its second moment", part.of_bits(memory.live)
            for late in each.late:
                if len(late):
                    yield "embedding.weight", "second moment", late.places
                    yield "embedding.weight", "second moment", late.live_since


@pytest.mark.parametrize(("world_size", "overlap"), [(2, True), (3, False)])
def test_one_flipped_bit_is_found_wherever_it_is(world_size, overlap):
    def fn(rank):
        probe, switch = Probe(), PhaseSwitch(FixedStep(5))
        strategy = OneBitDDPStrategy(overlap=overlap, variance_refresh=None)
        trainer, _ = fit(strategy, world_size, batches=17, model=Words(), callbacks=[switch, probe])
        assert trainer.strategy.phase is COMPRESSED
        return probe.found, probe.late_second_moments

    results = run_trainers(world_size, fn)
    messages = results[0][0]
    assert all(found == messages for found, _ in results)
    # Values, signs, scales, D; the mask of who takes part, for all three parameters of float32; who is late, and since when.
    assert len(messages) == (7 + 2 * 5) + 2 * (7 + 3 * 5 + 3 + 2)
    # Meanwhile each rank had a second moment of its own, on purpose, for the rows that came late.
    (late, values), (elsewhere, _) = results[-1][1], results[0][1]
    assert len(late) > 0
    assert (values > 0).all()
    assert len(elsewhere) == 0


@pytest.mark.parametrize("name", ["rms_code", "rms_scale"])
def test_one_flipped_bit_of_a_d_that_is_renewed_is_found(name):
    def fn(communicator):
        p = nn.Parameter(torch.ones(40))
        optimizer = torch.optim.Adam([p])
        p.grad = torch.arange(40.0)
        optimizer.step()
        compressed = CompressedOptimizer(optimizer, CompressionConfig(), communicator, {})
        if communicator.rank == 1:
            flip(getattr(compressed._sets[0].buckets.memories[0], name), 9)
        return difference_between_ranks({p: "p"}, compressed.state.replicated_state(), communicator, CPU)

    for difference in run_threads(3, fn):
        assert "rank 1 holds" in str(difference)
        assert "'p': its second moment" in str(difference)


def test_late_coordinates_are_compared_as_far_as_ranks_share_them():
    """Whether they are late, but not their second moment until the next refresh."""

    class FlipBits(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx != 15:
                return
            memory, parts, late = state_of(trainer.strategy, pl_module.embedding.weight)
            (part,) = parts
            (own,) = (each for each in late if each.memory is memory)
            rms, never = part.of_bucket(memory.rms), int((part.of_bucket(memory.rms) == 0).nonzero()[-1])
            seen = int((rms > 0).nonzero()[-1])
            for tensor, bit, shared in [
                (own.second_moment, 3, False),
                (own.second_moment, 8 * own.second_moment.nbytes - 1, False),
                (rms, 32 * seen, True),
                (rms, 32 * never + 31, True),
            ]:
                if trainer.global_rank == 1:
                    flip(tensor, bit)
                if shared:
                    with pytest.raises(DivergenceError, match=r"rank 1 .* 'embedding.weight': its second moment"):
                        trainer.strategy.check_ranks_agree()
                else:
                    trainer.strategy.check_ranks_agree()
                if trainer.global_rank == 1:
                    flip(tensor, bit)
            trainer.strategy.check_ranks_agree()

    def fn(rank):
        frozen = OneBitDDPStrategy(variance_refresh=None)
        fit(frozen, 3, batches=17, model=Words(), callbacks=[*early_switch(), FlipBits()])

    run_trainers(3, fn)


# The guard


def early_switch(steps=5):
    return [PhaseSwitch(FixedStep(steps))]


class FlipOnce(pl.Callback):
    """Flips the sign of one element of a parameter on the last rank, at the beginning of a batch."""

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch and trainer.global_rank == trainer.world_size - 1:
            flip(pl_module.head.weight, 32 * 11 + 31)


@pytest.mark.parametrize(
    ("world_size", "batch", "options", "step", "agreed"),
    [
        (2, 2, {}, 4, "They were not compared before in this run"),  # in warm-up
        (3, 13, {}, 16, "agree after step 12"),  # compressed
        (2, 13, {"accumulate_grad_batches": 2}, 8, "agree after step 4"),
        (3, 18, {"max_steps": 19}, 19, "agree after step 16"),  # the end of training is checked, too
    ],
)
def test_a_run_whose_ranks_diverge_ends_on_all_ranks_with_the_same_message(world_size, batch, options, step, agreed):
    def fn(rank):
        callbacks = [*early_switch(), FlipOnce(batch), DivergenceGuard(every_n_steps=4)]
        with pytest.raises(DivergenceError) as caught:
            fit("onebit_ddp", world_size, batches=20, callbacks=callbacks, **options)
        return str(caught.value)

    messages = run_trainers(world_size, fn)
    assert len(set(messages)) == 1
    assert f"after optimizer step {step} rank {world_size - 1} holds" in messages[0]
    assert "The first of them is 'head.weight': its value" in messages[0]
    assert agreed in messages[0]


class Comparisons(pl.Callback):
    """Counts the calls of ``check_ranks_agree``, by batch."""

    def __init__(self):
        self.batches = []

    def on_train_start(self, trainer, pl_module):
        check = trainer.strategy.check_ranks_agree

        def counting():
            self.batches.append(trainer.fit_loop.epoch_loop.batch_idx)
            check()

        trainer.strategy.check_ranks_agree = counting


@pytest.mark.parametrize(
    ("every", "options", "batches"),
    [
        (4, {}, [3, 7, 9]),
        (5, {}, [4, 9]),
        (2, {"accumulate_grad_batches": 3}, [5, 9]),  # steps after batches 2, 5, 8 and, at the end of the epoch, 9
        (None, {}, []),
        (1, {"max_steps": 3}, [0, 1, 2]),
    ],
)
def test_it_compares_every_so_many_steps_right_after_a_step_and_at_the_end(every, options, batches):
    def fn(rank):
        comparisons = Comparisons()
        callbacks = [comparisons, *early_switch(), DivergenceGuard(every)]
        fit("onebit_ddp", 2, batches=10, callbacks=callbacks, **options)
        return comparisons.batches

    assert run_trainers(2, fn) == [batches] * 2


def test_the_strategy_adds_one_before_the_checkpoints(tmp_path):
    def fn(rank):
        trainer = make_trainer("onebit_ddp", 2, callbacks=[ModelCheckpoint(tmp_path)], enable_checkpointing=True)
        trainer.fit(Classifier(), data(4, 2))
        mine = DivergenceGuard(every_n_steps=None)
        other, _ = fit("onebit_ddp", 2, batches=2, callbacks=[mine])
        return [type(c).__name__ for c in trainer.callbacks], [
            c for c in other.callbacks if isinstance(c, DivergenceGuard)
        ] == [mine]

    for names, only_mine in run_trainers(2, fn):
        assert names[-3:] == ["PhaseSwitch", "DivergenceGuard", "ModelCheckpoint"]
        assert only_mine


@pytest.mark.parametrize("every", [0, -1])
def test_the_interval_must_be_positive(every):
    with pytest.raises(ValueError, match=f"Invalid every_n_steps: {every}. Must be >= 1"):
        DivergenceGuard(every)


def test_outside_a_run_there_is_nothing_to_compare():
    with pytest.raises(RuntimeError, match="needs a running"):
        OneBitDDPStrategy().check_ranks_agree()


@pytest.mark.parametrize("batches", [4, 12])
def test_fabric_compares_as_well(batches):
    def fn(rank):
        # Frozen: the next refresh would make D the same again.
        options = {"criterion": FixedStep(6), "guard": DivergenceGuard(every_n_steps=2), "variance_refresh": None}
        strategy = OneBitDDPFabricStrategy(**options)
        loop = Loop(strategy).run(batches)
        if rank == 1:
            bias = loop.model.head.bias
            if batches > 6:
                memory, (part,), _ = state_of(strategy, bias)
                flip(part.of_bucket(coded_or_not(memory)), 5)
            else:
                flip(loop.optimizer.state[bias]["exp_avg_sq"], 5)
        with pytest.raises(DivergenceError) as caught:
            loop.run(batches + 2)
        strategy.teardown()
        return str(caught.value)

    first, second = run_trainers(2, fn)
    assert first == second
    assert f"after optimizer step {batches + 2} rank 1 holds other bits than rank 0" in first
    assert "'head.bias': its" in first
    assert "second moment" in first


# No false alarm


class Unfrozen(Classifier):
    def __init__(self):
        super().__init__()
        self.backbone = self.body

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class ThereAndBack(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 10:
            trainer.strategy.resume_warmup()


class InfiniteOnRank1(Words):
    def on_after_backward(self):
        if self.trainer.global_step % 5 == 1 and self.trainer.strategy.phase is COMPRESSED and self.global_rank == 1:
            self.narrow.grad.fill_(torch.inf)


class PerRank(Classifier):
    """A buffer, and a parameter that DDP is told to ignore, with a value of its own on each rank."""

    def __init__(self):
        super().__init__()
        self.register_buffer("moments", torch.zeros(3))
        self.own = nn.Parameter(torch.zeros(3), requires_grad=False)
        self._ddp_params_and_buffers_to_ignore = ["own"]

    def on_train_batch_end(self, *_):
        self.moments += self.global_rank
        self.own += self.global_rank


RUNS = {
    "what DDP does not keep equal": (PerRank, {}, []),
    "late rows": (Words, {}, []),
    "late rows, momentum space": (Words, {"space": "momentum"}, []),
    "overlapped": (Words, {"overlap": True, "bucket_cap_mb": 0.0005}, []),
    "back to warm-up": (Words, {}, [ThereAndBack]),
    "steps skipped": (InfiniteOnRank1, {}, []),
    "two optimizers": (Adversaries, {}, []),
    "one dense optimizer": (lambda: Adversaries(kinds=(adam, rmsprop)), {}, []),
    "unfreezing": (Unfrozen, {}, [lambda: BackboneFinetuning(unfreeze_backbone_at_epoch=1)]),
}


@pytest.mark.parametrize("kind", RUNS)
def test_no_false_alarm(kind):
    make_model, options, callbacks = RUNS[kind]

    def fn(rank):
        comparisons = Comparisons()
        each = [comparisons, *early_switch(), *(make() for make in callbacks), DivergenceGuard(every_n_steps=1)]
        strategy = OneBitDDPStrategy(**options)
        fit(strategy, 3, batches=14, model=make_model(), callbacks=each, max_epochs=2)
        assert strategy.comm_stats[COMPRESSED].steps > 12
        return len(comparisons.batches)

    assert run_trainers(3, fn) == [28] * 3


def test_a_parameter_that_comes_during_the_run_is_compared_as_well():
    class Growing(Classifier):
        def __init__(self):
            super().__init__()
            self.late = None

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss if self.late is None else loss + self.late.square().sum()

    class Grow(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 7:
                del pl_module.late
                pl_module.late = nn.Parameter(torch.ones(3))
                trainer.optimizers[0].add_param_group({"params": [pl_module.late]})
            if batch_idx == 9 and trainer.global_rank == 1:
                flip(pl_module.late, 40)

    def fn(rank):
        guard = DivergenceGuard(every_n_steps=1)
        with pytest.raises(DivergenceError, match=r"after optimizer step 10 rank 1 .* 'late': its value\."):
            fit("onebit_ddp", 2, batches=12, callbacks=[Grow(), *early_switch(20), guard], model=Growing())

    run_trainers(2, fn)


def test_another_fit_is_counted_anew():
    def fn(rank):
        comparisons = Comparisons()
        trainer, _ = fit("onebit_ddp", 2, batches=6, callbacks=[*early_switch(), DivergenceGuard(every_n_steps=4)])
        trainer.callbacks.insert(0, comparisons)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(trainer.lightning_module, data(6, 2))
        return comparisons.batches

    assert run_trainers(2, fn) == [[3, 5]] * 2


def test_no_false_alarm_on_nodes_of_several_processes():
    def fn(rank):
        comparisons = Comparisons()
        callbacks = [comparisons, *early_switch(), DivergenceGuard(every_n_steps=1)]
        trainer, _ = fit("onebit_ddp", 4, num_nodes=2, batches=20, model=Words(), callbacks=callbacks)
        return "2 nodes of 2 ranks" in repr(trainer.strategy), len(comparisons.batches)

    assert run_trainers(4, fn, num_nodes=2) == [(True, 20)] * 4


def test_no_false_alarm_after_a_resume(tmp_path):
    """Nor is the step forgotten."""

    def fn(rank):
        path = tmp_path / "run.ckpt"
        trainer, _ = fit("onebit_ddp", 2, batches=12, model=Words(), callbacks=early_switch())
        trainer.save_checkpoint(path)
        callbacks = [FlipWords(), *early_switch(), DivergenceGuard(every_n_steps=1)]
        with pytest.raises(DivergenceError) as caught:
            fit("onebit_ddp", 2, batches=12, model=Words(), callbacks=callbacks, max_epochs=2, ckpt_path=path)
        return str(caught.value)

    class FlipWords(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 6 and trainer.global_rank == 1:
                flip(pl_module.frozen.weight, 100)

    first, second = run_trainers(2, fn)
    assert first == second
    assert "after optimizer step 19 rank 1 holds" in first
    assert "'frozen.weight': its value" in first
    assert "last seen to agree after step 18" in first
