"""A training script as a user would write it, in which one rank, or each, does itself harm. Run by test_faults.py and benchmarks/faults.py.

It resumes from its last checkpoint if there is one.
"""

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
from lightning.pytorch.callbacks import ModelCheckpoint
from trainers import Classifier, data

import lightning_onebit
from lightning_onebit.comm.allreduce import CompressedBucket

PLACES = ("batch", "backward", "exchange", "save")


class Fault(pl.Callback):
    """Sends a signal to the own process, once per folder: at a step, and there in the middle of a batch, of backward,
    of a compressed exchange (in its thread), or of writing a checkpoint."""

    def __init__(self, folder, *, signal, step, place, seconds=0.0):
        self.marker, self.signal, self.step, self.place, self.seconds = Path(folder) / "done", signal, step, place, seconds
        self.armed = False

    def strike(self):
        if self.armed and not self.marker.exists():
            self.marker.touch()
            if self.seconds:  # comes later, wherever training is then
                threading.Timer(self.seconds, os.kill, (os.getpid(), self.signal)).start()
            else:
                os.kill(os.getpid(), self.signal)

    def setup(self, trainer, pl_module, stage):
        if self.place == "exchange":
            serve = CompressedBucket._served

            def serve_or_strike(bucket, *args):
                self.strike()
                return serve(bucket, *args)

            CompressedBucket._served = serve_or_strike
        if self.place == "save":
            save = trainer.strategy.save_checkpoint

            def save_or_strike(checkpoint, filepath, storage_options=None):
                self.strike()
                return save(checkpoint, filepath, storage_options)

            trainer.strategy.save_checkpoint = save_or_strike

    def on_train_batch_start(self, trainer, *_):
        self.armed = trainer.global_step == self.step
        if self.place == "batch":
            self.strike()

    def on_after_backward(self, *_):
        if self.place == "backward":
            self.strike()


class Slow(pl.Callback):
    def on_train_batch_end(self, *_):
        time.sleep(0.02)


def main(arguments):
    pl.seed_everything(0)
    folder = Path(arguments.folder)
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", 0))))
    callbacks = [
        ModelCheckpoint(dirpath=folder, every_n_train_steps=3, save_last=True, save_top_k=1),
        Slow(),
    ]
    if arguments.strategy == "ddp":
        strategy = pl.strategies.DDPStrategy(timeout=timedelta(seconds=arguments.timeout))
    else:
        strategy = lightning_onebit.OneBitDDPStrategy(timeout=timedelta(seconds=arguments.timeout), bucket_cap_mb=0.005)
        callbacks.append(lightning_onebit.PhaseSwitch(criterion=lightning_onebit.FixedStep(6)))
    if arguments.signal and rank in arguments.ranks:
        number = getattr(signal, f"SIG{arguments.signal}")
        folder_of_rank = folder / f"fault{rank}"
        folder_of_rank.mkdir(exist_ok=True)
        callbacks.append(Fault(folder_of_rank, signal=number, step=arguments.step, place=arguments.place, seconds=arguments.delay * rank))
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=arguments.devices,
        num_nodes=arguments.nodes,
        max_steps=arguments.steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        default_root_dir=folder,
    )
    model = Classifier(hidden=64)
    trainer.fit(model, data(arguments.steps, trainer.world_size), ckpt_path="last" if arguments.resume else None)
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    report = {"step": trainer.global_step, "digest": digest}
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--strategy", default="onebit_ddp")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--timeout", type=float, default=10)
    parser.add_argument("--signal")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1])
    parser.add_argument("--step", type=int, default=3)
    parser.add_argument("--place", choices=PLACES, default="batch")
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--resume", action="store_true")
    main(parser.parse_args())
