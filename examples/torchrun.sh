#!/usr/bin/env bash
# Train on several machines with torchrun. Start it on every one of them, with its own number, and the first one's address:
#
#   NODES=2 NODE=0 MASTER=192.168.1.10 examples/torchrun.sh      # on the first machine
#   NODES=2 NODE=1 MASTER=192.168.1.10 examples/torchrun.sh      # on the second
#   examples/torchrun.sh                                         # two processes on this machine alone
#
# What is written behind it goes to the script: examples/torchrun.sh --epochs 5
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")

nodes=${NODES:-1}
devices=${DEVICES:-2} # per machine: its GPUs, or processes on its CPU

# Where a machine has several networks, name the one that joins the machines (`ip -brief address` lists them):
# export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0

exec torchrun --nnodes "$nodes" --node-rank "${NODE:-0}" --nproc-per-node "$devices" \
  --master-addr "${MASTER:-127.0.0.1}" --master-port "${PORT:-29500}" \
  "$here/vit_digits.py" --num-nodes "$nodes" --devices "$devices" --accelerator "${ACCELERATOR:-cpu}" "$@"
