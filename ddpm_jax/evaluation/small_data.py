"""The small-data score of a run: its classifier, and its results."""

import pathlib

import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import dataset
from ddpm_jax import errors
from ddpm_jax.metrics import classifier as classifiers
from ddpm_jax.storage import logs
from ddpm_jax.storage import paths
from ddpm_jax.storage import results
from ddpm_jax.storage import workdir as workdirs

NAME = 'score.json'
SCORES = 'scores'
MARK = 'frechet_distance'  # marks a file of earlier versions: one score


def read(folder: pathlib.Path) -> list[results.Entry]:
  """Reads the scores of a workdir."""
  return results.read(folder / NAME, SCORES, MARK).get(SCORES, [])


def judge(
  config: ConfigDict, workdir: pathlib.Path
) -> tuple[dict[str, np.ndarray], classifiers.Classifier]:
  """Loads the training data and the workdir's classifier, or trains it.

  Raises:
    UserError: If the data have no labels.
  """
  source = dataset.source(config, folder=workdir)
  if not source.class_names:
    raise errors.UserError(
      f'the data set {config.data.name} has no labels, and the small-data '
      'score needs them for its classifier'
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
  with paths.atomic_write(path) as part:
    classifiers.save(part, made)
  return data, made
