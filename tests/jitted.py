"""What tests call often, compiled once for equal arguments."""

import functools

import jax

from ddpm_jax.diffusion import denoiser as denoisers
from ddpm_jax.diffusion import samplers


@functools.partial(
  jax.jit, static_argnames=('step', 'network', 'times', 'snapshots')
)
def sample(
  step, schedule, network, keys, x_T, *, times=None, previous=None, snapshots=0
) -> samplers.Sampled:
  """`samplers.sample`, which outside of jit is compiled at every call.

  `step` and `network` are compared by identity, so give it the same objects;
  `times` is a range or a tuple.
  """
  return samplers.sample(
    *(step, denoisers.Denoiser(schedule, network), keys, x_T),
    times=times,
    previous=previous,
    snapshots=snapshots,
  )


@functools.cache
def reading(step, **fields) -> samplers.Step:
  """`step` of a denoiser with these fields; the same object for the same."""

  def other(denoiser, *args):
    return step(denoiser._replace(**fields), *args)

  return other
