"""`--mode=few_steps`: what samplers make of how many looks at the network."""

import argparse
import dataclasses
import time
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax import plots
from ddpm_jax import run as runs
from ddpm_jax import samples
from ddpm_jax.diffusion import samplers
from ddpm_jax.diffusion import variances
from ddpm_jax.evaluation import small_data
from ddpm_jax.metrics import classifier as classifiers
from ddpm_jax.metrics import classifier_score
from ddpm_jax.storage import images
from ddpm_jax.storage import logs
from ddpm_jax.storage import results

EVALUATIONS = (5, 10, 20, 50, 100)  # of the network, an image
# All T as well: there the others are as good as ddim, and take long.
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
TABLES = 'tables'  # of `few_steps.json`, one for each way of measuring
COLUMNS = ('evaluations', 'frechet_distance', 'sure_share', 'images_per_second')

JOB = command.Job('compares samplers at few steps', writes=True)


def flags(p: Any) -> None:
  """Adds the flags of this mode."""
  command.num_samples(p, 'images of each sampler (default: 64)')
  p.set_defaults(num_samples=64)


def run(config: ConfigDict, args: argparse.Namespace) -> None:
  """Scores `--num_samples` images of every sampler at 5, 10, ..., T looks.

  Adds to `few_steps.json` in `--workdir`, writes `few_steps.png`, and prints a
  table in Markdown.

  Raises:
    UserError: if there is no run in `--workdir`, or its data have no labels.
  """
  if args.num_samples < classifier_score.LEAST:
    raise errors.UserError(
      f'--num_samples={args.num_samples}: a score needs '
      f'{classifier_score.LEAST}, and says little below 1000'
    )
  run = runs.load(config, args.workdir, seed=args.seed)
  data, classifier = small_data.judge(config, args.workdir)
  learnt, held_out = classifiers.split(len(data['image']))
  real = data['image'][learnt], data['label'][learnt]

  others = 'spacing', 'eta', 'variance'  # which the samplers here set
  options = samples.options(config)
  result: dict[str, Any] = {
    'step': run.step,
    'weights': run.weights,
    'seed': run.seed,
    'sampler_options': {k: options[k] for k in options if k not in others},
  }
  yardstick = classifier_score.score(*real, data['image'][held_out], classifier)
  result['held_out'] = {key: yardstick[key] for key in COLUMNS[1:3]}
  result['images'] = args.num_samples
  result['samplers'] = {}
  for title, changes in ways(config).items():
    result['samplers'][title] = {key: [] for key in COLUMNS}
    for n in looks(changes, config.schedule.T):
      c = changed(config, changes, n)
      drawn, rate = timed(dataclasses.replace(run, config=c), args.num_samples)
      score_of = classifier_score.score(*real, drawn, classifier)
      found = dict(errors.finite(score_of, 'score'))
      found['images_per_second'] = rate
      found['evaluations'] = evaluations(c)
      for key in COLUMNS:
        result['samplers'][title][key].append(found[key])
      logs.say(
        f'{title}: {found["evaluations"]} evaluations, Fréchet distance '
        f'{found["frechet_distance"]:.3f}, {rate:.1f} images/s'
      )
  path = args.workdir / 'few_steps.json'
  found_keys = ['held_out', 'samplers']
  results.add(path, TABLES, 'samplers', result, found_keys)
  images.save_png(args.workdir / 'few_steps.png', plot(result))
  print(table(result))
  logs.say(f'all of it            {path}')
  logs.say(f'as curves            {args.workdir}/few_steps.png')


def ways(config: ConfigDict) -> dict[str, dict[str, Any]]:
  """Those that the network was made for: a learned variance, or a fixed one.

  One that was learned of single steps says nothing of jumps.
  """
  variance = config.model.variance
  learns = variances.is_learned(variance)
  return {
    title: way
    for title, way in WAYS.items()
    if way['name'] != 'ancestral'
    or (('variance' in way) != learns and variance != 'learned')
  }


def looks(way: dict[str, Any], T: int) -> list[int]:
  """How many evaluations to try it with."""
  fewer = [n for n in EVALUATIONS if n < T]
  full = way['name'] in UP_TO_T and 'spacing' not in way
  return [*fewer, T] if full else fewer


def changed(config: ConfigDict, changes: dict[str, Any], n: int) -> ConfigDict:
  """The recipe with another sampler, of at most n evaluations."""
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
  """`count` images, and how many a second; compiling does not count."""
  draw = runs.sampler(run.config, run.engine, count)
  sizes, ends = [], []
  batches = []
  for batch, _ in draw(run.params, seed=run.seed):
    batches.append(batch)
    sizes.append(len(batch))
    ends.append(time.perf_counter())
  if len(sizes) == 1:  # Once more, for the program is compiled now.
    for _ in draw(run.params, seed=run.seed):
      sizes.append(sizes[0])
      ends.append(time.perf_counter())
  # The last batch may have been cut, but was drawn whole.
  rate = sizes[0] * (len(sizes) - 1) / (ends[-1] - ends[0])
  return np.concatenate(batches), rate


def table(result: dict[str, Any]) -> str:
  """For a person, in Markdown."""
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
    # With T of 5 or less all but the first have no row.
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
