"""The variational bound in the form of eq. 3; `likelihood` computes eq. 5.

-E_q[log p(x_T)] + Σ E_q[log q(x_t | x_{t-1}) / p(x_{t-1} | x_t)] over a path of
q. Both have the same expectation (Ho et al. 2020, appendix A). Where eq. 5 has
a KL divergence, eq. 3 has one draw of x_{t-1}.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion import denoiser as denoisers
from ddpm_jax.diffusion import likelihood
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import shapes


def bound(
  denoiser: denoisers.Denoiser, keys: shapes.Keys, x0: shapes.Batch
) -> likelihood.Bound:
  """Like `likelihood.bound`, from one path x_1..x_T for each example.

  `prior` is -log p(x_T), and a term is the log ratio at t. Each may be
  negative; only their sum is a bound.
  """
  schedule = denoiser.schedule

  def body(x_prev: shapes.Batch, t: shapes.Step) -> tuple[shapes.Batch, Any]:
    k_t = jax.vmap(jax.random.fold_in, (0, None))(keys, t)
    eps = process.normal(k_t, x0.shape[1:])
    x_t = process.q_step(schedule, x_prev, t, eps)
    mean, log_var, x0_hat = denoisers.p_mean_variance(denoiser, x_t, t)
    beta = schedule.beta[t]
    q = log_normal(x_t, jnp.sqrt(1 - beta) * x_prev, jnp.log(beta))
    decoder = likelihood.decoder_log_prob(x0, mean, log_var)
    p = jnp.where(t > 1, log_normal(x_prev, mean, log_var), decoder)
    mse = process.example_mean(jnp.square(x0 - x0_hat))
    return x_t, (process.example_mean(q - p), mse)

  times = jnp.arange(1, schedule.T + 1)
  x_T, (nats, mse) = jax.lax.scan(body, x0, times)
  prior = -process.example_mean(log_normal(x_T, 0.0, 0.0))
  every = jnp.broadcast_to(times, (len(x0), schedule.T))
  return likelihood.Bound(prior, every, nats.T, mse.T)


def log_normal(
  x: likelihood.Values,
  mean: likelihood.Values,
  log_var: likelihood.Values,
) -> shapes.X:
  """log N(x; mean, var), elementwise, in nats."""
  square = jnp.square(x - mean) * jnp.exp(-jnp.asarray(log_var))
  return -0.5 * (np.log(2 * np.pi) + log_var + square)
