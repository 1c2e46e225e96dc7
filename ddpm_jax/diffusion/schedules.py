"""Noise schedules: how fast an image is turned into noise.

`config.schedule.name` names one of `__all__`, each a function that returns a
`Schedule`.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from jaxtyping import Float32
from jaxtyping import Float64
from jaxtyping import Int
from jaxtyping import Int32

from ddpm_jax.diffusion import shapes
from ddpm_jax.diffusion import spacings

# The schedules that a recipe can name.
__all__ = [
  'const',
  'cosine',
  'jsd',
  'linear',
  'quad',
  'scaled_linear',
  'sqrt',
  'sqrt_linear',
  'su',
  'warmup10',
  'warmup50',
]

Time = shapes.Time

Table = Float32[Array, 'T+1']


class Schedule(NamedTuple):
  """Tables, indexed by the paper's t; slot 0 is the clean image.

  Tables are computed in float64 and cast last: in float32, `1 - alpha_bar`
  would have a relative error of 1.7e-4 at t = 1. `alpha_bar` is 0 below 1e-38,
  because XLA flushes denormal numbers on CPUs; so form ratios from
  `log_alpha_bar`, and divide by `sqrt_alpha_bar`.
  """

  beta: Table  # β_t, the variance that step t adds; β_0 = 0
  alpha_bar: Table  # ᾱ_t = Π_{s≤t} (1 - β_s); ᾱ_0 = 1
  one_minus_alpha_bar: Table  # 1 - ᾱ_t
  beta_tilde: Table  # β̃_t, variance of q(x_{t-1} | x_t, x_0); β̃_1 = 0
  time: Int32[Array, 'T+1']  # the network's t: t, or more (`stride`)
  log_alpha_bar: Table  # log ᾱ_t; -∞ where nothing is left of x_0
  sqrt_alpha_bar: Table  # √ᾱ_t, at least LEAST_SIGNAL, or 0

  @property
  def T(self) -> int:
    return len(self.beta) - 1


# Long before √ᾱ_t is this small, a float32 x_t of size 1 loses √ᾱ_t x_0 to
# rounding. So this floor changes no x_t, and x̂_0 = (x_t - √(1-ᾱ_t) ε) / √ᾱ_t
# stays finite.
LEAST_SIGNAL = 1e-30


def from_beta(beta: Sequence[float] | np.ndarray) -> Schedule:
  """Computes the tables from β_1..β_T.

  Raises:
    ValueError: If a β_t is not in (0, 1); the last may be 1.
  """
  beta = np.asarray(beta, np.float64)
  inside = (beta > 0) & (beta < 1)
  inside[-1:] |= beta[-1:] == 1
  if beta.ndim != 1 or not len(beta) or not np.all(inside):
    raise ValueError(
      'every beta must lie strictly between 0 and 1; the last may be 1'
    )
  return _tables(_log_products(beta), np.arange(len(beta) + 1))


def _tables(
  log_alpha_bar: Float64[np.ndarray, 'N'], time: Int[np.ndarray, 'N']
) -> Schedule:
  """Computes the tables from log ᾱ_t, which decreases from 0.

  N is T+1. The last entry may be -∞; then β_T is 1.
  """
  beta = -np.expm1(np.diff(log_alpha_bar))
  one_minus = -np.expm1(log_alpha_bar)  # exact where ᾱ_t is near 1
  beta_tilde = beta * one_minus[:-1] / one_minus[1:]  # eq. 7
  signal = np.exp(log_alpha_bar / 2)
  signal = np.where(signal > 0, np.maximum(signal, LEAST_SIGNAL), 0)
  # Concrete arrays, even if this is called while a function is traced.
  with jax.ensure_compile_time_eval():
    return Schedule(
      beta=jnp.asarray(np.append(0.0, beta), jnp.float32),
      alpha_bar=jnp.asarray(np.exp(log_alpha_bar), jnp.float32),
      one_minus_alpha_bar=jnp.asarray(one_minus, jnp.float32),
      beta_tilde=jnp.asarray(np.append(0.0, beta_tilde), jnp.float32),
      time=jnp.asarray(time, jnp.int32),
      log_alpha_bar=jnp.asarray(log_alpha_bar, jnp.float32),
      sqrt_alpha_bar=jnp.asarray(signal, jnp.float32),
    )


def _log_products(
  beta: Float64[np.ndarray, 'T'],
) -> Float64[np.ndarray, 'T+1']:
  """log ᾱ_0..ᾱ_T, from β_1..β_T."""
  with np.errstate(divide='ignore'):  # log 0, at a zero terminal SNR
    return np.append(0.0, np.cumsum(np.log1p(-beta)))


def _log_alpha_bar(schedule: Schedule) -> Float64[np.ndarray, '{schedule.T}+1']:
  """log ᾱ_t in float64, from β_t, which is accurate where ᾱ_t is near 1."""
  return _log_products(np.asarray(schedule.beta, np.float64)[1:])


def log_ratio(schedule: Schedule, s: Time, t: Time) -> Float[Array, '*shape']:
  """log (ᾱ_t / ᾱ_s) for s ≤ t: 0 for s = t, even if both ᾱ are 0."""
  table = schedule.log_alpha_bar
  return jnp.where(jnp.equal(s, t), 0.0, table[t] - table[s])


def log_snr(schedule: Schedule, t: Time) -> Float[Array, '*shape']:
  """log (ᾱ_t / (1-ᾱ_t)); -∞ at a zero terminal SNR."""
  return schedule.log_alpha_bar[t] - jnp.log(schedule.one_minus_alpha_bar[t])


def ends_in_noise(schedule: Schedule) -> bool:
  """Whether ᾱ_T is 0 (zero terminal SNR), so that ε does not determine x_0."""
  return bool(np.isneginf(schedule.log_alpha_bar[-1]))


def _line(first: float, last: float, T: int) -> Float64[np.ndarray, '{T}']:
  """T evenly spaced numbers; for T = 1 only `last`."""
  return np.linspace(first, last, T) if T > 1 else np.array([last])


def linear(
  T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02
) -> Schedule:
  """β_t from β_1 to β_T in equal steps  (Ho et al. 2020, section 4).

  With T = 1 the only step has β_T, as in all schedules with both arguments.
  """
  return from_beta(_line(beta_1, beta_T, T))


def sqrt_linear(
  T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02
) -> Schedule:
  """`linear`, under the name of Rombach et al. 2022's code."""
  return linear(T, beta_1, beta_T)


