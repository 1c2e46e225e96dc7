"""Samplers: from noise x_T to images x_0, one `lax.scan`.

`config.sampler.name` names one of `__all__`, each a step

  (denoiser, keys, x_t, t, previous) -> (x_{t-1}, x̂_0)

To sample in fewer than T steps, use the denoiser from `denoiser.strided`.
"""

from collections.abc import Callable
from collections.abc import Iterable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from ddpm_jax.diffusion import denoiser as denoisers
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import shapes

__all__ = [
  'ancestral',
  'ddim',
  'dpm_solver_pp_2m',
  'dpm_solver_pp_2m_sde',
  'greedy',
  'heun',
]

Denoiser = denoisers.Denoiser
Keys = shapes.Keys
Batch = shapes.Batch


class Previous(NamedTuple):
  """The prediction of the previous step, for multistep samplers."""

  x0_hat: Batch
  t: shapes.Times  # time of the prediction; 0: there is none


Step = Callable[
  [Denoiser, Keys, Batch, shapes.Step, Previous], tuple[Batch, Batch]
]


def ancestral(
  denoiser: Denoiser,
  keys: Keys,
  x_t: Batch,
  t: shapes.Step,
  previous: Previous | None = None,
) -> tuple[Batch, Batch]:
  """x_{t-1} = μ_θ(x_t, t) + σ_t z, z = 0 at t = 1  (Algorithm 2, one step)."""
  del previous
  mean, log_variance, x0 = denoisers.p_mean_variance(denoiser, x_t, t)
  sigma = jnp.where(t > 1, jnp.exp(log_variance / 2), 0.0)
  return mean + sigma * process.normal(keys, x_t.shape[1:]), x0


def greedy(
  denoiser: Denoiser,
  keys: Keys,
  x_t: Batch,
  t: shapes.Step,
  previous: Previous | None = None,
) -> tuple[Batch, Batch]:
  """x_{t-1} = μ_θ(x_t, t): `ancestral` with σ_t = 0 at every step."""
  del keys, previous
  mean, _, x0 = denoisers.p_mean_variance(denoiser, x_t, t)
  return mean, x0


def ddim(
  denoiser: Denoiser,
  keys: Keys,
  x_t: Batch,
  t: shapes.Step,
  previous: Previous | None = None,
  *,
  eta: float = 0.0,
) -> tuple[Batch, Batch]:
  """x_{t-1} = √ᾱ_{t-1} x̂_0 + √(1-ᾱ_{t-1}-σ_t²) ε̂ + σ_t z, σ_t² = η² β̃_t.

  Song et al. 2021, eq. 12; ε̂ is (x_t - √ᾱ_t x̂_0) / √(1-ᾱ_t), with x̂_0 clipped
  if `clip` is set. η = 0 is deterministic, of order 1; η = 1 is `ancestral`
  with σ² = β̃.
  """
  del previous
  x0 = denoisers.x0_hat(denoiser, x_t, t)
  return _jump(denoiser, keys, x0, x_t, t, eta), x0


def dpm_solver_pp_2m(
  denoiser: Denoiser,
  keys: Keys,
  x_t: Batch,
  t: shapes.Step,
  previous: Previous | None = None,
) -> tuple[Batch, Batch]:
  """DPM-Solver++(2M): `ddim` with x̂_0 extrapolated to the middle of the step.

  Lu et al. 2022 (DPM-Solver++), Algorithm 2: order 2, one evaluation per step.
  """
  x0 = denoisers.x0_hat(denoiser, x_t, t)
  middle = _extrapolated(denoiser.schedule, x0, t, previous)
  return _jump(denoiser, keys, middle, x_t, t, 0.0), x0


def dpm_solver_pp_2m_sde(
  denoiser: Denoiser,
  keys: Keys,
  x_t: Batch,
  t: shapes.Step,
  previous: Previous | None = None,
) -> tuple[Batch, Batch]:
  """SDE-DPM-Solver++(2M): `dpm_solver_pp_2m` with the noise of η = 1.

  Lu et al. 2022 (DPM-Solver++), eq. 18 and appendix. Without a previous step it
  is `ancestral` with σ² = β̃.
  """
  x0 = denoisers.x0_hat(denoiser, x_t, t)
  middle = _extrapolated(denoiser.schedule, x0, t, previous)
  return _jump(denoiser, keys, middle, x_t, t, 1.0), x0


def heun(
  denoiser: Denoiser,
  keys: Keys,
  x_t: Batch,
  t: shapes.Step,
  previous: Previous | None = None,
) -> tuple[Batch, Batch]:
  """Heun's method on the probability-flow ODE: `ddim` with a mean of two x̂_0.

  The ODE is dy/ds = x̂_0 with y = x_t / √(1-ᾱ_t) and s² = ᾱ_t / (1-ᾱ_t). Order
  2, with two evaluations per step, except for the last, to s = ∞, which takes
  one (as in Karras et al. 2022, Algorithm 1).
  """
  del previous
  x0 = denoisers.x0_hat(denoiser, x_t, t)
  euler = _jump(denoiser, keys, x0, x_t, t, 0.0)

  def corrected(x_prev: Batch) -> Batch:
    second = denoisers.x0_hat(denoiser, x_prev, t - 1)
    return _jump(denoiser, keys, (x0 + second) / 2, x_t, t, 0.0)

  return jax.lax.cond(t > 1, corrected, lambda x: x, euler), x0


