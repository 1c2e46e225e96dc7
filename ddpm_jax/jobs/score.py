"""`--mode=score`: the small-data score of samples; see `metrics/small.py`."""

import argparse
import pathlib
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import dataset
from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax.jobs import sample
from ddpm_jax.metrics import classifier as classifiers
from ddpm_jax.metrics import small
from ddpm_jax.runtime import images
from ddpm_jax.runtime import logs
from ddpm_jax.runtime import results
from ddpm_jax.runtime import workdir as workdirs

NAME = 'score.json'
SCORES = 'scores'
MARK = 'frechet_distance'  # of an entry in files of earlier versions

JOB = command.Job('compares samples with small data', writes=True)


def flags(p: Any) -> None:
  """Adds the flags of this mode."""
  command.num_samples(p, 'images to draw and compare (default: 64)')
  p.set_defaults(num_samples=64)


def run(config: ConfigDict, args: argparse.Namespace) -> None:
  """Draws `--num_samples` images and compares them with the data.

  Adds to `score.json` in `--workdir`, writes `classifier.npz` once, and prints.

  Raises:
    UserError: if there is no run in `--workdir`, or its data have no labels.
  """
  sample.check_workdir(args.workdir)
  if args.num_samples < small.LEAST:
    raise errors.UserError(
      f'--num_samples={args.num_samples}: a score needs {small.LEAST}, and '
      'says little below 1000'
    )
  mesh = build.mesh(config)
  seed = config.seed if args.seed is None else args.seed
  kind, step, params = sample.restore(config, mesh, args.workdir)
  data, classifier = judge(config, args.workdir)
  draw = sample.sampler(config, mesh, args.num_samples, seed)
  logs.say(
    f'drawing {args.num_samples} images with the {kind} weights of step {step}'
  )
  drawn = [batch for batch, _ in draw(params)]
  learnt, held_out = classifiers.split(len(data['image']))
  found = small.score(
    data['image'][learnt],
    data['label'][learnt],
    np.concatenate(drawn),
    classifier,
    held_out=data['image'][held_out],
  )
  errors.finite(found, 'score')
  made = {
    'class_names': workdirs.read_classes(args.workdir) or [],
    'step': step,
    'weights': kind,
    'seed': seed,
    'sampler': config.sampler.name,
    'sampler_steps': config.sampler.steps,
    'sampler_options': sample.options(config),
  }
  path = args.workdir / NAME
  keys = found.keys() - {'fake_images'}  # of which there may be more
  results.add(path, SCORES, MARK, made | found, keys)
  print(small.table(made | found))
  logs.say(f'all of it            {path}')


def read(folder: pathlib.Path) -> list[results.Entry]:
  """The scores in a workdir."""
  return results.read(folder / NAME, SCORES, MARK).get(SCORES, [])


def judge(
  config: ConfigDict, workdir: pathlib.Path
) -> tuple[dict[str, np.ndarray], classifiers.Classifier]:
  """The training data, and the classifier of a workdir, made if need be.

  Raises:
    UserError: if the data have no labels.
  """
  source = dataset.source(config, folder=workdir)
  if not source.class_names:
    raise errors.UserError(
      f'the data set {config.data.name} has no labels, which the small-data '
      'score needs for its classifier'
    )
  saved = workdirs.read_classes(workdir)
  if saved and saved != source.class_names:
    raise dataset.other_classes(source.class_names, saved, workdir)
  dataset.warn_of_data(source, workdir)
  data = source.gather(np.arange(len(source)))
  path = workdir / 'classifier.npz'
  if path.exists():
    return data, classifiers.load(path)
  logs.say(f'training a classifier of {len(source.class_names)} classes')
  made = classifiers.train(
    data['image'], data['label'], len(source.class_names)
  )
  with images.whole(path) as part:
    classifiers.save(part, made)
  return data, made
