#!/bin/bash
# Trains a recipe on one node or many, and puts itself back into the queue until it is finished:
#   sbatch --nodes=2 --gpus-per-node=8 --time=08:00:00 recipes/accelerate/slurm.sh --recipe RECIPE
# Arguments are train.py's. CONFIG names another launch configuration, PROCESSES_PER_NODE another number than the GPUs.
#SBATCH --job-name=huatuo-vision
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
set -euo pipefail

config=${CONFIG:-recipes/accelerate/fsdp2.yaml}
per_node=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:?ask for GPUs, as with sbatch --gpus-per-node=8}}
options=(--config_file "$config" --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * per_node))
  --main_process_ip "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
  --main_process_port $((10000 + SLURM_JOB_ID % 50000)))
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600  # at preemption (SIGTERM) the launcher waits so long for train.py to save

# Ten minutes before the time limit this script is told, and tells every process of the step: train.py saves and stops.
stopping=no
trap 'stopping=yes; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1

# The launcher would die of that signal, so it ignores it. When one node's processes die, srun ends those of the others.
srun --kill-on-bad-exit=1 \
  bash -c 'trap "" USR1; exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' - "${options[@]}" train.py "$@" &
step=$!
code=0
until wait "$step"; do
  code=$?
  kill -0 "$step" 2> /dev/null || break  # else it was the trap that interrupted the waiting
  code=0
done
if [ "$stopping" = yes ] && [ "$code" -ne 0 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
