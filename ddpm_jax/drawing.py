"""Draws many images in batches, on all devices."""

import functools
import math
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import errors
from ddpm_jax import sampling
from ddpm_jax.parallel import engines
from ddpm_jax.parallel import meshes
from ddpm_jax.storage import logs

# (params, condition) -> batches of arrays with a row for each image
Batches = Callable[..., Iterator[Any]]


def at_a_time(config: ConfigDict, mesh: jax.sharding.Mesh, count: int) -> int:
  """The batch size for drawing `count` images."""
  n = meshes.num_shards(mesh)
  return math.ceil(min(count, config.sampler.batch_size) / n) * n


def drawer(
  config: ConfigDict,
  engine: engines.Engine,
  count: int,
  draw: sampling.Draw,
  name: str = 'the sampler',
) -> tuple[int, Callable[..., sampling.Drawn]]:
  """Compiles `draw` for batches.

  Args:
    config: The recipe.
    engine: The compiler.
    count: Number of images in all.
    draw: (params, rows) -> `sampling.Drawn`, for rows of `sampling.rows`.
    name: Name of `draw` in messages.

  Returns:
    The batch size b, and batch(params, seed, start, condition=None) for the
    images from `start` on. `condition` has a row for each of the `count`
    images. It raises RunError for images that are not finite.
  """
  size = at_a_time(config, engine.mesh, count)
  init = functools.partial(build.init_state, config)
  compiled = engine.compile_map(
    draw, jax.eval_shape(init).ema_params, name=name
  )

  def batch(
    params: Any, seed: int, start: int, condition: Any = None
  ) -> sampling.Drawn:
    index = np.arange(start, start + size, dtype=np.int32)
    at = np.minimum(index, count - 1)
    rows = sampling.rows(seed, index, jax.tree.map(lambda x: x[at], condition))
    drawn = compiled(params, engine.put_whole(rows))
    check_finite(drawn.bad_t[: count - start], start)
    return drawn

  return size, batch


def check_finite(bad_t: np.ndarray, start: int = 0) -> None:
  """Refuses images that were not finite at some t.

  Args:
    bad_t: (n,), of each image; see `samplers.Sampled`.
    start: The index of the first image.

  Raises:
    RunError: Naming the first such image, and t.
  """
  if np.any(bad_t):
    i = int(np.flatnonzero(bad_t)[0])
    raise errors.RunError(
      f'image {start + i} is not finite from t = {bad_t[i]} on; nothing of it '
      'is written. Try --config.model.dtype=float32, another sampler, or an '
      'earlier checkpoint'
    )


def in_batches(
  config: ConfigDict,
  engine: engines.Engine,
  count: int,
  draw: sampling.Draw,
  name: str = 'the sampler',
) -> Batches:
  """`drawer` for all batches, with a progress bar.

  Returns:
    A function (params, condition=None, *, seed) -> `sampling.Drawn` by batch.
  """
  size, batch = drawer(config, engine, count, draw, name)

  def drawn(params: Any, condition: Any, seed: int) -> Iterator[Any]:
    for start in range(0, count, size):
      # The last batch has the size of the others, so that one program does for
      # all, and is cut.
      full = batch(params, seed, start, condition)
      yield jax.tree.map(lambda x, real=count - start: x[:real], full)

  def watched(
    params: Any, condition: Any = None, *, seed: int
  ) -> Iterator[Any]:
    return logs.watched(drawn(params, condition, seed), 'drawing', count)

  return watched


def sampler(
  config: ConfigDict,
  engine: engines.Engine,
  count: int,
  cache: dict[Any, Any] | None = None,
  *,
  snapshots: int = 0,
) -> Batches:
  """Compiles the recipe's sampler for `count` images.

  Args:
    config: The recipe.
    engine: The compiler.
    count: Number of images.
    cache: Keeps what is compiled, for later calls.
    snapshots: The number K of predictions on the way.

  Returns:
    A function (params, condition=None, *, seed) -> images (b, H, W, C) and
    predictions (b, K, H, W, C), both uint8, batch by batch.
  """

  def compiled() -> Batches:
    shard = functools.partial(meshes.shard_rows, mesh=engine.mesh)
    draw = sampling.sampler(config, snapshots=snapshots, shard=shard)
    return in_batches(config, engine, count, draw)

  cache = {} if cache is None else cache
  batches = cached(cache, config, ('sample', count, snapshots), compiled)

  def pairs(params: Any, condition: Any = None, *, seed: int) -> Iterator[Any]:
    for drawn in batches(params, condition, seed=seed):
      yield drawn.images, drawn.x0_hats

  return pairs


def cached(
  cache: dict[Any, Any],
  config: ConfigDict,
  key: Any,
  make: Callable[[], Any],
) -> Any:
  """What `make` returned for this recipe and key, or returns now."""
  whole = (config.to_json(), key)
  if whole not in cache:
    cache[whole] = make()
  return cache[whole]


def gather(batches: Iterator[Any]) -> Any:
  """Concatenates batches."""
  return jax.tree.map(lambda *x: np.concatenate(x), *batches)
