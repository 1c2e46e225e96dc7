"""Edits of an image, as functions to compile.

Each returns a `sampling.Draw`, whose rows are those of `sampling.rows`, and a
description for a message.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import inputs
from ddpm_jax import recipe
from ddpm_jax import sampling
from ddpm_jax.diffusion import editing
from ddpm_jax.diffusion import pixels
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import samplers
from ddpm_jax.diffusion import schedules
from ddpm_jax.storage import outputs

Edit = tuple[sampling.Draw, str]


@dataclasses.dataclass(frozen=True)
class Request:
  """An edit and its files.

  Attributes:
    image: The image to edit.
    mask: The part to draw again; None for the whole.
    to: The image to turn into; None for none.
    strength: t / T of the noise that is added; see `varied`.
    invert: Whether to draw from the x_T that DDIM maps to the image.
  """

  image: pathlib.Path
  mask: pathlib.Path | None = None
  to: pathlib.Path | None = None
  strength: float = 0.5
  invert: bool = False

  @property
  def name(self) -> str:
    """The images and the edit, as a part of a file's name."""
    if self.mask:
      return f'{self.image.stem}_{self.mask.stem}'
    how = 'inverted' if self.invert else f'strength{self.strength:g}'
    return '_'.join(x.stem for x in (self.image, self.to) if x) + f'_{how}'

  def about(self, config: ConfigDict, count: int) -> outputs.About:
    """What is written into the JSON file beside `count` images."""
    files = {'image': self.image, 'mask': self.mask, 'to': self.to}
    about = {key: str(x.resolve()) for key, x in files.items() if x}
    if self.mask:
      return about | {'edit': dict(config.edit)}
    if self.to:
      about['order'] = f'image i has λ = i / {count - 1}'
    if self.invert:
      return about | {'invert': True}
    return about | {'strength': self.strength}

  def make(self, config: ConfigDict, count: int) -> Edit:
    """Reads the files, and returns the edit that draws `count` images.

    Raises:
      UserError: If a file cannot be read, or the mask does not fit.
    """
    height, width, channels = recipe.shape(config)
    shape, most = (height, width, channels), config.data.max_value

    def read(flag: str, path: pathlib.Path) -> jax.Array:
      image = inputs.opened(flag, path)
      return pixels.to_float(inputs.fitted(path, image, shape, most))

    x0 = read('image', self.image)
    if self.mask:
      return inpainted(config, x0, inputs.mask(self.mask, self.image, shape))
    other = read('to', self.to) if self.to else None
    if self.invert:
      return inverted(config, x0, other, count)
    if other is not None:
      return between(config, x0, other, self.strength, count)
    return varied(config, x0, self.strength)


def inpainted(config: ConfigDict, x0: jax.Array, mask: np.ndarray) -> Edit:
  """Draws the part of an image under a mask, and keeps the rest (RePaint).

  Args:
    config: The recipe.
    x0: (H, W, C), the image in [-1, 1].
    mask: bool (H, W, 1), true where the image is drawn.
  """
  p = build.sampler(config)
  times = build.call(editing.jumps, config.edit, p.schedule.T, of='edit')
  step = editing.inpaint(p.step, x0, jnp.asarray(mask))

  def draw(params: Any, rows: Any) -> sampling.Drawn:
    keys, x_T = sampling.noise(config, rows['seed'], rows['index'])
    denoiser = p.denoiser(params, rows.get('condition'))
    sampled = samplers.sample(step, denoiser, keys, x_T, times=times)
    return sampling.drawn(config, sampled)

  share = f'{np.count_nonzero(mask)} of {mask.size} pixels'
  what = f'drawing {share}, in {len(times)} steps'
  if config.edit.resample > 1 and len(times) == p.schedule.T:
    what += (
      f' (each once: edit.jump={config.edit.jump} is not below '
      f'sampler.steps={p.schedule.T})'
    )
  return draw, what


def varied(config: ConfigDict, x0: jax.Array, strength: float) -> Edit:
  """Draws variations of an image: q(x_t | x_0), then p (Meng et al. 2022).

  Args:
    config: The recipe.
    x0: (H, W, C), the image in [-1, 1].
    strength: t / T, from 0 (the image is kept) to 1 (it is forgotten).
  """
  p = build.sampler(config)
  t, time = level(config, p.schedule, strength)

  def start(rows: Any) -> tuple[jax.Array, jax.Array]:
    keys, eps = sampling.noise(config, rows['seed'], rows['index'])
    q_sample = jax.vmap(process.q_sample, (None, None, None, 0))
    return keys, q_sample(p.schedule, x0, jnp.array(t), eps)

  draw = _down_from(config, p, t, start)
  return draw, f'varying the image from t = {time} down, in {t} steps'


