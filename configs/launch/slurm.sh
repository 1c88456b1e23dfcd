#!/bin/bash
# One task a GPU node; srun sets the variables that jax.distributed.initialize() reads, so the trainer needs no change.
#SBATCH --job-name=lm
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
# SIGTERM 5 minutes before the limit: the trainer saves at the next step, waits for the commit and exits.
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -eu
# Every node must see the same directory: NFS, Lustre or a bucket, not a local disk.
srun --kill-on-bad-exit=1 python -m ckpt_jax.examples.lm --run "${RUN:?set RUN to a shared directory}" --steps 100000 --every 500
