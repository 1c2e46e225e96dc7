#!/bin/bash
# Trains on GPUs under Slurm, one process a GPU. Begins again, where it was, after
# preemption, a lost node, or the end of its time:
#
#   WORKDIR=/shared/runs/cifar NODES=2 GPUS=8 \
#     bash launch/slurm.sh --config=configs/cifar.py
#
# --dry-run as the first word prints what would be done. What else is given goes
# to `python -m ddpm_jax.main`. WORKDIR must lie on a disk that all nodes share, or
# be gs://BUCKET/NAME: Slurm's own log is then in the folder that this starts in.
set -euo pipefail

if [[ -z ${SLURM_JOB_ID:-} ]]; then # on the login node: hand this file in
  dry_run=
  if [[ ${1:-} == --dry-run ]]; then
    dry_run=yes
    shift
  fi
  : "${WORKDIR:?is not set: the folder of the run, on a disk that nodes share}"
  : "${NODES:?is not set: how many nodes}"
  : "${GPUS:?is not set: how many GPUs a node}"
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
    # To the processes, five minutes before the end of the time.
    --signal=TERM@300
  )
  read -ra more <<<"${SBATCH_FLAGS:-}" # such as an account or a partition
  job+=("${more[@]}" "$0" "$@")
  if [[ $dry_run ]]; then
    printf '%q ' "${job[@]}"
    printf '\n# and there, begun again %s times at most:\n' "$RESTARTS"
    printf 'srun %q -m ddpm_jax.main' "$PYTHON"
    printf ' %q' "--workdir=$WORKDIR" --stopped_code=75 "$@"
    printf '\n'
    exit
  fi
  mkdir -p "$logs"
  exec "${job[@]}"
fi

# In the job: Slurm tells JAX of the processes, and who is who.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
code=0
srun "$PYTHON" -m ddpm_jax.main --workdir="$WORKDIR" --stopped_code=75 "$@" ||
  code=$?
# 0: done. 2: a mistake, which would be made again.
if ((code == 0 || code == 2)); then
  exit "$code"
fi
if ((${SLURM_RESTART_COUNT:-0} >= RESTARTS)); then
  echo "launch: exited with $code; gave up after $RESTARTS restarts" >&2
  exit "$code"
fi
echo "launch: exited with $code; the job is queued again" >&2
scontrol requeue "$SLURM_JOB_ID"
