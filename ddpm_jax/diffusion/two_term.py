"""The bound in two terms, for study; `likelihood` has the form in three.

-E_q[log p(x_T)] + Σ E_q[log q(x_t | x_{t-1}) / p(x_{t-1} | x_t)] over a path of
q. It is the same in expectation (Ho et al. 2020, eq. 3 and appendix A), and
where the other takes a KL divergence this draws one x_{t-1}.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import Key

from ddpm_jax.diffusion import likelihood
from ddpm_jax.diffusion import predictions
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import variances


def bound(
  schedule: schedules.Schedule,
  model_fn: process.ModelFn,
  keys: Key[Array, 'B'],
  x0: Float[Array, 'B *shape'],
  *,
  predict: predictions.Prediction = predictions.eps,
  variance: process.Variance = variances.beta,
  clip: bool = True,
) -> likelihood.Bound:
  """The terms of one path x_1..x_T for each of x0; see `likelihood`.

  Here `prior` is -log p(x_T), and a term the log ratio at t; either may be
  negative, and only their sum is a bound.
  """

  def one(
    x0: Float[Array, '*shape'],
    x_prev: Float[Array, '*shape'],
    x_t: Float[Array, '*shape'],
    out: Float[Array, '...'],
    t: Int[Array, ''],
  ) -> tuple[Float[Array, ''], Float[Array, '']]:
    mean, log_var, x0_hat = process.p_mean_variance(
      schedule, out, x_t, t, predict=predict, variance=variance, clip=clip
    )
    beta = schedule.beta[t]
    q = log_normal(x_t, jnp.sqrt(1 - beta) * x_prev, jnp.log(beta))
    decoder = likelihood.decoder_log_prob(x0, mean, log_var)
    p = jnp.where(t > 1, log_normal(x_prev, mean, log_var), decoder)
    return jnp.mean(q - p), jnp.mean(jnp.square(x0 - x0_hat))

  def body(
    x_prev: Float[Array, 'B *shape'], t: Int[Array, '']
  ) -> tuple[Float[Array, 'B *shape'], Any]:
    k_t = jax.vmap(jax.random.fold_in, (0, None))(keys, t)
    eps = process.normal(k_t, x0.shape[1:])
    x_t = jax.vmap(process.q_step, (None, 0, None, 0))(schedule, x_prev, t, eps)
    out = model_fn(x_t, jnp.full(len(x0), t))
    return x_t, jax.vmap(one, (0, 0, 0, 0, None))(x0, x_prev, x_t, out, t)

  times = jnp.arange(1, schedule.T + 1)
  x_T, (nats, mse) = jax.lax.scan(body, x0, times)
  prior = -log_normal(x_T, 0.0, 0.0).reshape(len(x0), -1).mean(1)
  every = jnp.broadcast_to(times, (len(x0), schedule.T))
  return likelihood.Bound(prior, every, nats.T, mse.T)


def log_normal(
  x: likelihood.Values,
  mean: likelihood.Values,
  log_var: likelihood.Values,
) -> Float[Array, '*shape']:
  """log N(x; mean, var), elementwise, in nats."""
  square = jnp.square(x - mean) * jnp.exp(-jnp.asarray(log_var))
  return -0.5 * (np.log(2 * np.pi) + log_var + square)
