"""The tiny recipe on one device, and weights for it that were not trained."""

import functools

import conftest
import jax

from ddpm_jax import functions
from ddpm_jax import main
from ddpm_jax import recipe

T = 50


def config(**changes):
  """The recipe of `conftest.TINY` with T = 50; a__b='c' sets a.b=c."""
  _, tiny = main.split(conftest.TINY)
  tiny |= {'schedule.T': f'{T}', 'schedule.beta_T': '0.4', 'parallel.data': '1'}
  changes = {k.replace('__', '.'): v for k, v in changes.items()}
  return recipe.resolve(conftest.DIGITS, None, tiny | changes)


@functools.cache
def weights():
  """Random, also those of the last layer, which begins at 0."""
  init = functools.partial(functions.init_state, config())
  params = jax.jit(init)().params
  key = jax.random.key(1)
  return jax.tree.map(
    lambda p: p + 0.1 * jax.random.normal(key, p.shape), params
  )
