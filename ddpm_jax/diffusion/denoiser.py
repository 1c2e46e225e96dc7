"""The reverse process p(x_{t-1} | x_t)  (Ho et al. 2020, section 3).

A `Denoiser` holds all that a loss, a sampler or the bound needs of a model. It
is made inside the compiled function, from the weights that are traced there,
and closed over: it is no argument of a jitted function.
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

# (x_t, t) -> output: as many channels (last axis) as x_t, or twice as many, of
# which the second half is for a learned variance. t is in 1..T.
Network = Callable[[shapes.Batch, shapes.Times], Float[Array, 'B ...']]

# (schedule, what the network says of the variance, t) -> log σ_t².
Variance = Callable[
  [schedules.Schedule, variances.Raw, shapes.Time], shapes.Scale
]


class Denoiser(NamedTuple):
  """p(x_{t-1} | x_t): a schedule, a network, and how its output is read.

  Attributes:
    schedule: the noise levels.
    network: (x_t (B, ...), t (B,)) -> output (B, ...).
    predict: what the network predicts; ε in the paper.
    variance: what σ_t² is.
    clip: whether x̂_0 is clipped to [-1, 1], as in the authors' code.
  """

  schedule: schedules.Schedule
  network: Network
  predict: predictions.Prediction = predictions.eps
  variance: Variance = variances.beta
  clip: bool = True


def output(
  denoiser: Denoiser, x_t: shapes.Batch, t: shapes.Times | shapes.Step
) -> tuple[Float32[Array, 'B *shape'], Float32[Array, 'B *shape'] | None]:
  """The network's prediction, and its output for a learned variance or None.

  Args:
    denoiser: the model.
    x_t: (B, ...).
    t: in 1..T of the denoiser's schedule, () or (B,). The network is given
      `schedule.time[t]`, its own time, which differs on a strided schedule.

  Returns:
    Both of the shape of x_t, in float32, whatever the network computes in.
  """
  time = jnp.broadcast_to(denoiser.schedule.time[t], len(x_t))
  return split(denoiser.network(x_t, time), x_t)


def split(
  out: Float[Array, 'B ...'], x_t: shapes.Batch
) -> tuple[Float32[Array, 'B *shape'], Float32[Array, 'B *shape'] | None]:
  """The output of a network, in its two parts; see `output`."""
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

  The mean is that of q(x_{t-1} | x_t, x̂_0), of the clipped x̂_0 where it is
  clipped. A network that predicts the mean itself is not clipped. Without
  clipping, and with ε predicted, the mean is eq. 11.

  Args:
    denoiser: the model.
    x_t: (B, ...).
    t: in 1..T, () or (B,).

  Returns:
    The mean, of the shape of x_t; the logarithm of the variance, which
    broadcasts against it; and x̂_0.
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
  """The same model in fewer steps; see `schedules.stride`.

  Raises:
    ValueError: if `steps` is not in 1..T.
  """
  schedule = schedules.stride(denoiser.schedule, steps, spacing)
  return denoiser._replace(schedule=schedule)
