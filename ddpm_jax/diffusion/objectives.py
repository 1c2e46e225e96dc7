"""Training objectives: per-example losses of a network's output.

`config.loss.name` names one. All take

  schedule: of T steps.
  model_fn: the network.
  keys: (B,), one for the noise of each example.
  x0: (B, ...) in [-1, 1].
  t: (B,) in 1..T.
  predict: what the network predicts; the paper's ε by default.
  variance: what σ_t² is; only the bound looks at it.

and return (B,) float32 losses, means over the dimensions of an example.
"""

import functools

import jax
import jax.numpy as jnp

from ddpm_jax.diffusion import likelihood
from ddpm_jax.diffusion import predictions
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import variances


def simple(
  schedule: schedules.Schedule,
  model_fn: process.ModelFn,
  keys: jax.Array,
  x0: jax.Array,
  t: jax.Array,
  *,
  predict: predictions.Prediction = predictions.eps,
  variance: process.Variance = variances.beta,
) -> jax.Array:
  """L_simple = ‖ε - ε_θ(√ᾱ_t x_0 + √(1-ᾱ_t) ε, t)‖²  (eq. 14).

  Where the network predicts something else, the error of that: with μ̃ it is
  the ‖μ̃ - μ̃_θ‖² of table 2.
  """
  del variance
  x_t, target = _noisy(schedule, keys, x0, t, predict)
  out, _ = process.split(model_fn(x_t, t), x_t)
  return _mean_square(target - out)


def min_snr(
  schedule: schedules.Schedule,
  model_fn: process.ModelFn,
  keys: jax.Array,
  x0: jax.Array,
  t: jax.Array,
  *,
  predict: predictions.Prediction = predictions.eps,
  variance: process.Variance = variances.beta,
  gamma: float = 5.0,
) -> jax.Array:
  """min(SNR_t, γ) ‖x_0 - x̂_0‖², whatever is predicted  (Hang et al. 2023)."""
  del variance
  x_t, _ = _noisy(schedule, keys, x0, t, predict)
  out, _ = process.split(model_fn(x_t, t), x_t)
  to_x0 = jax.vmap(predict.to_x0, (None, 0, 0, 0))
  snr = schedule.alpha_bar[t] / schedule.one_minus_alpha_bar[t]
  error = _mean_square(x0 - to_x0(schedule, x_t, out, t))
  return jnp.minimum(snr, gamma) * error


def vlb(
  schedule: schedules.Schedule,
  model_fn: process.ModelFn,
  keys: jax.Array,
  x0: jax.Array,
  t: jax.Array,
  *,
  predict: predictions.Prediction = predictions.eps,
  variance: process.Variance = variances.beta,
) -> jax.Array:
  """L_{t-1}, the term of the true bound, in bits a dimension  (eq. 5)."""
  nats, _ = likelihood.terms(
    schedule,
    model_fn,
    keys,
    x0,
    t,
    predict=predict,
    variance=variance,
    clip=False,  # no gradient comes through a clipped x̂_0
  )
  return nats * likelihood.BITS


def hybrid(
  schedule: schedules.Schedule,
  model_fn: process.ModelFn,
  keys: jax.Array,
  x0: jax.Array,
  t: jax.Array,
  *,
  predict: predictions.Prediction = predictions.eps,
  variance: process.Variance = variances.learned_range,
) -> jax.Array:
  """L_simple + 0.001 L_vlb, where the bound trains the variance alone.

  Nichol & Dhariwal 2021, eq. 16; L_vlb is T times its term at t.
  """
  x_t, target = _noisy(schedule, keys, x0, t, predict)
  out, raw = process.split(model_fn(x_t, t), x_t)
  if raw is None:
    raise ValueError('hybrid needs a network that learns its variance')
  frozen = jnp.concatenate([jax.lax.stop_gradient(out), raw], axis=-1)
  term = functools.partial(
    likelihood.term, schedule, predict=predict, variance=variance, clip=False
  )
  nats, _ = jax.vmap(term)(x0, x_t, frozen, t)
  bound = schedule.T * nats * likelihood.BITS
  return _mean_square(target - out) + 0.001 * bound


def _noisy(
  schedule: schedules.Schedule,
  keys: jax.Array,
  x0: jax.Array,
  t: jax.Array,
  predict: predictions.Prediction,
) -> tuple[jax.Array, jax.Array]:
  """x_t, and what the network should answer to it."""
  eps = process.normal(keys, x0.shape[1:])
  x_t = jax.vmap(process.q_sample, (None, 0, 0, 0))(schedule, x0, t, eps)
  return x_t, jax.vmap(predict.target, (None, 0, 0, 0))(schedule, x0, eps, t)


def _mean_square(x: jax.Array) -> jax.Array:
  return jnp.mean(jnp.square(x).reshape(len(x), -1), axis=1)
