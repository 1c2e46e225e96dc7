"""Gaussian data, for which the optimal network is known in closed form."""

import jax
import jax.numpy as jnp

from ddpm_jax.diffusion import denoiser as denoisers
from ddpm_jax.diffusion import schedules


def network(
  schedule: schedules.Schedule, mean: float, variance: float
) -> denoisers.Network:
  """E[ε | x_t] for x_0 ~ N(mean, variance), independent in each dimension."""

  def eps_hat(x_t: jax.Array, t: jax.Array) -> jax.Array:
    shape = (-1,) + (1,) * (x_t.ndim - 1)
    a = schedule.alpha_bar[t].reshape(shape)
    n = schedule.one_minus_alpha_bar[t].reshape(shape)
    return jnp.sqrt(n) * (x_t - jnp.sqrt(a) * mean) / (a * variance + n)

  return eps_hat
