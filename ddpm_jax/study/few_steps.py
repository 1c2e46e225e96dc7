"""Scores of samplers by network evaluations."""

import time
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import drawing
from ddpm_jax import plots
from ddpm_jax import run as runs
from ddpm_jax.diffusion import samplers
from ddpm_jax.diffusion import variances

EVALUATIONS = (5, 10, 20, 50, 100)  # of the network, per image
# Samplers to score at T steps too. The others, which take long there, are as
# good as ddim.
UP_TO_T = ('ancestral', 'ddim')
WAYS: dict[str, dict[str, Any]] = {
  'ancestral, σ² = β': dict(name='ancestral', variance='beta'),
  'ancestral, σ² = β̃': dict(name='ancestral', variance='beta_tilde'),
  'ancestral, learned σ²': dict(name='ancestral'),
  'ddim': dict(name='ddim'),
  'ddim, quadratic': dict(name='ddim', spacing='quadratic'),
  'dpm_solver_pp_2m': dict(name='dpm_solver_pp_2m'),
  'dpm_solver_pp_2m, quadratic': dict(
    name='dpm_solver_pp_2m', spacing='quadratic'
  ),
  'dpm_solver_pp_2m_sde': dict(name='dpm_solver_pp_2m_sde'),
  'dpm_solver_pp_2m_sde, quadratic': dict(
    name='dpm_solver_pp_2m_sde', spacing='quadratic'
  ),
  'heun': dict(name='heun'),
  'heun, quadratic': dict(name='heun', spacing='quadratic'),
}
TABLES = 'tables'  # the list in `few_steps.json`: a table for each setting
COLUMNS = ('evaluations', 'frechet_distance', 'sure_share', 'images_per_second')


def ways(config: ConfigDict) -> dict[str, dict[str, Any]]:
  """Returns the samplers that fit the network's variance, learned or fixed.

  A variance that was learned for single steps does not fit longer ones.
  """
  variance = config.model.variance
  learns = variances.is_learned(variance)
  return {
    title: way
    for title, way in WAYS.items()
    if way['name'] != 'ancestral'
    or (('variance' in way) != learns and variance != 'learned')
  }


def budgets(way: dict[str, Any], T: int) -> list[int]:
  """Returns the numbers of evaluations to score a sampler at."""
  fewer = [n for n in EVALUATIONS if n < T]
  full = way['name'] in UP_TO_T and 'spacing' not in way
  return [*fewer, T] if full else fewer


def changed(config: ConfigDict, changes: dict[str, Any], n: int) -> ConfigDict:
  """Returns the recipe with another sampler, of at most n evaluations."""
  c = config.copy_and_resolve_references()
  c.sampler.spacing, c.sampler.eta = 'linear', 0.0
  c.sampler.update(changes)
  c.sampler.steps = n
  if evaluations(c) > n:
    c.sampler.steps = (n + 1) // 2
  return c


def evaluations(config: ConfigDict) -> int:
  return samplers.nfe(config.sampler.name, config.sampler.steps)


def timed(run: runs.Run, count: int) -> tuple[np.ndarray, float]:
  """Returns `count` images, and images per second without compilation."""
  draw = drawing.sampler(run.config, run.engine, count)
  sizes, ends = [], []
  batches = []
  for batch, _ in draw(run.params, seed=run.seed):
    batches.append(batch)
    sizes.append(len(batch))
    ends.append(time.perf_counter())
  if len(sizes) == 1:  # Draw again, as the first batch included compilation.
    for _ in draw(run.params, seed=run.seed):
      sizes.append(sizes[0])
      ends.append(time.perf_counter())
  # The last batch was drawn in full, even if it is shorter.
  rate = sizes[0] * (len(sizes) - 1) / (ends[-1] - ends[0])
  return np.concatenate(batches), rate


def table(result: dict[str, Any]) -> str:
  """Formats the results as a table in Markdown."""
  rows = result['samplers']
  most = max((row['evaluations'] for row in rows.values()), key=len)
  columns = range(len(most))

  def line(title: str, cells: list[str]) -> str:
    cells += [''] * (len(most) - len(cells))
    return f'| {title} | {" | ".join(cells)} |'

  lines = [line('evaluations', [str(n) for n in most])]
  lines.append('|---|' + '---|' * len(most))
  for title, row in rows.items():
    lines.append(line(title, [f'{x:.2f}' for x in row['frechet_distance']]))
  rates = [row['images_per_second'] for row in rows.values()]
  middle = [
    np.median([row[i] for row in rates if i < len(row)]) for i in columns
  ]
  lines.append(line('images/s, median', [f'{x:.3g}' for x in middle]))
  held_out = result['held_out']['frechet_distance']
  return '\n'.join(
    [
      *lines,
      '',
      f'Fréchet distance (classifier) of {result["images"]} samples; of '
      f'held-out real images {held_out:.2f}. heun takes an odd number: one '
      'less where the column is even.',
    ]
  )


def plot(result: dict[str, Any]) -> np.ndarray:
  keys = {
    'frechet_distance': 'Fréchet distance (classifier)',
    'images_per_second': 'images/s',
  }
  panels = []
  for key, words in keys.items():
    rows = result['samplers'].items()
    # If T ≤ 5, only `UP_TO_T` have results.
    curves = {
      title: (np.array(row['evaluations']), np.array(row[key]))
      for title, row in rows
      if row['evaluations']
    }
    low = min(y.min() for _, y in curves.values())
    panels += [
      plots.Panel('evaluations', words, curves, bottom=low / 1.5, log_x=True)
    ]
  return plots.plot(panels)
