"""The weights to evaluate: EMA or raw, of the newest checkpoint or another."""

import argparse
import functools
import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict

from ddpm_jax import errors
from ddpm_jax import functions
from ddpm_jax.jobs import sample
from ddpm_jax.jobs import train
from ddpm_jax.runtime import checkpoint
from ddpm_jax.runtime import parallel


def restore(
  config: ConfigDict, mesh: jax.sharding.Mesh, args: argparse.Namespace
) -> tuple[str, int, Any]:
  """What to call the weights, their step, and the weights."""
  known = {'ema': ('EMA', sample.restore_ema), 'raw': ('raw', raw)}
  if config.evaluate.weights not in known:
    raise errors.unknown('kind of weights', config.evaluate.weights, known)
  kind, function = known[config.evaluate.weights]
  return kind, *function(config, mesh, args.workdir, args.step)


def raw(
  config: ConfigDict,
  mesh: jax.sharding.Mesh,
  folder: pathlib.Path,
  step: int | None = None,
) -> tuple[int, Any]:
  """(step, weights) as they were trained, without averaging."""
  init = functools.partial(functions.init_state, config)
  abstract = parallel.abstract_state(init, mesh)
  step, state = checkpoint.restore_item(
    folder / 'checkpoints', 'state', train.trained(abstract), step
  )
  return step, state['params']
