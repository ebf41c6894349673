#!/usr/bin/env bash
# SLURM: one process a node, with all of its GPUs. JAX reads SLURM's variables.
#
#   sbatch --nodes 2 --gres gpu:8 train/launch/slurm.sh train/recipes/llama3_8b_gpu_8.yaml
#
# Data and train.output must lie where all nodes see them. Ten minutes before the time limit, and
# when the job is preempted, SLURM sends SIGTERM: the run saves, ends, and puts itself back into the
# queue to go on. So it does, up to twenty times, when a process is killed.
#SBATCH --job-name genlora
#SBATCH --ntasks-per-node 1
#SBATCH --exclusive
#SBATCH --signal TERM@600
#SBATCH --requeue
#SBATCH --open-mode append
set -uo pipefail
recipe=$1
shift
# JAX would give each task the one GPU that has its number on the node.
if [ "${SLURM_NTASKS_PER_NODE:-1}" = 1 ] && [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
  JAX_LOCAL_DEVICE_IDS=$(seq -s , 0 $((SLURM_GPUS_ON_NODE - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi
trap : TERM # it comes to this shell as well, which waits until all have saved
srun --kill-on-bad-exit .venv/bin/python train/finetune.py --config "$recipe" \
  --train.distributed true --train.resume auto "$@"
status=$?
# Above 128: ended by a signal. A job that scancel ends is no longer RUNNING, and does not come back.
if [ "$status" -gt 128 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ] &&
  scontrol show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
