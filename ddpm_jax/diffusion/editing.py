"""What can be made of given images: chains entered, left and mixed midway.

All of it is run by `samplers.sample`: a function here makes a step of a step,
the x_t to begin with, or the times to visit.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import Key

from ddpm_jax.diffusion import predictions
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import samplers
from ddpm_jax.diffusion import schedules


def between(
  step: samplers.Step,
  first: Int[Array, '*#B'] | int,
  last: Int[Array, '*#B'] | int = 1,
) -> samplers.Step:
  """A sampler's `step` from `first` down to `last`, each row's own.

  Before and after that x_t waits. So rows that begin or end at different times
  are one scan and one program; `samplers.sample` has such a part for all alike.
  What was found while a row waited is kept from it.
  """

  def part(
    schedule: schedules.Schedule,
    model_fn: process.ModelFn,
    keys: Key[Array, 'B'],
    x_t: Float[Array, 'B *shape'],
    t: Int[Array, ''],
    before: samplers.Before,
  ) -> tuple[Float[Array, 'B *shape'], Float[Array, 'B *shape']]:
    before = before._replace(t=jnp.where(t < first, before.t, 0))
    x_prev, x0_hat = step(schedule, model_fn, keys, x_t, t, before)
    moves = jnp.broadcast_to((t <= first) & (t >= last), len(x_t))
    rows = moves.reshape(-1, *[1] * (x_t.ndim - 1))
    return jnp.where(rows, x_prev, x_t), x0_hat

  return part


def interpolate(
  schedule: schedules.Schedule,
  x0: process.XLike,
  other: process.XLike,
  t: process.Time,
  weight: Float[Array, ''] | float,
  eps: process.XLike,
) -> process.X:
  """(1-λ) x_t + λ x'_t of two images  (section 4.4).

  One ε for both ends is our choice: the paper draws x_t and x'_t of q, each
  with its own, and then a mixture is less noisy than x_t is.
  """
  x_t = process.q_sample(schedule, x0, t, eps)
  other_t = process.q_sample(schedule, other, t, eps)
  return (1 - weight) * x_t + weight * other_t


def inpaint(
  step: samplers.Step, x0: Float[Array, '*shape'], mask: Bool[Array, '*#shape']
) -> samplers.Step:
  """A sampler's `step` that makes a part of an image anew and keeps the rest.

  After each step x_{t-1} of what is known is drawn from q, down to x_0 itself
  (Lugmayr et al. 2022, RePaint, eq. 8). Where t lies above the level that the
  step before has left, noise is added first, so that `jumps` may be visited.

  Args:
    step: such as `samplers.ancestral`.
    x0: the image, in [-1, 1].
    mask: where to make it anew.
  """

  def part(
    schedule: schedules.Schedule,
    model_fn: process.ModelFn,
    keys: Key[Array, 'B'],
    x_t: Float[Array, 'B *shape'],
    t: Int[Array, ''],
    before: samplers.Before,
  ) -> tuple[Float[Array, 'B *shape'], Float[Array, 'B *shape']]:
    split = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
    k_step, k_up, k_known = split[:, 0], split[:, 1], split[:, 2]
    shape = x_t.shape[1:]
    level = jnp.where(before.t > 0, before.t - 1, t)
    higher = jax.vmap(process.q_between, (None, 0, 0, None, 0))(
      schedule, x_t, level, t, process.normal(k_up, shape)
    )
    below = (level < t).reshape(-1, *[1] * len(shape))
    x_t = jnp.where(below, higher, x_t)
    x_prev, x0_hat = step(schedule, model_fn, k_step, x_t, t, before)
    eps = process.normal(k_known, shape)
    known = jax.vmap(process.q_sample, (None, None, None, 0))(
      schedule, x0, t - 1, eps
    )
    return jnp.where(mask[None], x_prev, known), x0_hat

  return part


def jumps(T: int, jump: int = 10, resample: int = 10) -> list[int]:
  """RePaint's order of steps: the t of each step x_t -> x_{t-1}.

  From T down to 1; on reaching x_t for t = 1, 1 + jump, 1 + 2 jump, ... below
  1 + T - jump the chain goes back up by `jump`, `resample` - 1 times each
  (Lugmayr et al. 2022, appendix B, and their code). So the steps above the
  highest of these jumps are taken once, and so is that to the clean image.

  Raises:
    ValueError: if either is not positive.
  """
  if jump < 1 or resample < 1:
    raise ValueError(f'jump={jump} and resample={resample} must be at least 1')
  left = {1 + t: resample - 1 for t in range(0, T - jump, jump)}
  times, t = [], T
  while t > 0:
    if left.get(t, 0):
      left[t] -= 1
      t += jump
    else:
      times.append(t)
      t -= 1
  return times


def invert(
  schedule: schedules.Schedule,
  model_fn: process.ModelFn,
  keys: Key[Array, 'B'],
  x_prev: Float[Array, 'B *shape'],
  t: Int[Array, ''],
  before: samplers.Before | None = None,
  *,
  predict: predictions.Prediction = predictions.eps,
) -> tuple[Float[Array, 'B *shape'], Float[Array, 'B *shape']]:
  """x_t of x_{t-1}, from which `samplers.ddim` leads back, with η = 0.

  At the times 1, ..., T it makes x_T of x_0  (Song et al. 2021, section 4.3).
  ε̂ is taken at x_{t-1}, told t, so the way back is exact to order 1.
  """
  del keys, before
  out = model_fn(x_prev, jnp.full(len(x_prev), t))
  x0_hat = process.to_x0(schedule, out, x_prev, t, predict=predict, clip=False)
  signal = schedule.sqrt_alpha_bar
  noise = jnp.sqrt(schedule.one_minus_alpha_bar)
  eps = (x_prev - signal[t] * x0_hat) / noise[t]
  x0_hat = (x_prev - noise[t - 1] * eps) / signal[t - 1]
  return signal[t] * x0_hat + noise[t] * eps, x0_hat
