"""What is asked of the machine is given."""

import os
import pathlib
import platform
import subprocess
import sys

import pytest

from ddpm_jax.runtime import machine

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = """
import resource
from ddpm_jax.runtime import machine
machine.restart_with_memory()
import numpy as np

def faults_of_a_large_array():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  np.ones(2**23)  # 64 MiB, freed at once
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults_of_a_large_array(), faults_of_a_large_array())
"""


@pytest.mark.skipif(
  platform.libc_ver()[0] != 'glibc' or machine.accelerators(),
  reason='a setting of glibc, for CPUs',
)
def test_memory_that_was_freed_is_not_taken_anew():
  env = {k: v for k, v in os.environ.items() if k != 'GLIBC_TUNABLES'}
  out = subprocess.run(
    [sys.executable, '-c', PROGRAM],
    cwd=ROOT,
    env=env,
    check=True,
    capture_output=True,
    text=True,
  ).stdout
  first, again = map(int, out.split())
  assert first >= 32  # pages of 2 MiB, or more and smaller ones
  assert again < 4
