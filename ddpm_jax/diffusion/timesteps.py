"""How the times of a training batch are drawn.

Each function gives the time of example i of n under one key, so that every
device can draw its own examples' times alone and all agree. `importance` also
takes how likely each time is to be, and that follows from a `History`.
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
  """Half of the batch draws t, the other half has T + 1 - t."""
  half = (n + 1) // 2
  t = uniform(key, i % half, n, T)
  return jnp.where(i < half, t, T + 1 - t)


def stratified(
  key: Key[Array, ''], i: Int[Array, ''] | int, n: int, T: int
) -> Int[Array, '']:
  """Example i draws from the i-th of n equal parts of the times.

  Over the batch t is uniform; for one i it is not, so the examples must come in
  random order, as they do from a shuffled data set.
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
  """t with probability p, of `probabilities`; a loss weighs 1 / (T p_t).

  By Gumbel's maximum: rounding in p, which differs with the number of devices,
  then changes a draw T times more rarely than by a cumulative sum.
  """
  del n
  key = jax.random.fold_in(key, i)
  return 1 + jax.random.categorical(key, jnp.log(p))


class History(NamedTuple):
  """The last losses at every t: what `importance` needs of the past."""

  losses: Float[Array, 'T K']  # the row of t is t - 1
  seen: Int32[Array, 'T']  # how many there have been


def no_history(T: int, K: int = 10) -> History:
  return History(jnp.zeros((T, K)), jnp.zeros(T, jnp.int32))


def probabilities(history: History) -> Float[Array, 'T']:
  """p_t ∝ √E[L_t²], with a share of 0.001 uniform  (Nichol & Dhariwal 2021).

  The least variance of L_t / (T p_t) of all p. Uniform until every t has been
  seen as often as the history is long.
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
  """The history after the losses at t of a batch.

  `index`, the row of each in the whole batch, is the order in which they
  count: the order of the arrays depends on the devices.
  """
  T, K = history.losses.shape
  order = jnp.lexsort((index, t))
  t, losses = t[order], losses[order]
  start = jnp.searchsorted(t, t)
  rank = jnp.arange(len(t)) - start  # among those of the same t
  count = jnp.searchsorted(t, t, side='right') - start
  # Of more than K at one t the last K stay; row T is none, and is dropped.
  row = jnp.where(rank >= count - K, t - 1, T)
  slot = (history.seen[t - 1] + rank) % K
  return History(
    jnp.asarray(history.losses).at[row, slot].set(losses, mode='drop'),
    jnp.asarray(history.seen).at[t - 1].add(1),
  )
