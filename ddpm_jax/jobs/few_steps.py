"""`--mode=few_steps`: scores samplers at few network evaluations."""

import argparse
import dataclasses
from typing import Any

from ml_collections import ConfigDict

from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax import run as runs
from ddpm_jax import samples
from ddpm_jax.evaluation import small_data
from ddpm_jax.metrics import classifier as classifiers
from ddpm_jax.metrics import classifier_score
from ddpm_jax.storage import images
from ddpm_jax.storage import logs
from ddpm_jax.storage import results
from ddpm_jax.study import few_steps

JOB = command.Job('compares samplers at few steps', writes=True)


def flags(p: Any) -> None:
  """Adds the flags of this mode."""
  command.num_samples(p, 'images to draw with each sampler (default: 64)')
  p.set_defaults(num_samples=64)


def run(config: ConfigDict, args: argparse.Namespace) -> None:
  """Scores `--num_samples` images of each sampler at 5, 10, ..., T evaluations.

  Adds to `few_steps.json` in `--workdir`, writes `few_steps.png`, and prints a
  table in Markdown.

  Raises:
    UserError: If there is no run in `--workdir`, or its data have no labels.
  """
  if args.num_samples < classifier_score.LEAST:
    raise errors.UserError(
      f'--num_samples={args.num_samples}: a score needs at least '
      f'{classifier_score.LEAST} images, and is unreliable below 1000'
    )
  run = runs.load(config, args.workdir, seed=args.seed)
  data, classifier = small_data.judge(config, args.workdir)
  learnt, held_out = classifiers.split(len(data['image']))
  real = data['image'][learnt], data['label'][learnt]

  others = 'spacing', 'eta', 'variance'  # set for each sampler here
  options = samples.options(config)
  result: dict[str, Any] = {
    'step': run.step,
    'weights': run.weights,
    'seed': run.seed,
    'sampler_options': {k: options[k] for k in options if k not in others},
  }
  yardstick = classifier_score.score(*real, data['image'][held_out], classifier)
  result['held_out'] = {key: yardstick[key] for key in few_steps.COLUMNS[1:3]}
  result['images'] = args.num_samples
  result['samplers'] = {}
  for title, changes in few_steps.ways(config).items():
    result['samplers'][title] = {key: [] for key in few_steps.COLUMNS}
    for n in few_steps.budgets(changes, config.schedule.T):
      c = few_steps.changed(config, changes, n)
      drawn, rate = few_steps.timed(
        dataclasses.replace(run, config=c), args.num_samples
      )
      score_of = classifier_score.score(*real, drawn, classifier)
      found = dict(errors.finite(score_of, 'score'))
      found['images_per_second'] = rate
      found['evaluations'] = few_steps.evaluations(c)
      for key in few_steps.COLUMNS:
        result['samplers'][title][key].append(found[key])
      logs.say(
        f'{title}: {found["evaluations"]} evaluations, Fréchet distance '
        f'{found["frechet_distance"]:.3f}, {rate:.1f} images/s'
      )
  path = args.workdir / 'few_steps.json'
  found_keys = ['held_out', 'samplers']
  results.add(path, few_steps.TABLES, 'samplers', result, found_keys)
  images.save_png(args.workdir / 'few_steps.png', few_steps.plot(result))
  print(few_steps.table(result))
  logs.say(f'all results          {path}')
  logs.say(f'as curves            {args.workdir}/few_steps.png')
