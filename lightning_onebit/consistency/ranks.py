"""What Lightning's strategies tell of this process's place among all: the little that the layers below them ask for."""

from __future__ import annotations

from typing import Protocol

import torch


class Ranks(Protocol):
    """The strategies for Trainer and Fabric are such objects. What they answer may change until processes are started."""

    @property
    def world_size(self) -> int: ...
    @property
    def global_rank(self) -> int: ...
    @property
    def num_nodes(self) -> int: ...
    @property
    def num_processes(self) -> int: ...  # of this node
    @property
    def node_rank(self) -> int: ...
    @property
    def local_rank(self) -> int: ...
    @property
    def is_global_zero(self) -> bool: ...
    @property
    def root_device(self) -> torch.device: ...
