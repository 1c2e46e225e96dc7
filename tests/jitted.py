"""What tests call often, compiled once for equal arguments."""

import functools

import jax

from ddpm_jax.diffusion import samplers


@functools.partial(
  jax.jit, static_argnames=('step', 'model_fn', 'times', 'snapshots')
)
def sample(
  step, schedule, model_fn, keys, x_T, *, times=None, before=None, snapshots=0
) -> samplers.Sampled:
  """`samplers.sample`, which outside of jit is compiled at every call.

  `step` and `model_fn` are compared by identity, so give it the same objects;
  `times` is a range or a tuple.
  """
  return samplers.sample(
    *(step, schedule, model_fn, keys, x_T),
    times=times,
    before=before,
    snapshots=snapshots,
  )
