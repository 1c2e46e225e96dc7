"""The forward process q and the reverse process p  (Ho et al. 2020, section 2).

Everything is written for one time t in 1..T (0 is the clean image) and an x of
any shape; `jax.vmap` makes a batch of different times of it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ddpm_jax.diffusion import schedules

Schedule = schedules.Schedule

# All that is asked of a network: (x_t (B, ...), t (B,) in 1..T) -> (B, ...).
ModelFn = Callable[[jax.Array, jax.Array], jax.Array]


def normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """(B, *shape) of N(0, 1); row i follows from keys[i] alone."""
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def q_sample(
  schedule: Schedule, x0: jax.Array, t: jax.Array, eps: jax.Array
) -> jax.Array:
  """x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε  (eq. 4)."""
  signal = jnp.sqrt(schedule.alpha_bar[t])
  noise = jnp.sqrt(schedule.one_minus_alpha_bar[t])
  return signal * x0 + noise * eps


def q_step(
  schedule: Schedule, x_prev: jax.Array, t: jax.Array, eps: jax.Array
) -> jax.Array:
  """x_t = √(1-β_t) x_{t-1} + √β_t ε  (eq. 2)."""
  beta = schedule.beta[t]
  return jnp.sqrt(1 - beta) * x_prev + jnp.sqrt(beta) * eps


def q_posterior(
  schedule: Schedule, x0: jax.Array, x_t: jax.Array, t: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Mean μ̃_t(x_t, x_0) and variance β̃_t of q(x_{t-1} | x_t, x_0)  (eq. 6-7)."""
  beta = schedule.beta[t]
  one_minus = schedule.one_minus_alpha_bar
  of_x0 = jnp.sqrt(schedule.alpha_bar[t - 1]) * beta / one_minus[t]
  of_x_t = jnp.sqrt(1 - beta) * one_minus[t - 1] / one_minus[t]
  return of_x0 * x0 + of_x_t * x_t, schedule.beta_tilde[t]


def x0_from_eps(
  schedule: Schedule, x_t: jax.Array, t: jax.Array, eps: jax.Array
) -> jax.Array:
  """x_0 = (x_t - √(1-ᾱ_t) ε) / √ᾱ_t, the inverse of eq. 4  (eq. 15)."""
  noise = jnp.sqrt(schedule.one_minus_alpha_bar[t])
  return (x_t - noise * eps) / jnp.sqrt(schedule.alpha_bar[t])


def p_mean_variance(
  schedule: Schedule,
  eps_hat: jax.Array,
  x_t: jax.Array,
  t: jax.Array,
  *,
  sigma2: str = 'beta',
  clip: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Mean μ_θ and variance σ_t² of p(x_{t-1} | x_t), and x̂_0  (eq. 11).

  Args:
    schedule: of T steps.
    eps_hat: ε_θ(x_t, t), what the network makes of x_t.
    x_t: of any shape.
    t: a time in 1..T.
    sigma2: the table that holds σ_t²: `beta` ("fixed large", optimal for x_0
      from N(0, I)) or `beta_tilde` ("fixed small", optimal for one fixed x_0).
    clip: x̂_0 to [-1, 1], as the authors' code does. Without it the mean is
      eq. 11 to the letter.
  """
  x0_hat = x0_from_eps(schedule, x_t, t, eps_hat)
  if clip:
    x0_hat = jnp.clip(x0_hat, -1, 1)
  mean, _ = q_posterior(schedule, x0_hat, x_t, t)
  return mean, getattr(schedule, sigma2)[t], x0_hat
