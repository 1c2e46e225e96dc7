"""Editing of images: sampling that begins, ends or is mixed on the way.

`samplers.sample` runs all of it, with a step, an x_t or times from here.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from ddpm_jax.diffusion import denoiser as denoisers
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import samplers
from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import shapes


def between(
  step: samplers.Step,
  first: Int[Array, '*#B'] | int,
  last: Int[Array, '*#B'] | int = 1,
) -> samplers.Step:
  """`step` from t = `first` down to t = `last`, of each example its own.

  At other times x_t is returned unchanged. So examples that begin or end at
  different times are sampled by one scan and one program.
  """

  def part(
    denoiser: denoisers.Denoiser,
    keys: shapes.Keys,
    x_t: shapes.Batch,
    t: shapes.Step,
    previous: samplers.Previous,
  ) -> tuple[shapes.Batch, shapes.Batch]:
    # What was predicted from an unchanged x_t is no step to look back at.
    previous = previous._replace(t=jnp.where(t < first, previous.t, 0))
    x_prev, x0_hat = step(denoiser, keys, x_t, t, previous)
    moves = jnp.broadcast_to((t <= first) & (t >= last), len(x_t))
    return jnp.where(process.per_example(moves, x_t), x_prev, x_t), x0_hat

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

  Both have the same ε, which is our choice: the paper draws one for each, and
  then their mixture is less noisy than x_t.
  """
  x_t = process.q_sample(schedule, x0, t, eps)
  other_t = process.q_sample(schedule, other, t, eps)
  return (1 - weight) * x_t + weight * other_t


def inpaint(
  step: samplers.Step, x0: Float[Array, '*shape'], mask: Bool[Array, '*#shape']
) -> samplers.Step:
  """`step` that makes the masked part of an image anew and keeps the rest.

  After each step x_{t-1} of the known part is drawn from q, down to x_0 itself
  (Lugmayr et al. 2022, RePaint, eq. 8). Where t is above the level that the
  previous step left, noise is added first, so that `jumps` can be visited.

  Args:
    step: such as `samplers.ancestral`.
    x0: the image, in [-1, 1].
    mask: True where it is made anew.
  """

  def part(
    denoiser: denoisers.Denoiser,
    keys: shapes.Keys,
    x_t: shapes.Batch,
    t: shapes.Step,
    previous: samplers.Previous,
  ) -> tuple[shapes.Batch, shapes.Batch]:
    split = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
    k_step, k_up, k_known = split[:, 0], split[:, 1], split[:, 2]
    schedule, shape = denoiser.schedule, x_t.shape[1:]
    level = jnp.where(previous.t > 0, previous.t - 1, t)
    eps = process.normal(k_up, shape)
    higher = jax.vmap(process.q_between, (None, 0, 0, None, 0))(
      schedule, x_t, level, t, eps
    )
    x_t = jnp.where(process.per_example(level < t, x_t), higher, x_t)
    x_prev, x0_hat = step(denoiser, k_step, x_t, t, previous)
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
  denoiser: denoisers.Denoiser,
  keys: shapes.Keys,
  x_prev: shapes.Batch,
  t: shapes.Step,
  previous: samplers.Previous | None = None,
) -> tuple[shapes.Batch, shapes.Batch]:
  """x_t from x_{t-1}: a step of `samplers.ddim` with η = 0, backwards.

  At the times 1, ..., T it makes x_T of x_0  (Song et al. 2021, section 4.3).
  ε̂ is predicted from x_{t-1} at time t, so it is exact to order 1.
  """
  del keys, previous
  open_ = denoiser._replace(clip=False)
  x0_hat = denoisers.x0_hat(open_, x_prev, t)
  signal = denoiser.schedule.sqrt_alpha_bar
  noise = jnp.sqrt(denoiser.schedule.one_minus_alpha_bar)
  eps = (x_prev - signal[t] * x0_hat) / noise[t]
  x0_hat = (x_prev - noise[t - 1] * eps) / signal[t - 1]
  return signal[t] * x0_hat + noise[t] * eps, x0_hat


def slerp(a: shapes.X, b: shapes.X, weight: Float[Array, '']) -> shapes.X:
  """Spherical interpolation of two x_T  (Song et al. 2021, eq. 67).

  Args:
    a: The array at weight 0.
    b: The array at weight 1.
    weight: In [0, 1].
  """
  cos = jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b))
  angle = jnp.arccos(jnp.clip(cos, -1 + 1e-6, 1 - 1e-6))
  return (
    jnp.sin((1 - weight) * angle) * a + jnp.sin(weight * angle) * b
  ) / jnp.sin(angle)
