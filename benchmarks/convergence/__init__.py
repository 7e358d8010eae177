"""Whether training with this library ends where Adam ends: ``python -m benchmarks.convergence --help``."""
