"""One training: a workload, a method, a seed. Ranks are threads of this process, each with its own model and gradients."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from benchmarks.convergence.methods import METHODS, Averaging, Diverged, begin, gradient_of, patches
from benchmarks.convergence.workloads import WORKLOADS, Part, Task, Workload
from lightning_onebit.comm.primitives import Communicator

from thread_ranks import run_threads  # isort: skip  # the path is set by methods.py

EVALUATIONS = 8
HOUR = 3600


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What decides a run's result; the key of its line in the file of results."""

    workload: str
    method: str
    seed: int
    ranks: int = 4
    """The global batch is that of 4 ranks, whatever this is."""
    steps: int | None = None
    """``None``: the workload's."""
    beta2: float | None = None
    lr_scale: float = 1.0
    lr_end: float | None = None
    """The last learning rate over the largest; ``None``: the workload's."""

    def of_workload(self) -> Workload:
        workload = WORKLOADS[self.workload]
        return replace(
            workload,
            steps=self.steps or workload.steps,
            beta2=self.beta2 or workload.beta2,
            lr=workload.lr * self.lr_scale,
            lr_end=workload.lr_end if self.lr_end is None else self.lr_end,
            batch_size=max(1, workload.batch_size * 4 // self.ranks),
        )


class Shadow:
    """Beside a run: the true second moment of the mean gradient, and where Adam would have gone on the same gradients.

    A wrong scale of D acts as a learning rate: it shows here, whatever the loss is.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        flat = parameters_to_vector(params).detach()
        self.params, self.first = params, flat.clone()
        self.m, self.v, self.moved = torch.zeros_like(flat), torch.zeros_like(flat), torch.zeros_like(flat)
        self.steps = 0

    def add_(self, mean_gradient: Tensor, lr: float, beta1: float, beta2: float) -> None:
        self.steps += 1
        self.m.lerp_(mean_gradient, 1 - beta1)
        self.v.lerp_(mean_gradient.square(), 1 - beta2)
        m_hat, v_hat = self.m / (1 - beta1**self.steps), self.v / (1 - beta2**self.steps)
        self.moved.sub_(m_hat.div_(v_hat.sqrt_().add_(1e-8)), alpha=lr)

    def speed(self) -> float:
        """The displacement, projected on Adam's: 1 is right. Weight decay makes it smaller than 1, a little."""
        moved = parameters_to_vector(self.params).detach() - self.first
        return float(moved @ self.moved / self.moved.square().sum())

    def scatter(self, exp_avg_sq: Tensor) -> list[float]:
        """sqrt(v / v_true) where there was a gradient: 5%, 25%, 50%, 75%, 95%."""
        seen = self.v > 0
        ratio = (exp_avg_sq[seen] / self.v[seen]).sqrt()
        return [round(float(ratio.quantile(q)), 4) for q in (0.05, 0.25, 0.5, 0.75, 0.95)]


class PartTraining:
    """An optimizer of one rank."""

    def __init__(self, part: Part, workload: Workload, setting: Setting, communicator: Communicator, watch: Any) -> None:
        self.part, self.workload, self.communicator, self.watch = part, workload, communicator, watch
        self.method = METHODS[setting.method]
        adam = torch.optim.AdamW if workload.weight_decay else torch.optim.Adam
        betas = workload.beta1, workload.beta2
        self.optimizer = adam(part.params, lr=workload.lr, betas=betas, weight_decay=workload.weight_decay)
        self.stepper: Any = Averaging(part.params, self.optimizer, communicator)
        self.shadow = Shadow(part.params)

    def step(self, step: int, num_batches: int) -> None:
        """Gradients are the mean over ``num_batches`` batches: more than one where one rank stands for several."""
        workload, part = self.workload, self.part
        if step == self.method.dense_steps_of(workload.steps):
            self.stepper = begin(self.method, part.params, self.optimizer, self.communicator)
        lr = workload.lr * workload.lr_factor(step, workload.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for batch in range(num_batches):
            loss = part.loss(step, self.communicator.rank + batch) / num_batches
            gradients = torch.autograd.grad(loss, part.params)
            for p, gradient in zip(part.params, gradients, strict=True):
                p.grad = gradient if batch == 0 else gradient_of(p).add_(gradient)
        mean = torch.cat([gradient_of(p).view(-1) for p in part.params])
        self.watch.all_reduce_mean_(mean)
        if self.communicator.rank == 0:
            self.shadow.add_(mean, lr, workload.beta1, workload.beta2)
        self.stepper.step()

    def exp_avg_sq(self) -> Tensor:
        """As a checkpoint would hold it."""
        state = self.optimizer.state_dict()["state"]
        return torch.cat([state[i]["exp_avg_sq"].float().view(-1) for i in range(len(self.part.params))])


def train(setting: Setting, *, timeout: float = HOUR) -> dict[str, Any]:
    """One line of results. ``loss`` is None, and ``diverged_at`` the step, where gradients are not finite any more."""
    workload, method = setting.of_workload(), METHODS[setting.method]
    threads = 1 if method.kind == "exact" else setting.ranks
    tasks = [workload.make(setting.seed, workload.batch_size, workload.steps) for _ in range(threads)]
    start = time.perf_counter()

    def on_rank(communicator: Any) -> dict[str, Any]:
        task: Task = tasks[communicator.rank]
        watch = communicator.split(range(threads)) if threads > 1 else communicator  # with counters of its own
        parts = [PartTraining(part, workload, setting, communicator, watch) for part in task.parts]
        curve, dense_bytes = [], 0
        every = max(1, workload.steps // EVALUATIONS)
        dense_steps = method.dense_steps_of(workload.steps)
        diverged_at = None
        for step in range(workload.steps):
            try:
                for part in parts:
                    part.step(step, setting.ranks // threads)
            except Diverged:
                diverged_at = step
                break
            if step + 1 == dense_steps:
                dense_bytes = communicator.counters.bytes_sent
            if communicator.rank == 0 and (step + 1) % every == 0 and step + 1 < workload.steps:
                curve.append([step + 1, round(task.evaluate(), 5)])
        x = parameters_to_vector(p for part in task.parts for p in part.params)
        counters = communicator.counters
        result: dict[str, Any] = {"x": x.detach(), "bytes": counters.bytes_sent, "dense_bytes": dense_bytes}
        result |= {"refresh_bytes": counters.refresh_bytes_sent, "sketch_bytes": counters.sketch_bytes_sent}
        if communicator.rank == 0 and diverged_at is not None:
            result |= {"diverged_at": diverged_at, "loss": None}
            result["curve"] = [point for point in curve if math.isfinite(point[1])]
        elif communicator.rank == 0:
            result["loss"] = round(task.evaluate(), 6)
            result["curve"] = [*curve, [workload.steps, round(result["loss"], 5)]]
            result["speed"] = [round(part.shadow.speed(), 4) for part in parts]
            result["scatter"] = [part.shadow.scatter(part.exp_avg_sq()) for part in parts]
            first = torch.cat([part.shadow.first for part in parts])
            result["distance"] = round(float((x.detach() - first).norm()), 5)
        return result

    with patches(method):
        results = run_threads(threads, on_rank, timeout=timeout)
    first, x = results[0], results[0].pop("x")
    numel, n = len(x), setting.ranks
    return {
        **dataclasses.asdict(setting),
        "steps": workload.steps,
        "numel": numel,
        **first,
        # A dense all-reduce of float32, for comparison, as counted by the library.
        "ddp_bytes": 2 * (n - 1) * 4 * numel // n * workload.steps,
        "ranks_equal": all(torch.equal(x, other["x"]) for other in results[1:]),
        "seconds": round(time.perf_counter() - start, 1),
    }
