"""What a network may predict of x_t: ε, x_0, v or the posterior mean μ̃.

`config.model.predict` names one. Each says what the network is to answer, and
what its answer makes of x_0 and of the mean of the reverse step.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from ddpm_jax.diffusion import schedules

Schedule = schedules.Schedule
Time = schedules.Time
X = Float[Array, '*shape']  # all of a call have one shape
XLike = Float[ArrayLike, '*shape']


class Prediction(NamedTuple):
  """Functions of one time t and an x of any shape."""

  # (schedule, x0, eps, t) -> what the network should answer to x_t
  target: Callable[[Schedule, X, X, Time], X]
  # (schedule, x_t, out, t) -> x̂_0, given its answer; the inverse of `target`
  to_x0: Callable[[Schedule, X, X, Time], X]
  # (schedule, x_t, out, t) -> μ_θ, given its answer, if nothing is clipped
  mean: Callable[[Schedule, X, X, Time], X]
  # (schedule, t) -> log |∂x̂_0/∂out|
  log_gain: Callable[[Schedule, Time], Float[Array, '*#shape']]
  # Whether clipping x̂_0 changes μ_θ: not where the answer is μ_θ itself.
  clips_mean: bool = True


def _signal_noise(s: Schedule, t: Time) -> tuple[X, X]:
  """√ᾱ_t and √(1-ᾱ_t)."""
  return s.sqrt_alpha_bar[t], jnp.sqrt(s.one_minus_alpha_bar[t])


def posterior_weights(s: Schedule, t: Time) -> tuple[X, X]:
  """The weights of x_0 and of x_t in μ̃_t(x_t, x_0)  (eq. 7)."""
  beta, one_minus = s.beta[t], s.one_minus_alpha_bar
  of_x0 = s.sqrt_alpha_bar[t - 1] * beta / one_minus[t]
  of_x_t = jnp.sqrt(1 - beta) * one_minus[t - 1] / one_minus[t]
  return of_x0, of_x_t


def posterior_mean(
  s: Schedule, x0: XLike, x_t: XLike, t: Time
) -> Float[Array, '*shape']:
  """μ̃_t(x_t, x_0), the mean of q(x_{t-1} | x_t, x_0)  (eq. 7)."""
  of_x0, of_x_t = posterior_weights(s, t)
  return of_x0 * x0 + of_x_t * x_t


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
  of_x0, of_x_t = posterior_weights(s, t)
  return (out - of_x_t * x_t) / of_x0


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
  log_gain=lambda s, t: -jnp.log(posterior_weights(s, t)[0]),
  clips_mean=False,
)
