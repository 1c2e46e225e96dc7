"""Samplers: from noise x_T to images x_0, one `lax.scan`.

A step is a function (schedule, model_fn, keys, x_t, t) -> (x_{t-1}, x̂_0); its
name is what a recipe says in `config.sampler.name`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.diffusion import predictions
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import variances

Step = Callable[..., tuple[jax.Array, jax.Array]]


def ancestral(
  schedule: schedules.Schedule,
  model_fn: process.ModelFn,
  keys: jax.Array,
  x_t: jax.Array,
  t: jax.Array,
  *,
  predict: predictions.Prediction = predictions.eps,
  variance: process.Variance = variances.beta,
  clip: bool = True,
) -> tuple[jax.Array, jax.Array]:
  """x_{t-1} = μ_θ(x_t, t) + σ_t z, z = 0 at t = 1  (Algorithm 2, one step)."""
  out = model_fn(x_t, jnp.full(len(x_t), t))
  mean, log_variance, x0_hat = process.p_mean_variance(
    schedule, out, x_t, t, predict=predict, variance=variance, clip=clip
  )
  sigma = jnp.where(t > 1, jnp.exp(log_variance / 2), 0.0)
  return mean + sigma * process.normal(keys, x_t.shape[1:]), x0_hat


def greedy(
  schedule: schedules.Schedule,
  model_fn: process.ModelFn,
  keys: jax.Array,
  x_t: jax.Array,
  t: jax.Array,
  *,
  predict: predictions.Prediction = predictions.eps,
  variance: process.Variance = variances.beta,
  clip: bool = True,
) -> tuple[jax.Array, jax.Array]:
  """x_{t-1} = μ_θ(x_t, t): `ancestral` with σ_t = 0 at every step."""
  del keys
  out = model_fn(x_t, jnp.full(len(x_t), t))
  mean, _, x0_hat = process.p_mean_variance(
    schedule, out, x_t, t, predict=predict, variance=variance, clip=clip
  )
  return mean, x0_hat


def sample(
  step: Step,
  schedule: schedules.Schedule,
  model_fn: process.ModelFn,
  keys: jax.Array,
  x_T: jax.Array,
  *,
  first: int | None = None,
  last: int = 1,
  snapshots: int = 0,
) -> tuple[jax.Array, jax.Array]:
  """Runs `step` from t = T down to 1  (Algorithm 2), or over a part of that.

  Args:
    step: such as `ancestral`.
    schedule: of as many steps as are wanted; see `schedules.stride`.
    model_fn: the network, told the times of `schedule.time`.
    keys: (B,), for the noise of each image; step t folds t in.
    x_T: (B, ...) of N(0, 1); or x_first.
    first: the step to begin with, T by default.
    last: the step to end with.
    snapshots: K, at most the number of steps.

  Returns:
    x_0 (B, ...), or x_{last-1}; and K of the predictions x̂_0 made on the way,
    evenly spaced and ending with the last, (K, B, ...). Memory is O(B·K), not
    O(B·T).
  """
  times = jnp.arange(first or schedule.T, last - 1, -1)
  N, K = len(times), snapshots
  # Where each step's x̂_0 goes; slot K takes those that are not wanted.
  kept_steps = jnp.round(jnp.arange(1, K + 1) * N / max(K, 1)).astype(int) - 1
  slots = jnp.full(N, K).at[kept_steps].set(jnp.arange(K))

  def told(x_t: jax.Array, t: jax.Array) -> jax.Array:
    return model_fn(x_t, schedule.time[t])

  def body(carry: Any, scanned: Any) -> tuple[Any, None]:
    x_t, kept = carry
    t, slot = scanned
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, t)
    x_prev, x0_hat = step(schedule, told, step_keys, x_t, t)
    return (x_prev, kept.at[slot].set(x0_hat)), None

  kept = jnp.zeros((K + 1, *x_T.shape), x_T.dtype)
  (x_0, kept), _ = jax.lax.scan(body, (x_T, kept), (times, slots))
  return x_0, kept[:K]
