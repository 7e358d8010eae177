"""The whole algorithm in float64 and one process, written from the description, sharing no code with the package.

``quantize`` works on one parameter; ``Simulation`` runs n workers. Wire scales are float32, as on the wire.
"""

import numpy as np


def quantize(values, block_size, scale="l2"):
    """C: +-scale per block of a flat array, the last block short."""
    result = np.empty_like(values)
    for start in range(0, len(values), block_size):
        block = values[start : start + block_size]
        size = np.sqrt(np.mean(block**2)) if scale == "l2" else np.mean(np.abs(block))
        result[start : start + block_size] = np.where(block >= 0, 1.0, -1.0) * np.float64(np.float32(size))
    return result


class ErrorFeedbackModel:
    """Steps 2 to 5 for one flat tensor: what every rank gets, from what every rank has."""

    def __init__(self, numel, world_size, block_size, scale="l2"):
        self.block_size, self.scale = block_size, scale
        self.worker_errors = np.zeros((world_size, numel))
        self.server_error = np.zeros(numel)

    def reduce(self, values):
        quantized = []
        for worker_error, value in zip(self.worker_errors, values, strict=True):
            c = value + worker_error
            q = quantize(c, self.block_size, self.scale)
            worker_error[:] = c - q
            quantized.append(q)
        c_bar = np.mean(quantized, axis=0) + self.server_error
        result = quantize(c_bar, self.block_size, self.scale)
        self.server_error = c_bar - result
        return result


class AdamModel:
    """One parameter through warm-up, freeze and compressed steps; ``step`` takes the gradients of all workers."""

    def __init__(self, x, world_size, *, lr, betas, eps, weight_decay, decoupled, block_size, scale, space, maximize=False):
        self.x = np.array(x, dtype=np.float64).ravel()
        self.m, self.v, self.t = np.zeros_like(self.x), np.zeros_like(self.x), 0
        self.lr, (self.beta1, self.beta2), self.eps = lr, betas, eps
        self.weight_decay, self.decoupled, self.maximize = weight_decay, decoupled, maximize
        self.space = space
        self.kappa = 1 / np.sqrt(1 - self.beta2)
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
        self.D = np.sqrt(self.v / (1 - self.beta2**self.t)) + self.eps
        self.u = self.m / self.D if self.space == "update" else self.m

    def compressed_step(self, grads):
        local = self.local_gradients(grads)
        self.decay()
        self.t += 1
        if self.space == "update":
            local = [np.clip(g / self.D, -self.kappa, self.kappa) for g in local]
        momenta = [self.beta1 * self.u + (1 - self.beta1) * g for g in local]
        self.u = self.compression.reduce(momenta) if self.compression else momenta[0]
        update = self.u if self.space == "update" else self.u / self.D
        self.x -= self.lr / (1 - self.beta1**self.t) * update
