"""Which clamp: the displacement of compressed updates over Adam's, and what one rare gradient does to its block.

    python benchmarks/clamp.py --out benchmarks/results/clamp.txt

A simulation in numpy, of steps 1 to 6 of the algorithm in update space, without any code of the package: n ranks, sign
quantizer with one scale per block, error feedback of worker and server. Compared are three bounds kappa of a rank's own
g_i / D, D = sqrt(v) of the *mean* gradient; the truth is kept on the side, without ranks, clamp or quantizer.

Ordinary coordinates: g_i = drift + noise of each rank; in one step the mean gradient's noise is five times its drift. D is
frozen after a warm-up. "Displacement" is that of the compressed updates along the drift, over that of frozen Adam with the
same D on the same mean gradient, between two steps long after the freeze: what the errors hold back along the drift is the
same at both, and cancels. "Projected": all of the displacement, projected on frozen Adam's; it is mostly noise, and the last
few steps of it are still held back.

Rare coordinates (words): K gradients in 1 / (1 - beta2) steps, each on one rank only, among ordinary ones in the same block.
D is that of the mean gradient's true v, renewed every REFRESH / (1 - beta2) steps; the reference is Adam itself, unfrozen.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from report import Spread, describe, environment, save, table

Array = NDArray[np.float32]

BLOCK_SIZE = 2048
BETA1 = 0.9
DRIFT = 0.2
"""What all ranks' gradients have in common, over the standard deviation of their mean: noise dominates a single step."""
RARE_PER_BLOCK = 64
NO_RARE = "no rare gradients"
"""The same block without them, and without any clamp."""
REFRESH = 0.064
"""Steps between two renewals of D for rare coordinates, in units of 1 / (1 - beta2): 64 at 0.999, 1 at 0.95."""

KAPPAS: dict[str, Callable[[int, float], float]] = {
    "1 / sqrt(1 - beta2)": lambda n, beta2: 1 / math.sqrt(1 - beta2),
    "sqrt(n / (1 - beta2))": lambda n, beta2: math.sqrt(n / (1 - beta2)),
    "n / sqrt(1 - beta2)": lambda n, beta2: n / math.sqrt(1 - beta2),
}


