"""Run a function on many ranks: threads of one process, joined by a process group that copies between their tensors.

32 ranks cost no more than their arithmetic, a debugger sees all of them, and closures need no pickling. Everything above
torch.distributed is the product's: :class:`ThreadCommunicator` is a ``Communicator`` on a :class:`ThreadProcessGroup`, so
bytes and collectives are counted by the same code. What differs from gloo: sums are taken in rank order, so dense means
equal gloo's to rounding only (test_thread_ranks.py), and global state (random generators, environment, warnings) is shared.
"""

import sys
import threading
import time
import traceback
from dataclasses import dataclass
from functools import reduce
from unittest import mock

import torch
import torch.distributed as dist
from torch.profiler import record_function

from lightning_onebit.comm.groups import ExchangeGroups
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.comm.topology import Topology

# Name, operation, and what adds the second tensor to the first, in place.
REDUCTIONS = (
    ("sum", dist.ReduceOp.SUM, torch.Tensor.add_),
    ("max", dist.ReduceOp.MAX, lambda a, b: torch.maximum(a, b, out=a)),
)


def run_threads(world_size, fn, *args, timeout=60):
    """Call ``fn(communicator, *args)`` on every rank, each in a thread of its own, and return the results in rank order.

    Args:
        world_size: number of ranks.
        fn: any callable. Its first argument is the rank's :class:`ThreadCommunicator` over all ranks.
        args: passed to every rank, the same objects: tensors in them are shared memory.
        timeout: seconds that all of it, and each wait in a collective, may take.

    Raises:
        BaseException: the first exception of any rank, as it was raised there. All other ranks end at their next, or
            present, collective.
        TimeoutError: if a rank does not come to its end; says where it is.
    """
    world = _World(world_size, timeout)
    results = [None] * world_size

    def main(rank):
        torch.set_num_threads(1)
        world.turn.take()
        try:
            results[rank] = fn(ThreadCommunicator(ThreadProcessGroup(world, tuple(range(world_size)), rank)), *args)
        except BaseException as error:
            world.fail(rank, error)
        else:
            world.finish(rank)
        finally:
            world.turn.pass_on()

    num_threads, switch_interval = torch.get_num_threads(), sys.getswitchinterval()
    # A rank computes until it waits for others: handing the interpreter around in between only costs time.
    sys.setswitchinterval(0.05)
    # Daemons: a rank that hangs must not keep a failed test's process alive.
    threads = [threading.Thread(target=main, args=(rank,), name=f"rank{rank}", daemon=True) for rank in range(world_size)]
    try:
        with without_profiler_ranges():
            for thread in threads:
                thread.start()
            deadline = time.monotonic() + timeout
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
            world.give_up([(rank, thread) for rank, thread in enumerate(threads) if thread.is_alive()])
    finally:
        sys.setswitchinterval(switch_interval)
        torch.set_num_threads(num_threads)
    if world.failure is not None:
        rank, error = world.failure
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"Raised on rank {rank} of {world_size} (threads).")
        raise error
    return results


def without_profiler_ranges():
    """A context in which ``record_function`` does nothing: no profiler listens, and they are a sixth of a small step."""
    return mock.patch.multiple(
        record_function, __init__=lambda *_: None, __enter__=lambda self: self, __exit__=lambda *_: None
    )


class ThreadCommunicator(Communicator):
    """A ``Communicator`` among threads. Only its construction differs: no default process group is needed."""

    def __init__(self, group, *, waits=True, within_node=False):
        super().__init__(None, waits=waits, within_node=within_node)
        self.group, self.rank, self.world_size = group, group.rank(), group.size()

    def split(self, members, *, waits=True, within_node=False):
        """A communicator of ``members``, ranks of this one, in their order. To be called by members only.

        Each call makes another group. Not collective, but all members must make their calls for the same ``members`` in
        the same order.
        """
        return ThreadCommunicator(self.group.split(members), waits=waits, within_node=within_node)


def exchange_groups(communicator, local_world_size=1):
    """What ``new_groups`` makes, for nodes of ``local_world_size`` ranks each."""
    topology = Topology(
        num_nodes=communicator.world_size // local_world_size,
        node_rank=communicator.rank // local_world_size,
        local_world_size=local_world_size,
        local_rank=communicator.rank % local_world_size,
    )
    peers = communicator.split(topology.peers, waits=False)
    if topology.is_flat:
        return ExchangeGroups(topology=topology, peers=peers)
    return ExchangeGroups(
        topology=topology,
        peers=peers,
        node=communicator.split(topology.node, waits=False, within_node=True),
        averaging=communicator.split(topology.node, waits=True, within_node=True),
    )


