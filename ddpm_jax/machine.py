"""The machine that a run is on: its limits, devices and compiled programs.

Nothing heavy is imported before it is needed.
"""

import contextlib
import sys

from ddpm_jax import errors
from ddpm_jax.storage import workdir


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
    from ddpm_jax.storage import logs

    logs.say(
      'what is compiled is not kept for the next run: no ~/.cache can be '
      'written (JAX_COMPILATION_CACHE_DIR names another place)'
    )