def nfe(name: str, steps: int) -> int:
  """Number of network evaluations for an image, in `steps` steps."""
  return 2 * steps - 1 if name == 'heun' else steps


def _jump(
  denoiser: Denoiser,
  keys: Keys,
  x0: Batch,
  x_t: Batch,
  t: shapes.Step,
  eta: float,
) -> Batch:
  """x_{t-1} ~ q_σ(x_{t-1} | x_t, x̂_0)."""
  mean, variance = process.q_sigma(denoiser.schedule, x0, x_t, t, eta)
  if not eta:
    return mean
  return mean + jnp.sqrt(variance) * process.normal(keys, x_t.shape[1:])


def _extrapolated(
  schedule: schedules.Schedule,
  x0: Batch,
  t: shapes.Step,
  previous: Previous | None,
) -> Batch:
  """x̂_0 + h/(2 h') (x̂_0 - previous x̂_0), for the steps h and h' of λ.

  λ is ½ log SNR, h is this step and h' the previous one. Returns x̂_0, for a
  step of order 1, if the previous step was not at t + 1 or this one ends at
  λ = ∞.
  """
  if previous is None:
    return x0
  half_log_snr = schedules.log_snr(schedule, jnp.arange(schedule.T + 1)) / 2
  steps = -jnp.diff(half_log_snr, append=half_log_snr[-1])
  follows = (previous.t == t + 1) & (t > 1)
  weight = jnp.where(follows, steps[t - 1] / (2 * steps[t]), 0.0)
  ratio: Array = process.per_example(weight, x0)
  return x0 + ratio * (x0 - previous.x0_hat)


class Sampled(NamedTuple):
  """Result of `sample`."""

  x_0: Batch  # or x_t, if the given times end earlier
  x0_hats: Float[Array, 'K B *shape']  # intermediate predictions, in order
  bad_t: shapes.Times  # time of the first x that is not finite; 0: none


def sample(
  step: Step,
  denoiser: Denoiser,
  keys: Keys,
  x_T: Batch,
  *,
  times: Iterable[int] | None = None,
  previous: Previous | None = None,
  snapshots: int = 0,
) -> Sampled:
  """Runs `step` from t = T down to 1  (Algorithm 2), or at the times given.

  Args:
    step: A sampler step, such as `ancestral`.
    denoiser: The model; `denoiser.strided` sets the number of steps.
    keys: (B,), for the noise of each image; step t folds t in.
    x_T: (B, ...), from N(0, I); or x_t for the first of `times`.
    times: Times in 1..T in the order of the steps; T, ..., 1 by default. A
      repeated time gets new noise.
    previous: The prediction of the step that returned x_T, if there was one.
    snapshots: K, the number of predictions x̂_0 to keep, evenly spaced; at most
      the number of steps. Memory is O(B·K), not O(B·T).
  """
  T, K, B = denoiser.schedule.T, snapshots, len(x_T)
  order = np.array(range(T, 0, -1) if times is None else list(times))
  visit = [np.sum(order[:i] == t) for i, t in enumerate(order)]
  # The slot for each step's x̂_0; slot K is for those that are not kept.
  N = len(order)
  kept_steps = np.round(np.arange(1, K + 1) * N / max(K, 1)).astype(int) - 1
  slots = np.full(N, K)
  slots[kept_steps] = np.arange(K)

  def body(carry: Any, scanned: Any) -> tuple[Any, None]:
    x_t, previous, kept, bad_t = carry
    t, number, slot = scanned
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
    x_prev, x0_hat = step(denoiser, step_keys, x_t, t, previous)
    previous = Previous(x0_hat, jnp.full(B, t))
    finite = jnp.all(jnp.isfinite(x_prev), axis=range(1, x_prev.ndim))
    time = denoiser.schedule.time[t]
    bad_t = jnp.where(finite | (bad_t > 0), bad_t, time)
    return (x_prev, previous, kept.at[slot].set(x0_hat), bad_t), None

  if previous is None:
    previous = Previous(jnp.zeros_like(x_T), jnp.zeros(B, int))
  kept = jnp.zeros((K + 1, *x_T.shape), x_T.dtype)
  scanned = order, order + T * np.array(visit), slots
  scanned = jax.tree.map(jnp.asarray, scanned)
  start = x_T, previous, kept, jnp.zeros(B, denoiser.schedule.time.dtype)
  (x_0, _, kept, bad_t), _ = jax.lax.scan(body, start, scanned)
  return Sampled(x_0, kept[:K], bad_t)