class ThreadProcessGroup(dist.ProcessGroup):
    """What functions of torch.distributed need of a process group, for the collectives that this project uses.

    The last rank to arrive moves the data of all, while the others wait: one meeting per collective.

    Args:
        world: shared by all ranks.
        members: ranks of the world.
        rank: position of this one among them.
        number: tells groups of the same members apart.
    """

    def __init__(self, world, members, rank, number=0):
        super().__init__(rank, len(members))
        self._world, self._members, self._position = world, members, rank
        self._meeting = world.meeting(members, number)
        self._made = {}

    def rank(self):
        return self._position

    def size(self):
        return len(self._members)

    def split(self, members):
        members = tuple(self._members[rank] for rank in members)
        own = self._members[self._position]
        if own not in members:
            raise ValueError(f"Rank {self._position} is not one of {members}. HINT: split on member ranks only.")
        number = self._made[members] = self._made.get(members, 0) + 1
        # The parent's number goes in as well: subgroups of different parents are different.
        return ThreadProcessGroup(self._world, members, members.index(own), (self._meeting.key, number))

    def allreduce(self, tensors, opts):
        (tensor,) = tensors
        # Compared in this order: an operation of the enumeration says that it is not equal to the options' object.
        name, function = next((name, function) for name, op, function in REDUCTIONS if opts.reduceOp == op)
        call = _Call(f"all_reduce ({name}) of {_described(tensor)}", (tensor,))

        def move(calls):
            # In rank order, into a new tensor: every rank gets the same bits.
            total = reduce(function, [c.tensors[0] for c in calls[1:]], calls[0].tensors[0].clone())
            for c in calls:
                c.tensors[0].copy_(total)

        self._meet(call, move)
        return _Done(tensors)

    def broadcast(self, tensors, opts):
        (tensor,) = tensors
        source = opts.rootRank
        call = _Call(f"broadcast from rank {source} of {_described(tensor)}", (tensor,))

        def move(calls):
            for c in calls:
                if c is not calls[source]:
                    c.tensors[0].copy_(calls[source].tensors[0])

        self._meet(call, move)
        return _Done(tensors)

    def all_gather_single(self, output, source, opts):
        self._check_numel("all_gather", output, source.numel() * self.size())
        call = _Call(f"all_gather of {_described(source)}", (output, source))

        def move(calls):
            everything = torch.cat([c.tensors[1].view(-1) for c in calls])
            for c in calls:
                c.tensors[0].view(-1).copy_(everything)

        self._meet(call, move)
        return _Done([output])

    def all_to_all_single(self, output, source, output_numels, source_numels, opts):
        received, sent = self._splits(output, output_numels), self._splits(source, source_numels)
        self._check_numel("all_to_all, received", output, sum(received))
        self._check_numel("all_to_all, sent", source, sum(sent))
        equal = not output_numels and not source_numels
        described = f"all_to_all of {_described(source)}" if equal else f"all_to_all in parts of {source.dtype}"
        call = _Call(described, (output, source), sent, received)

        def move(calls):
            for i, a in enumerate(calls):
                for j, b in enumerate(calls):
                    if a.received[j] != b.sent[i]:
                        raise ValueError(
                            f"In an all_to_all rank {i} expects {a.received[j]} elements of rank {j}, but rank {j} sends"
                            f" {b.sent[i]} to rank {i}."
                        )
            parts = [c.tensors[1].view(-1).split(c.sent) for c in calls]
            for i, c in enumerate(calls):
                torch.cat([each[i] for each in parts], out=c.tensors[0].view(-1))

        self._meet(call, move)
        return _Done([output])

    # Their names before torch 2.13
    _allgather_base, alltoall_base = all_gather_single, all_to_all_single

    def _meet(self, call, move):
        if not all(tensor.is_contiguous() for tensor in call.tensors):
            raise ValueError(f"{call.described}: tensors must be contiguous, as gloo wants them.")
        self._meeting.attend(self._position, call, move)

    def _splits(self, tensor, numels):
        return list(numels) if numels else [tensor.numel() // self.size()] * self.size()

    def _check_numel(self, what, tensor, numel):
        if tensor.numel() != numel:
            raise ValueError(f"{what}: a tensor of {tensor.numel()} elements where {numel} are expected.")


class OtherRankFailed(RuntimeError):
    """Raised in a collective that will never complete; the reason is what the other rank raised."""


@dataclass(frozen=True)
class _Call:
    """What one rank asks for. ``described`` must be the same on all ranks."""

    described: str
    tensors: tuple
    sent: list | None = None
    received: list | None = None


class _Done:
    """A ``Work`` that is complete."""

    def __init__(self, tensors):
        self._tensors = tensors

    def wait(self, *_):
        return True

    def get_future(self):
        future = torch.futures.Future()
        future.set_result(list(self._tensors))
        return future


class _World:
    """What all ranks share: the lock, the meeting places, and the first failure."""

    def __init__(self, size, timeout):
        self.size, self.timeout = size, timeout
        self.lock = threading.RLock()
        self.turn = _Turn(patience=min(1.0, timeout / 4))  # so that of a rank that hangs not the next ones are blamed
        self.failure = None
        self.finished = set()
        self._meetings = {}

    def meeting(self, members, number):
        with self.lock:
            return self._meetings.setdefault((members, number), _Meeting(self, members, (members, number)))

    def fail(self, rank, error):
        """Note the first failure, and end all waiting."""
        with self.lock:
            if self.failure is None:
                self.failure = (rank, error)
            for meeting in self._meetings.values():
                meeting.changed.notify_all()

    def finish(self, rank):
        with self.lock:
            self.finished.add(rank)
            for meeting in self._meetings.values():
                meeting.changed.notify_all()

    def give_up(self, hanging):
        """After the time is over: end the ranks that still wait, and say where the first of them is."""
        if not hanging:
            return
        rank, thread = hanging[0]
        frame = sys._current_frames().get(thread.ident)
        where = "".join(traceback.format_stack(frame)[-3:]) if frame else ""
        ranks = ", ".join(str(rank) for rank, _ in hanging)
        self.fail(rank, TimeoutError(f"Ranks {ranks} did not end within {self.timeout} s. Rank {rank} is here:\n{where}"))
        for _, thread in hanging:
            thread.join(1.0)


class _Turn:
    """One rank computes at a time, until it waits for others: what they need of the interpreter is not fought for then.

    Every operation of torch lets go of it, so that threads took it from each other all the time, which took longer than the
    arithmetic. A rank that has its turn may wait for something else, such as a thread of its own: that ends the turns.
    """

    def __init__(self, patience):
        self._patience = patience
        self._lock = threading.Lock()
        self._own = threading.local()
        self._ended = False

    def take(self):
        deadline = time.monotonic() + self._patience
        self._own.has_it = False
        while not (self._ended or self._own.has_it):
            self._own.has_it = self._lock.acquire(timeout=0.05)
            self._ended |= not self._own.has_it and time.monotonic() > deadline

    def pass_on(self):
        if self._own.has_it:
            self._own.has_it = False
            self._lock.release()

    def end_if_unknown(self):
        """A thread that takes no turns communicates: the ranks' own may be waiting for it."""
        if not hasattr(self._own, "has_it"):
            self._own.has_it = False
            self._ended = True


class _Meeting:
    """Where the members of one group wait for each other, once per collective."""

    def __init__(self, world, members, key):
        self.key = key
        self.changed = threading.Condition(world.lock)
        self._world, self._members = world, members
        self._calls = {}
        self._round = 0

    def attend(self, position, call, move):
        world = self._world
        world.turn.end_if_unknown()
        with self.changed:
            self._check(call)
            if position in self._calls:
                raise RuntimeError(
                    f"Two threads of rank {position} communicate on one group: {self._calls[position].described}, and"
                    f" {call.described}. HINT: a thread needs a group of its own."
                )
            self._calls[position] = call
            if len(self._calls) == len(self._members):
                calls = [self._calls[i] for i in range(len(self._members))]
                self._check_same(calls)
                move(calls)
                self._calls = {}
                self._round += 1
                self.changed.notify_all()
                return
            this_round = self._round
            deadline = time.monotonic() + world.timeout
            world.turn.pass_on()
            while self._round == this_round:
                self._check(call)
                if not self.changed.wait(max(0.0, deadline - time.monotonic())):
                    missing = sorted(set(range(len(self._members))) - set(self._calls))
                    raise TimeoutError(f"{call.described}: ranks {missing} did not call it within {world.timeout} s.")
        world.turn.take()

    def _check(self, call):
        if self._world.failure is not None:
            rank, error = self._world.failure
            raise OtherRankFailed(f"rank {rank} has failed: {type(error).__name__}: {error}")
        finished = self._world.finished
        gone = [i for i, rank in enumerate(self._members) if rank in finished] if finished else []
        if gone:
            raise RuntimeError(f"{call.described}: ranks {gone} have ended and will never call it.")

    @staticmethod
    def _check_same(calls):
        for rank, call in enumerate(calls):
            if call.described != calls[0].described:
                raise RuntimeError(
                    f"The ranks make different collectives: {calls[0].described} on rank 0, but {call.described} on rank"
                    f" {rank}."
                )


def _described(tensor):
    return f"{tensor.numel()} {str(tensor.dtype).removeprefix('torch.')}"
