"""Run a function on several ranks: forked processes joined by gloo, much cheaper than spawned ones."""

import functools
import gc
import io
import multiprocessing
import os
import socket
import tempfile
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import Connection, wait

import torch
import torch.distributed as dist

TIMEOUT_SECONDS = 60
SCRATCH = tempfile.gettempdir()


def run_ranks(world_size, fn, *args, group=True, num_nodes=1):
    """Call ``fn(rank, *args)`` on every rank and return the results in rank order.

    Args:
        world_size: number of ranks.
        fn: any callable, closures included.
        group: whether to initialize the default process group. Otherwise only the environment that a Lightning
            Trainer expects is set, as ``torchrun`` would do it.
        num_nodes: nodes over which the ranks are distributed.

    Raises:
        AssertionError: if a rank raised, with its traceback.
    """
    context = multiprocessing.get_context("fork")
    store = tempfile.mktemp(prefix="onebit-store-", dir=SCRATCH)
    port = free_port()
    pipes, processes = [], []
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            target_args = (sender, rank, world_size, num_nodes, store if group else None, port, fn, args)
            process = context.Process(target=_rank_main, args=target_args, daemon=True)
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        return _collect(pipes)
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        if os.path.exists(store):
            os.remove(store)


def run_trainers(world_size, fn, *args, num_nodes=1):
    """:func:`run_ranks` for functions that run a Lightning Trainer, which makes its own process group."""
    _prepare_trainers()
    return run_ranks(world_size, fn, *args, group=False, num_nodes=num_nodes)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@functools.cache
def _prepare_trainers():
    """Train once in this process, so that the forked ranks find done what a first Trainer does: half of a short run's time.

    That is what is imported late, and checks of types against abstract classes, whose answers Python keeps.
    """
    import torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook
    from trainers import fit

    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        fit("auto", 1, batches=2)


def _collect(pipes: list[Connection]):
    results = {}
    failures = {}
    pending = dict(enumerate(pipes))
    while pending:
        ready = wait(list(pending.values()), timeout=TIMEOUT_SECONDS)
        if not ready:
            raise AssertionError(f"ranks {sorted(pending)} did not finish; others failed with: {failures}")
        for rank in [rank for rank, pipe in pending.items() if pipe in ready]:
            try:
                ok, payload = pending.pop(rank).recv()
            except EOFError:
                ok, payload = False, "died without a word"
            if ok:
                results[rank] = torch.load(io.BytesIO(payload), weights_only=False)
            else:
                failures[rank] = payload
    if failures:
        raise AssertionError("\n".join(f"rank {rank}:\n{failure}" for rank, failure in sorted(failures.items())))
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(sender, rank, world_size, num_nodes, store, port, fn, args):
    gc.freeze()  # else each full collection looks at all that was inherited, and copies its pages
    torch.set_num_threads(1)
    local_world_size = world_size // num_nodes
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        WORLD_SIZE=str(world_size),
        RANK=str(rank),
        LOCAL_RANK=str(rank % local_world_size),
        NODE_RANK=str(rank // local_world_size),
        OMP_NUM_THREADS="1",  # else Lightning raises the number: see conftest.py
    )
    try:
        if store is not None:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=30)
            )
            dist.barrier()  # a rank that ends at once must not close its connections before the others have made theirs
        buffer = io.BytesIO()
        torch.save(fn(rank, *args), buffer)
        sender.send((True, buffer.getvalue()))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    finally:
        sender.close()
        # Not sys.exit: atexit handlers belong to the parent.
        os._exit(0)
