"""Images as they are kept, uint8, and as the process sees them, [-1, 1]."""

import jax
import jax.numpy as jnp


def to_float(images: jax.Array) -> jax.Array:
  """uint8 [0, 255] -> float32 [-1, 1], without noise  (section 3.3).

  What is float already, such as points, stays as it is.
  """
  if jnp.issubdtype(images.dtype, jnp.floating):
    return images
  return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(x: jax.Array) -> jax.Array:
  """float [-1, 1] -> the nearest uint8 [0, 255]; the rest is clipped."""
  return jnp.round(jnp.clip(x, -1, 1) * 127.5 + 127.5).astype(jnp.uint8)


def random_flip(keys: jax.Array, x: jax.Array) -> jax.Array:
  """Mirrors each image, (B, H, W, C), left to right with probability 1/2."""
  flip = jax.vmap(jax.random.bernoulli)(keys)
  return jnp.where(flip[:, None, None, None], x[:, :, ::-1], x)
