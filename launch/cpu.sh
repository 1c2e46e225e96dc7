#!/bin/bash
# Runs a command that uses huge pages, and keeps memory that it has freed:
#
#   bash launch/cpu.sh python -m ddpm_jax.main --config=configs/cifar.py
#
# On CPUs, XLA allocates and frees memory in every step, and the system clears it
# each time. docs/performance.md says what this setting saves. The C library
# (glibc, on Linux) reads it when a program starts, so a program cannot set it
# itself.
set -euo pipefail
export GLIBC_TUNABLES="glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:\
glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776"
exec "$@"
