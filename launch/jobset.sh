#!/bin/bash
# Trains on a TPU slice of a GKE cluster that has JobSet:
#
#   NAME=ddpm IMAGE=REGISTRY/ddpm_jax CLAIM=runs WORKDIR=cifar HOSTS=4 CHIPS=4 \
#     ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=4x4 \
#     bash launch/jobset.sh --config=configs/cifar.py
#
# --dry-run as the first argument prints the YAML. All other arguments are passed
# to `python -m ddpm_jax.main` on all hosts. IMAGE is that of launch/cpu.Dockerfile,
# built for TPUs, or another with this package. CLAIM is a volume that all hosts
# can write to (ReadWriteMany), and contains WORKDIR. WORKDIR=gs://BUCKET/NAME
# needs no CLAIM, but gcsfs in IMAGE. When a host is preempted or fails, JobSet
# restarts all of them, and the run resumes.
set -euo pipefail

dry_run=
if [[ ${1:-} == --dry-run ]]; then
  dry_run=yes
  shift
fi
: "${NAME:?is not set: the name of the JobSet}"
: "${IMAGE:?is not set: the image of the container}"
: "${WORKDIR:?is not set: the folder of the run, in the volume CLAIM}"
if [[ $WORKDIR == gs://* ]]; then
  workdir=$WORKDIR
else
  : "${CLAIM:?is not set: the PersistentVolumeClaim that holds the runs}"
  workdir=/runs/$WORKDIR
fi
: "${HOSTS:?is not set: the number of VMs in the slice}"
: "${CHIPS:?is not set: the number of chips per VM}"
: "${ACCELERATOR:?is not set: for example tpu-v5-lite-podslice}"
: "${TOPOLOGY:?is not set: for example 4x4}"
: "${SPOT:=}" "${RESTARTS:=20}"
spot=${SPOT:+$'                cloud.google.com/gke-spot: "true"\n'}

arguments() { # as JSON strings, which are valid YAML
  local word
  for word in "--workdir=$workdir" --stopped_code=75 "$@"; do
    word=${word//\\/\\\\}
    printf '                    - "%s"\n' "${word//\"/\\\"}"
  done
}

volume() {
  cat <<END
                  volumeMounts:
                    - name: runs
                      mountPath: /runs
              volumes:
                - name: runs
                  persistentVolumeClaim:
                    claimName: $CLAIM
END
}

yaml() {
  cat <<END
---
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $RESTARTS
    rules:
      # A mistake of the user: a restart would not help.
      - name: mistake
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: 1
      template:
        spec:
          completionMode: Indexed
          completions: $HOSTS
          parallelism: $HOSTS
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: train
                  operator: In
                  values: [2]
          template:
            spec:
              restartPolicy: Never
              # Time to save a checkpoint after SIGTERM.
              terminationGracePeriodSeconds: 120
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $ACCELERATOR
                cloud.google.com/gke-tpu-topology: $TOPOLOGY
$spot              tolerations:
                - key: cloud.google.com/gke-spot
                  operator: Exists
              containers:
                - name: train
                  image: $IMAGE
                  command: [python, -m, ddpm_jax.main]
                  args:
$(arguments "$@")
                  ports:
                    - containerPort: 8471
                    - containerPort: 8482
                  resources:
                    limits:
                      google.com/tpu: $CHIPS
END
  [[ $WORKDIR == gs://* ]] || volume
}

if [[ $dry_run ]]; then
  yaml "$@"
else
  yaml "$@" | kubectl apply -f -
fi
