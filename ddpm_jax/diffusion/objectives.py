"""Training objectives: per-example losses of a network's output."""

import jax
import jax.numpy as jnp

from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import schedules


def simple(
  schedule: schedules.Schedule,
  model_fn: process.ModelFn,
  keys: jax.Array,
  x0: jax.Array,
  t: jax.Array,
) -> jax.Array:
  """L_simple = ‖ε - ε_θ(√ᾱ_t x_0 + √(1-ᾱ_t) ε, t)‖², mean over dims  (eq. 14).

  Args:
    schedule: of T steps.
    model_fn: ε_θ.
    keys: (B,), one for the noise of each example.
    x0: (B, ...) in [-1, 1].
    t: (B,) in 1..T.

  Returns:
    (B,) float32 losses; 1 in expectation for a network that answers 0.
  """
  eps = process.normal(keys, x0.shape[1:])
  x_t = jax.vmap(process.q_sample, (None, 0, 0, 0))(schedule, x0, t, eps)
  error = jnp.square(eps - model_fn(x_t, t))
  return jnp.mean(error.reshape(len(error), -1), axis=1)
