"""Samplers: from noise x_T to images x_0, one `lax.scan`.

A step is a function (schedule, model_fn, keys, x_t, t, before) -> (x_{t-1},
x̂_0); its name is what a recipe says in `config.sampler.name`. Fewer steps than
T are the same steps on another schedule; see `schedules.stride`.
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
from jaxtyping import Int
from jaxtyping import Key

from ddpm_jax.diffusion import predictions
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import variances

Schedule = schedules.Schedule
Prediction = predictions.Prediction
Step = Callable[..., tuple[Float[Array, 'B *shape'], Float[Array, 'B *shape']]]


class Before(NamedTuple):
  """What the step before has found, for those that look back."""

  x0_hat: Float[Array, 'B *shape']
  t: Int[Array, 'B']  # the time that it was made at; 0: there was none


def ancestral(
  schedule: Schedule,
  model_fn: process.ModelFn,
  keys: Key[Array, 'B'],
  x_t: Float[Array, 'B *shape'],
  t: Int[Array, ''] | int,
  before: Before | None = None,
  *,
  predict: Prediction = predictions.eps,
  variance: process.Variance = variances.beta,
  clip: bool = True,
) -> tuple[Float[Array, 'B *shape'], Float[Array, 'B *shape']]:
  """x_{t-1} = μ_θ(x_t, t) + σ_t z, z = 0 at t = 1  (Algorithm 2, one step)."""
  del before
  out = model_fn(x_t, jnp.full(len(x_t), t))
  mean, log_variance, x0_hat = process.p_mean_variance(
    schedule, out, x_t, t, predict=predict, variance=variance, clip=clip
  )
  sigma = jnp.where(t > 1, jnp.exp(log_variance / 2), 0.0)
  return mean + sigma * process.normal(keys, x_t.shape[1:]), x0_hat


def greedy(
  schedule: Schedule,
  model_fn: process.ModelFn,
  keys: Key[Array, 'B'],
  x_t: Float[Array, 'B *shape'],
  t: Int[Array, ''] | int,
  before: Before | None = None,
  *,
  predict: Prediction = predictions.eps,
  clip: bool = True,
) -> tuple[Float[Array, 'B *shape'], Float[Array, 'B *shape']]:
  """x_{t-1} = μ_θ(x_t, t): `ancestral` with σ_t = 0 at every step."""
  del keys, before
  out = model_fn(x_t, jnp.full(len(x_t), t))
  # The variance is not looked at: any will do.
  mean, _, x0_hat = process.p_mean_variance(
    schedule, out, x_t, t, predict=predict, clip=clip
  )
  return mean, x0_hat


def ddim(
  schedule: Schedule,
  model_fn: process.ModelFn,
  keys: Key[Array, 'B'],
  x_t: Float[Array, 'B *shape'],
  t: Int[Array, ''] | int,
  before: Before | None = None,
  *,
  predict: Prediction = predictions.eps,
  clip: bool = True,
  eta: float = 0.0,
) -> tuple[Float[Array, 'B *shape'], Float[Array, 'B *shape']]:
  """x_{t-1} = √ᾱ_{t-1} x̂_0 + √(1-ᾱ_{t-1}-σ_t²) ε̂ + σ_t z, σ_t² = η² β̃_t.

  Song et al. 2021, eq. 12; ε̂ is what x_t holds beside x̂_0, clipped or not.
  With η = 0 the image follows from x_T, and the order is 1; η = 1 is
  `ancestral` with σ² = β̃.
  """
  del before
  x0_hat = _x0_hat(schedule, model_fn, x_t, t, predict, clip)
  return _jump(schedule, keys, x0_hat, x_t, t, eta), x0_hat


def dpm_solver_pp_2m(
  schedule: Schedule,
  model_fn: process.ModelFn,
  keys: Key[Array, 'B'],
  x_t: Float[Array, 'B *shape'],
  t: Int[Array, ''] | int,
  before: Before | None = None,
  *,
  predict: Prediction = predictions.eps,
  clip: bool = True,
) -> tuple[Float[Array, 'B *shape'], Float[Array, 'B *shape']]:
  """DPM-Solver++(2M): `ddim` with x̂_0 carried on to the middle of the jump.

  Lu et al. 2022 (DPM-Solver++), Algorithm 2: order 2, one evaluation a step.
  """
  x0_hat = _x0_hat(schedule, model_fn, x_t, t, predict, clip)
  middle = _extrapolated(schedule, x0_hat, t, before)
  return _jump(schedule, keys, middle, x_t, t, 0.0), x0_hat


def dpm_solver_pp_2m_sde(
  schedule: Schedule,
  model_fn: process.ModelFn,
  keys: Key[Array, 'B'],
  x_t: Float[Array, 'B *shape'],
  t: Int[Array, ''] | int,
  before: Before | None = None,
  *,
  predict: Prediction = predictions.eps,
  clip: bool = True,
) -> tuple[Float[Array, 'B *shape'], Float[Array, 'B *shape']]:
  """SDE-DPM-Solver++(2M): the same with the noise of η = 1.

  Lu et al. 2022 (DPM-Solver++), eq. 18 and appendix: without the look back it
  is `ancestral` with σ² = β̃.
  """
  x0_hat = _x0_hat(schedule, model_fn, x_t, t, predict, clip)
  middle = _extrapolated(schedule, x0_hat, t, before)
  return _jump(schedule, keys, middle, x_t, t, 1.0), x0_hat


def heun(
  schedule: Schedule,
  model_fn: process.ModelFn,
  keys: Key[Array, 'B'],
  x_t: Float[Array, 'B *shape'],
  t: Int[Array, ''] | int,
  before: Before | None = None,
  *,
  predict: Prediction = predictions.eps,
  clip: bool = True,
) -> tuple[Float[Array, 'B *shape'], Float[Array, 'B *shape']]:
  """Heun's rule on the probability-flow ODE: `ddim` by the mean of two x̂_0.

  The ODE is dy/ds = x̂_0 with y = x_t / √(1-ᾱ_t) and s² = ᾱ_t / (1-ᾱ_t). Order
  2, and two evaluations a step, of which the last, to s = ∞, needs one (as in
  Karras et al. 2022, Algorithm 1).
  """
  del before
  x0_hat = _x0_hat(schedule, model_fn, x_t, t, predict, clip)
  euler = _jump(schedule, keys, x0_hat, x_t, t, 0.0)

  def corrected(x_prev: Float[Array, 'B *shape']) -> Float[Array, 'B *shape']:
    second = _x0_hat(schedule, model_fn, x_prev, t - 1, predict, clip)
    return _jump(schedule, keys, (x0_hat + second) / 2, x_t, t, 0.0)

  return jax.lax.cond(t > 1, corrected, lambda x: x, euler), x0_hat


def evaluations(name: str, steps: int) -> int:
  """How often the network is asked for an image in `steps` steps of `name`."""
  return 2 * steps - 1 if name == 'heun' else steps


def _x0_hat(
  schedule: Schedule,
  model_fn: process.ModelFn,
  x_t: Float[Array, 'B *shape'],
  t: Int[Array, ''] | int,
  predict: Prediction,
  clip: bool,
) -> Float[Array, 'B *shape']:
  out = model_fn(x_t, jnp.full(len(x_t), t))
  return process.to_x0(schedule, out, x_t, t, predict=predict, clip=clip)


def _jump(
  schedule: Schedule,
  keys: Key[Array, 'B'],
  x0_hat: Float[Array, 'B *shape'],
  x_t: Float[Array, 'B *shape'],
  t: Int[Array, ''] | int,
  eta: float,
) -> Float[Array, 'B *shape']:
  """x_{t-1} of q_σ(x_{t-1} | x_t, x̂_0)."""
  mean, variance = process.q_sigma(schedule, x0_hat, x_t, t, eta)
  if not eta:
    return mean
  return mean + jnp.sqrt(variance) * process.normal(keys, x_t.shape[1:])


def _extrapolated(
  schedule: Schedule,
  x0_hat: Float[Array, 'B *shape'],
  t: Int[Array, ''] | int,
  before: Before | None,
) -> Float[Array, 'B *shape']:
  """x̂_0 + h/(2 h') (x̂_0 - x̂_0 before), h and h' the last two steps of λ.

  λ = ½ log SNR. Where the step before was not at t + 1, or this one ends at
  λ = ∞, x̂_0 itself: a step of order 1.
  """
  if before is None:
    return x0_hat
  half_log_snr = schedules.log_snr(schedule, jnp.arange(schedule.T + 1)) / 2
  jumps = -jnp.diff(half_log_snr, append=half_log_snr[-1])
  follows = (before.t == t + 1) & (t > 1)
  weight = jnp.where(follows, jumps[t - 1] / (2 * jumps[t]), 0.0)
  weight = weight.reshape(-1, *[1] * (x0_hat.ndim - 1))
  return x0_hat + weight * (x0_hat - before.x0_hat)


class Sampled(NamedTuple):
  """What `sample` gives of B examples."""

  x_0: Float[Array, 'B *shape']  # or what the last step leaves
  x0_hats: Float[Array, 'K B *shape']  # predictions on the way, in order
  bad_t: Int[Array, 'B']  # the t whose x_{t-1} was first not finite; 0: none


def sample(
  step: Step,
  schedule: Schedule,
  model_fn: process.ModelFn,
  keys: Key[Array, 'B'],
  x_T: Float[Array, 'B *shape'],
  *,
  times: Iterable[int] | None = None,
  before: Before | None = None,
  snapshots: int = 0,
) -> Sampled:
  """Runs `step` from t = T down to 1  (Algorithm 2), or at the times given.

  Args:
    step: such as `ancestral`.
    schedule: of as many steps as are wanted; see `schedules.stride`.
    model_fn: the network, told the times of `schedule.time`.
    keys: for the noise of each image; step t folds t in.
    x_T: of N(0, 1); or x_t of the first time.
    times: in 1..T, in the order of the steps; T, ..., 1 by default. Another
      visit to a time has noise of its own.
    before: if x_t comes of a step, what that has found.
    snapshots: K, at most the number of steps: how many of the predictions x̂_0
      are kept, evenly spaced. Memory is O(B·K), not O(B·T).
  """
  T, K, B = schedule.T, snapshots, len(x_T)
  order = np.array(range(T, 0, -1) if times is None else list(times))
  visit = [np.sum(order[:i] == t) for i, t in enumerate(order)]
  # Where each step's x̂_0 goes; slot K takes those that are not wanted.
  N = len(order)
  kept_steps = np.round(np.arange(1, K + 1) * N / max(K, 1)).astype(int) - 1
  slots = np.full(N, K)
  slots[kept_steps] = np.arange(K)

  def told(x_t: Float[Array, 'B *shape'], t: Int[Array, 'B']) -> Any:
    return model_fn(x_t, schedule.time[t])

  def body(carry: Any, scanned: Any) -> tuple[Any, None]:
    x_t, before, kept, bad_t = carry
    t, number, slot = scanned
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
    x_prev, x0_hat = step(schedule, told, step_keys, x_t, t, before)
    before = Before(x0_hat, jnp.full(B, t))
    finite = jnp.all(jnp.isfinite(x_prev), axis=range(1, x_prev.ndim))
    bad_t = jnp.where(finite | (bad_t > 0), bad_t, schedule.time[t])
    return (x_prev, before, kept.at[slot].set(x0_hat), bad_t), None

  if before is None:
    before = Before(jnp.zeros_like(x_T), jnp.zeros(B, int))
  kept = jnp.zeros((K + 1, *x_T.shape), x_T.dtype)
  scanned = order, order + T * np.array(visit), slots
  scanned = jax.tree.map(jnp.asarray, scanned)
  start = x_T, before, kept, jnp.zeros(B, schedule.time.dtype)
  (x_0, _, kept, bad_t), _ = jax.lax.scan(body, start, scanned)
  return Sampled(x_0, kept[:K], bad_t)
