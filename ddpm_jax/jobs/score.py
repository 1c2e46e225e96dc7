"""`--mode=score`: the small-data score of samples; see `metrics/small.py`."""

import argparse
import json
import pathlib

import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import checks
from ddpm_jax import errors
from ddpm_jax.jobs import sample
from ddpm_jax.metrics import classifier as classifiers
from ddpm_jax.metrics import small
from ddpm_jax.runtime import images
from ddpm_jax.runtime import logs


def run(config: ConfigDict, args: argparse.Namespace) -> None:
  """Draws `--num_samples` images and compares them with the data.

  Writes `score.json`, and `classifier.npz` once, into `--workdir`; prints.

  Raises:
    UserError: if there is no run in `--workdir`, or its data have no labels.
  """
  sample.check_workdir(args.workdir)
  if args.output:
    raise errors.UserError('--output is for images: score has --workdir')
  if args.num_samples < small.LEAST:
    raise errors.UserError(
      f'--num_samples={args.num_samples}: a score needs {small.LEAST}, and '
      'says little below 1000'
    )
  checks.basics(config)
  mesh = build.mesh(config)
  seed = config.seed if args.seed is None else args.seed
  step, params = sample.restore_ema(config, mesh, args.workdir)
  data, classifier = judge(config, args.workdir)
  draw = sample.sampler(config, mesh, args.num_samples, seed)
  logs.say(f'drawing {args.num_samples} images with the weights of step {step}')
  drawn = [batch for batch, _ in draw(params)]
  learnt, held_out = classifiers.split(len(data['image']))
  result = {
    **small.score(
      data['image'][learnt],
      data['label'][learnt],
      np.concatenate(drawn),
      classifier,
      held_out=data['image'][held_out],
    ),
    'step': step,
    'seed': seed,
    'sampler': config.sampler.name,
    'sampler_steps': config.sampler.steps,
  }
  with images.whole(args.workdir / 'score.json') as path:
    path.write_text(json.dumps(result, indent=2) + '\n')
  print(small.table(result))
  logs.say(f'all of it            {args.workdir}/score.json')


def judge(
  config: ConfigDict, workdir: pathlib.Path
) -> tuple[dict[str, np.ndarray], classifiers.Classifier]:
  """The training data, and the classifier of a workdir, made if need be.

  Raises:
    UserError: if the data have no labels.
  """
  source = build.source(config)
  if not source.class_names:
    raise errors.UserError(
      f'the data set {config.data.name} has no labels, which the small-data '
      'score needs for its classifier'
    )
  data = source.gather(np.arange(len(source)))
  path = workdir / 'classifier.npz'
  if path.exists():
    return data, classifiers.load(path)
  logs.say(f'training a classifier of {len(source.class_names)} classes')
  made = classifiers.train(
    data['image'], data['label'], len(source.class_names)
  )
  classifiers.save(path, made)
  return data, made
