"""Every way in which Lightning starts processes: a script, spawn, fork, torchrun over two nodes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import free_port

SCRIPT = Path(__file__).with_name("launch_script.py")
ROOT = SCRIPT.parent.parent


def environment():
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def wait_for(processes):
    outputs = [process.communicate(timeout=110)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)


def start(*command):
    return subprocess.Popen(
        list(map(str, command)), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def check(folder, world_size, num_nodes=1):
    reports = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world_size)]
    for report in reports:
        assert (report["world_size"], report["num_nodes"]) == (world_size, num_nodes)
        assert report["phase"] == "COMPRESSED"
        assert report["steps"] == [4, 6]
        assert report["ratio"] > 20
        assert report["params"] == reports[0]["params"]


@pytest.mark.parametrize("strategy", ["onebit_ddp", "onebit_ddp_spawn", "onebit_ddp_fork"])
def test_lightning_starts_the_processes(strategy, tmp_path):
    wait_for([start(sys.executable, SCRIPT, strategy, 2, 1, tmp_path)])
    check(tmp_path, world_size=2)


def test_torchrun_with_two_nodes(tmp_path):
    port = free_port()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--nnodes", 2]
    nodes = [
        start(
            *torchrun,
            *("--node-rank", node, "--master-addr", "127.0.0.1", "--master-port", port),
            *(SCRIPT, "onebit_ddp", 2, 2, tmp_path),
        )
        for node in range(2)
    ]
    wait_for(nodes)
    check(tmp_path, world_size=4, num_nodes=2)
