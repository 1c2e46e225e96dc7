"""The variance σ_t² of p(x_{t-1} | x_t), fixed or learned.

`config.model.variance` names one. Each gives log σ_t² for one time t, from what
the network says of it (`raw`; None where it is fixed).
"""

import jax
import jax.numpy as jnp

from ddpm_jax.diffusion import schedules

Schedule = schedules.Schedule


def beta(schedule: Schedule, raw: jax.Array | None, t: jax.Array) -> jax.Array:
  """σ² = β_t ("fixed large"): optimal for x_0 from N(0, I)  (section 3.2)."""
  del raw
  return jnp.log(schedule.beta[t])


def beta_tilde(
  schedule: Schedule, raw: jax.Array | None, t: jax.Array
) -> jax.Array:
  """σ² = β̃_t ("fixed small"): optimal for one fixed x_0  (section 3.2).

  β̃_1 is 0; in its place stands β̃_2, as in the authors' code.
  """
  del raw
  return jnp.log(schedule.beta_tilde[jnp.maximum(t, 2)])


def learned(
  schedule: Schedule, raw: jax.Array | None, t: jax.Array
) -> jax.Array:
  """log σ² is what the network says: a learned diagonal Σ  (table 2)."""
  del schedule, t
  return _given(raw)


def learned_range(
  schedule: Schedule, raw: jax.Array | None, t: jax.Array
) -> jax.Array:
  """Between log β̃_t and log β_t: v log β_t + (1-v) log β̃_t, raw = 2v - 1.

  Nichol & Dhariwal 2021, eq. 15.
  """
  v = (_given(raw) + 1) / 2
  large, small = beta(schedule, None, t), beta_tilde(schedule, None, t)
  return v * large + (1 - v) * small


def _given(raw: jax.Array | None) -> jax.Array:
  if raw is None:
    raise ValueError('a learned variance needs a network of twice the channels')
  return raw


def is_learned(name: str) -> bool:
  """Whether the network answers twice as many channels, for this variance."""
  return name.startswith('learned')
