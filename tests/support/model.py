"""The whole algorithm in float64 and one process, written from the description, sharing no code with the package.

``quantize`` works on one parameter; the models run n workers. Wire scales are float32, as on the wire.
"""

import numpy as np

REFRESH_STEPS = 64


def quantize(values, block_size, scale="l2", live=None, gain=1.0):
    """C, times ``gain``: +-scale per block of a flat array, the last block short; 0 where an element is not ``live``."""
    result = np.zeros_like(values)
    live = np.ones(len(values), dtype=bool) if live is None else live
    for start in range(0, len(values), block_size):
        part = slice(start, start + block_size)
        block, counted = values[part], values[part][live[part]]
        if len(counted):
            size = gain * (np.sqrt(np.mean(counted**2)) if scale == "l2" else np.mean(np.abs(counted)))
            result[part] = live[part] * np.where(block >= 0, 1.0, -1.0) * np.float64(np.float32(size))
    return result


class ErrorFeedbackModel:
    """Steps 2 to 5 for one flat tensor: what every rank gets, from what every rank has."""

    def __init__(self, numel, world_size, block_size, scale="l2"):
        self.block_size, self.scale = block_size, scale
        self.worker_errors = np.zeros((world_size, numel))
        self.server_error = np.zeros(numel)

    def reduce(self, values, live=None, beta=0.0):
        """``beta``: that of the last result in ``values``."""
        quantized = []
        for worker_error, value in zip(self.worker_errors, values, strict=True):
            c = value + worker_error
            q = quantize(c, self.block_size, self.scale, live)
            worker_error[:] = c - q
            quantized.append(q)
        c_bar = np.mean(quantized, axis=0) + self.server_error
        result = quantize(c_bar, self.block_size, self.scale, live, gain=1 + beta / 2)
        self.server_error = c_bar - result
        return result


class AdamModel:
    """One parameter through warm-up, freeze and compressed steps, each of which takes the gradients of all workers.

    Coordinates with v = 0 at the freeze are not live, and unchanged. There worker i gathers
    v_i = beta2 v_i + (1 - beta2) g_i^2 / n; every REFRESH_STEPS steps v = mean_i v_i is everybody's v_i, from which
    D follows, and where it is not 0, the coordinate is live from the next step on. So it goes on until the coordinate has
    been live for 1 / (1 - beta2) steps.
    """

    def __init__(self, x, world_size, *, lr, betas, eps, weight_decay, decoupled, block_size, scale, space, maximize=False):
        self.x = np.array(x, dtype=np.float64).ravel()
        self.m, self.v, self.t = np.zeros_like(self.x), np.zeros_like(self.x), 0
        self.lr, (self.beta1, self.beta2), self.eps = lr, betas, eps
        self.weight_decay, self.decoupled, self.maximize = weight_decay, decoupled, maximize
        self.space = space
        self.kappa = world_size / np.sqrt(1 - self.beta2)
        self.world_size = world_size
        self.compression = ErrorFeedbackModel(len(self.x), world_size, block_size, scale) if world_size > 1 else None

    @property
    def bound(self):
        """Of m / sqrt(v), in momentum space: by Cauchy and Schwarz over more steps than m remembers; or of g / sqrt(v)."""
        gains = (self.beta1**2 / self.beta2) ** np.arange(1000)
        return min(1.0, (1 - self.beta1) * np.sqrt(np.sum(gains))) / np.sqrt(1 - self.beta2)

    def local_gradients(self, grads):
        grads = [np.array(g, dtype=np.float64).ravel() * (-1 if self.maximize else 1) for g in grads]
        return grads if self.decoupled else [g + self.weight_decay * self.x for g in grads]

    def decay(self):
        if self.decoupled:
            self.x *= 1 - self.lr * self.weight_decay

    def warmup_step(self, grads):
        g = np.mean(self.local_gradients(grads), axis=0)
        self.decay()
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * g**2
        v_hat = self.v / (1 - self.beta2**self.t)
        self.x -= self.lr / (1 - self.beta1**self.t) * self.m / (np.sqrt(v_hat) + self.eps)

    def freeze(self):
        self.live = self.v > 0
        self.since = np.where(self.live, -np.inf, np.inf)
        self.D = np.where(self.live, np.sqrt(self.v / (1 - self.beta2**self.t)) + self.eps, 1.0)
        self.u = np.where(self.live, self.m / self.D if self.space == "update" else self.m, 0.0)
        self.late_v = np.zeros((self.world_size, len(self.x)))

    def compressed_step(self, grads):
        local = self.local_gradients(grads)
        self.decay()
        self.t += 1
        if self.space == "update":
            local = [self.live * np.clip(g / self.D, -self.kappa, self.kappa) for g in local]
        momenta = [self.beta1 * self.u + (1 - self.beta1) * g for g in local]
        self.u = self.compression.reduce(momenta, self.live, self.beta1) if self.compression else momenta[0]
        update = self.u if self.space == "update" else np.clip(self.u / self.D, -self.bound, self.bound)
        self.x -= self.lr / (1 - self.beta1**self.t) * update
        self.collect(grads)
        if self.t % REFRESH_STEPS == 0:
            self.refresh()

    def collect(self, grads):
        for v, g in zip(self.late_v, grads, strict=True):
            v[:] = self.beta2 * v + (1 - self.beta2) * np.array(g, dtype=np.float64).ravel() ** 2 / self.world_size

    def refresh(self):
        late = self.t - self.since < 1 / (1 - self.beta2)  # those that are not live yet as well
        v = np.mean(self.late_v, axis=0)
        renewed = late & (v > 0)
        self.late_v[:] = v
        self.D[renewed] = np.sqrt(v[renewed] / (1 - self.beta2**self.t)) + self.eps
        self.since[renewed & ~self.live] = self.t
        self.live |= renewed


