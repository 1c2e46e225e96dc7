"""The images that a run draws while it trains and at its end."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import dataset
from ddpm_jax import drawing
from ddpm_jax import errors
from ddpm_jax import plots
from ddpm_jax import recipe
from ddpm_jax import sampling
from ddpm_jax import validate
from ddpm_jax.data import store
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import schedules
from ddpm_jax.metrics import distances
from ddpm_jax.parallel import engines
from ddpm_jax.parallel import processes
from ddpm_jax.storage import images
from ddpm_jax.storage import logs

POINTS = 2000  # Points of the data, and samples, in a plot.

# (weights, suffix): writes the files of `paths`.
Preview = Callable[[Any, str], None]


def paths(folder: pathlib.Path, suffix: str = '') -> dict[str, pathlib.Path]:
  """The files of a preview by name: samples, and how they develop over t."""
  names = ('samples', 'progress')
  return {name: folder / f'{name}{suffix}.png' for name in names}


def in_training(config: ConfigDict) -> ConfigDict:
  """Returns the recipe of the grids that are drawn while a run trains.

  It takes `log.pictures_steps` steps, unless the model cannot skip steps.
  """
  steps = config.log.pictures_steps
  if not config.log.pictures_every or not 0 < steps < config.sampler.steps:
    return config
  fewer = recipe.changed_copy(config, {'sampler.steps': steps})
  try:
    validate.check(fewer)
  except errors.UserError as e:
    logs.say(
      f'grids take {config.sampler.steps} steps, and not '
      f'config.log.pictures_steps={steps}: {e}'
    )
    return config
  return fewer


def drawer(
  config: ConfigDict,
  engine: engines.Engine,
  folder: pathlib.Path,
  count: int,
  source: store.Source,
) -> Preview:
  """Returns (weights, suffix) -> None, which writes the preview's files.

  progress.png shows x̂_0 at ten times, for eight of the samples.

  Args:
    config: The recipe.
    engine: The compiler.
    folder: The workdir.
    count: Number of samples.
    source: The data, whose texts are the prompts of a model of texts.
  """
  if not recipe.image_size(config):
    return _point_drawer(config, engine, folder, source)
  condition = dataset.of_data(config, source, count)
  snapshots = min(10, config.sampler.steps)
  draw = drawing.sampler(config, engine, count, snapshots=snapshots)

  def preview(params: Any, suffix: str) -> None:
    tiles, seen = drawing.gather(draw(params, condition, seed=config.seed))
    if not processes.is_primary():
      return
    rows = seen[:8].reshape(-1, *tiles.shape[1:])
    files = paths(folder, suffix)
    images.save_png(files['samples'], images.grid(tiles))
    images.save_png(files['progress'], images.grid(rows, columns=snapshots))

  return preview


def _point_drawer(
  config: ConfigDict,
  engine: engines.Engine,
  folder: pathlib.Path,
  source: store.Source,
) -> Preview:
  """`drawer` for points: the forward and the reverse process at ten times.

  Prints a two-sample test: the energy distance of samples and data, and the
  probability of a larger one if both had one distribution.
  """
  n = POINTS // engine.mesh.size * engine.mesh.size
  schedule = build.schedule(config)
  steps, times = preview_times(build.sampler(config).schedule)
  data = source.gather(np.arange(n))['image']
  rows = engine.put_whole(sampling.rows(config.seed, np.arange(n)))
  eps = np.random.default_rng(config.seed).normal(size=data.shape)
  forward = [
    np.asarray(process.q_sample(schedule, data, t, eps)) for t in times
  ]
  init = functools.partial(build.init_state, config)
  draw = engine.compile_map(
    sampling.chain(config, steps),
    jax.eval_shape(init).ema_params,
    name='the sampler',
  )

  def preview(params: Any, suffix: str) -> None:
    chains = draw(params, rows)
    drawing.check_finite(chains.bad_t)
    reverse = list(chains.images.swapaxes(0, 1))
    if not processes.is_primary():
      return
    titles = [f't = {t}' for t in times]
    for ending in ('png', 'gif'):
      path = folder / f'progress{suffix}.{ending}'
      sets = {'q': forward, 'p': reverse}
      plots.save_scatter(path, sets, titles, forward)
    plots.save_scatter(
      folder / f'samples{suffix}.png',
      {'': [data, reverse[-1]]},
      ['data', 'samples'],
      [data],
    )
    rng = np.random.default_rng(config.seed)
    distance = distances.energy(data, reverse[-1])
    p_value = distances.energy_p_value(rng, data, reverse[-1], permutations=199)
    logs.result(f'energy distance {distance:.5f}, p = {p_value:.3f}, n = {n}')

  return preview


def preview_times(schedule: schedules.Schedule) -> tuple[list[int], list[int]]:
  """Up to ten steps of a sampler's schedule, from the last to 0, and their t.

  They are denser towards 0, where the shape appears.
  """
  T = schedule.T
  steps = sorted({round(T * (k / 9) ** 2) for k in range(10)}, reverse=True)
  return steps, np.asarray(schedule.time)[steps].tolist()
