"""The engine on nodes of several ranks, without a Trainer: process groups, a dense warm-up, compressed steps."""

import functools
import random
from datetime import timedelta

import torch
from ranks import run_ranks

from lightning_onebit.comm.groups import new_groups
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.comm.topology import Topology
from lightning_onebit.config import CompressionConfig
from lightning_onebit.engine.optimizer import CompressedOptimizer
from lightning_onebit.methods import parameters_of


def on_nodes(nodes, fn, *args):
    """Call ``fn(groups, *args)`` on all ranks of ``nodes``, (number of nodes, ranks of each); results in rank order."""
    num_nodes, local_world_size = nodes

    def on_rank(rank):
        node_rank, local_rank = divmod(rank, local_world_size)
        topology = Topology(
            num_nodes=num_nodes, node_rank=node_rank, local_world_size=local_world_size, local_rank=local_rank
        )
        return fn(new_groups(topology, timedelta(seconds=30)), *args)

    return run_ranks(num_nodes * local_world_size, on_rank, num_nodes=num_nodes)


def mean(grads):
    """As a node averages: scaled first, then summed in rank order; ``None`` counts as zero, unless there is nothing else."""
    present = [grad for grad in grads if grad is not None]
    if not present:
        return None
    grads = [torch.zeros_like(present[0]) if grad is None else grad for grad in grads]
    return functools.reduce(torch.add, [grad * (1.0 / len(grads)) for grad in grads])


def warmed_up(optimizer, world_size, gradient, *, steps):
    """After dense steps with the means of ``gradient(rank, step, index, shape, dtype)``."""
    for step in range(steps):
        for index, p in enumerate(parameters_of(optimizer)):
            p.grad = mean([gradient(rank, step, index, p.shape, p.dtype) for rank in range(world_size)])
        optimizer.step()
    return optimizer


def freeze(optimizer, groups, *, communicator=None, exchanger=None, overlap=False, **config):
    config = CompressionConfig(**{"block_size": 8, "variance_refresh": None, **config})
    communicator = communicator or Communicator()
    return CompressedOptimizer(optimizer, config, communicator, {}, groups=groups, exchanger=exchanger, overlap=overlap)


def take_step(optimizer, compressed, rank, step, gradient, *, overlap=False):
    """One compressed step; with ``overlap``, gradients come in an order that differs between ranks, and some unannounced."""
    params = parameters_of(optimizer)
    for p in params:
        p.grad = None
    chance = random.Random(1000 * step + rank)
    for index in chance.sample(range(len(params)), len(params)):
        p = params[index]
        p.grad = gradient(rank, step, index, p.shape, p.dtype)
        if overlap and chance.random() < 0.9:
            compressed.gradients_ready([p])
    return compressed.step()
