"""Conversion of images between uint8 and [-1, 1], and random flips."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float
from jaxtyping import Key
from jaxtyping import Shaped
from jaxtyping import UInt8


def to_float(
  images: UInt8[Array, '*shape'] | Float[Array, '*shape'],
) -> Float[Array, '*shape']:
  """uint8 [0, 255] -> float32 [-1, 1], without noise  (section 3.3).

  Float inputs, such as points, are returned unchanged.
  """
  if jnp.issubdtype(images.dtype, jnp.floating):
    return images
  return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(x: Float[Array, '*shape']) -> UInt8[Array, '*shape']:
  """float [-1, 1] -> the nearest uint8 [0, 255], with clipping."""
  return jnp.round(jnp.clip(x, -1, 1) * 127.5 + 127.5).astype(jnp.uint8)


def random_flip(
  keys: Key[Array, 'B'], x: Shaped[Array, 'B H W C']
) -> Shaped[Array, 'B H W C']:
  """Mirrors each image left to right with probability 1/2."""
  flip = jax.vmap(jax.random.bernoulli)(keys)
  return jnp.where(flip[:, None, None, None], x[:, :, ::-1], x)
