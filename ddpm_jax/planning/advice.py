"""Suggests changes to a recipe whose programs do not fit in memory."""

import math
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import recipe
from ddpm_jax.parallel import meshes
from ddpm_jax.planning import measure
from ddpm_jax.planning import programs
from ddpm_jax.planning import topology as targets
from ddpm_jax.storage import logs


def of_training(
  config: ConfigDict,
  target: targets.Target,
  mesh: jax.sharding.Mesh,
  train: dict[str, Any],
) -> dict[str, Any] | None:
  """A change that should make the training step fit; None if it does."""
  return _first(
    *(config, target, mesh, train),
    programs.train,
    smaller(config, mesh),
    lambda c: 1 / c.accumulate,
  )


def of_sampling(
  config: ConfigDict,
  target: targets.Target,
  mesh: jax.sharding.Mesh,
  draw: dict[str, Any],
) -> dict[str, Any] | None:
  """Like `of_training`, for the sampler: fewer images at a time."""
  return _first(
    *(config, target, mesh, draw),
    programs.draw,
    fewer(draw['images'], meshes.num_shards(mesh)),
    lambda c: c.sampler.batch_size,
  )


def _first(
  config: ConfigDict,
  target: targets.Target,
  mesh: jax.sharding.Mesh,
  found: dict[str, Any],
  program: Callable[[ConfigDict, jax.sharding.Mesh], programs.Program],
  changes: Iterable[dict[str, Any]],
  share: Callable[[ConfigDict], float],
) -> dict[str, Any] | None:
  """Compiles the first change that is estimated to fit, or else the last.

  `share` of a recipe is proportional to the images that it processes at a time.
  """
  memory = target.chip.memory
  if not memory or found['fits'] or found['peak_bytes'] is None:
    return None
  change, other, estimate = {}, config, math.inf
  for change in changes:
    other = changed(config, change)
    estimate = estimated(mesh, found, other, share(other) / share(config))
    if estimate < 0.95 * memory:
      break
  if not change:
    return None
  flags = ' '.join(f'--config.{k}={str(v).lower()}' for k, v in change.items())
  logs.say(f'this does not fit in memory; compiling it with {flags}')
  devices = list(mesh.devices.flat)
  again = measure.program(
    program(other, build.mesh(other, devices=devices)), target
  )
  return {
    'change': flags,
    'estimated_bytes': None if other.model.remat else round(estimate),
    'peak_bytes': again['peak_bytes'],
    'fits': again['fits'],
  }


def smaller(
  config: ConfigDict, mesh: jax.sharding.Mesh
) -> Iterator[dict[str, Any]]:
  """Yields changes that need ever less memory for the same training."""
  parts, change = meshes.num_shards(mesh), {}
  if mesh.shape['fsdp'] < parts:
    change = {'parallel.data': 1, 'parallel.fsdp': parts}
    yield change
  rows, accumulate = config.batch_size // parts, config.accumulate
  for n in range(accumulate + 1, rows + 1):
    if rows % n == 0:
      change = change | {'accumulate': n}
      yield change
  yield change | {'model.remat': True}


def fewer(images: int, num_shards: int) -> Iterator[dict[str, Any]]:
  """Yields halved batch sizes, as long as each shard has an image."""
  while images // 2 >= num_shards:
    images //= 2
    yield {'sampler.batch_size': images}


def changed(config: ConfigDict, change: dict[str, Any]) -> ConfigDict:
  other = config.copy_and_resolve_references()
  recipe.override(other, {k: str(v) for k, v in change.items()})
  return other


def estimated(
  mesh: jax.sharding.Mesh,
  found: dict[str, Any],
  other: ConfigDict,
  share: float,
) -> float:
  """Estimates the peak bytes of one device.

  The sum of its shard of the state, the gathered weights, and activations in
  proportion to `share`. Savings by `model.remat` cannot be estimated and are
  not counted.
  """
  before, after = mesh.shape['fsdp'], max(other.parallel.fsdp, 1)
  state = found['state_bytes']
  if after == before:
    cut = state
  else:
    # One of the four parts (weights, average, two moments) is gathered.
    cut = state * before / after + state * before / 4
  return cut + (found['peak_bytes'] - state) * share
