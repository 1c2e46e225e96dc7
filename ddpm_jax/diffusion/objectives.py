"""Training objectives: per-example losses of a network's output.

`config.loss.name` names one. All take

  schedule: of T steps.
  model_fn: the network.
  keys: one for the noise of each example.
  x0: in [-1, 1].
  t: in 1..T.
  predict: what the network predicts; the paper's ε by default.
  variance: what σ_t² is; only `vlb` and `hybrid` read it.

and return losses, means over the dimensions of an example.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float
from jaxtyping import Float32
from jaxtyping import Int
from jaxtyping import Key

from ddpm_jax.diffusion import likelihood
from ddpm_jax.diffusion import predictions
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import variances


def simple(
  schedule: schedules.Schedule,
  model_fn: process.ModelFn,
  keys: Key[Array, 'B'],
  x0: Float[Array, 'B *shape'],
  t: Int[Array, 'B'],
  *,
  predict: predictions.Prediction = predictions.eps,
  variance: process.Variance = variances.beta,
) -> Float32[Array, 'B']:
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
  keys: Key[Array, 'B'],
  x0: Float[Array, 'B *shape'],
  t: Int[Array, 'B'],
  *,
  predict: predictions.Prediction = predictions.eps,
  variance: process.Variance = variances.beta,
  gamma: float = 5.0,
) -> Float32[Array, 'B']:
  """min(SNR_t, γ) ‖x_0 - x̂_0‖², whatever is predicted  (Hang et al. 2023)."""
  del variance
  x_t, target = _noisy(schedule, keys, x0, t, predict)
  out, _ = process.split(model_fn(x_t, t), x_t)
  # In logarithms, for SNR_t and the gain may leave the range of float32 where
  # their product does not.
  log_gain = jax.vmap(predict.log_gain, (None, 0))(schedule, t)
  log_snr = jnp.minimum(schedules.log_snr(schedule, t), jnp.log(gamma))
  return jnp.exp(log_snr + 2 * log_gain) * _mean_square(target - out)


def vlb(
  schedule: schedules.Schedule,
  model_fn: process.ModelFn,
  keys: Key[Array, 'B'],
  x0: Float[Array, 'B *shape'],
  t: Int[Array, 'B'],
  *,
  predict: predictions.Prediction = predictions.eps,
  variance: process.Variance = variances.beta,
) -> Float32[Array, 'B']:
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
  keys: Key[Array, 'B'],
  x0: Float[Array, 'B *shape'],
  t: Int[Array, 'B'],
  *,
  predict: predictions.Prediction = predictions.eps,
  variance: process.Variance = variances.learned_range,
) -> Float32[Array, 'B']:
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


def two_noise(
  schedule: schedules.Schedule,
  model_fn: process.ModelFn,
  keys: Key[Array, 'B'],
  x0: Float[Array, 'B *shape'],
  t: Int[Array, 'B'],
  *,
  predict: predictions.Prediction = predictions.eps,
  variance: process.Variance = variances.beta,
) -> Float32[Array, 'B']:
  """‖ε_t - √(β_t/(1-ᾱ_t)) ε_θ(x_t, t)‖², of the noise that step t adds.

  x_t is reached by way of x_{t-1}, from x_0 and ε̄_{t-1}, and one step with ε_t:
  two noises where `one_noise` draws one (Su 2022, "DDPM = demolition and
  construction"). His network predicts ε_t; the factor makes that of ε_θ of
  eq. 14, so that any sampler reads the network.
  """
  del variance
  _, eps, x_t = _one_step(schedule, keys, x0, t)
  out, _ = process.split(model_fn(x_t, t), x_t)
  eps_hat = _eps_hat(schedule, predict, x_t, out, t)
  share = schedule.beta[t] / schedule.one_minus_alpha_bar[t]
  return _mean_square(eps - jnp.sqrt(process.per_example(share, x0)) * eps_hat)


def one_noise(
  schedule: schedules.Schedule,
  model_fn: process.ModelFn,
  keys: Key[Array, 'B'],
  x0: Float[Array, 'B *shape'],
  t: Int[Array, 'B'],
  *,
  predict: predictions.Prediction = predictions.eps,
  variance: process.Variance = variances.beta,
) -> Float32[Array, 'B']:
  """(β_t/(1-ᾱ_t)) ‖ε - ε_θ(x_t, t)‖²: `two_noise`, one noise integrated out.

  The same gradient in expectation, of less variance (Su 2022).
  """
  del variance
  eps = process.normal(keys, x0.shape[1:])
  x_t = process.q_sample(schedule, x0, t, eps)
  out, _ = process.split(model_fn(x_t, t), x_t)
  eps_hat = _eps_hat(schedule, predict, x_t, out, t)
  share = schedule.beta[t] / schedule.one_minus_alpha_bar[t]
  return share * _mean_square(eps - eps_hat)


def x_prev(
  schedule: schedules.Schedule,
  model_fn: process.ModelFn,
  keys: Key[Array, 'B'],
  x0: Float[Array, 'B *shape'],
  t: Int[Array, 'B'],
  *,
  predict: predictions.Prediction = predictions.eps,
  variance: process.Variance = variances.beta,
) -> Float32[Array, 'B']:
  """‖x_{t-1} - μ_θ(x_t, t)‖² of an x_{t-1} and the x_t that follows it.

  Su 2022, eq. 7: the least that a loss may know, since the mean of x_{t-1}
  given x_t is what minimises it. For ε it weighs t by β_t²/((1-ᾱ_t)(1-β_t)).
  """
  del variance
  previous, _, x_t = _one_step(schedule, keys, x0, t)
  out, _ = process.split(model_fn(x_t, t), x_t)
  mean = jax.vmap(predict.mean, (None, 0, 0, 0))(schedule, x_t, out, t)
  return _mean_square(previous - mean)


def _one_step(
  schedule: schedules.Schedule,
  keys: Key[Array, 'B'],
  x0: Float[Array, 'B *shape'],
  t: Int[Array, 'B'],
) -> tuple[
  Float[Array, 'B *shape'], Float[Array, 'B *shape'], Float[Array, 'B *shape']
]:
  """x_{t-1} of q(x_{t-1} | x_0), ε_t, and the x_t that a step makes of them."""
  first, second = jax.vmap(jax.random.split, out_axes=1)(keys)
  eps = process.normal(second, x0.shape[1:])
  before = process.normal(first, x0.shape[1:])
  previous = process.q_sample(schedule, x0, t - 1, before)
  return previous, eps, process.q_step(schedule, previous, t, eps)


def _eps_hat(
  schedule: schedules.Schedule,
  predict: predictions.Prediction,
  x_t: Float[Array, 'B *shape'],
  out: Float[Array, 'B *shape'],
  t: Int[Array, 'B'],
) -> Float[Array, 'B *shape']:
  """The ε̂ from which eq. 11 gives the mean that was predicted."""
  if predict is predictions.eps:
    return out
  mean = jax.vmap(predict.mean, (None, 0, 0, 0))(schedule, x_t, out, t)
  t = process.per_example(t, x_t)
  beta = schedule.beta[t]
  scale = jnp.sqrt(schedule.one_minus_alpha_bar[t]) / beta
  return scale * (x_t - jnp.sqrt(1 - beta) * mean)


def _noisy(
  schedule: schedules.Schedule,
  keys: Key[Array, 'B'],
  x0: Float[Array, 'B *shape'],
  t: Int[Array, 'B'],
  predict: predictions.Prediction,
) -> tuple[Float[Array, 'B *shape'], Float[Array, 'B *shape']]:
  """x_t, and what the network should answer to it."""
  eps = process.normal(keys, x0.shape[1:])
  x_t = process.q_sample(schedule, x0, t, eps)
  return x_t, jax.vmap(predict.target, (None, 0, 0, 0))(schedule, x0, eps, t)


def _mean_square(x: Float[Array, 'B *shape']) -> Float[Array, 'B']:
  return jnp.mean(jnp.square(x).reshape(len(x), -1), axis=1)
