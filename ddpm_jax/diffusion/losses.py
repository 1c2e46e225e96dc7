"""Training losses, per example.

`config.loss.name` names one of `__all__`. All take

  denoiser: The model.
  keys: (B,), for the noise of each example.
  x0: (B, ...), in [-1, 1].
  t: (B,), in 1..T.

and return (B,) losses, means over the dimensions of an example.
"""

import jax
import jax.numpy as jnp

from ddpm_jax.diffusion import denoiser as denoisers
from ddpm_jax.diffusion import likelihood
from ddpm_jax.diffusion import predictions
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import shapes

__all__ = [
  'hybrid',
  'min_snr',
  'one_noise',
  'simple',
  'two_noise',
  'vlb',
  'x_prev',
]

Denoiser = denoisers.Denoiser
Keys = shapes.Keys
Batch = shapes.Batch
Times = shapes.Times
Values = shapes.Values


def simple(denoiser: Denoiser, keys: Keys, x0: Batch, t: Times) -> Values:
  """L_simple = ‖ε - ε_θ(√ᾱ_t x_0 + √(1-ᾱ_t) ε, t)‖²  (eq. 14).

  If the network predicts something else, the squared error of that: with μ̃ it
  is the ‖μ̃ - μ̃_θ‖² of table 2.
  """
  x_t, target = _noisy(denoiser, keys, x0, t)
  out, _ = denoisers.output(denoiser, x_t, t)
  return _mean_square(target - out)


def min_snr(
  denoiser: Denoiser, keys: Keys, x0: Batch, t: Times, *, gamma: float = 5.0
) -> Values:
  """min(SNR_t, γ) ‖x_0 - x̂_0‖², for any prediction  (Hang et al. 2023)."""
  schedule = denoiser.schedule
  # In logarithms, because SNR_t and the gain can leave the range of float32
  # even if their product does not.
  log_gain = denoiser.predict.log_gain(schedule, t)
  log_snr = jnp.minimum(schedules.log_snr(schedule, t), jnp.log(gamma))
  return jnp.exp(log_snr + 2 * log_gain) * simple(denoiser, keys, x0, t)


def vlb(denoiser: Denoiser, keys: Keys, x0: Batch, t: Times) -> Values:
  """L_{t-1}, the term of the true bound, in bits per dimension  (eq. 5)."""
  # A clipped x̂_0 has no gradient.
  nats, _ = likelihood.terms(denoiser._replace(clip=False), keys, x0, t)
  return nats * likelihood.BITS


def hybrid(denoiser: Denoiser, keys: Keys, x0: Batch, t: Times) -> Values:
  """L_simple + 0.001 L_vlb, where L_vlb trains only the variance.

  Nichol & Dhariwal 2021, eq. 16; L_vlb is T times its term at t.

  Raises:
    ValueError: If the network does not learn its variance.
  """
  x_t, target = _noisy(denoiser, keys, x0, t)
  out, raw = denoisers.output(denoiser, x_t, t)
  if raw is None:
    raise ValueError('hybrid needs a network that learns its variance')
  frozen = jnp.concatenate([jax.lax.stop_gradient(out), raw], axis=-1)
  variance_only = denoiser._replace(network=lambda x_t, t: frozen, clip=False)
  nats, _ = likelihood.term(variance_only, x0, x_t, t)
  bound = denoiser.schedule.T * nats * likelihood.BITS
  return _mean_square(target - out) + 0.001 * bound


def two_noise(denoiser: Denoiser, keys: Keys, x0: Batch, t: Times) -> Values:
  """‖ε_t - √(β_t/(1-ᾱ_t)) ε_θ(x_t, t)‖², for the noise ε_t of step t.

  x_t is one step with ε_t after a noisy x_{t-1}, so there are two noises where
  `one_noise` has one (Su 2022, "DDPM = demolition and construction"). Su's
  network predicts ε_t; the factor converts it to the ε_θ of eq. 14, so that
  every sampler can use the network.
  """
  schedule = denoiser.schedule
  _, eps, x_t = _one_step(denoiser, keys, x0, t)
  share = schedule.beta[t] / schedule.one_minus_alpha_bar[t]
  scale = jnp.sqrt(process.per_example(share, x0))
  return _mean_square(eps - scale * _eps_hat(denoiser, x_t, t))


def one_noise(denoiser: Denoiser, keys: Keys, x0: Batch, t: Times) -> Values:
  """(β_t/(1-ᾱ_t)) ‖ε - ε_θ(x_t, t)‖²: `two_noise`, one noise integrated out.

  Its gradient has the same expectation and less variance (Su 2022).
  """
  schedule = denoiser.schedule
  eps = process.normal(keys, x0.shape[1:])
  x_t = process.q_sample(schedule, x0, t, eps)
  share = schedule.beta[t] / schedule.one_minus_alpha_bar[t]
  return share * _mean_square(eps - _eps_hat(denoiser, x_t, t))


def x_prev(denoiser: Denoiser, keys: Keys, x0: Batch, t: Times) -> Values:
  """‖x_{t-1} - μ_θ(x_t, t)‖², with x_t one step of noise after x_{t-1}.

  Su 2022, eq. 7. E[x_{t-1} | x_t] minimises it. As a loss for ε, its weight at
  t is β_t²/((1-ᾱ_t)(1-β_t)).
  """
  previous, _, x_t = _one_step(denoiser, keys, x0, t)
  return _mean_square(previous - _mean(denoiser, x_t, t))


def _noisy(
  denoiser: Denoiser, keys: Keys, x0: Batch, t: Times
) -> tuple[Batch, Batch]:
  """x_t, and the training target."""
  schedule, t_x = denoiser.schedule, process.per_example(t, x0)
  eps = process.normal(keys, x0.shape[1:])
  x_t = process.q_sample(schedule, x0, t, eps)
  return x_t, denoiser.predict.target(schedule, x0, eps, t_x)


def _one_step(
  denoiser: Denoiser, keys: Keys, x0: Batch, t: Times
) -> tuple[Batch, Batch, Batch]:
  """x_{t-1} ~ q(x_{t-1} | x_0), ε_t, and x_t, which is one step later."""
  first, second = jax.vmap(jax.random.split, out_axes=1)(keys)
  eps = process.normal(second, x0.shape[1:])
  before = process.normal(first, x0.shape[1:])
  previous = process.q_sample(denoiser.schedule, x0, t - 1, before)
  return previous, eps, process.q_step(denoiser.schedule, previous, t, eps)


def _mean(denoiser: Denoiser, x_t: Batch, t: Times) -> Batch:
  """μ_θ(x_t, t), without clipping."""
  out, _ = denoisers.output(denoiser, x_t, t)
  t = process.per_example(t, x_t)
  return denoiser.predict.mean(denoiser.schedule, x_t, out, t)


def _eps_hat(denoiser: Denoiser, x_t: Batch, t: Times) -> Batch:
  """The ε̂ for which eq. 11 is the predicted mean."""
  if denoiser.predict is predictions.eps:
    return denoisers.output(denoiser, x_t, t)[0]
  mean, schedule = _mean(denoiser, x_t, t), denoiser.schedule
  t = process.per_example(t, x_t)
  beta = schedule.beta[t]
  scale = jnp.sqrt(schedule.one_minus_alpha_bar[t]) / beta
  return scale * (x_t - jnp.sqrt(1 - beta) * mean)


def _mean_square(x: Batch) -> Values:
  return process.example_mean(jnp.square(x))
