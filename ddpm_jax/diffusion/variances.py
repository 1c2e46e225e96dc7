"""The variance σ_t² of p(x_{t-1} | x_t), fixed or learned.

`config.model.variance` names one. Each gives log σ_t² for one time t, from what
the network says of it (`raw`; None where it is fixed).
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from ddpm_jax.diffusion import schedules

Schedule = schedules.Schedule
Time = schedules.Time
Raw = Float[Array, '*shape'] | None


def beta(schedule: Schedule, raw: Raw, t: Time) -> Float[Array, '*#shape']:
  """σ² = β_t ("fixed large"): optimal for x_0 from N(0, I)  (section 3.2).

  At t = 1, where it is the decoder's alone, it is that of `beta_tilde`, as in
  the authors' code; the paper's bits/dim are of that.
  """
  del raw
  return jnp.log(jnp.where(t > 1, schedule.beta[t], _at_1(schedule)))


def beta_tilde(
  schedule: Schedule, raw: Raw, t: Time
) -> Float[Array, '*#shape']:
  """σ² = β̃_t ("fixed small"): optimal for one fixed x_0  (section 3.2).

  β̃_1 is 0; in its place stands β̃_2, as in the authors' code.
  """
  del raw
  return jnp.log(jnp.where(t > 1, schedule.beta_tilde[t], _at_1(schedule)))


def _at_1(schedule: Schedule) -> Float[Array, '']:
  """σ_1² of both fixed variances: β̃_2; with T = 1 there is only β_1."""
  return schedule.beta_tilde[2] if schedule.T > 1 else schedule.beta[1]


def learned(schedule: Schedule, raw: Raw, t: Time) -> Float[Array, '*shape']:
  """log σ² is what the network says: a learned diagonal Σ  (table 2)."""
  del schedule, t
  return _given(raw)


def learned_range(
  schedule: Schedule, raw: Raw, t: Time
) -> Float[Array, '*shape']:
  """Between log β̃_t and log β_t: v log β_t + (1-v) log β̃_t, raw = 2v - 1.

  Nichol & Dhariwal 2021, eq. 15; at t = 1, β_1 and β̃_2, as in their code.
  """
  v = (_given(raw) + 1) / 2
  large, small = jnp.log(schedule.beta[t]), beta_tilde(schedule, None, t)
  return v * large + (1 - v) * small


def _given(raw: Raw) -> Float[Array, '*shape']:
  if raw is None:
    raise ValueError('a learned variance needs a network of twice the channels')
  return raw


def is_learned(name: str) -> bool:
  """Whether the network answers twice as many channels, for this variance."""
  return name.startswith('learned')
