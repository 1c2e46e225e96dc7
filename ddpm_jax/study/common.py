"""What figures share: a run that has been trained, and how they come back."""

import math
import pathlib
from collections.abc import Callable
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
from ddpm_jax import sampling
from ddpm_jax.diffusion import pixels
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import schedules as tables
from ddpm_jax.parallel import engines
from ddpm_jax.storage import logs


class Trained(NamedTuple):
  """A run that has been trained."""

  config: ConfigDict
  mesh: jax.sharding.Mesh
  params: Any  # the weights that sample
  seed: int
  workdir: pathlib.Path

  def map(self, fn: Callable[[Any, Any], Any], rows: Any) -> Any:
    """fn(params, rows) of arrays with a row an example, over all devices.

    Of a `sampling.Drawn` it gives the images.

    Raises:
      RunError: if one of them, or a number, is not finite.
    """
    engine, n = self.config.parallel.engine, len(jax.tree.leaves(rows)[0])
    # Filled up with copies of the last row, until all devices have as many.
    index = np.arange(math.ceil(n / self.mesh.size) * self.mesh.size)
    filled = jax.tree.map(lambda x: x[np.minimum(index, n - 1)], rows)
    compiled = engines.compile_map(
      fn, self.mesh, engine, self.params, name='the figure'
    )
    with logs.Progress('drawing', n) as bar:
      out = compiled(self.params, engines.put(filled, self.mesh, engine))
      bar.update(n)
    out = jax.tree.map(lambda x: x[:n], out)
    if isinstance(out, sampling.Drawn):
      runs.check_finite(np.asarray(out.bad_t))
      return out.images
    if not all(np.all(np.isfinite(x)) for x in jax.tree.leaves(out)):
      raise errors.RunError(
        'the figure would be of numbers that are not finite'
      )
    return out


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
