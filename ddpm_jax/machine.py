"""Prepares this machine for a run: limits, devices, the compilation cache.

JAX is imported in the functions, as it takes seconds.
"""

import contextlib
import sys

from ddpm_jax import errors
from ddpm_jax.storage import workdir


def open_many_files() -> None:
  """Raises the limit of open files to the largest that this user may set."""
  if sys.platform == 'win32':
    return
  import resource

  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if soft != hard:
    with contextlib.suppress(OSError, ValueError):  # macOS has a lower limit.
      resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def look_for_devices() -> None:
  """Checks, before any work, that JAX finds the devices of JAX_PLATFORMS.

  Raises:
    UserError: With the message of JAX.
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
  """Imports JAX and checks its environment variables.

  JAX_ENABLE_X64 is turned off: with it, parts of a run would be float64, and
  its results would differ.

  Raises:
    UserError: If JAX cannot be imported, or JAX_DISABLE_JIT is set.
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
      'JAX_DISABLE_JIT is set, but this program needs compilation: unset it'
    )


def keep_compiled() -> None:
  """Caches compiled programs for the next run, in `~/.cache/ddpm_jax/xla`.

  JAX_COMPILATION_CACHE_DIR sets another folder, and
  JAX_ENABLE_COMPILATION_CACHE=false disables the cache.
  """
  import jax

  if jax.config.values['jax_compilation_cache_dir']:
    return
  path = workdir.cache()
  if path:
    jax.config.update('jax_compilation_cache_dir', str(path / 'xla'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
  else:
    from ddpm_jax.storage import logs

    logs.say(
      'compiled programs are not kept for the next run: ~/.cache cannot be '
      'written (set JAX_COMPILATION_CACHE_DIR to use another folder)'
    )
