#!/bin/bash
# Trains on a TPU slice of Google Cloud with any number of hosts. Queues for the
# slice, sets it up, and queues again when it is preempted:
#
#   NAME=ddpm ZONE=us-central2-b TYPE=v4-32 VERSION=tpu-ubuntu2204-base \
#     SETUP='sudo mount SERVER:/runs /mnt' WORKDIR=/mnt/cifar \
#     bash launch/tpu_vm.sh --config=configs/cifar.py
#
# --dry-run as the first argument prints the commands. All other arguments are
# passed to `python -m ddpm_jax.main` on all hosts. SETUP runs on each host first,
# and mounts the disk of WORKDIR, which all hosts share; WORKDIR=gs://BUCKET/NAME
# needs none. The project is the default one of gcloud.
set -euo pipefail
cd "$(dirname "$0")/.."

dry_run=
if [[ ${1:-} == --dry-run ]]; then
  dry_run=yes
  shift
fi
: "${NAME:?is not set: the name of the TPU}"
: "${ZONE:?is not set: for example us-central2-b}"
: "${TYPE:?is not set: for example v4-32 or v5litepod-16}"
: "${VERSION:?is not set: of the TPU VM, for example tpu-ubuntu2204-base}"
: "${WORKDIR:?is not set: the folder of the run, on a disk that hosts share}"
: "${SETUP:=true}" "${PYTHON:=python3.11}" "${SPOT:=}" "${RESTARTS:=20}"

tpus=(gcloud compute tpus)

# Prints a command, and runs it unless this is a dry run.
run() {
  printf '%q ' "$@"
  printf '\n'
  [[ $dry_run ]] || "$@"
}

state() {
  "${tpus[@]}" queued-resources describe "$NAME" --zone="$ZONE" \
    --format='value(state.state)' 2>/dev/null || echo NONE
}

acquire() {
  local create=(
    "${tpus[@]}" queued-resources create "$NAME" --zone="$ZONE"
    --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$VERSION"
    ${SPOT:+--spot}
  )
  if [[ $dry_run ]]; then
    run "${create[@]}"
    return
  fi
  while :; do
    case $(state) in
      ACTIVE) return ;;
      NONE) run "${create[@]}" ;;
      FAILED | SUSPENDED)
        run "${tpus[@]}" queued-resources delete "$NAME" --zone="$ZONE" \
          --force --quiet
        ;;
    esac
    sleep 30
  done
}

hosts() { # runs a script on all hosts
  run "${tpus[@]}" tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all \
    --command="$1"
}

install() {
  local code=${TMPDIR:-/tmp}/ddpm_jax.tar.gz
  run git archive --output="$code" HEAD &&
    run "${tpus[@]}" tpu-vm scp "$code" "$NAME:" --zone="$ZONE" --worker=all &&
    hosts "set -e; mkdir -p ddpm_jax; tar xzf ddpm_jax.tar.gz -C ddpm_jax
command -v $PYTHON || sudo apt-get install -qy $PYTHON $PYTHON-venv
$PYTHON -m venv venv; venv/bin/pip install -q -e './ddpm_jax[gcs]' 'jax[tpu]'
$SETUP"
}

# If only our connection broke, the process still runs, and is stopped first. JAX
# learns the number and the index of hosts from the TPU VM.
train() {
  local line
  line=$(printf ' %q' "--workdir=$WORKDIR" --stopped_code=75 "$@")
  hosts "cd ddpm_jax; if [ -f pid ] && kill \$(cat pid); then
  timeout 120 tail --pid=\$(cat pid) -f /dev/null || kill -9 \$(cat pid)
fi
../venv/bin/python -m ddpm_jax.main$line &
echo \$! >pid; wait \$!; code=\$?; rm pid
echo \"ddpm_jax: exit code \$code\"; exit \$code"
}

log=$(mktemp)
trap 'rm -f "$log"' EXIT
for ((restart = 0; restart <= RESTARTS; restart++)); do
  acquire
  if install && train "$@" 2>&1 | tee "$log"; then
    echo "# done; to stop paying: gcloud compute tpus queued-resources" \
      "delete $NAME --force --zone=$ZONE"
    exit
  fi
  if grep -q '^ddpm_jax: exit code 2$' "$log"; then
    exit 2 # a mistake of the user: a restart would not help
  fi
  echo "launch: failed; restart $((restart + 1)) of $RESTARTS" >&2
  sleep 30
done
exit 1
