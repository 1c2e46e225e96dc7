"""How the times t of a training batch are drawn.

Each function returns the time of example i of n, from one key for the batch, so
that each device can draw its own examples' times and all agree. `importance`
also takes the probability of each time, which follows from a `History`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import Int32
from jaxtyping import Key

__all__ = ['antithetic', 'importance', 'stratified', 'uniform']


def uniform(
  key: Key[Array, ''], i: Int[Array, ''] | int, n: int, T: int
) -> Int[Array, '']:
  """t ~ U{1..T}  (Ho et al. 2020, Algorithm 1)."""
  del n
  return jax.random.randint(jax.random.fold_in(key, i), (), 1, T + 1)


def antithetic(
  key: Key[Array, ''], i: Int[Array, ''] | int, n: int, T: int
) -> Int[Array, '']:
  """Half of the batch draws t; the other half gets T + 1 - t."""
  half = (n + 1) // 2
  t = uniform(key, i % half, n, T)
  return jnp.where(i < half, t, T + 1 - t)


def stratified(
  key: Key[Array, ''], i: Int[Array, ''] | int, n: int, T: int
) -> Int[Array, '']:
  """Example i draws from the i-th of n equal parts of the times.

  t is uniform over the batch, but not for a given i, so examples must be in
  random order, as in a shuffled data set.
  """
  u = jax.random.uniform(jax.random.fold_in(key, i))
  t = 1 + jnp.floor((i + u) / n * T).astype(jnp.int32)
  return jnp.minimum(t, T)  # i + u can round up to n


def importance(
  key: Key[Array, ''],
  i: Int[Array, ''] | int,
  n: int,
  T: int,
  p: Float[Array, '{T}'],
) -> Int[Array, '']:
  """t with probability p_t, from `probabilities`; weight losses by 1 / (T p_t).

  By the Gumbel-max trick: the rounding of p, which depends on the number of
  devices, then changes a draw T times less often than with a cumulative sum.
  """
  del n
  key = jax.random.fold_in(key, i)
  return 1 + jax.random.categorical(key, jnp.log(p))


class History(NamedTuple):
  """The last K losses at every t, for `importance`."""

  losses: Float[Array, 'T K']  # row t - 1 is for t
  seen: Int32[Array, 'T']  # number of losses so far


def no_history(T: int, K: int = 10) -> History:
  return History(jnp.zeros((T, K)), jnp.zeros(T, jnp.int32))


def probabilities(history: History) -> Float[Array, 'T']:
  """p_t ∝ √E[L_t²], with a share of 0.001 uniform  (Nichol & Dhariwal 2021).

  This p minimises the variance of L_t / (T p_t). Uniform until every t has K
  losses.
  """
  T, K = history.losses.shape
  size = jnp.sqrt(jnp.mean(jnp.square(history.losses), axis=1))
  p = 0.999 * size / jnp.sum(size) + 0.001 / T
  return jnp.where(jnp.all(history.seen >= K), p, 1 / T)


def record(
  history: History,
  index: Int[Array, 'B'],
  t: Int[Array, 'B'],
  losses: Float[Array, 'B'],
) -> History:
  """Adds the losses of a batch to the history.

  They are added in the order of `index`, the rows in the global batch, because
  the order of the arrays depends on the devices.
  """
  T, K = history.losses.shape
  order = jnp.lexsort((index, t))
  t, losses = t[order], losses[order]
  start = jnp.searchsorted(t, t)
  rank = jnp.arange(len(t)) - start  # among those of the same t
  count = jnp.searchsorted(t, t, side='right') - start
  # The last K losses at one t are kept; row T does not exist and is dropped.
  row = jnp.where(rank >= count - K, t - 1, T)
  slot = (history.seen[t - 1] + rank) % K
  return History(
    jnp.asarray(history.losses).at[row, slot].set(losses, mode='drop'),
    jnp.asarray(history.seen).at[t - 1].add(1),
  )