def gaussian(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.standard_normal(shape, dtype=np.float32)


def student_t3(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Heavy tails: three degrees of freedom, scaled to variance 1; the fourth moment is infinite."""
    squares = sum((rng.standard_normal(shape, dtype=np.float32) ** 2 for _ in range(3)), np.float32(0))
    # t = z / sqrt(chi2_3 / 3), of variance 3.
    return rng.standard_normal(shape, dtype=np.float32) / np.sqrt(squares)


NOISES: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Array]] = {
    "Gaussian": gaussian,
    "Student t, 3 d.o.f.": student_t3,
}


class CompressedMomentum:
    """Steps 1 to 5 for ``numel`` coordinates, whole blocks, on ``n`` ranks."""

    def __init__(self, n: int, numel: int) -> None:
        self.worker_errors: Array = np.zeros((n, numel), np.float32)
        self.server_error: Array = np.zeros(numel, np.float32)
        self.u: Array = np.zeros(numel, np.float32)
        self.scales: Array = np.zeros((n, numel // BLOCK_SIZE), np.float32)

    def step(self, clamped: Array) -> Array:
        """From clamped g_i / D ``[n, numel]`` to the new u ``[numel]``."""
        c = self.worker_errors
        c += BETA1 * self.u + (1 - BETA1) * clamped  # step 1
        q, self.scales = quantize(c)  # step 2
        c -= q
        c_bar = q.mean(axis=0) + self.server_error  # step 4
        self.u, _ = quantize(c_bar)
        self.server_error = c_bar - self.u
        return self.u


def quantize(c: Array) -> tuple[Array, Array]:
    """C: the sign times the root mean square of the block; and these scales."""
    blocks = c.reshape(*c.shape[:-1], -1, BLOCK_SIZE)
    scales = np.sqrt(np.einsum("...j,...j->...", blocks, blocks) / np.float32(BLOCK_SIZE))
    return np.where(blocks >= 0, scales[..., None], -scales[..., None]).reshape(c.shape), scales


@dataclass(frozen=True, kw_only=True)
class Displacement:
    noise: str
    beta2: float
    ranks: int
    kappa: str
    along_drift: Spread
    """Over frozen Adam's."""
    projected: Spread
    """The same, of the whole displacement, projected on frozen Adam's: mostly noise; what is held back does not cancel."""
    cut: Spread
    """Share of a rank's g_i / D that the clamp cuts."""


def displacement(noise: str, n: int, beta2: float, seed: int, *, blocks: int, steps: int) -> dict[str, list[float]]:
    """For each kappa: the displacement along the drift, projected, and the share of gradients that are cut."""
    rng = np.random.default_rng([seed, n, round(1000 * beta2), *noise.encode()])
    numel = blocks * BLOCK_SIZE
    drift = np.where(rng.random(numel) < 0.5, -1, 1).astype(np.float32) * np.float32(DRIFT / math.sqrt(n))
    draw = NOISES[noise]

    # Warm-up: v of the mean gradient, bias-corrected, over as many steps as it remembers, 500 at most.
    warmup_steps = round(min(3 / (1 - beta2), 500))
    v = np.zeros(numel, np.float32)
    for _ in range(warmup_steps):
        g_bar = drift + draw(rng, (n, numel)).mean(axis=0)
        v = beta2 * v + (1 - beta2) * g_bar**2
    d = np.sqrt(v / (1 - beta2**warmup_steps))

    momenta = {name: CompressedMomentum(n, numel) for name in KAPPAS}
    exact_u = np.zeros(numel, np.float32)
    exact_x = np.zeros(numel)
    x = {name: np.zeros(numel) for name in KAPPAS}
    cut = dict.fromkeys(KAPPAS, 0.0)
    settled = steps // 3
    for step in range(steps):
        if step == settled:
            exact_x[:] = 0
            for each in x.values():
                each[:] = 0
        a = (drift + draw(rng, (n, numel))) / d
        exact_u = BETA1 * exact_u + (1 - BETA1) * a.mean(axis=0)
        exact_x += exact_u
        for name, momentum in momenta.items():
            kappa = KAPPAS[name](n, beta2)
            x[name] += momentum.step(np.clip(a, -kappa, kappa))
            cut[name] += float((np.abs(a) > kappa).mean()) / steps
    sign = np.sign(drift) / d  # coordinates alike, whatever D the warm-up has left
    return {
        name: [float(x[name] @ sign / (exact_x @ sign)), float(x[name] @ exact_x / (exact_x @ exact_x)), cut[name]]
        for name in KAPPAS
    }


@dataclass(frozen=True, kw_only=True)
class Rare:
    gradients: int
    """K: in 1 / (1 - beta2) steps, over all ranks."""
    beta2: float
    ranks: int
    kappa: str
    speed: Spread
    """Displacement of rare coordinates over unfrozen Adam's."""
    scale: Spread
    """Scale of a block on a rank in a step with a rare gradient there, over the same block's without any."""
    largest_scale: Spread
    """The largest of these."""
    squared_error: Spread
    """Mean squared worker error of the block's ordinary coordinates, over that without rare ones."""
    ordinary: Spread
    """Displacement of the ordinary coordinates of the block along their drift, over frozen Adam's."""


def rare(gradients: int, n: int, beta2: float, seed: int, *, windows: float) -> dict[str, list[float]]:
    """For each kappa the numbers of :class:`Rare`, in its order, over ``windows`` times 1 / (1 - beta2) steps."""
    rng = np.random.default_rng([seed, n, round(1000 * beta2), gradients])
    r, ordinary = RARE_PER_BLOCK, slice(RARE_PER_BLOCK, None)
    rate = gradients * (1 - beta2)
    refresh = max(1, round(REFRESH / (1 - beta2)))

    def events() -> tuple[NDArray[np.bool_], NDArray[np.int64], Array]:
        """Which rare coordinates have a gradient in this step, on which rank, and which: of like sign, mostly."""
        return rng.random(r) < rate, rng.integers(n, size=r), rng.normal(1.0, 0.5, r).astype(np.float32)

    # Before: Adam's v and m of the mean gradient as they are when it has gone on for long.
    v = np.zeros(r)
    for _ in range(round(5 / (1 - beta2))):
        occurs, _, g = events()
        v = beta2 * v + (1 - beta2) * np.where(occurs, g / n, 0) ** 2
    m, adam_x = np.zeros(r), np.zeros(r)

    drift = np.where(rng.random(BLOCK_SIZE - r) < 0.5, -1, 1).astype(np.float32) * np.float32(DRIFT)
    momenta = {name: CompressedMomentum(n, BLOCK_SIZE) for name in (*KAPPAS, NO_RARE)}
    x = {name: np.zeros(BLOCK_SIZE) for name in momenta}
    exact_u, exact_x = np.zeros(BLOCK_SIZE - r), np.zeros(BLOCK_SIZE - r)
    squared = dict.fromkeys(momenta, 0.0)
    scales: dict[str, list[float]] = {name: [] for name in KAPPAS}
    a: Array = np.zeros((n, BLOCK_SIZE), np.float32)
    d = np.sqrt(v)
    # At least so many that the quantizer's errors, which know nothing of beta2, settle and average out.
    steps, settled = max(round(windows / (1 - beta2)), 1000), max(round(0.25 / (1 - beta2)), 200)
    for step in range(settled + steps):
        if step == settled:  # as with ordinary coordinates: the errors hold back as much now as in the end
            for each in (*x.values(), exact_x, adam_x):
                each[:] = 0
        occurs, where, g = events()
        if step % refresh == 0:  # with the v of the step before
            d = np.sqrt(v)
        # What is drawn is g_i / D of ordinary coordinates: the mean's D is 1 / sqrt(n) of a rank's standard deviation.
        a[:, ordinary] = rng.standard_normal((n, BLOCK_SIZE - r), dtype=np.float32) * np.float32(math.sqrt(n)) + drift
        a[:, :r] = 0
        index = occurs.nonzero()[0]
        # A coordinate without any gradient for very long has d = 0 here, which the clamp bounds.
        a[where[index], index] = g[index] / np.maximum(d[index], 1e-12)
        g_bar = np.where(occurs, g / n, 0)
        v = beta2 * v + (1 - beta2) * g_bar**2
        m = BETA1 * m + (1 - BETA1) * g_bar
        adam_x += m / np.sqrt(np.maximum(v, 1e-30))
        exact_u = BETA1 * exact_u + (1 - BETA1) * a[:, ordinary].mean(axis=0)
        exact_x += exact_u
        for name, momentum in momenta.items():
            if name == NO_RARE:
                clamped = a.copy()
                clamped[:, :r] = 0
            else:
                kappa = KAPPAS[name](n, beta2)
                clamped = np.clip(a, -kappa, kappa)
            x[name] += momentum.step(clamped)
            if step >= settled:
                squared[name] += float((momentum.worker_errors[:, ordinary] ** 2).mean())
        if step >= settled and len(index):
            for name in KAPPAS:
                ranks = np.unique(where[index])
                scales[name].extend((momenta[name].scales[ranks, 0] / momenta[NO_RARE].scales[ranks, 0]).tolist())
    return {
        name: [
            float(x[name][:r].sum() / adam_x.sum()),
            float(np.mean(scales[name])),
            float(np.max(scales[name])),
            squared[name] / squared[NO_RARE],
            float(x[name][ordinary] @ np.sign(drift) / (exact_x @ np.sign(drift))),
        ]
        for name in KAPPAS
    }


def spreads(samples: list[dict[str, list[float]]], kappa: str) -> list[Spread]:
    return [Spread.of(list(values)) for values in zip(*(sample[kappa] for sample in samples), strict=True)]


def shown(spread: Spread, digits: int = 3) -> str:
    return (
        f"{spread.median:.{digits}f} [{spread.lower_quartile:.{digits}f}-{spread.upper_quartile:.{digits}f}]"
        if spread.samples > 1
        else f"{spread.median:.{digits}f}"
    )


def main() -> None:
    settings = parse_arguments()
    machine = environment()
    displacements, rares = [], []
    for noise in NOISES:
        for beta2 in settings.beta2:
            for n in settings.ranks:
                samples = [
                    displacement(noise, n, beta2, seed, blocks=settings.blocks, steps=settings.steps)
                    for seed in range(settings.seeds)
                ]
                for kappa in KAPPAS:
                    along, projected, cut = spreads(samples, kappa)
                    result = Displacement(
                        noise=noise, beta2=beta2, ranks=n, kappa=kappa, along_drift=along, projected=projected, cut=cut
                    )
                    displacements.append(result)
                    print(result, flush=True)
    for beta2 in settings.beta2:
        for gradients in (1, 5):
            for n in settings.ranks:
                samples = [rare(gradients, n, beta2, seed, windows=settings.windows) for seed in range(settings.seeds)]
                for kappa in KAPPAS:
                    speed, scale, largest, squared, ordinary = spreads(samples, kappa)
                    rares.append(
                        Rare(
                            gradients=gradients,
                            beta2=beta2,
                            ranks=n,
                            kappa=kappa,
                            speed=speed,
                            scale=scale,
                            largest_scale=largest,
                            squared_error=squared,
                            ordinary=ordinary,
                        )
                    )
                    print(rares[-1], flush=True)
    text = "\n\n".join([describe(machine), *report(settings, displacements, rares)])
    print(text)
    if settings.out is not None:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(text + "\n", encoding="utf-8")
        save(settings.out.with_suffix(".json"), {"environment": machine, "displacements": displacements, "rare": rares})


def report(settings: argparse.Namespace, displacements: list[Displacement], rares: list[Rare]) -> list[str]:
    """Paragraphs and tables."""
    return [
        f"Median [quartiles] over {settings.seeds} seeds. Ordinary coordinates: {settings.blocks} blocks of {BLOCK_SIZE},"
        f" {settings.steps} steps, the last two thirds counted; drift {DRIFT} of the noise of the mean gradient.",
        table(
            ("noise", "beta2", "n", "kappa", "displacement", "projected", "cut"),
            [
                (
                    r.noise,
                    f"{r.beta2}",
                    f"{r.ranks}",
                    r.kappa,
                    shown(r.along_drift),
                    shown(r.projected),
                    f"{r.cut.median:.2%}",
                )
                for r in displacements
            ],
        ),
        f"Rare coordinates: {RARE_PER_BLOCK} of the {BLOCK_SIZE} of a block, {settings.windows:g} / (1 - beta2) steps, 1000"
        " at least. Scale (of a block on a rank in a step with a rare gradient there; mean, largest) and squared worker"
        " error of the ordinary coordinates: over those of the same block without rare gradients and clamp.",
        table(
            ("K", "beta2", "n", "kappa", "speed over Adam's", "scale", "largest", "squared error", "ordinary"),
            [
                (
                    f"{r.gradients}",
                    f"{r.beta2}",
                    f"{r.ranks}",
                    r.kappa,
                    shown(r.speed, 2),
                    shown(r.scale, 2),
                    f"{r.largest_scale.median:.1f}",
                    shown(r.squared_error, 2),
                    shown(r.ordinary),
                )
                for r in rares
            ],
        ),
        verdict(displacements, rares),
    ]


def verdict(displacements: list[Displacement], rares: list[Rare]) -> str:
    """For each kappa, whether invariants 5 and 11 hold, and the numbers that decide."""
    lines, follow = [], []
    for kappa in KAPPAS:
        gaussian_ratios = [r.along_drift.median for r in displacements if r.kappa == kappa and r.noise == "Gaussian"]
        tailed = [r.along_drift.median for r in displacements if r.kappa == kappa and r.noise != "Gaussian"]
        speeds = [r.speed.median for r in rares if r.kappa == kappa]
        errors = [r.squared_error.median for r in rares if r.kappa == kappa]
        eleven = all(abs(ratio - 1) <= 0.03 for ratio in gaussian_ratios)
        five = all(0.5 <= speed <= 2 for speed in speeds)
        lines.append(
            f"{kappa}: invariant 11 (within 3%, Gaussian) {'holds' if eleven else 'does not hold'}:"
            f" {min(gaussian_ratios):.3f} to {max(gaussian_ratios):.3f} (heavy tails: {min(tailed):.3f} to"
            f" {max(tailed):.3f}); invariant 5 (rare coordinates within 2x of Adam) {'holds' if five else 'does not hold'}:"
            f" {min(speeds):.2f} to {max(speeds):.2f}; squared worker error up to {max(errors):.2f} times that without rare"
            " gradients."
        )
        if five and eleven:
            follow.append(kappa)
    return "\n".join([*lines, f"From invariants 5 and 11 follows kappa = {' or '.join(follow) or 'none of these'}."])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python benchmarks/clamp.py"
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 8, 16, 32], help="n (default: %(default)s)")
    parser.add_argument("--beta2", nargs="+", type=float, default=[0.95, 0.999], help="(default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=1, help="of ordinary coordinates (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="with ordinary coordinates (default: %(default)s)")
    parser.add_argument(
        "--windows", type=float, default=3, help="of 1 / (1 - beta2) steps, with rare ones (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there, and the numbers beside it as .json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
