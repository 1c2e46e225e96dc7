"""What figures share: a run that has been trained, and how they come back."""

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
  """A figure: tiles, with words to them, below a plot; perhaps a film."""

  tiles: np.ndarray | None = None  # uint8 (rows, columns, H, W, C)
  titles: Sequence[str] = ()  # of the columns
  labels: Sequence[str] = ()  # of the rows
  plot: np.ndarray | None = None
  # Frames (F, rows, columns, H, W, C), and what stands above each.
  frames: np.ndarray | None = None
  heads: Sequence[str] = ()


def spread(T: int, n: int) -> list[int]:
  """n + 1 times from 0 to T, evenly; fewer if T is smaller."""
  return sorted({round(T * k / n) for k in range(n + 1)})


def real(config: ConfigDict, seed: int, count: int) -> np.ndarray:
  """Some images of the split to evaluate on, uint8; all if they are fewer."""
  source, _ = dataset.source_to_evaluate(config)
  return source.gather(some(len(source), seed, count))['image']


def need_two(figure: str, count: int) -> None:
  """Refuses a figure of variances that would be of one image.

  Raises:
    UserError: if `count` is below 2.
  """
  if count < 2:
    raise errors.UserError(
      f'--figure={figure} is of variances over images, and needs 2 or more'
    )


def some(n: int, seed: int, count: int) -> np.ndarray:
  """`count` of n, in random order; all if they are fewer."""
  index = np.random.default_rng(seed).permutation(n)[:count]
  return index.astype(np.int32)


def noised(
  table: tables.Schedule, x0: Any, times: Any, eps: jax.Array
) -> np.ndarray:
  """uint8 x_t of uint8 images, (images, times, H, W, C)  (eq. 4).

  On one device: there is no network in it.
  """
  over_times = jax.vmap(process.q_sample, (None, None, 0, None))
  over_images = jax.vmap(over_times, (None, 0, None, 0))
  x_t = over_images(table, pixels.to_float(jnp.asarray(x0)), times, eps)
  return np.asarray(pixels.to_uint8(x_t))
