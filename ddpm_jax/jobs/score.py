"""`--mode=score`: scores samples with a small classifier of the data.

See `metrics/classifier_score.py`.
"""

import argparse
from typing import Any

from ml_collections import ConfigDict

from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax import run as runs
from ddpm_jax import samples
from ddpm_jax.evaluation import small_data
from ddpm_jax.metrics import classifier as classifiers
from ddpm_jax.metrics import classifier_score
from ddpm_jax.storage import logs
from ddpm_jax.storage import results
from ddpm_jax.storage import workdir as workdirs

JOB = command.Job('scores samples with a classifier of the data', writes=True)


def flags(p: Any) -> None:
  """Adds the flags of this mode."""
  command.num_samples(p, 'images to draw and compare (default: 64)')
  p.set_defaults(num_samples=64)


def run(config: ConfigDict, args: argparse.Namespace) -> None:
  """Draws `--num_samples` images and compares them with the data.

  Prints the score and adds it to `score.json` in `--workdir`. The classifier is
  trained once and kept in `classifier.npz`.

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
  logs.say(
    f'drawing {args.num_samples} images with the {run.weights} weights of step '
    f'{run.step}'
  )
  drawn = run.draw(args.num_samples)
  learnt, held_out = classifiers.split(len(data['image']))
  found = classifier_score.score(
    data['image'][learnt],
    data['label'][learnt],
    drawn,
    classifier,
    held_out=data['image'][held_out],
  )
  errors.finite(found, 'score')
  made = {
    'class_names': workdirs.read_classes(args.workdir) or [],
    'step': run.step,
    'weights': run.weights,
    'seed': run.seed,
    'sampler': config.sampler.name,
    'sampler_steps': config.sampler.steps,
    'sampler_options': samples.options(config),
  }
  path = args.workdir / small_data.NAME
  keys = found.keys() - {'fake_images'}  # a setting, not a result
  results.add(path, small_data.SCORES, small_data.MARK, made | found, keys)
  print(classifier_score.table(made | found))
  logs.say(f'all results          {path}')
