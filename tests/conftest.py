"""Nothing may leak from one test to the next: threads, environment variables, process groups."""

import gc
import os
import threading

import pytest
import torch
import torch.distributed as dist

gc.disable()  # until all is imported: a sixth of the time

# Forked ranks must not inherit a pool of OpenMP threads that did not survive the fork.
torch.set_num_threads(1)

# Without a GPU, Triton's kernels are interpreted. It has to know when it is imported, and importing lightning does that.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish():
    """Full collections need not look at all that was imported: 4% of the time of ranks that are threads."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def no_leaks():
    environment = dict(os.environ)
    threads = set(threading.enumerate())
    yield
    leaked_threads = [t for t in threading.enumerate() if t not in threads and not t.daemon]
    assert not leaked_threads
    leaked_group = dist.is_initialized()
    assert not leaked_group
    changed = {k: v for k, v in os.environ.items() if environment.get(k) != v and not k.startswith("PYTEST_")}
    os.environ.clear()
    os.environ.update(environment)
    assert not changed