def between(
  config: ConfigDict,
  x0: jax.Array,
  other: jax.Array,
  strength: float,
  count: int,
) -> Edit:
  """Draws images between two, mixed at a noise level  (section 4.4).

  Image i has λ = i / (count - 1), and all have the same noise: so in the paper.
  One ε for both ends is our choice; see `editing.interpolate`.

  Args:
    config: The recipe.
    x0: (H, W, C), the image at λ = 0, in [-1, 1].
    other: (H, W, C), the image at λ = 1.
    strength: t / T at which they are mixed.
    count: Number of images, with both ends.
  """
  p = build.sampler(config)
  t, time = level(config, p.schedule, strength)
  mix = jax.vmap(editing.interpolate, (None, None, None, None, 0, 0))

  def start(rows: Any) -> tuple[jax.Array, jax.Array]:
    index = rows['index']
    keys, eps = sampling.noise(config, rows['seed'], jnp.zeros_like(index))
    weight = index / (count - 1)
    return keys, mix(p.schedule, x0, other, jnp.array(t), weight, eps)

  draw = _down_from(config, p, t, start)
  return draw, f'mixing the images at t = {time}, {t} steps each'


def _down_from(
  config: ConfigDict,
  p: build.Sampler,
  t: int,
  start: Callable[[Any], tuple[jax.Array, jax.Array]],
) -> sampling.Draw:
  """Draws from time t down; `start` maps rows to (keys, x_t)."""

  def draw(params: Any, rows: Any) -> sampling.Drawn:
    keys, x_t = start(rows)
    denoiser = p.denoiser(params, rows.get('condition'))
    times = range(t, 0, -1)
    sampled = samplers.sample(p.step, denoiser, keys, x_t, times=times)
    return sampling.drawn(config, sampled)

  return draw


def inverted(
  config: ConfigDict,
  x0: jax.Array,
  other: jax.Array | None = None,
  count: int = 1,
) -> Edit:
  """Draws from the x_T that DDIM maps to an image (Song et al. 2021, 4.3).

  The inversion is without a condition, so that a prompt or a label changes the
  image. With `other`, image i is drawn from the spherical interpolation of both
  x_T at λ = i / (count - 1)  (their eq. 67).

  Args:
    config: The recipe.
    x0: (H, W, C), the image in [-1, 1].
    other: (H, W, C), a second image; None for none.
    count: Number of images.
  """
  p, shape = build.sampler(config), recipe.shape(config)
  T = p.schedule.T

  def draw(params: Any, rows: Any) -> sampling.Drawn:
    keys, _ = sampling.noise(config, rows['seed'], rows['index'])
    # The inversion is the same for all rows: computed once for each image.
    ends = jnp.stack([x0] if other is None else [x0, other])
    x_T, _, bad = samplers.sample(
      *(editing.invert, p.denoiser(params), keys[: len(ends)], ends),
      times=range(1, T + 1),
    )
    if other is None:
      x_T = jnp.broadcast_to(x_T, (len(keys), *shape))
    else:
      weight = rows['index'] / (count - 1)
      x_T = jax.vmap(editing.slerp, (None, None, 0))(x_T[0], x_T[1], weight)
    denoiser = p.denoiser(params, rows.get('condition'))
    sampled = samplers.sample(samplers.ddim, denoiser, keys, x_T)
    worst = jnp.maximum(sampled.bad_t, jnp.max(bad))
    return sampling.drawn(config, sampled._replace(bad_t=worst))

  what = (
    'mixing the images at' if other is not None else 'inverting the image to'
  )
  return draw, f'{what} x_T, {T} steps of DDIM each way'


def level(
  config: ConfigDict, schedule: schedules.Schedule, strength: float
) -> tuple[int, int]:
  """The first step whose time is at least strength · T, and that time."""
  times = np.asarray(schedule.time)
  t = int(np.searchsorted(times, strength * config.schedule.T))
  t = min(max(t, 1), schedule.T)
  return t, int(times[t])
