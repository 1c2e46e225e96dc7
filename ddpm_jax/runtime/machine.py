"""The machine that a run is on: its memory pages, and what was compiled there.

Nothing heavy is imported before it is needed.
"""

import glob
import os
import sys

from ddpm_jax.runtime import workdir

TUNABLES = 'GLIBC_TUNABLES'
MEMORY = {
  'hugetlb': 1,  # pages of 2 MiB
  # What is freed is kept: one heap, that large arrays are of too.
  'arena_max': 1,
  'mmap_max': 0,
  'trim_threshold': 2**40,
}


def accelerators() -> list[str]:
  """The files of GPUs and TPUs."""
  patterns = ('/dev/nvidia[0-9]*', '/dev/accel*', '/dev/vfio/[0-9]*')
  return [path for pattern in patterns for path in glob.glob(pattern)]


def keep_memory() -> None:
  """Starts this program again with memory in huge pages that it keeps.

  On a CPU, XLA takes the memory of a step from the system and gives it back
  each time, and the system clears it. Of configs/cifar.py (8 images, two cores)
  huge pages make a step 1.16 times as fast; to keep them saves another 0.1 s of
  the system's time a step, and takes 6% more memory. The C library reads this
  setting when a program starts, and at no other time. Where there is an
  accelerator, and where it is set already, nothing is done.
  """
  if sys.platform != 'linux' or TUNABLES in os.environ or accelerators():
    return
  os.environ[TUNABLES] = ':'.join(
    f'glibc.malloc.{name}={value}' for name, value in MEMORY.items()
  )
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep_compiled() -> None:
  """Keeps what is compiled for the next run, in `~/.cache/ddpm_jax/xla`.

  JAX_COMPILATION_CACHE_DIR names another place,
  JAX_ENABLE_COMPILATION_CACHE=false keeps none.
  """
  import jax

  if not jax.config.values['jax_compilation_cache_dir']:
    path = workdir.cache() / 'xla'
    jax.config.update('jax_compilation_cache_dir', str(path))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
