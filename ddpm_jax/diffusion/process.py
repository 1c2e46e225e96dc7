"""The forward process q  (Ho et al. 2020, section 2).

x may have any shape. t is in 1..T (0 is the clean image): a scalar, or one time
per example of a batch.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int
from jaxtyping import Shaped

from ddpm_jax.diffusion import predictions
from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import shapes

Schedule = schedules.Schedule
X = shapes.X
XLike = shapes.XLike

# A scalar t, or one per example: (B,) for an x of (B, ...).
Time = Int[Array | np.ndarray, '...'] | int


def normal(keys: shapes.Keys, shape: tuple[int, ...]) -> shapes.Batch:
  """Samples of N(0, I), (B, *shape); row i depends on keys[i] alone."""
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def q_sample(schedule: Schedule, x0: XLike, t: Time, eps: XLike) -> X:
  """x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε  (eq. 4).

  Args:
    schedule: The noise schedule, with T steps.
    x0: Clean examples, of any shape.
    t: In 0..T; a scalar, or (B,) for x0 and eps of shape (B, ...).
    eps: Noise from N(0, I).

  Raises:
    ValueError: If t has another shape.
  """
  t = per_example(t, x0)
  signal = schedule.sqrt_alpha_bar[t]
  noise = jnp.sqrt(schedule.one_minus_alpha_bar[t])
  return signal * x0 + noise * eps


def q_step(schedule: Schedule, x_prev: XLike, t: Time, eps: XLike) -> X:
  """x_t = √(1-β_t) x_{t-1} + √β_t ε  (eq. 2); t as in `q_sample`."""
  beta = schedule.beta[per_example(t, x_prev)]
  return jnp.sqrt(1 - beta) * x_prev + jnp.sqrt(beta) * eps


def q_between(
  schedule: Schedule, x_s: XLike, s: Time, t: Time, eps: XLike
) -> X:
  """x_t = √(ᾱ_t/ᾱ_s) x_s + √(1-ᾱ_t/ᾱ_s) ε, for s ≤ t: t - s steps of eq. 2.

  s and t have the shapes that t has in `q_sample`.
  """
  s, t = per_example(s, x_s), per_example(t, x_s)
  log_kept = schedules.log_ratio(schedule, s, t)
  return jnp.exp(log_kept / 2) * x_s + jnp.sqrt(-jnp.expm1(log_kept)) * eps


def per_example(t: Shaped[Array | np.ndarray, '...'] | float, x: XLike) -> Any:
  """Reshapes t to broadcast against x: (), or (B,) for x of (B, ...).

  Raises:
    ValueError: If t has another shape.
  """
  shape, x_shape = jnp.shape(t), jnp.shape(x)
  if shape == () or shape == x_shape or x_shape == ():
    return t
  if shape != x_shape[:1]:
    raise ValueError(
      f't has shape {shape} and x {x_shape}: give a scalar t, or one for each '
      'example, (B,) for x of (B, ...); use jax.vmap for other batches'
    )
  return jnp.reshape(t, (-1, *(1,) * (len(x_shape) - 1)))


def q_posterior(
  schedule: Schedule, x0: XLike, x_t: XLike, t: Time
) -> tuple[X, shapes.Scale]:
  """Mean μ̃_t(x_t, x_0) and variance β̃_t of q(x_{t-1} | x_t, x_0)  (eq. 6-7)."""
  t = per_example(t, x_t)
  mean = predictions.posterior_mean(schedule, x0, x_t, t)
  return mean, schedule.beta_tilde[t]


def q_sigma(
  schedule: Schedule, x0: XLike, x_t: XLike, t: Time, eta: float
) -> tuple[X, shapes.Scale]:
  """Mean and variance σ² = η² β̃_t of q_σ(x_{t-1} | x_t, x_0).

  The family of DDIM (Song et al. 2021, eq. 7 and 16), which shares q(x_t |
  x_0). η = 1 is `q_posterior`; η = 0 is deterministic.
  """
  t = per_example(t, x_t)
  signal, one_minus = schedule.sqrt_alpha_bar, schedule.one_minus_alpha_bar
  eps = (x_t - signal[t] * x0) / jnp.sqrt(one_minus[t])
  # 1 - ᾱ_{t-1} - σ² = (1 - ᾱ_{t-1}) rest, a form that cannot round below 0.
  rest = jnp.maximum(1 - eta**2 * schedule.beta[t] / one_minus[t], 0)
  mean = signal[t - 1] * x0
  mean += jnp.sqrt(one_minus[t - 1] * rest) * eps
  return mean, eta**2 * schedule.beta_tilde[t]


def example_mean(x: shapes.Batch) -> shapes.Values:
  """The mean over the dimensions of each example, (B,)."""
  return jnp.mean(x.reshape(len(x), -1), axis=1)
