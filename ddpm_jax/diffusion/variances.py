"""The variance σ_t² of p(x_{t-1} | x_t), fixed or learned.

`config.model.variance` names one of `__all__`. Each returns log σ_t².
"""

import jax.numpy as jnp

from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import shapes

__all__ = ['beta', 'beta_tilde', 'learned', 'learned_range']

Schedule = schedules.Schedule
Time = shapes.Time
Raw = shapes.X | None  # the network's output for σ_t²; None if it is fixed


def beta(schedule: Schedule, raw: Raw, t: Time) -> shapes.Scale:
  """σ² = β_t ("fixed large"): optimal for x_0 from N(0, I)  (section 3.2).

  At t = 1, where only the decoder uses it, it equals `beta_tilde`, as in the
  authors' code and for the paper's bits/dim.
  """
  del raw
  return jnp.log(jnp.where(t > 1, schedule.beta[t], _at_1(schedule)))


def beta_tilde(schedule: Schedule, raw: Raw, t: Time) -> shapes.Scale:
  """σ² = β̃_t ("fixed small"): optimal for one fixed x_0  (section 3.2).

  β̃_2 replaces β̃_1 = 0, as in the authors' code.
  """
  del raw
  return jnp.log(jnp.where(t > 1, schedule.beta_tilde[t], _at_1(schedule)))


def _at_1(schedule: Schedule) -> shapes.Scale:
  """σ_1² of both fixed variances: β̃_2; with T = 1 there is only β_1."""
  return schedule.beta_tilde[2] if schedule.T > 1 else schedule.beta[1]


def learned(schedule: Schedule, raw: Raw, t: Time) -> shapes.X:
  """log σ² is the network's output: a learned diagonal Σ  (table 2)."""
  del schedule, t
  return _required(raw)


def learned_range(schedule: Schedule, raw: Raw, t: Time) -> shapes.X:
  """Between log β̃_t and log β_t: v log β_t + (1-v) log β̃_t, raw = 2v - 1.

  Nichol & Dhariwal 2021, eq. 15; at t = 1 with β_1 and β̃_2, as in their code.
  """
  v = (_required(raw) + 1) / 2
  large, small = jnp.log(schedule.beta[t]), beta_tilde(schedule, None, t)
  return v * large + (1 - v) * small


def _required(raw: Raw) -> shapes.X:
  if raw is None:
    raise ValueError('a learned variance needs twice the channels of x_t')
  return raw


def is_learned(name: str) -> bool:
  """Whether this variance needs a network with twice the channels."""
  return name.startswith('learned')
