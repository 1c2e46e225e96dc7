#!/bin/bash
# Runs a command whose memory is in large pages, and is kept when it is freed:
#
#   bash launch/cpu.sh python -m ddpm_jax.main --config=configs/cifar.py
#
# On CPUs, XLA takes the memory of every step from the system and gives it back,
# and the system clears it each time. docs/performance.md says what this saves.
# The C library (glibc, on Linux) reads the setting when a program starts, so that
# a program cannot set it for itself.
set -euo pipefail
export GLIBC_TUNABLES="glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:\
glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776"
exec "$@"
