#!/usr/bin/env bash
# SLURM: one process a node, with all of its GPUs. JAX reads SLURM's variables.
#
#   sbatch --nodes 2 --gres gpu:8 train/launch/slurm.sh train/recipes/llama3_8b_gpu_8.yaml
#
# Data and train.output must lie on a file system that all nodes see. Ten minutes before the time
# limit SLURM sends SIGTERM: the run saves, ends, and puts itself back into the queue to resume.
#SBATCH --job-name genlora
#SBATCH --ntasks-per-node 1
#SBATCH --exclusive
#SBATCH --signal TERM@600
#SBATCH --requeue
set -uo pipefail
recipe=$1
shift
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || set -- "$@" --train.resume true
srun --kill-on-bad-exit .venv/bin/python train/finetune.py \
  --config "$recipe" --train.distributed true "$@"
status=$?
[ "$status" != 143 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"
