"""A network of two convolutions, which compiles at once, and a recipe for it.

For tests of what is done with a network's answers, whatever these are.
"""

import functools
from typing import Any

import conftest
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import main
from ddpm_jax import recipe
from ddpm_jax.models import layers

T = 50


class Net(nn.Module):
  """Of images of so many channels; it takes a condition or none."""

  channels: int

  @nn.compact
  def __call__(self, x_t, t, context=None, keys=None):
    embedded = [layers.time_embedding(t, 8)]
    embedded += [] if context is None else [context.pooled]
    h = nn.Dense(8)(jnp.concatenate(embedded, axis=-1))[:, None, None]
    h += nn.Conv(8, (3, 3))(x_t)
    return nn.Conv(self.channels, (3, 3))(jnp.tanh(h))


def network(image_size, image_channels):
  """As config.model.name=tiny.network."""
  del image_size
  return Net(image_channels)


def config(**changes):
  """That of `conftest.TINY` with T = 50; a__b='c' sets a.b=c."""
  _, tiny = main.split(conftest.TINY)
  tiny |= {'schedule.T': f'{T}', 'schedule.beta_T': '0.4'}
  tiny |= {'parallel.data': '1', 'model.name': 'tiny.network'}
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
