#!/bin/bash
# Trains on GPUs under Slurm, one process per GPU. Resumes after preemption, the
# loss of a node, or the time limit:
#
#   WORKDIR=/shared/runs/cifar NODES=2 GPUS=8 \
#     bash launch/slurm.sh --config=configs/cifar.py
#
# --dry-run as the first argument prints the commands. All other arguments are
# passed to `python -m ddpm_jax.main`. WORKDIR must be on a disk that all nodes
# share, or gs://BUCKET/NAME; then Slurm's log is in the current folder.
set -euo pipefail

if [[ -z ${SLURM_JOB_ID:-} ]]; then # on the login node: submit this file
  dry_run=
  if [[ ${1:-} == --dry-run ]]; then
    dry_run=yes
    shift
  fi
  : "${WORKDIR:?is not set: the folder of the run, on a disk that nodes share}"
  : "${NODES:?is not set: the number of nodes}"
  : "${GPUS:?is not set: the number of GPUs per node}"
  : "${TIME:=24:00:00}" "${RESTARTS:=20}" "${PYTHON:=python}" "${CPUS:=8}"
  export WORKDIR RESTARTS PYTHON
  logs=$WORKDIR
  if [[ $WORKDIR == gs://* ]]; then
    logs=.
  fi
  job=(
    sbatch --job-name=ddpm_jax --nodes="$NODES" --time="$TIME"
    --ntasks-per-node="$GPUS" --gpus-per-node="$GPUS" --cpus-per-task="$CPUS"
    --requeue --open-mode=append --output="$logs/slurm-%j.log"
    # Sent to the processes five minutes before the time limit.
    --signal=TERM@300
  )
  read -ra more <<<"${SBATCH_FLAGS:-}" # for example an account or a partition
  job+=("${more[@]}" "$0" "$@")
  if [[ $dry_run ]]; then
    printf '%q ' "${job[@]}"
    printf '\n# in the job, restarted up to %s times:\n' "$RESTARTS"
    printf 'srun %q -m ddpm_jax.main' "$PYTHON"
    printf ' %q' "--workdir=$WORKDIR" --stopped_code=75 "$@"
    printf '\n'
    exit
  fi
  mkdir -p "$logs"
  exec "${job[@]}"
fi

# In the job. JAX learns the number and the index of processes from Slurm.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
code=0
srun "$PYTHON" -m ddpm_jax.main --workdir="$WORKDIR" --stopped_code=75 "$@" ||
  code=$?
# 0: done. 2: a mistake of the user, for which a restart would not help.
if ((code == 0 || code == 2)); then
  exit "$code"
fi
if ((${SLURM_RESTART_COUNT:-0} >= RESTARTS)); then
  echo "launch: exited with $code; gave up after $RESTARTS restarts" >&2
  exit "$code"
fi
echo "launch: exited with $code; the job is queued again" >&2
scontrol requeue "$SLURM_JOB_ID"
