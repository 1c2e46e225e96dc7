"""What can be made of given images: chains entered, left and mixed midway."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import schedules


def between(
  step: Callable, first: jax.Array | int, last: jax.Array | int = 1
) -> Callable:
  """A sampler's `step` from `first` down to `last`, each row's own.

  Before and after that x_t waits. So rows that begin or end at different times
  are one scan and one program; `samplers.sample` has such a part for all alike.
  What was found while a row waited is kept from it.
  """

  def part(
    schedule: schedules.Schedule,
    model_fn: process.ModelFn,
    keys: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    before: Any,
  ) -> tuple[jax.Array, jax.Array]:
    before = before._replace(t=jnp.where(t < first, before.t, 0))
    x_prev, x0_hat = step(schedule, model_fn, keys, x_t, t, before)
    moves = jnp.broadcast_to((t <= first) & (t >= last), len(x_t))
    rows = moves.reshape(-1, *[1] * (x_t.ndim - 1))
    return jnp.where(rows, x_prev, x_t), x0_hat

  return part


def interpolate(
  schedule: schedules.Schedule,
  x0: jax.Array,
  other: jax.Array,
  t: jax.Array,
  weight: jax.Array,
  eps: jax.Array,
) -> jax.Array:
  """(1-λ) x_t + λ x'_t of two images under one noise ε  (section 4.4).

  With noises of their own a mixture would be less noisy than q(x_t) is.
  """
  x_t = process.q_sample(schedule, x0, t, eps)
  other_t = process.q_sample(schedule, other, t, eps)
  return (1 - weight) * x_t + weight * other_t
