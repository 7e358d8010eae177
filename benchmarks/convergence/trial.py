"""A simulation of DESIGN 2 in plain torch, in one process, to compare choices before or beside the library's own code.

    python -m benchmarks.convergence.trial --workloads cnn vit gpt --arms adam renewed20 --seeds 0 1 2 --out trial.jsonl

What it computes: the n gradients of one model, error feedback with signs in blocks of 2,048, each rank's v_i, r per tensor
from the clamped preconditioned gradients, refreshes as 8-bit logarithms. Beside it, on its own trajectory, it keeps what
Adam would do: ``v_true``, the second moment of the mean gradient, and the sum of Adam's steps. A scale that is wrong by a
factor acts as a learning rate and can look better than Adam: look at ``speed`` (the displacement projected on that of
Adam, 1 is right) and ``scatter`` (quartiles of sqrt(v / v_true)) before the loss.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.convergence.report import table
from benchmarks.convergence.workloads import WORKLOADS, Workload

CHUNK = 64
"""Tensors are padded to multiples of this in flat memory, so that sums over blocks are sums over chunks first."""
EPS = 1e-8
LLOYD_MAX_THRESHOLD, LLOYD_MAX_LEVELS = 0.9816, (0.4528, 1.5104)
"""Of four levels for a Gaussian of unit variance (Max 1960, table I)."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A method: one row of the trial."""

    dense_steps: float = 20
    """A share of the run if below 1."""
    refreshes: bool = True
    quantized: bool = True
    rescale_u: bool = False
    """Multiply u by D_old / D_new at a refresh."""
    true_v: bool = False
    """Refresh from the second moment of the mean gradient, exactly."""
    r_sketch: bool = False
    """r from sketches in the first 16 compressed steps and every 16th, instead of exactly in the warm-up."""
    r_fixed: float | None = None
    interval: Callable[[int], int] = lambda step: max(1, min(64, step // 4))
    block_size: int = 2048
    kappa_power: float = 1.0
    """kappa = n^power / sqrt(1 - beta2)."""
    sketch_numel: int = 256
    r_of_ratios: bool = True
    """Average the quotients of single steps; else the sums of squares, of which large a_i decide."""
    window: float | None = None
    """Estimates that r is averaged over; ``None``: max(4, 1 / (1 - beta2) / 64)."""
    dense: bool = False
    """Adam to the end."""
    dense_below: int = 0
    """Tensors with fewer elements are averaged exactly."""
    server_bits: int = 1
    """Two: the server sends back four levels, those of Lloyd and Max for a Gaussian."""
    worker_bits: int = 1
    """Likewise, what workers send."""
    twice: bool = False
    """Two bits are those of C(c) + C(c - C(c)), with a scale each, instead of the levels for a Gaussian."""
    worker_scale: float = 1.0
    """What workers multiply their scales by."""
    server_scale: float = 1.0
    """Likewise, servers."""
    server_gain_of_beta: float = 0.0
    """And by 1 + this times beta."""
    l1: bool = False
    """Scales are mean absolute values."""
    renew_above: float | None = None
    """D is renewed at once where the mean of a_bar^2 over all coordinates is larger."""
    momentum: str = "shared"
    """Of what is quantized: "shared": beta times the last average is part of it; "local": each rank's own; "after": none,
    gradients are quantized, and their average goes into a momentum that all ranks have alike."""


RENEWED = Arm()
BUILT = Arm(interval=lambda step: max(1, min(64, step // 8)), rescale_u=True, r_sketch=True)
"""What the library did before servers had their gain, as near as this comes to it."""
ARMS = {
    "adam": Arm(dense=True),
    "frozen15": Arm(dense_steps=0.15, refreshes=False),
    "frozen30": Arm(dense_steps=0.30, refreshes=False),
    "renewed5": replace(RENEWED, dense_steps=5),
    "renewed10": replace(RENEWED, dense_steps=10),
    "renewed20": RENEWED,
    "renewed35": replace(RENEWED, dense_steps=35),
    "renewed45": replace(RENEWED, dense_steps=45),
    "rescaled5": replace(RENEWED, dense_steps=5, rescale_u=True),
    "rescaled20": replace(RENEWED, rescale_u=True),
    "rescaled45": replace(RENEWED, dense_steps=45, rescale_u=True),
    "sketched20": replace(RENEWED, r_sketch=True),
    "sketched5": replace(RENEWED, dense_steps=5, r_sketch=True),
    "sketched20_rescaled": replace(RENEWED, r_sketch=True, rescale_u=True),
    "sums20": replace(RENEWED, r_of_ratios=False),
    "sketched_sums20": replace(RENEWED, r_sketch=True, r_of_ratios=False),
    "exact20": replace(RENEWED, quantized=False),
    "exact20_rescaled": replace(RENEWED, quantized=False, rescale_u=True),
    "exact_true20": replace(RENEWED, quantized=False, true_v=True),
    "exact_true20_rescaled": replace(RENEWED, quantized=False, true_v=True, rescale_u=True),
    "true20": replace(RENEWED, true_v=True),
    "true20_rescaled": replace(RENEWED, true_v=True, rescale_u=True),
    "r_one20": replace(RENEWED, r_fixed=1.0),
    "interval_8th20": replace(RENEWED, interval=lambda step: max(1, min(64, step // 8))),
    "rescaled_8th20": replace(RENEWED, interval=lambda step: max(1, min(64, step // 8)), rescale_u=True),
    "rescaled_8th5": replace(RENEWED, interval=lambda step: max(1, min(64, step // 8)), rescale_u=True, dense_steps=5),
    "interval_16th20": replace(RENEWED, interval=lambda step: max(1, min(64, step // 16))),
    "interval_half20": replace(RENEWED, interval=lambda step: max(1, min(64, step // 2))),
    "interval16_20": replace(RENEWED, interval=lambda step: max(1, min(16, step // 4))),
    "interval256_20": replace(RENEWED, interval=lambda step: max(1, min(256, step // 4))),
    "kappa_sqrt20": replace(RENEWED, kappa_power=0.5),
    "block512_20": replace(RENEWED, block_size=512),
    "small_dense20": replace(RENEWED, dense_below=2048),
    "built20": BUILT,
    "server_bits_2": replace(BUILT, server_bits=2),
    "worker_bits_2": replace(BUILT, worker_bits=2),
    "both_bits_2": replace(BUILT, server_bits=2, worker_bits=2),
    "l1_20": replace(BUILT, l1=True),
    "block256_20": replace(BUILT, block_size=256),
    "renew_above_2": replace(BUILT, renew_above=2.0),
    "worker_twice": replace(BUILT, worker_bits=2, twice=True),
    "both_twice": replace(BUILT, worker_bits=2, server_bits=2, twice=True),
    "worker_scale_1.5": replace(BUILT, worker_scale=1.5),
    "worker_scale_2": replace(BUILT, worker_scale=2.0),
    "server_gain20": replace(BUILT, server_gain_of_beta=0.5),
    "server_scale_1.25": replace(BUILT, server_scale=1.25),
    "server_scale_1.5": replace(BUILT, server_scale=1.5),
    "server_scale_1.75": replace(BUILT, server_scale=1.75),
    "both_scale_1.5": replace(BUILT, worker_scale=1.5, server_scale=1.5),
    "local20": replace(BUILT, momentum="local"),
    "after20": replace(BUILT, momentum="after"),
}


class Layout:
    """Where tensors and their blocks lie in flat memory."""

    def __init__(self, numels: list[int], block_size: int) -> None:
        self.numels, self.starts = numels, []
        tensor_of, block_of, blocks, position = [], [], 0, 0
        for index, numel in enumerate(numels):
            self.starts.append(position)
            chunks = -(-numel // CHUNK)
            per_block = block_size // CHUNK
            tensor_of += [index] * chunks
            block_of += [blocks + chunk // per_block for chunk in range(chunks)]
            blocks += -(-chunks // per_block)
            position += chunks * CHUNK
        self.numel, self.blocks = position, blocks
        self.tensor_of, self.block_of = torch.tensor(tensor_of), torch.tensor(block_of)

    def sums(self, x: Tensor, of: Tensor, number: int) -> Tensor:
        """Over blocks or tensors, [..., flat] to [..., number]."""
        chunks = x.view(*x.shape[:-1], -1, CHUNK).sum(-1)
        return chunks.new_zeros(*x.shape[:-1], number).index_add_(-1, of, chunks)

    def spread(self, values: Tensor, of: Tensor) -> Tensor:
        """The inverse: [..., number] to [..., flat]."""
        return values[..., of].repeat_interleave(CHUNK, -1)


class Log8:
    """The 8-bit logarithm of sqrt(v): 254 levels over 24 octaves below the block's largest, 0 for 0."""

    STEP = 24.0 / 253.0

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def __call__(self, v: Tensor) -> Tensor:
        """Encoded and decoded."""
        root = v.clamp(min=0).sqrt()
        chunks = root.view(*v.shape[:-1], -1, CHUNK).amax(-1)
        largest = chunks.new_zeros(*v.shape[:-1], self.layout.blocks)
        largest.scatter_reduce_(-1, self.layout.block_of.expand_as(chunks), chunks, "amax")
        top = self.layout.spread(largest, self.layout.block_of)
        level = ((top / root.clamp(min=1e-38)).log2() / self.STEP).round().clamp(0, 253)
        return torch.where(root > 0, (top * torch.exp2(-level * self.STEP)).square(), 0.0)


class Simulation:
    """The optimizer of all ranks, on flat memory; several instances for several optimizers."""

    def __init__(self, params: list[torch.nn.Parameter], arm: Arm, workload: Workload, *, ranks: int, steps: int) -> None:
        self.arm, self.workload, self.ranks = arm, workload, ranks
        self.params, self.layout = params, Layout([p.numel() for p in params], arm.block_size)
        self.x = torch.zeros(self.layout.numel)
        self.gradients = torch.zeros(ranks, self.layout.numel)
        for p, start in zip(params, self.layout.starts, strict=True):
            flat = self.x[start : start + p.numel()].view(p.shape)
            flat.copy_(p.detach())
            p.data = flat
        self.first_x, zeros = self.x.clone(), torch.zeros(self.layout.numel)
        self.m, self.v, self.D, self.u = zeros.clone(), zeros.clone(), zeros.clone(), zeros.clone()
        self.shadow_m, self.v_true, self.adam_moved = zeros.clone(), zeros.clone(), zeros.clone()
        self.e, self.s = torch.zeros(ranks, self.layout.numel), zeros.clone()
        self.v_i, self.local_u, self.residual = torch.zeros(0), torch.zeros(0), zeros.clone()
        self.step_number, self.next_refresh, self.compressed_steps = 0, 0, 0
        self.dense_steps = round(arm.dense_steps * steps) if arm.dense_steps < 1 else int(arm.dense_steps)
        tensors = len(params)
        self.of_mean, self.mean_of, self.estimates = torch.zeros(tensors), torch.zeros(tensors), 0
        self.r = torch.full((tensors,), 1.0 / ranks)
        self.code = Log8(self.layout)
        self.refreshes = 0
        self.scatter: list[list[Any]] = []
        self.returned: list[float] = []
        exact = [p.numel() < arm.dense_below for p in params]
        self.is_exact = self.layout.spread(torch.tensor(exact), self.layout.tensor_of)
        self.bits = 0.0

    def use_rank(self, rank: int) -> None:
        """Let backward write this rank's gradients."""
        for p, start in zip(self.params, self.layout.starts, strict=True):
            p.grad = self.gradients[rank, start : start + p.numel()].view(p.shape)

    def step(self, lr: float) -> None:
        beta1, beta2, decay = self.workload.beta1, self.workload.beta2, self.workload.weight_decay
        self.step_number = t = self.step_number + 1
        g_bar = self.gradients.mean(0)
        if self.arm.r_fixed is None and t > 1 and t <= self.dense_steps and not self.arm.r_sketch and not self.arm.dense:
            self.learn_r_(self.clamped_(), exact=True)
        self.v_true.lerp_(g_bar.square(), 1 - beta2)
        self.shadow_m.lerp_(g_bar, 1 - beta1)
        corrected = 1 - beta2**t
        adam = (self.shadow_m / (1 - beta1**t)) / ((self.v_true / corrected).sqrt() + EPS)
        self.adam_moved.sub_(lr * adam)
        self.x.mul_(1 - lr * decay)
        if self.arm.dense or t <= self.dense_steps:
            self.m.copy_(self.shadow_m)
            self.v.copy_(self.v_true)
            self.D = (self.v / corrected).sqrt() + EPS
            self.x.sub_(lr * adam)
            self.bits += 32
            if t == self.dense_steps and not self.arm.dense:
                self.switch_()
        else:
            self.compressed_step_(lr / (1 - beta1**t), beta1)
        self.gradients.zero_()
        if t in (self.dense_steps + 50, 150, 300):
            self.note_scatter_()

    def switch_(self) -> None:
        self.u = torch.where(self.v > 0, self.m / self.D, 0.0)
        self.local_u = self.u.expand(self.ranks, -1).clone()
        self.v_i = self.v.expand(self.ranks, -1).clone()
        self.next_refresh = self.step_number + self.arm.interval(self.step_number)

    def clamped_(self) -> Tensor:
        """a_i of step 1, [ranks, flat]."""
        kappa = self.ranks**self.arm.kappa_power / math.sqrt(1 - self.workload.beta2)
        return torch.where(self.v > 0, self.gradients / self.D, 0.0).clamp_(-kappa, kappa)

    def compressed_step_(self, eta: float, beta1: float) -> None:
        a, beta2 = self.clamped_(), self.workload.beta2
        if self.arm.quantized:
            if self.arm.momentum == "shared":
                c = self.e.add_(beta1 * self.u + (1 - beta1) * a)
            elif self.arm.momentum == "local":
                self.local_u = beta1 * self.local_u + (1 - beta1) * a
                c = self.e.add_(self.local_u)
            else:
                c = self.e.add_(a)
            q = self.signs(c, self.arm.worker_bits) * self.arm.worker_scale
            self.e = c - q
            c_bar = q.mean(0) + self.s
            if self.step_number % 10 == 0:
                self.returned.append(self.share_returned(c_bar))
            gain = self.arm.server_scale * (1 + self.arm.server_gain_of_beta * beta1)
            average = self.signs(c_bar, self.arm.server_bits) * gain
            self.s = c_bar - average
            self.u = beta1 * self.u + (1 - beta1) * average if self.arm.momentum == "after" else average
        else:
            self.u = beta1 * self.u + (1 - beta1) * a.mean(0)
        self.bits += (self.arm.worker_bits + self.arm.server_bits) / 2
        self.x.sub_(eta * self.u)
        if not self.arm.refreshes:
            return
        r = self.layout.spread(self.r, self.layout.tensor_of)
        self.v_i.lerp_(r * self.gradients.square(), 1 - beta2)
        # With the r of earlier steps: what the sketch says comes with the exchange, when v_i is done.
        first = self.arm.r_sketch and self.compressed_steps < 16
        if self.arm.r_fixed is None and (first or self.step_number % 16 == 0):
            self.learn_r_(a, exact=False)
        self.compressed_steps += 1
        above = self.arm.renew_above is not None and float(a.mean(0).square().mean()) > self.arm.renew_above
        if above or self.step_number >= self.next_refresh:
            self.refresh_()

    def signs(self, c: Tensor, bits: int = 1) -> Tensor:
        """C of DESIGN 2: coordinates that are not seen are no part of their block. With two bits, one of four levels."""
        layout, live = self.layout, (self.v > 0).float()
        count = layout.sums(live, layout.block_of, layout.blocks).clamp(min=1)
        norms = (c * live).abs() if self.arm.l1 else (c * live).square()
        scale = layout.sums(norms, layout.block_of, layout.blocks) / count
        scale = scale if self.arm.l1 else scale.sqrt()
        scale = layout.spread(scale, layout.block_of)
        if bits == 2 and self.arm.twice:
            q = torch.where(c >= 0, 1.0, -1.0) * scale * live
            return q + self.signs(c - q)
        level = torch.where(c.abs() < LLOYD_MAX_THRESHOLD * scale, *LLOYD_MAX_LEVELS) if bits == 2 else 1.0
        q = torch.where(c >= 0, 1.0, -1.0) * level * scale * live
        return torch.where(self.is_exact, c, q) if self.arm.dense_below else q

    def share_returned(self, c: Tensor) -> float:
        """<C(c), c> / <c, c>: the mean of |c| over its root mean square; the median over blocks."""
        layout, live = self.layout, self.v > 0
        counts = layout.sums(live.float(), layout.block_of, layout.blocks)
        means, squares = (layout.sums(x * live, layout.block_of, layout.blocks) / counts for x in (c.abs(), c.square()))
        used = (counts > self.arm.block_size // 2) & (squares > 0)
        return float((means[used] / squares[used].sqrt()).median())

    def refresh_(self) -> None:
        beta2, t, before = self.workload.beta2, self.step_number, self.D
        if self.arm.true_v:
            self.v.copy_(self.v_true)
        else:
            sent = self.code(self.v_i)
            mean = sent.mean(0) + self.residual
            self.v = self.code(mean)
            self.residual = mean - self.v
            self.v_i += self.v - sent
        self.D = (self.v / (1 - beta2**t)).sqrt() + EPS
        if self.arm.rescale_u:
            rescaling = torch.where(before > 0, before / self.D, 1.0)
            self.u, self.local_u = self.u * rescaling, self.local_u * rescaling
        self.next_refresh = t + self.arm.interval(t)
        self.refreshes += 1
        self.bits += 8

    def learn_r_(self, a: Tensor, *, exact: bool) -> None:
        layout, tensors = self.layout, len(self.params)
        mean_of = layout.sums(a.square(), layout.tensor_of, tensors).mean(0)
        a_bar = a.mean(0)
        if exact:
            of_mean = layout.sums(a_bar.square(), layout.tensor_of, tensors)
        else:
            of_mean = torch.stack([self.sketched_square(part) for part in self.tensors(a_bar)])
        if self.arm.r_of_ratios:
            of_mean = torch.where(mean_of > 0, of_mean / mean_of, 1 / self.ranks)
            mean_of = torch.ones_like(of_mean)
        self.estimates += 1
        window = self.arm.window or max(4.0, 1 / (1 - self.workload.beta2) / 64)
        weight = max(1 / self.estimates, 1 / window)
        self.of_mean.lerp_(of_mean, weight)
        self.mean_of.lerp_(mean_of, weight)
        ratio = torch.where(self.mean_of > 0, self.of_mean / self.mean_of, 1 / self.ranks)
        self.r = ratio.clamp(1 / self.ranks, 1.0)

    def sketched_square(self, a_bar: Tensor) -> Tensor:
        """||a_bar||^2 by a sketch with random signs: exact where the tensor is not larger than the sketch."""
        numel = min(self.arm.sketch_numel, len(a_bar))
        signs = torch.randint(2, (-(-len(a_bar) // numel) * numel,)).mul_(2).sub_(1)
        signed = torch.nn.functional.pad(a_bar, (0, len(signs) - len(a_bar))) * signs
        return signed.view(-1, numel).sum(0).square().sum()

    def tensors(self, x: Tensor) -> list[Tensor]:
        return [x[start : start + numel] for start, numel in zip(self.layout.starts, self.layout.numels, strict=True)]

    def note_scatter_(self) -> None:
        """Quantiles of sqrt(v_i's mean / v_true), and of what D uses, over the coordinates that had a gradient."""
        seen = self.v_true > 0
        now = self.v_i.mean(0) if self.arm.refreshes and len(self.v_i) else self.v
        for name, v in (("v_i", now), ("D", self.v)):
            ratio = (v[seen] / self.v_true[seen]).clamp(min=0).sqrt()
            quantiles = ratio.quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])).tolist()
            within15 = float(((ratio - 1).abs() < 0.15).float().mean())
            self.scatter.append([self.step_number, name, *(round(q, 3) for q in quantiles), round(within15, 3)])

    def speed(self) -> float:
        """How far the run has gone along what Adam would have moved on the same gradients, without decay."""
        moved = self.x - self.first_x
        return float(moved @ self.adam_moved / self.adam_moved.square().sum())


def simulate(workload: Workload, name: str, seed: int, *, ranks: int = 4, steps: int | None = None) -> dict[str, object]:
    start, steps = time.perf_counter(), steps or workload.steps
    size = max(1, workload.batch_size * 4 // ranks)
    task = workload.make(seed, size, steps)
    torch.manual_seed(seed + 1000)  # for the sketches
    optimizers = [Simulation(p.params, ARMS[name], workload, ranks=ranks, steps=steps) for p in task.parts]
    for step in range(steps):
        for part, optimizer in zip(task.parts, optimizers, strict=True):
            for rank in range(ranks):
                optimizer.use_rank(rank)
                part.loss(step, rank).backward(inputs=part.params)
            optimizer.step(workload.lr * workload.lr_factor(step, steps))
    return {
        "workload": workload.name,
        "arm": name,
        "seed": seed,
        "ranks": ranks,
        "steps": steps,
        "loss": round(task.evaluate(), 5),
        "speed": [round(each.speed(), 4) for each in optimizers],
        "bits": round(optimizers[0].bits / steps, 2),
        "refreshes": optimizers[0].refreshes,
        "scatter": optimizers[0].scatter,
        "r": [round(float(r), 3) for r in optimizers[0].r],
        "returned": round(statistics.mean(optimizers[0].returned), 3) if optimizers[0].returned else None,
        "seconds": round(time.perf_counter() - start, 1),
    }


def summary(lines: list[dict[str, Any]]) -> str:
    """A table per workload and number of ranks, where there is an Adam to compare with."""
    parts = []
    for workload, ranks, steps in sorted({(line["workload"], line["ranks"], line["steps"]) for line in lines}):
        here = [line for line in lines if (line["workload"], line["ranks"], line["steps"]) == (workload, ranks, steps)]
        adam = {line["seed"]: line["loss"] for line in here if line["arm"] == "adam"}
        if not adam:
            continue
        rows = []
        for arm in dict.fromkeys(line["arm"] for line in here):
            own = [line for line in here if line["arm"] == arm and line["seed"] in adam]
            if arm != "adam" and own:
                above = [line["loss"] - adam[line["seed"]] for line in own]
                speed = statistics.mean(each for line in own for each in line["speed"])
                row = [arm, f"{statistics.mean(above):+.4f}", " ".join(f"{each:+.4f}" for each in above), f"{speed:.3f}"]
                quartiles = [
                    f"{statistics.mean(line['scatter'][k][i] for line in own):.2f}" for k in (0, 1) for i in (3, 4, 5)
                ]
                returned = [line["returned"] for line in own if line.get("returned") is not None]
                row += [" ".join(quartiles[3:]), " ".join(quartiles[:3]), str(own[0]["bits"])]
                rows.append([*row, f"{statistics.mean(returned):.3f}" if returned else "-"])
        spread = statistics.stdev(adam.values()) if len(adam) > 1 else float("nan")
        header = ["arm", "loss - Adam's", "by seed", "speed", "D / D_true", "v_i / v_true", "bits", "|c| / rms"]
        parts.append(
            f"{workload}, {ranks} ranks, {steps} steps; Adam {statistics.mean(adam.values()):.4f} (sd {spread:.4f})\n\n"
            + table(header, rows)
        )
    explanation = (
        "Quartiles of square roots, 50 steps after the dense ones; bits: per element and step, over the whole run;\n"
        "|c| / rms: of what servers quantize, mean of |c| over root mean square (median over blocks, mean over steps).\n"
        "Not the library's own code: benchmarks/convergence/trial.py says what it is."
    )
    return "\n\n".join([explanation, *parts]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=["cnn", "vit", "gpt"], choices=list(WORKLOADS))
    parser.add_argument("--arms", nargs="+", default=["adam", "renewed20"], choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--summary", action="store_true", help="train nothing; write a .txt beside --out")
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl; what is in it already is not done again")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    if arguments.summary:
        arguments.out.with_suffix(".txt").write_text(summary(lines), encoding="utf-8")
        return
    done = {(each["workload"], each["arm"], each["seed"], each["ranks"], each["steps"]) for each in lines}
    for seed, workload, arm in itertools.product(arguments.seeds, arguments.workloads, arguments.arms):
        if (workload, arm, seed, arguments.ranks, arguments.steps or WORKLOADS[workload].steps) not in done:
            result = simulate(WORKLOADS[workload], arm, seed, ranks=arguments.ranks, steps=arguments.steps)
            with arguments.out.open("a") as file:
                file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
