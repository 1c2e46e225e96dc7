"""What to change in a recipe whose training step does not fit."""

import math
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import recipe
from ddpm_jax.jobs.plan import measure
from ddpm_jax.jobs.plan import programs
from ddpm_jax.runtime import logs
from ddpm_jax.runtime import parallel
from ddpm_jax.runtime import target as targets


def find(
  config: ConfigDict,
  target: targets.Target,
  mesh: jax.sharding.Mesh,
  train: dict[str, Any],
) -> dict[str, Any] | None:
  """A change with which the training step should fit; None if it does.

  The first of `smaller` that should do by estimate, or else the last, is
  compiled too.
  """
  memory = target.chip.memory
  if not memory or train['fits'] or train['peak_bytes'] is None:
    return None
  change, other, estimate = {}, config, math.inf
  for change in smaller(config, mesh):
    other = changed(config, change)
    estimate = estimated(config, mesh, train, other)
    if estimate < 0.95 * memory:
      break
  flags = ' '.join(f'--config.{k}={str(v).lower()}' for k, v in change.items())
  logs.say(f'it does not fit; compiling it with {flags}')
  devices = list(mesh.devices.flat)
  again = measure.program(
    programs.train(other, build.mesh(other, devices=devices)), target
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
  """Changes that need less and less memory for the same training."""
  parts, change = parallel.parts(mesh), {}
  if mesh.shape['fsdp'] < parts:
    change = {'parallel.data': 1, 'parallel.fsdp': parts}
    yield change
  rows, accumulate = config.batch_size // parts, config.accumulate
  for n in range(accumulate + 1, rows + 1):
    if rows % n == 0:
      change = change | {'accumulate': n}
      yield change
  yield change | {'model.remat': True}


def changed(config: ConfigDict, change: dict[str, Any]) -> ConfigDict:
  other = config.copy_and_resolve_references()
  recipe.override(other, {k: str(v) for k, v in change.items()})
  return other


def estimated(
  config: ConfigDict,
  mesh: jax.sharding.Mesh,
  train: dict[str, Any],
  other: ConfigDict,
) -> float:
  """Bytes of a device: the state as it is cut, the weights whole, and
  activations in proportion to the images that are worked on at a time.

  What recomputing blocks saves is not known before; it is not counted.
  """
  before, after = mesh.shape['fsdp'], max(other.parallel.fsdp, 1)
  state = train['state_bytes']
  if after == before:
    cut = state
  else:
    # Of the four parts (weights, average, two moments) one is gathered.
    cut = state * before / after + state * before / 4
  activations = train['peak_bytes'] - state
  return cut + activations * config.accumulate / other.accumulate
