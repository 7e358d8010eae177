"""A training script as a user would write it, run by test_launchers.py. Each rank reports to the output folder."""

# ruff: noqa: E402
import gc

gc.disable()  # until all is imported: a sixth of the time

import json
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from trainers import Classifier, data

import lightning_onebit

gc.enable()


class Report(pl.Callback):
    """Written by every rank, in whatever process it runs."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        strategy = trainer.strategy
        stats = strategy.comm_stats[lightning_onebit.Phase.COMPRESSED]
        # In ten steps, refreshes of the second moment are most of what travels.
        for_signs = stats.bytes_sent - stats.refresh_bytes_sent - stats.sketch_bytes_sent
        report = {
            "rank": trainer.global_rank,
            "world_size": trainer.world_size,
            "num_nodes": trainer.num_nodes,
            "phase": strategy.phase.name,
            "steps": [strategy.comm_stats[phase].steps for phase in lightning_onebit.Phase],
            "ratio": stats.dense_equivalent_bytes / for_signs,
            "params": torch.cat([p.detach().ravel() for p in pl_module.parameters()]).tolist(),
        }
        (Path(self.folder) / f"rank{trainer.global_rank}.json").write_text(json.dumps(report))


def main(strategy, devices, num_nodes, folder):
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=int(devices),
        num_nodes=int(num_nodes),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[lightning_onebit.PhaseSwitch(criterion=lightning_onebit.FixedStep(4)), Report(folder)],
    )
    trainer.fit(Classifier(hidden=128), data(10, trainer.world_size))


if __name__ == "__main__":
    main(*sys.argv[1:])
