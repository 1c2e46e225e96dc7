"""The reverse process p(x_{t-1} | x_t)  (Ho et al. 2020, section 3).

A `Denoiser` holds everything that a loss, a sampler or the bound needs from a
model. Build it from the traced weights inside the jitted function and close
over it: it cannot be an argument of a jitted function.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from jaxtyping import Float32

from ddpm_jax.diffusion import predictions
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import shapes
from ddpm_jax.diffusion import spacings
from ddpm_jax.diffusion import variances

# (x_t, t) -> output, with the channels (last axis) of x_t, or twice as many if
# the variance is learned: the second half is for it. t is in 1..T.
Network = Callable[[shapes.Batch, shapes.Times], Float[Array, 'B ...']]

# (schedule, network output for the variance, t) -> log σ_t².
Variance = Callable[
  [schedules.Schedule, variances.Raw, shapes.Time], shapes.Scale
]


class Denoiser(NamedTuple):
  """p(x_{t-1} | x_t): a schedule, a network, and how its output is read.

  Attributes:
    schedule: The noise levels.
    network: (x_t (B, ...), t (B,)) -> output (B, ...).
    predict: What the network predicts; ε in the paper.
    variance: The variance σ_t².
    clip: Whether x̂_0 is clipped to [-1, 1], as in the authors' code.
  """

  schedule: schedules.Schedule
  network: Network
  predict: predictions.Prediction = predictions.eps
  variance: Variance = variances.beta
  clip: bool = True


def output(
  denoiser: Denoiser, x_t: shapes.Batch, t: shapes.Times | shapes.Step
) -> tuple[Float32[Array, 'B *shape'], Float32[Array, 'B *shape'] | None]:
  """Returns the network's prediction, and its variance output or None.

  Args:
    denoiser: The model.
    x_t: (B, ...), noisy examples.
    t: () or (B,), in 1..T of the denoiser's schedule. The network receives
      `schedule.time[t]`, which differs from t on a strided schedule.

  Returns:
    Arrays of the shape of x_t, in float32 whatever the network's dtype.
  """
  time = jnp.broadcast_to(denoiser.schedule.time[t], len(x_t))
  return split(denoiser.network(x_t, time), x_t)


def split(
  out: Float[Array, 'B ...'], x_t: shapes.Batch
) -> tuple[Float32[Array, 'B *shape'], Float32[Array, 'B *shape'] | None]:
  """Splits the output of a network into the two parts of `output`."""
  out, C = jnp.asarray(out, jnp.float32), x_t.shape[-1]
  if out.shape[-1] == 2 * C:
    return out[..., :C], out[..., C:]
  return out, None


def x0_hat(
  denoiser: Denoiser, x_t: shapes.Batch, t: shapes.Times | shapes.Step
) -> shapes.Batch:
  """x̂_0, the prediction of x_0 from x_t  (eq. 15, for ε); t as in `output`."""
  out, _ = output(denoiser, x_t, t)
  return _to_x0(denoiser, x_t, out, process.per_example(t, x_t))


def p_mean_variance(
  denoiser: Denoiser, x_t: shapes.Batch, t: shapes.Times | shapes.Step
) -> tuple[shapes.Batch, Float[Array, '...'], shapes.Batch]:
  """Mean μ_θ and log σ_t² of p(x_{t-1} | x_t), and x̂_0  (eq. 1, 11).

  The mean is that of q(x_{t-1} | x_t, x̂_0), with x̂_0 clipped if `clip` is set;
  without clipping, an ε prediction gives eq. 11. If the network predicts the
  mean itself, that mean is never clipped.

  Args:
    denoiser: The model.
    x_t: (B, ...), noisy examples.
    t: () or (B,), in 1..T.

  Returns:
    The mean, of the shape of x_t; the log variance, which broadcasts against
    it; and x̂_0.
  """
  out, raw = output(denoiser, x_t, t)
  t = process.per_example(t, x_t)
  x0 = _to_x0(denoiser, x_t, out, t)
  schedule, predict = denoiser.schedule, denoiser.predict
  if denoiser.clip and predict.clips_mean:
    mean = predictions.posterior_mean(schedule, x0, x_t, t)
  else:
    mean = predict.mean(schedule, x_t, out, t)
  return mean, denoiser.variance(schedule, raw, t), x0


def _to_x0(
  denoiser: Denoiser, x_t: shapes.X, out: shapes.X, t: shapes.Time
) -> shapes.X:
  x0 = denoiser.predict.to_x0(denoiser.schedule, x_t, out, t)
  return jnp.clip(x0, -1, 1) if denoiser.clip else x0


def strided(
  denoiser: Denoiser,
  steps: int,
  spacing: Callable[[int, int], np.ndarray] = spacings.linear,
) -> Denoiser:
  """Returns the same model with fewer steps; see `schedules.stride`.

  Raises:
    ValueError: If `steps` is not in 1..T.
  """
  schedule = schedules.stride(denoiser.schedule, steps, spacing)
  return denoiser._replace(schedule=schedule)
