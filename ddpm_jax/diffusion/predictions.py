"""What a network may predict from x_t: ε, x_0, v or the posterior mean μ̃.

`config.model.predict` names one of `__all__`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import shapes

__all__ = ['eps', 'mu', 'v', 'x0']

Schedule = schedules.Schedule
X = shapes.X
XLike = shapes.XLike
Scale = shapes.Scale
Time = shapes.Time


class Prediction(NamedTuple):
  """A training target, and how the network's output is read.

  Attributes:
    target: (schedule, x0, eps, t) -> the training target.
    to_x0: (schedule, x_t, out, t) -> x̂_0; the inverse of `target`.
    mean: (schedule, x_t, out, t) -> μ_θ, without clipping x̂_0.
    log_gain: (schedule, t) -> log |∂x̂_0/∂out|.
    clips_mean: Whether clipping x̂_0 changes μ_θ; False if μ_θ is predicted.
  """

  target: Callable[[Schedule, X, X, Time], X]
  to_x0: Callable[[Schedule, X, X, Time], X]
  mean: Callable[[Schedule, X, X, Time], X]
  log_gain: Callable[[Schedule, Time], Scale]
  clips_mean: bool = True


def _signal_noise(s: Schedule, t: Time) -> tuple[X, X]:
  """√ᾱ_t and √(1-ᾱ_t)."""
  return s.sqrt_alpha_bar[t], jnp.sqrt(s.one_minus_alpha_bar[t])


def posterior_coefs(s: Schedule, t: Time) -> tuple[X, X]:
  """The coefficients of x_0 and x_t in μ̃_t(x_t, x_0)  (eq. 7)."""
  beta, one_minus = s.beta[t], s.one_minus_alpha_bar
  coef_x0 = s.sqrt_alpha_bar[t - 1] * beta / one_minus[t]
  coef_x_t = jnp.sqrt(1 - beta) * one_minus[t - 1] / one_minus[t]
  return coef_x0, coef_x_t


def posterior_mean(s: Schedule, x0: XLike, x_t: XLike, t: Time) -> X:
  """μ̃_t(x_t, x_0), the mean of q(x_{t-1} | x_t, x_0)  (eq. 7)."""
  coef_x0, coef_x_t = posterior_coefs(s, t)
  return coef_x0 * x0 + coef_x_t * x_t


def _eps_to_x0(s: Schedule, x_t: X, out: X, t: Time) -> X:
  """x_0 = (x_t - √(1-ᾱ_t) ε) / √ᾱ_t  (eq. 15)."""
  signal, noise = _signal_noise(s, t)
  return (x_t - noise * out) / signal


def _eps_mean(s: Schedule, x_t: X, out: X, t: Time) -> X:
  """(x_t - β_t/√(1-ᾱ_t) ε) / √(1-β_t)  (eq. 11)."""
  eps = s.beta[t] / jnp.sqrt(s.one_minus_alpha_bar[t]) * out
  return jnp.exp(-schedules.log_ratio(s, t - 1, t) / 2) * (x_t - eps)


def _v_target(s: Schedule, x0: X, eps: X, t: Time) -> X:
  """v = √ᾱ_t ε - √(1-ᾱ_t) x_0  (Salimans & Ho 2022, section 4)."""
  signal, noise = _signal_noise(s, t)
  return signal * eps - noise * x0


def _v_to_x0(s: Schedule, x_t: X, out: X, t: Time) -> X:
  """x_0 = √ᾱ_t x_t - √(1-ᾱ_t) v."""
  signal, noise = _signal_noise(s, t)
  return signal * x_t - noise * out


def _mu_target(s: Schedule, x0: X, eps: X, t: Time) -> X:
  """μ̃_t(x_t, x_0)  (eq. 7)."""
  signal, noise = _signal_noise(s, t)
  return posterior_mean(s, x0, signal * x0 + noise * eps, t)


def _mu_to_x0(s: Schedule, x_t: X, out: X, t: Time) -> X:
  """Eq. 7, solved for x_0."""
  coef_x0, coef_x_t = posterior_coefs(s, t)
  return (out - coef_x_t * x_t) / coef_x0


eps = Prediction(
  target=lambda s, x0, eps, t: eps,
  to_x0=_eps_to_x0,
  mean=_eps_mean,
  log_gain=lambda s, t: -schedules.log_snr(s, t) / 2,
)
x0 = Prediction(
  target=lambda s, x0, eps, t: x0,
  to_x0=lambda s, x_t, out, t: out,
  mean=lambda s, x_t, out, t: posterior_mean(s, out, x_t, t),
  log_gain=lambda s, t: jnp.zeros_like(s.beta[t]),
)
v = Prediction(
  target=_v_target,
  to_x0=_v_to_x0,
  mean=lambda s, x_t, out, t: posterior_mean(
    s, _v_to_x0(s, x_t, out, t), x_t, t
  ),
  log_gain=lambda s, t: jnp.log(s.one_minus_alpha_bar[t]) / 2,
)
mu = Prediction(
  target=_mu_target,
  to_x0=_mu_to_x0,
  mean=lambda s, x_t, out, t: out,
  log_gain=lambda s, t: -jnp.log(posterior_coefs(s, t)[0]),
  clips_mean=False,
)
