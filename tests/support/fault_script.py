"""A training script as a user would write it, in which ranks do harm to themselves: for tests and benchmarks of faults.

With ``--resume`` it goes on from its last checkpoint, if there is one.
"""

# ruff: noqa: E402
import gc

gc.disable()  # until all is imported: a sixth of the time

import argparse
import hashlib
import json
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from trainers import BATCH_SIZE, CLASSES, FEATURES, Classifier, data

from lightning_onebit import FixedStep, OneBitDDPStrategy, PhaseSwitch
from lightning_onebit.quantize.cpu import CpuKernels

gc.enable()

WARMUP_STEPS = 6
PLACES = ("batch", "backward", "exchange", "save")


class Fault(pl.Callback):
    """Sends a signal to the own process, once, after ``step`` steps.

    Args:
        marker: a file that is made when it happens, and keeps it from happening again.
        number: of the signal.
        step: optimizer steps that are complete.
        place: between two batches, before gradients are averaged, within a compressed exchange, or at a save.
        delay_seconds: afterwards, wherever training is then.
    """

    def __init__(self, marker, number, *, step, place, delay_seconds=0.0):
        assert place in PLACES
        self.marker, self.number, self.step, self.place = Path(marker), number, step, place
        self.delay_seconds = delay_seconds

    def strike(self, place, step):
        if place == self.place and step >= self.step and not self.marker.exists():
            self.marker.touch()
            if self.delay_seconds:
                threading.Timer(self.delay_seconds, os.kill, (os.getpid(), self.number)).start()
            else:
                os.kill(os.getpid(), self.number)
                if self.number == signal.SIGSTOP:
                    time.sleep(0.5)  # threads are stopped one by one, this one perhaps a little later

    def setup(self, trainer, pl_module, stage):
        serve, save = CpuKernels.serve_, trainer.strategy.save_checkpoint

        def strike_and_serve(kernels, *args, **kwargs):
            self.strike("exchange", trainer.global_step)
            serve(kernels, *args, **kwargs)

        def strike_and_save(*args, **kwargs):
            self.strike("save", trainer.global_step)
            return save(*args, **kwargs)

        CpuKernels.serve_ = strike_and_serve  # between all-to-all and all-gather, in the thread that exchanges
        trainer.strategy.save_checkpoint = strike_and_save

    def on_train_batch_start(self, trainer, *_):
        self.strike("batch", trainer.global_step)

    def on_before_backward(self, trainer, *_):
        self.strike("backward", trainer.global_step)


class ByStep(Classifier):
    """Its data depends on rank and step only, so that a run that resumes within an epoch sees what it would have seen."""

    def training_step(self, batch, batch_idx):
        generator = torch.Generator().manual_seed(1000 * self.global_step + self.global_rank)
        x = torch.randn(BATCH_SIZE, FEATURES, generator=generator)
        return super().training_step((x, x[:, :CLASSES].argmax(1)), batch_idx)


class Slow(pl.Callback):
    """Batches of a real model take some time. Whoever watches from outside finds the number of steps in ``progress``."""

    def __init__(self, progress=None):
        self.progress = progress

    def on_train_batch_end(self, trainer, *_):
        time.sleep(0.02)
        if self.progress is not None:
            self.progress.write_text(str(trainer.global_step))


def make_strategy(name, timeout_seconds, bucket_cap_mb=0.005):
    timeout = timedelta(seconds=timeout_seconds)
    if name == "ddp":
        return pl.strategies.DDPStrategy(timeout=timeout)
    return OneBitDDPStrategy(timeout=timeout, bucket_cap_mb=bucket_cap_mb)  # several buckets


def train(folder, strategy, world_size, *, steps, faults=(), resume=False, hidden=64, **kwargs):
    """Train on data that differs by rank, and return the trainer. Saves a checkpoint every third step."""
    pl.seed_everything(0)
    callbacks = [ModelCheckpoint(dirpath=folder, every_n_train_steps=3, save_last=True), *faults]
    if isinstance(strategy, OneBitDDPStrategy):
        callbacks.append(PhaseSwitch(FixedStep(WARMUP_STEPS)))
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        callbacks=callbacks,
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"devices": world_size, **kwargs},
    )
    trainer.fit(ByStep(hidden=hidden), data(steps, world_size), ckpt_path="last" if resume else None)
    return trainer


def digest(module):
    """Of the parameters' bits."""
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in module.parameters())).hexdigest()


def main(arguments):
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0)))
    faults = [Slow(Path(arguments.folder) / f"progress{rank}")]
    if arguments.fault and rank in arguments.ranks:
        marker = Path(arguments.folder) / f"fault{rank}"
        number = signal.Signals[f"SIG{arguments.fault}"]
        delay = arguments.apart * arguments.ranks.index(rank)
        faults.append(Fault(marker, number, step=arguments.step, place=arguments.place, delay_seconds=delay))
    trainer = train(
        arguments.folder,
        make_strategy(arguments.strategy, arguments.timeout, arguments.bucket_cap_mb),
        arguments.devices * arguments.nodes,
        steps=arguments.steps,
        faults=faults,
        resume=arguments.resume,
        hidden=arguments.hidden,
        devices=arguments.devices,
        num_nodes=arguments.nodes,
    )
    report = {"step": trainer.global_step, "digest": digest(trainer.lightning_module)}
    (Path(arguments.folder) / f"rank{trainer.global_rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="for checkpoints, and a report by each rank that comes to the end")
    parser.add_argument("--strategy", default="onebit_ddp", help="or ddp")
    parser.add_argument("--devices", type=int, default=2, help="processes per node")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--timeout", type=float, default=10, help="of collectives, seconds")
    parser.add_argument("--fault", help="the signal: KILL, TERM, STOP")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1], help="who gets the signal")
    parser.add_argument("--step", type=int, default=3, help=f"when; the first {WARMUP_STEPS} are warm-up")
    parser.add_argument("--place", choices=PLACES, default="batch", help="where in the step")
    parser.add_argument("--apart", type=float, default=0.0, help="seconds between the signals of different ranks")
    parser.add_argument("--hidden", type=int, default=64, help="width of the model")
    parser.add_argument("--bucket-cap-mb", type=float, default=0.005)
    parser.add_argument("--resume", action="store_true")
    main(parser.parse_args())
