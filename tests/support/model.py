"""The whole algorithm in float64 and one process, written from the description, sharing no code with the package.

``quantize`` works on one parameter; the models run n workers. Wire scales are float32, as on the wire.
"""

import numpy as np

REFRESH_STEPS = 64


def quantize(values, block_size, scale="l2", live=None):
    """C: +-scale per block of a flat array, the last block short; 0 where an element is not ``live``."""
    result = np.zeros_like(values)
    live = np.ones(len(values), dtype=bool) if live is None else live
    for start in range(0, len(values), block_size):
        part = slice(start, start + block_size)
        block, counted = values[part], values[part][live[part]]
        if len(counted):
            size = np.sqrt(np.mean(counted**2)) if scale == "l2" else np.mean(np.abs(counted))
            result[part] = live[part] * np.where(block >= 0, 1.0, -1.0) * np.float64(np.float32(size))
    return result


class ErrorFeedbackModel:
    """Steps 2 to 5 for one flat tensor: what every rank gets, from what every rank has."""

    def __init__(self, numel, world_size, block_size, scale="l2"):
        self.block_size, self.scale = block_size, scale
        self.worker_errors = np.zeros((world_size, numel))
        self.server_error = np.zeros(numel)

    def reduce(self, values, live=None):
        quantized = []
        for worker_error, value in zip(self.worker_errors, values, strict=True):
            c = value + worker_error
            q = quantize(c, self.block_size, self.scale, live)
            worker_error[:] = c - q
            quantized.append(q)
        c_bar = np.mean(quantized, axis=0) + self.server_error
        result = quantize(c_bar, self.block_size, self.scale, live)
        self.server_error = c_bar - result
        return result


class AdamModel:
    """One parameter through warm-up, freeze and compressed steps, each of which takes the gradients of all workers.

    Coordinates with v = 0 at the freeze are not live, and unchanged. There worker i gathers
    v_i = beta2 v_i + (1 - beta2) g_i^2 / n; every REFRESH_STEPS steps v = mean_i v_i is everybody's v_i, from which
    D follows, and where it is not 0, the coordinate is live from the next step on. So it goes on until the coordinate has been live for 1 / (1 - beta2) steps.
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
        self.u = self.compression.reduce(momenta, self.live) if self.compression else momenta[0]
        update = self.u if self.space == "update" else self.u / self.D
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
