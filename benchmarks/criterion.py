"""When a criterion would have ended the warm-up of dense runs, and whether the second moment moved afterwards.

Trains small models with dense Adam in one process, and keeps, for every step, what a criterion sees of it and what the
second moment was. Criteria are replayed on that. A run is kept in a file, so that other criteria are tried in seconds.

Command: ``python benchmarks/criterion.py --keep DIRECTORY --out benchmarks/results/criterion.txt``
"""

from __future__ import annotations

import argparse
import math
import pickle
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from report import Spread, describe, environment, table
from sgd_convergence import Digits, cnn
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_onebit.config import VarianceRefresh
from lightning_onebit.freeze.criteria import Observation, Ratio
from lightning_onebit.freeze.stability import VarianceStability
from lightning_onebit.lightning.gradient_ratios import gradient_ratios

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "examples")]
from gpt_stdlib import GPT, is_for_validation, split_words, stdlib_files  # noqa: E402

from benchmarks.convergence import workloads as study  # noqa: E402

BETA2, STUDY_RANKS = 0.999, 4
WORDS, CONTEXT, FILES = 1000, 16, 250
PAPER_THRESHOLD = 0.96

Loss = Callable[[nn.Module, int], Tensor]
"""Of a model at a step."""


class ViT(nn.Module):
    """A vision transformer on images of 8 x 8, in patches of 2 x 2."""

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.patch = nn.Linear(4, width)
        self.positions = nn.Parameter(torch.randn(16, width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, activation="gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, 10] of images [n, 1, 8, 8]."""
        x = self.patch(F.unfold(images, 2, stride=2).transpose(1, 2)) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def words() -> Tensor:
    """The training words of the standard library as ids; 0 for rare ones."""
    files = stdlib_files()
    text = split_words([path for name, path in files.items() if not is_for_validation(name)][:FILES])
    ids = {word: index + 1 for index, (word, _) in enumerate(Counter(text).most_common(WORDS - 1))}
    return torch.tensor([ids.get(word, 0) for word in text])


def gpt(seed: int) -> tuple[nn.Module, Loss]:
    torch.manual_seed(seed)
    model = GPT(vocabulary_size=WORDS, context=CONTEXT, d_model=32, layers=2, heads=2)
    text, generator = words(), torch.Generator().manual_seed(seed)

    def loss(model: nn.Module, step: int) -> Tensor:
        first = torch.randint(len(text) - CONTEXT - 1, (16,), generator=generator)
        at = first[:, None] + torch.arange(CONTEXT)
        return F.cross_entropy(model(text[at]).flatten(0, 1), text[at + 1].flatten())

    return model, loss


def digits(make: Callable[[int], nn.Module], noise: float) -> Callable[[int], tuple[nn.Module, Loss]]:
    def made(seed: int) -> tuple[nn.Module, Loss]:
        data = Digits(seed, noise)

        def loss(model: nn.Module, step: int) -> Tensor:
            x, y = data.batch(step, 0, 32)
            return F.cross_entropy(model(x), y)

        return make(seed), loss

    return made


def vit(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return ViT()


def constant(progress: float) -> float:
    return 1.0


def growing(progress: float) -> float:
    return 16.0**progress


@dataclass(frozen=True, kw_only=True)
class Workload:
    make: Callable[[int], tuple[nn.Module, Loss]]
    lr: float
    lr_warmup: float = 0.03
    """Of the run; a cosine to a tenth follows."""
    scale: Callable[[float], float] = constant
    """Of the loss, by the progress of the run."""


WORKLOADS = {
    "word GPT": Workload(make=gpt, lr=3e-3),
    "word GPT, learning rate rises over 10%": Workload(make=gpt, lr=3e-3, lr_warmup=0.1),
    "CNN": Workload(make=digits(cnn, 0.3), lr=3e-3),
    "ViT": Workload(make=digits(vit, 0.1), lr=2e-3),
    "ViT, learning rate rises over 10%": Workload(make=digits(vit, 0.1), lr=2e-3, lr_warmup=0.1),
    "CNN, loss grows 16-fold": Workload(make=digits(cnn, 0.3), lr=3e-3, scale=growing),
    "ViT, loss grows 16-fold": Workload(make=digits(vit, 0.1), lr=2e-3, scale=growing),
}


@dataclass
class Recording:
    """What was seen of a run, step by step."""

    ratios: list[dict[str, tuple[float, int, int]]]
    learning_rates: list[float]
    norms: list[float]
    """||v||_1 of Adam, not corrected for its bias."""
    drifts: list[float]
    """mean of |log2(v_hat)| of a tensor: filled in at the end, over all tensors, against the end of the run."""
    seconds: float = 0.0
    seconds_observing: float = 0.0


class Recorder:
    """Fills a recording."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], names: dict[Tensor, str]) -> None:
        self.optimizers, self.names = optimizers, names
        self.seen = Recording([], [], [], [])
        self.means: list[list[float]] = []
        self.start = time.perf_counter()

    def note_step(self, lr: float) -> None:
        """After all optimizers have made one step."""
        before = time.perf_counter()
        ratios = {p: ratio for optimizer in self.optimizers for p, ratio in gradient_ratios(optimizer).items()}
        self.seen.seconds_observing += time.perf_counter() - before
        self.seen.ratios.append({self.names[p]: (r.mean, r.numel, r.steps) for p, r in ratios.items()})
        self.seen.learning_rates.append(lr)
        states = {p: state for optimizer in self.optimizers for p, state in optimizer.state.items()}
        v = [states[p]["exp_avg_sq"] for p in self.names]
        self.seen.norms.append(sum(float(x.sum()) for x in v))
        self.means.append([float(x.mean()) / (1 - BETA2 ** len(self.seen.norms)) for x in v])

    def finished(self) -> Recording:
        numels = [p.numel() for p in self.names]
        last = self.means[-1]
        self.seen.drifts = [
            sum(n * abs(math.log2(b / a)) for n, a, b in zip(numels, row, last, strict=True) if a and b) / sum(numels)
            for row in self.means
        ]
        self.seen.seconds = time.perf_counter() - self.start
        return self.seen


def train(workload: Workload, seed: int, steps: int) -> Recording:
    model, loss = workload.make(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=workload.lr, betas=(0.9, BETA2))
    recorder = Recorder([optimizer], {p: name for name, p in model.named_parameters()})
    for step in range(1, steps + 1):
        progress = step / steps
        late = max(0.0, progress - workload.lr_warmup) / (1 - workload.lr_warmup)
        lr = workload.lr * min(1.0, progress / workload.lr_warmup) * (0.55 + 0.45 * math.cos(math.pi * late))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        (workload.scale(progress) * loss(model, step)).backward()
        optimizer.step()
        recorder.note_step(lr)
    return recorder.finished()


def train_of_study(workload: study.Workload, seed: int) -> Recording:
    """A training of ``benchmarks/convergence``, dense: the mean gradient of its ranks, and its own number of steps."""
    task = workload.make(seed, workload.batch_size, workload.steps)
    adam = torch.optim.AdamW if workload.weight_decay else torch.optim.Adam
    betas, decay = (workload.beta1, workload.beta2), workload.weight_decay
    optimizers = [adam(part.params, lr=workload.lr, betas=betas, weight_decay=decay) for part in task.parts]
    recorder = Recorder(optimizers, {p: name for name, p in task.model.named_parameters()})
    for step in range(workload.steps):
        lr = workload.lr * workload.lr_factor(step, workload.steps)
        for part, optimizer in zip(task.parts, optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            for rank in range(STUDY_RANKS):
                (part.loss(step, rank) / STUDY_RANKS).backward(inputs=part.params)
            optimizer.step()
        recorder.note_step(lr)
    return recorder.finished()


def replay(seen: Recording, refresh: VarianceRefresh, steps: float, criterion: VarianceStability) -> tuple[int, bool, str]:
    """The step of the switch, whether it was forced, and why; for a run of ``steps``, which may be longer than was seen."""
    plan = criterion.plan(total_steps=steps, beta2=BETA2, refresh=refresh)
    history: list[Observation] = []
    for step, (ratios, lr) in enumerate(zip(seen.ratios, seen.learning_rates, strict=True), 1):
        if not plan.observes(step):
            continue
        history = [o for o in history if o.step >= step - plan.history]
        found = {name: Ratio(mean=mean, numel=numel, steps=k) for name, (mean, numel, k) in ratios.items()}
        history.append(Observation(step=step, ratios=found, learning_rate=lr))
        verdict = criterion.judge(history, plan)
        if verdict.freeze:
            return step, verdict.forced, verdict.reason
    return len(seen.ratios), True, "the recording ended"


def paper(seen: Recording) -> tuple[int, int]:
    """The first steps at which the one-sided rule freezes: with the memory of beta2, and with a twentieth of the run."""
    found = []
    for delta in (round(1 / (1 - BETA2)), len(seen.norms) // 20):
        rising = [b > a for a, b in zip([0.0, *seen.learning_rates], seen.learning_rates, strict=False)]
        step = next(
            (
                t
                for t in range(delta + 1, len(seen.norms) + 1)
                if not rising[t - 1] and seen.norms[t - 1] / seen.norms[t - 1 - delta] >= PAPER_THRESHOLD
            ),
            0,
        )
        found.append(step)
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="of a run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--keep", type=Path, required=True, metavar="DIRECTORY", help="for what was seen of runs")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the tables there")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    machine = environment()
    settings.keep.mkdir(parents=True, exist_ok=True)

    def kept(name: str, make: Callable[[], Recording]) -> Recording:
        file = settings.keep / f"{name}.pkl"
        if not file.exists():
            file.write_bytes(pickle.dumps(make()))
        recording: Recording = pickle.loads(file.read_bytes())
        return recording

    renewed, frozen, reasons, costs = [], [], [], []
    for name, workload in WORKLOADS.items():
        rows = []
        for seed in range(settings.seeds):
            seen = kept(f"{name}, {settings.steps}, {seed}", partial(train, workload, seed, settings.steps))
            costs.append(seen.seconds_observing / settings.steps)
            by_length = [replay(seen, "auto", n, VarianceStability()) for n in (1000, 1500, 10_000)]
            rows.append((by_length, replay(seen, None, settings.steps, VarianceStability()), paper(seen), seen.drifts))
            for refresh, (step, forced, reason) in (("auto", by_length[-1]), (None, rows[-1][1])):
                if seed == 0:
                    reasons.append(f"{name}, variance_refresh={refresh!r}: {step}{', forced' if forced else ''}: {reason}")
        renewed.append(
            (
                name,
                *(", ".join(_marked(lengths[i]) for lengths, *_ in rows) for i in range(3)),
            )
        )
        moved = Spread.of([2 ** drifts[step - 1] for _, (step, _, _), _, drifts in rows])
        frozen.append(
            (
                name,
                ", ".join(_marked(judged) for _, judged, *_ in rows),
                f"{moved.median:.2f} [{moved.lower_quartile:.2f}-{moved.upper_quartile:.2f}]",
                *(", ".join(str(steps[i] or "never") for *_, steps, _ in rows) for i in range(2)),
            )
        )
    of_study = []
    for workload in study.WORKLOADS.values():
        seen = kept(f"study {workload.name}", partial(train_of_study, workload, 0))
        auto, none = (replay(seen, refresh, workload.steps, VarianceStability()) for refresh in ("auto", None))
        moved_by = [f"{2 ** seen.drifts[step - 1]:.2f}" for step, *_ in (auto, none)]
        one_sided = str(paper(seen)[1] or "never")
        of_study.append(
            (workload.name, str(workload.steps), _marked(auto), moved_by[0], _marked(none), moved_by[1], one_sided)
        )
    cost = Spread.of(costs)
    text = "\n\n".join(
        [
            describe(machine),
            f"{settings.seeds} seeds each, {settings.steps} steps of dense Adam, beta2 = {BETA2}. * : by max_steps.",
            'With refreshes (variance_refresh="auto"): last step of the warm-up in a run of so many steps.',
            table(("workload", "1000 steps", "1500", "10000"), renewed),
            f"Without (variance_refresh=None), in the run of {settings.steps} steps; beside it by what factor v of a tensor"
            " was another at the end of the run (mean over all elements; median and quartiles over seeds); and the first"
            f" step at which ||v_t||_1 / ||v_(t - Delta)||_1 >= {PAPER_THRESHOLD} with the learning rate not rising.",
            table(
                (
                    "workload",
                    "switch",
                    "v moved by",
                    f"paper, Delta = {round(1 / (1 - BETA2))}",
                    f"Delta = {settings.steps // 20}",
                ),
                frozen,
            ),
            "The workloads of benchmarks/convergence, seed 0, in their own lengths; the one-sided rule with Delta a"
            " twentieth of the run, as its 1000 steps are more than the run has.",
            table(("workload", "steps", "with refreshes", "v moved by", "without", "v moved by", "paper"), of_study),
            f"An observation took {cost.milliseconds()} ms (all workloads).",
            "Reasons given, seed 0:\n" + "\n".join(reasons),
        ]
    )
    print(text)
    if settings.out is not None:
        settings.out.write_text(text + "\n", encoding="utf-8")


def _marked(judged: tuple[int, bool, str]) -> str:
    return f"{judged[0]}{'*' if judged[1] else ''}"


if __name__ == "__main__":
    main()
