"""How the times of a training batch are drawn.

Each function gives the time of example i of n under one key, so that every
device can draw its own examples' times alone and all agree.
"""

import jax
import jax.numpy as jnp


def uniform(key: jax.Array, i: jax.Array, n: int, T: int) -> jax.Array:
  """t ~ U{1..T}  (Ho et al. 2020, Algorithm 1)."""
  del n
  return jax.random.randint(jax.random.fold_in(key, i), (), 1, T + 1)


def antithetic(key: jax.Array, i: jax.Array, n: int, T: int) -> jax.Array:
  """Half of the batch draws t, the other half has T + 1 - t."""
  half = (n + 1) // 2
  t = uniform(key, i % half, n, T)
  return jnp.where(i < half, t, T + 1 - t)


def stratified(key: jax.Array, i: jax.Array, n: int, T: int) -> jax.Array:
  """Example i draws from the i-th of n equal parts of the times.

  Over the batch t is uniform; for one i it is not, so the examples must come in
  random order, as they do from a shuffled data set.
  """
  u = jax.random.uniform(jax.random.fold_in(key, i))
  t = 1 + jnp.floor((i + u) / n * T).astype(jnp.int32)
  return jnp.minimum(t, T)  # i + u can round up to n
