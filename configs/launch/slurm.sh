#!/bin/bash
# One task a GPU node; code=0
srun --kill-on-bad-exit=1 python -m ckpt_jax.examples.lm --run "${RUN:?set RUN to a shared directory}" \
  --steps 100000 --every 500 || code=$?
if [ "$code" = 143 ]; then  # preemption.exit_code: preempted, and saved before it ended
  scontrol requeue "$SLURM_JOB_ID"
else
  exit "$code"
fi
