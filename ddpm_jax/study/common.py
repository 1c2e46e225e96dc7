"""Code shared by the figures: the type that they return, and their data."""

from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import dataset
from ddpm_jax import errors
from ddpm_jax import run as runs
from ddpm_jax.diffusion import pixels
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import schedules as tables

Run = runs.Run


class Drawn(NamedTuple):
  """A figure: any of a plot, a labelled grid below it, and an animation."""

  tiles: np.ndarray | None = None  # uint8 (rows, columns, H, W, C)
  titles: Sequence[str] = ()  # of columns
  labels: Sequence[str] = ()  # of rows
  plot: np.ndarray | None = None  # uint8 (height, width, 3)
  frames: np.ndarray | None = None  # uint8 (F, rows, columns, H, W, C)
  heads: Sequence[str] = ()  # F titles of frames


def spread(T: int, n: int) -> list[int]:
  """n + 1 evenly spaced times from 0 to T; fewer if T < n."""
  return sorted({round(T * k / n) for k in range(n + 1)})


def real(config: ConfigDict, seed: int, count: int) -> np.ndarray:
  """`count` random images of the evaluation split, uint8, or all if fewer."""
  source, _ = dataset.source_to_evaluate(config)
  return source.gather(some(len(source), seed, count))['image']


def need_two(figure: str, count: int) -> None:
  """Checks that a figure of variances over images has at least two images.

  Raises:
    UserError: If `count` is below 2.
  """
  if count < 2:
    raise errors.UserError(
      f'--figure={figure} shows variances over images, and needs 2 or more'
    )


def some(n: int, seed: int, count: int) -> np.ndarray:
  """`count` random indices below n, without repeats; all if n < `count`."""
  index = np.random.default_rng(seed).permutation(n)[:count]
  return index.astype(np.int32)


def noised(
  table: tables.Schedule, x0: Any, times: Any, eps: jax.Array
) -> np.ndarray:
  """uint8 x_t of uint8 images, (images, times, H, W, C)  (eq. 4)."""
  over_times = jax.vmap(process.q_sample, (None, None, 0, None))
  over_images = jax.vmap(over_times, (None, 0, None, 0))
  x_t = over_images(table, pixels.to_float(jnp.asarray(x0)), times, eps)
  return np.asarray(pixels.to_uint8(x_t))
