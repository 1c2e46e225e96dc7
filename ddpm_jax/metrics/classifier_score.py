"""The small-data score: no download, and comparable within one data set only.

Its Fréchet and kernel distances use the features of a classifier of this data
set, so they cannot be compared with numbers from another classifier.
"""

from typing import Any

import numpy as np

from ddpm_jax import errors
from ddpm_jax.metrics import classifier as classifiers
from ddpm_jax.metrics import distances

NAME = 'small-data score (features of a classifier of this data set)'
SURE = 0.9
LEAST = 10  # images
YARDSTICK = 2000  # real images that are compared with the others


def score(
  real: np.ndarray,
  labels: np.ndarray,
  fake: np.ndarray,
  classifier: classifiers.Classifier,
  held_out: np.ndarray | None = None,
) -> dict[str, Any]:
  """Compares samples with a data set, in several ways.

  Args:
    real: uint8 (n, H, W, C), the training images.
    labels: Integers (n,), -1 for none.
    fake: uint8 (m, H, W, C), the samples.
    classifier: Classifier of the data set; see `classifier.train`.
    held_out: uint8 (l, H, W, C), real images that neither classifier nor model
      has seen. They are scored too, as `held_out_...`, for comparison. Most
      distances depend on the number of images, so l should equal m.

  Returns:
    Numbers and lists of numbers for JSON; `table` explains them. Shares are in
    0..1. Without held-out images, compare `nearest_rmse` with
    `real_nearest_rmse`, from each real image to the nearest other one.

  Raises:
    UserError: If there are too few images, or they do not fit the classifier.
  """
  sets = {'real': real, 'fake': fake}
  if held_out is not None:
    sets['held_out'] = held_out
  for name, images in sets.items():
    if len(images) < LEAST:
      raise errors.UserError(
        f'{len(images)} {name.replace("_", "-")} images are too few for the '
        f'small-data score, which needs {LEAST}'
      )
  classes = int(classifier.classes)
  labels = np.asarray(labels)
  seen = labels[labels >= 0]
  real_features, _ = classifiers.features_and_probabilities(classifier, real)
  result: dict[str, Any] = {
    f'{name}_images': len(images) for name, images in sets.items()
  }
  result['classifier_accuracy'] = float(classifier.accuracy)
  result['real_class_share'] = _shares(seen, classes)
  result |= _compare(real, real_features, fake, classifier)
  if held_out is not None:
    yardstick = _compare(real, real_features, held_out, classifier)
    result |= {f'held_out_{name}': value for name, value in yardstick.items()}
  else:
    at = np.unique(
      np.linspace(0, len(real) - 1, min(len(real), YARDSTICK)).astype(int)
    )
    rmse, _ = distances.nearest(real[at], real, itself=at)
    result['real_nearest_rmse'] = float(np.median(rmse))
  return result


def _compare(
  real: np.ndarray,
  real_features: np.ndarray,
  images: np.ndarray,
  classifier: classifiers.Classifier,
) -> dict[str, Any]:
  """Scores one set of images."""
  features, probabilities = classifiers.features_and_probabilities(
    classifier, images
  )
  kernel = distances.kernel(real_features, features)
  precision, recall = distances.precision_recall(real_features, features)
  density, coverage = distances.density_coverage(real_features, features)
  rmse, _ = distances.nearest(images, real)
  sure = probabilities.max(axis=1) > SURE
  return {
    'frechet_distance': distances.frechet(
      *distances.moments(real_features), *distances.moments(features)
    ),
    'kernel_distance': kernel.value,
    'kernel_distance_error': kernel.standard_error,
    'precision': precision,
    'recall': recall,
    'density': density,
    'coverage': coverage,
    'nearest_rmse': float(np.median(rmse)),
    'sure_share': float(np.mean(sure)),
    'class_share': _shares(
      probabilities.argmax(axis=1), int(classifier.classes)
    ),
  }


def _shares(labels: np.ndarray, classes: int) -> list[float]:
  counts = np.bincount(labels, minlength=classes)
  return (counts / max(len(labels), 1)).tolist()


def table(score: dict[str, Any]) -> str:
  """Formats a score: samples next to held-out real images."""
  rows = [('', 'samples', 'held-out real', '')]

  def row(title: str, key: str, form: str, note: str = '') -> None:
    fake, real = (
      '-' if x is None else format(x, form)
      for x in (score.get(key), score.get(f'held_out_{key}'))
    )
    rows.append((title, fake, real, note))

  rows.append(
    (
      'images',
      str(score['fake_images']),
      str(score.get('held_out_images', '-')),
      f'against {score["real_images"]} real ones',
    )
  )
  row('Fréchet distance', 'frechet_distance', '.3f', 'less is better')
  row('kernel distance', 'kernel_distance', '.5f', 'less is better, 0 is equal')
  row('- its standard error', 'kernel_distance_error', '.5f')
  row('precision', 'precision', '.3f', 'samples amid the real images')
  row('recall', 'recall', '.3f', 'real images amid the samples')
  row('density', 'density', '.3f', '1 is equal')
  row('coverage', 'coverage', '.3f', 'real images with a sample near')
  note = 'median, of 0..255; 0 is a copy'
  if 'real_nearest_rmse' in score:
    note += f'; real to real: {score["real_nearest_rmse"]:.2f}'
  row('nearest training image', 'nearest_rmse', '.2f', note)
  row(
    f'classifier over {SURE:.0%} sure',
    'sure_share',
    '.1%',
    f'it gets {score["classifier_accuracy"]:.1%} of held-out images right',
  )
  held_out = score.get('held_out_class_share')
  names = score.get('class_names') or range(len(score['class_share']))
  for i, share in enumerate(score['class_share']):
    rows.append(
      (
        f'share of class {names[i]}',
        f'{share:.1%}',
        '-' if held_out is None else f'{held_out[i]:.1%}',
        f'real: {score["real_class_share"][i]:.1%}',
      )
    )
  widths = [max(len(cells[i]) for cells in rows) for i in range(3)]
  lines = [
    f'{title:<{widths[0]}}  {fake:>{widths[1]}}  {real:>{widths[2]}}  {note}'
    for title, fake, real, note in rows
  ]
  return '\n'.join([NAME, *(line.rstrip() for line in lines)])
