"""A recipe for the network of `two_convolutions`, and weights for it.

For tests of what is done with a network's answers, whatever these are.
"""

import functools
from typing import Any

import conftest
import jax
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import flags as command
from ddpm_jax import recipe

T = 50


def config(**changes):
  """That of `conftest.TINY` with T = 50; a__b='c' sets a.b=c."""
  _, tiny = command.split(conftest.TINY)
  tiny |= {'schedule.T': f'{T}', 'schedule.beta_T': '0.4'}
  tiny |= {'parallel.data': '1', 'model.name': 'two_convolutions.network'}
  changes = {k.replace('__', '.'): v for k, v in changes.items()}
  return recipe.resolve(conftest.DIGITS, None, tiny | changes)


@functools.cache
def weights():
  """At random; its answers are not 0."""
  return jax.jit(functools.partial(build.init_state, config()))().params


def drawn(shapes: Any) -> Any:
  """Random weights of these shapes, also where a network begins with 0.

  NumPy draws them: nothing is compiled.
  """
  rng = np.random.default_rng(0)

  def draw(path: Any, x: jax.ShapeDtypeStruct) -> np.ndarray:
    mean = 1.0 if path[-1].key == 'scale' else 0.0
    return rng.normal(mean, 0.2, x.shape).astype(x.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def weights_of(config: ConfigDict) -> Any:
  return drawn(jax.eval_shape(lambda: build.init_state(config)).params)
