#!/bin/bash
# sbatch --export=ALL,RUN=/shared/runs/lm slurm.sh
#SBATCH --job-name=lm
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
# The tasks get SIGTERM 300 s before the limit (and when they are preempted): they save and exit with 143. One save and
# its commit must fit into that time. The shell, which may get the signal too, outlives it.
trap : TERM
# By default jax gives a task of Slurm one GPU. Here one task has all GPUs of its node.
export JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
code=0
srun --kill-on-bad-exit=1 python -m ckpt_jax.examples.lm --run "${RUN:?set RUN to a shared directory}" \
  --steps 100000 --every 500 || code=$?
if [ "$code" = 143 ]; then  # preemption.exit_code
  scontrol requeue "$SLURM_JOB_ID"
else
  exit "$code"
fi
