"""The variational bound on -log p(x_0)  (Ho et al. 2020, eq. 5).

Values are in nats per dimension: means over the dimensions of an example.
Multiply by `BITS` for bits per dimension.
"""

import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from jaxtyping import Float64
from jaxtyping import Int

from ddpm_jax.diffusion import denoiser as denoisers
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import shapes
from ddpm_jax.diffusion import variances

BITS: float = 1 / np.log(2)

# Arguments of elementwise functions; their shapes broadcast.
Values = Float[Array | np.ndarray, '*#shape'] | float


def normal_kl(
  mean_1: Values,
  log_var_1: Values,
  mean_2: Values,
  log_var_2: Values,
) -> Float[Array, '*shape']:
  """KL(N(mean_1, var_1) ‖ N(mean_2, var_2)), elementwise, in nats."""
  ratio = log_var_1 - log_var_2
  distance = jnp.square(mean_1 - mean_2) * jnp.exp(-jnp.asarray(log_var_2))
  return 0.5 * (jnp.expm1(ratio) - ratio + distance)


def decoder_log_prob(
  x0: Values,
  mean: Values,
  log_var: Values,
) -> Float[Array, '*shape']:
  """log of N(mean, var)'s mass in x_0's bin, elementwise, in nats  (eq. 13).

  Bins reach ±1/255 around the 256 grays in [-1, 1]; the first and last are
  open. Accurate in the far tails too, where a difference of two CDFs would be
  0.
  """
  inverse = jnp.exp(-log_var / 2)
  a, b = (x0 - 1 / 255 - mean) * inverse, (x0 + 1 / 255 - mean) * inverse
  # Φ(b) - Φ(a) = Φ(-a) - Φ(-b): take the side where both are small.
  upper = a + b > 0
  low, high = jnp.where(upper, -b, a), jnp.where(upper, -a, b)
  log_high = jax.scipy.special.log_ndtr(high)
  between = log_high + jnp.log1p(
    -jnp.exp(jax.scipy.special.log_ndtr(low) - log_high)
  )
  first, last = x0 < -0.999, x0 > 0.999
  return jnp.where(
    first,
    jax.scipy.special.log_ndtr(b),
    jnp.where(last, jax.scipy.special.log_ndtr(-a), between),
  )


def prior(schedule: schedules.Schedule, x0: shapes.Batch) -> shapes.Values:
  """L_T = KL(q(x_T | x_0) ‖ N(0, I)), per example."""
  mean = schedule.sqrt_alpha_bar[-1] * x0
  log_var = jnp.log(schedule.one_minus_alpha_bar[-1])
  return process.example_mean(normal_kl(mean, log_var, 0.0, 0.0))


def terms(
  denoiser: denoisers.Denoiser,
  keys: shapes.Keys,
  x0: shapes.Batch,
  t: shapes.Times,
) -> tuple[shapes.Values, shapes.Values]:
  """L_{t-1} of each example at its own t, with one draw of x_t  (eq. 5).

  Args:
    denoiser: The model.
    keys: (B,), for the noise of x_t.
    x0: (B, ...), in [-1, 1], with 256 gray levels.
    t: (B,), in 1..T.

  Returns:
    KL(q(x_{t-1} | x_t, x_0) ‖ p(x_{t-1} | x_t)), or -log p(x_0 | x_1) at t = 1;
    and the mean squared errors of x̂_0.
  """
  eps = process.normal(keys, x0.shape[1:])
  return term(denoiser, x0, process.q_sample(denoiser.schedule, x0, t, eps), t)


def term(
  denoiser: denoisers.Denoiser,
  x0: shapes.Batch,
  x_t: shapes.Batch,
  t: shapes.Times | shapes.Step,
) -> tuple[shapes.Values, shapes.Values]:
  """Like `terms`, for a given x_t; t may be a scalar."""
  schedule = denoiser.schedule
  mean, log_var, x0_hat = denoisers.p_mean_variance(denoiser, x_t, t)
  true_mean, _ = process.q_posterior(schedule, x0, x_t, t)
  t = process.per_example(t, x0)
  true_log_var = variances.beta_tilde(schedule, None, t)
  kl = normal_kl(true_mean, true_log_var, mean, log_var)
  decoder = -decoder_log_prob(x0, mean, log_var)
  nats = process.example_mean(jnp.where(t > 1, kl, decoder))
  return nats, process.example_mean(jnp.square(x0 - x0_hat))


class Bound(NamedTuple):
  """Terms of the bound for each of B examples, in nats per dimension."""

  prior: Float[Array, 'B']  # L_T
  t: Int[Array, 'B N']  # times that were evaluated; the first is 1
  terms: Float[Array, 'B N']  # L_{t-1} at these times
  mse: Float[Array, 'B N']  # mean squared errors of x̂_0 at these times


def bound(
  denoiser: denoisers.Denoiser,
  keys: shapes.Keys,
  x0: shapes.Batch,
  *,
  draws: int = 0,
) -> Bound:
  """Computes the terms of the bound, at all times or at random ones.

  Args:
    denoiser: The model.
    keys: (B,), for times and noise.
    x0: (B, ...), in [-1, 1], with 256 gray levels.
    draws: If 0, all T terms, with one draw of x_t each. Otherwise t = 1 and
      this many times, drawn per example from 2..T, so that `totals` is an
      unbiased estimate. With T = 1 there is only one term.
  """
  T = denoiser.schedule.T
  fold = jax.vmap(jax.random.fold_in, (0, None))
  if draws and T > 1:
    draw = functools.partial(
      jax.random.randint, shape=(draws,), minval=2, maxval=T + 1
    )
    drawn = jax.vmap(draw)(fold(keys, T + 1))
    times = jnp.pad(drawn.T, ((1, 0), (0, 0)), constant_values=1)
  else:
    times = jnp.broadcast_to(jnp.arange(1, T + 1)[:, None], (T, len(x0)))

  def body(row: Any, t: shapes.Times) -> tuple[Any, Any]:
    return row + 1, terms(denoiser, fold(keys, row), x0, t)

  _, (nats, mse) = jax.lax.scan(body, 0, times)
  return Bound(prior(denoiser.schedule, x0), times.T, nats.T, mse.T)


def totals(
  parts: Bound, T: int
) -> tuple[
  Float64[np.ndarray, 'B'], Float64[np.ndarray, 'B'], Float64[np.ndarray, 'B']
]:
  """L_T, Σ L_{t-1} over 2..T, and L_0 of each example.

  The sum is exact if all times were evaluated; for drawn times it is an
  unbiased estimate, T - 1 times their mean.
  """
  between = np.asarray(parts.terms, np.float64)[:, 1:]
  share = (T - 1) / max(between.shape[1], 1)
  return (
    np.asarray(parts.prior, np.float64),
    share * between.sum(1),
    np.asarray(parts.terms, np.float64)[:, 0],
  )