class RenewedAdamModel(AdamModel):
    """The same where second moments go on. What is taken from the package is the 8-bit code (``code``: roots to what they
    decode to, one block), which test_quantized_variance.py knows; tensors of more than 251 elements are not for it, as norms
    of means are exact here.
    """

    def __init__(self, *args, code, every, **options):
        super().__init__(*args, **options)
        self.code, self.every, self.block_size = code, every, options["block_size"]

    def coded(self, squares):
        """Squares of the coded roots, block by block; a single rank codes nothing."""
        if self.world_size == 1:
            return squares.copy()
        blocks = [squares[start : start + self.block_size] for start in range(0, len(squares), self.block_size)]
        return np.concatenate([self.code(np.sqrt(block)) ** 2 for block in blocks])

    def freeze(self):
        correction = 1 - self.beta2**self.t
        self.v_i = np.stack([self.v] * self.world_size)
        self.residual = np.zeros_like(self.v)
        self.set_d(self.coded(self.v / correction))
        self.u = np.where(self.live, self.m / self.D, 0.0)
        self.quotient = 0.0
        self.num_estimates, self.next_refresh = 0, 1
        while self.next_refresh <= self.t:
            self.next_refresh += max(1, min(64, self.next_refresh // 8))

    def set_d(self, v_hat):
        self.live = v_hat > 0
        self.D = np.where(self.live, np.sqrt(v_hat) + self.eps, 1.0)

    @property
    def r(self):
        return np.clip(self.quotient, 1 / self.world_size, 1.0)

    def collect(self, grads):
        raise AssertionError("second moments are updated by compressed_step")

    def compressed_step(self, grads):
        sign = -1 if self.maximize else 1
        grads = [sign * np.array(g, dtype=np.float64).ravel() for g in grads]
        decay = 0.0 if self.decoupled else self.weight_decay * self.x
        a = [self.live * np.clip((g + decay) / self.D, -self.kappa, self.kappa) for g in grads]
        bare = [self.live * np.clip(g / self.D, -self.kappa, self.kappa) for g in grads]
        for v, g in zip(self.v_i, grads, strict=True):  # with the r of the steps before
            v[:] = self.beta2 * v + (1 - self.beta2) * (np.sqrt(self.r) * g + decay) ** 2
        self.decay()
        self.t += 1
        momenta = [self.beta1 * self.u + (1 - self.beta1) * each for each in a]
        self.u = self.compression.reduce(momenta, self.live, self.beta1) if self.compression else momenta[0]
        self.x -= self.lr / (1 - self.beta1**self.t) * self.u
        if self.t % 16 == 0 or self.num_estimates < 16:
            self.estimate_r(bare)
        if self.is_refresh_due():
            self.refresh()

    def is_refresh_due(self):
        if self.every != "auto":
            return self.t % self.every == 0
        due = self.t == self.next_refresh
        if due:
            self.next_refresh += max(1, min(64, self.t // 8))
        return due

    def estimate_r(self, a):
        """Of the preconditioned, clamped gradients of this step: a quotient, averaged over two."""
        self.num_estimates += 1
        quotient = np.sum(np.mean(a, axis=0) ** 2) / np.mean([np.sum(each**2) for each in a])
        self.quotient += max(1 / self.num_estimates, 1 / 2) * (quotient - self.quotient)

    def refresh(self):
        correction = 1 - self.beta2**self.t
        own = [self.coded(v / correction) for v in self.v_i]
        mean = np.mean(own, axis=0)
        c = np.clip(mean + self.residual, mean / 2, 2 * mean)
        v = self.coded(c)
        self.residual = c - v
        for each, its_code in zip(self.v_i, own, strict=True):
            each[:] = np.clip(each / correction - its_code + v, v / 2, 2 * v) * correction
        old, had_d = self.D, self.live
        self.set_d(v)
        rescaling = np.where(had_d & self.live, np.minimum(old / self.D, 1.25 if self.compression else 4), 1.0)
        if self.compression:  # what the next step adds, beta u, is not what it should be by now: owed by every worker
            self.compression.worker_errors += self.beta1 * self.u * (rescaling - 1)
        else:
            self.u = self.u * rescaling