def scaled_linear(
  T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02
) -> Schedule:
  """√β_t in equal steps: the `linear` of Rombach et al. 2022's code."""
  return from_beta(_line(beta_1**0.5, beta_T**0.5, T) ** 2)


def quad(T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02) -> Schedule:
  """`scaled_linear`, under the name of Ho et al. 2020's code."""
  return scaled_linear(T, beta_1, beta_T)


def sqrt(T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02) -> Schedule:
  """√ of β in equal steps from β_1 to β_T  (Rombach et al. 2022's code)."""
  return from_beta(_line(beta_1, beta_T, T) ** 0.5)


def const(T: int = 1000, beta_T: float = 0.02) -> Schedule:
  """β_t = β_T for all t  (Ho et al. 2020's code)."""
  return from_beta(np.full(T, beta_T))


def warmup10(
  T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02
) -> Schedule:
  """`linear` over a tenth of the steps, then β_T  (Ho et al. 2020's code)."""
  return _warmup(T, beta_1, beta_T, T // 10)


def warmup50(
  T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02
) -> Schedule:
  """`linear` over half of the steps, then β_T  (Ho et al. 2020's code)."""
  return _warmup(T, beta_1, beta_T, T // 2)


def _warmup(T: int, beta_1: float, beta_T: float, steps: int) -> Schedule:
  return from_beta(
    np.append(np.linspace(beta_1, beta_T, steps), np.full(T - steps, beta_T))
  )


def jsd(T: int = 1000) -> Schedule:
  """β_t = 1/(T - t + 1), so that ᾱ_t = 1 - t/T  (Ho et al. 2020's code).

  ᾱ_T is 0, so the network must not predict ε.
  """
  return from_beta(1 / np.arange(T, 0, -1))


def su(T: int = 1000) -> Schedule:
  """β_t = 0.02 t/T; in Su's notation α_t = √(1 - 0.02 t/T)  (Su 2022)."""
  return from_beta(0.02 * np.arange(1, T + 1) / T)


def cosine(T: int = 1000, s: float = 8e-3) -> Schedule:
  """ᾱ_t = f(t)/f(0), f(t) = cos²((t/T + s)/(1 + s)·π/2), β_t ≤ 0.999.

  Nichol & Dhariwal 2021, eq. 17.
  """
  f = np.cos((np.arange(T + 1) / T + s) / (1 + s) * np.pi / 2) ** 2
  return from_beta(np.clip(1 - f[1:] / f[:-1], None, 0.999))


def zero_terminal_snr(schedule: Schedule) -> Schedule:
  """Shifts and scales √ᾱ_t to be 0 at T and unchanged at 1.

  Then x_T is pure noise, as it is in sampling  (Lin et al. 2023, Algorithm 1).
  The network must not predict ε, which does not determine x_0 at T.

  Raises:
    ValueError: If there is only one step.
  """
  if schedule.T < 2:
    raise ValueError('a zero terminal SNR needs T of 2 or more')
  signal = np.exp(_log_alpha_bar(schedule) / 2)
  first, last = signal[1], signal[-1]
  signal[1:] = (signal[1:] - last) * first / (first - last)
  with np.errstate(divide='ignore'):
    return _tables(2 * np.log(signal), np.asarray(schedule.time))


def stride(
  schedule: Schedule,
  steps: int,
  spacing: Callable[[int, int], Int[np.ndarray, 'steps+1']] = spacings.linear,
) -> Schedule:
  """Returns a schedule of `steps` ≤ T jumps between the same noise levels.

  Sampling in fewer steps is ordinary sampling on this schedule: its x_k is
  x_{time[k]} of the original, and its β_k the variance of the whole jump.

  Raises:
    ValueError: If `steps` is not in 1..T.
  """
  if not 1 <= steps <= schedule.T:
    raise ValueError(f'steps must be in 1..{schedule.T}, got {steps}')
  if steps == schedule.T:
    return schedule
  at = spacing(schedule.T, steps)
  return _tables(_log_alpha_bar(schedule)[at], np.asarray(schedule.time)[at])
