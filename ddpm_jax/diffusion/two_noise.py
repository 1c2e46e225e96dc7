"""Two losses of one minimiser: what integrating a Gaussian out is worth.

Su 2022 comes to DDPM by way of `two_noise`; `one_noise` is the same in
expectation, with less variance. They are for study: `objectives.simple` is
`one_noise` without its weight.
"""

import jax
import jax.numpy as jnp

from ddpm_jax.diffusion import predictions
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import schedules


def two_noise(
  schedule: schedules.Schedule,
  model_fn: process.ModelFn,
  keys: jax.Array,
  x0: jax.Array,
  t: jax.Array,
) -> jax.Array:
  """‖ε_t - ε_θ(x_t, t)‖², the noise of step t alone, of two that are drawn.

  x_t is reached by way of x_{t-1}, from x_0 and ε̄_{t-1}, and a step with ε_t
  (Su 2022). The network that minimises it answers √(β_t / (1-ᾱ_t)) times ε_θ of
  eq. 14.
  """
  before = process.normal(_fold(keys, 0), x0.shape[1:])
  own = process.normal(_fold(keys, 1), x0.shape[1:])
  x_prev = jax.vmap(process.q_sample, (None, 0, 0, 0))(
    schedule, x0, t - 1, before
  )
  x_t = jax.vmap(process.q_step, (None, 0, 0, 0))(schedule, x_prev, t, own)
  return _mean_square(own - model_fn(x_t, t))


def one_noise(
  schedule: schedules.Schedule,
  model_fn: process.ModelFn,
  keys: jax.Array,
  x0: jax.Array,
  t: jax.Array,
) -> jax.Array:
  """(β_t / (1-ᾱ_t)) ‖ε - √((1-ᾱ_t)/β_t) ε_θ(x_t, t)‖²  (Su 2022).

  `two_noise` with one of its two Gaussians integrated out: the same gradient in
  expectation, of less variance.
  """
  eps = process.normal(keys, x0.shape[1:])
  x_t = jax.vmap(process.q_sample, (None, 0, 0, 0))(schedule, x0, t, eps)
  share = schedule.beta[t] / schedule.one_minus_alpha_bar[t]
  out = model_fn(x_t, t)
  root = jnp.sqrt(share).reshape(-1, *(1,) * (x0.ndim - 1))
  return share * _mean_square(eps - out / root)


def own_noise(
  schedule: schedules.Schedule,
  x_t: jax.Array,
  out: jax.Array,
  t: jax.Array,
  *,
  predict: predictions.Prediction = predictions.eps,
) -> jax.Array:
  """√(β_t / (1-ᾱ_t)) ε̂: what a network of eq. 14 answers to both losses.

  For one example; `out` is its prediction in terms of `predict`.
  """
  signal = jnp.sqrt(schedule.alpha_bar[t])
  rest = x_t - signal * predict.to_x0(schedule, x_t, out, t)
  one_minus = schedule.one_minus_alpha_bar[t]
  return jnp.sqrt(schedule.beta[t]) * rest / one_minus


def _fold(keys: jax.Array, number: int) -> jax.Array:
  return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def _mean_square(x: jax.Array) -> jax.Array:
  return jnp.mean(jnp.square(x).reshape(len(x), -1), axis=1)
