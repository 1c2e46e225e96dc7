"""The machine that a run is on: its memory pages, its limits, its devices, and
what was compiled there.

Nothing heavy is imported before it is needed.
"""

import contextlib
import glob
import itertools
import os
import sys

from ddpm_jax import errors
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
  """Starts `python -m ddpm_jax.main` again; see `restart_with_memory`.

  Nothing else is started again: a notebook, a debugger or a program of someone
  else's would be lost.
  """
  if is_the_program(sys.orig_argv, sys.argv):
    restart_with_memory()


def restart_with_memory() -> None:
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


def is_the_program(words: list[str], argv: list[str]) -> bool:
  """Whether Python was started as `python -m ddpm_jax.main`, and no more.

  Args:
    words: as of `sys.orig_argv`.
    argv: as of `sys.argv`.
  """
  front = words[1 : len(words) - len(argv) + 1]
  if not sys.executable or front[-2:] != ['-m', 'ddpm_jax.main']:
    return False
  if words[len(front) + 1 :] != argv[1:]:
    return False
  options = ['', *front[:-2]]
  return not (sys.gettrace() or sys.getprofile()) and all(
    before in ('-W', '-X') or (word.startswith('-') and word not in ('-', '-m'))
    for before, word in itertools.pairwise(options)
  )


def open_many_files() -> None:
  """Raises the limit of open files as far as this user may."""
  if sys.platform == 'win32':
    return
  import resource

  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if soft != hard:
    with contextlib.suppress(OSError, ValueError):  # macOS has its own bound.
      resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def look_for_devices() -> None:
  """Refuses JAX_PLATFORMS of what is not here, before there is any work.

  Raises:
    UserError: with what JAX says of it.
  """
  import jax

  try:
    jax.devices()
  except (RuntimeError, AssertionError) as e:
    reason = ' '.join(str(e).split()) or 'there is no such device'
    named = jax.config.values['jax_platforms']
    where = f'JAX_PLATFORMS={named}' if named else 'JAX finds no devices'
    raise errors.UserError(
      f'{where}: {reason:.200}; set JAX_PLATFORMS=cpu, or leave it out'
    ) from None


def start_jax() -> None:
  """Imports JAX; refuses or undoes what its environment would make of a run.

  A run is of float32: with JAX_ENABLE_X64 some of it would not be, and it would
  be another run.

  Raises:
    UserError: JAX cannot be imported, or JAX_DISABLE_JIT is set.
  """
  try:
    import jax
  except Exception as e:  # such as JAX_ENABLE_X64=maybe
    reason = ' '.join(str(e).split())
    raise errors.UserError(
      f'JAX cannot be imported ({type(e).__name__}: {reason:.200})'
    ) from e
  jax.config.update('jax_enable_x64', False)
  if jax.config.values['jax_disable_jit']:
    raise errors.UserError(
      'JAX_DISABLE_JIT is set, and this program is compiled whole: unset it'
    )


def keep_compiled() -> None:
  """Keeps what is compiled for the next run, in `~/.cache/ddpm_jax/xla`.

  JAX_COMPILATION_CACHE_DIR names another place,
  JAX_ENABLE_COMPILATION_CACHE=false keeps none.
  """
  import jax

  if jax.config.values['jax_compilation_cache_dir']:
    return
  path = workdir.cache()
  if path:
    jax.config.update('jax_compilation_cache_dir', str(path / 'xla'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
  else:
    from ddpm_jax.runtime import logs

    logs.say(
      'what is compiled is not kept for the next run: no ~/.cache can be '
      'written (JAX_COMPILATION_CACHE_DIR names another place)'
    )
