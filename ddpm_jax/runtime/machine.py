"""The machine that a run is on: its memory pages, and what was compiled there.

Nothing heavy is imported before it is needed.
"""

import glob
import os
import sys

from ddpm_jax.runtime import workdir

TUNABLES = 'GLIBC_TUNABLES'


def huge_pages() -> None:
  """Starts this program again with memory in huge pages, if that may help.

  On a CPU, XLA takes the memory of a step from the system and gives it back
  each time; a step of configs/cifar.py is 1.16 times as fast (8 images, two
  cores) with pages of 2 MiB in the place of 4 KiB. The C library reads this
  setting when a program starts, and at no other time. Where there is an
  accelerator, and where it is set already, nothing is done.
  """
  accelerators = ('/dev/nvidia[0-9]*', '/dev/accel*', '/dev/vfio/[0-9]*')
  if (
    sys.platform != 'linux'
    or TUNABLES in os.environ
    or any(glob.glob(pattern) for pattern in accelerators)
  ):
    return
  os.environ[TUNABLES] = 'glibc.malloc.hugetlb=1'
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
