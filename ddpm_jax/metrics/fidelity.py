"""FID, sFID, KID, IS, precision and recall, from Inception's features.

Each batch of features is reduced to sums, which can be merged in any order,
over batches and over processes.
"""

import json
import pathlib
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from ddpm_jax import errors
from ddpm_jax import jsonfile
from ddpm_jax import npz
from ddpm_jax.metrics import distances
from ddpm_jax.metrics import inception
from ddpm_jax.metrics import running

SPLITS = 10  # of the Inception score
LEAST = 10_000  # images; below this, the name of a score has the number


class Sums(NamedTuple):
  """Sums over a set of images, or a part of it."""

  pool: running.Running
  spatial: running.Running
  # For each split: number of images, Σ p(y|x) and Σ_x Σ_y p(y|x) log p(y|x).
  split_count: np.ndarray  # (SPLITS,)
  split_p: np.ndarray  # (SPLITS, classes)
  split_p_log_p: np.ndarray  # (SPLITS,)
  rows: np.ndarray  # (k,), the images whose features are kept
  features: np.ndarray  # (k, 2048)


# Tree structure of a `Sums`.
_PART = running.Running(*[np.zeros(0)] * 3)
TREE = jax.tree.structure(Sums(_PART, _PART, *[np.zeros(0)] * 5))


class Statistics(NamedTuple):
  """What scores need from a set of images; None if a file does not have it."""

  pool: distances.Moments
  spatial: distances.Moments | None = None
  features: np.ndarray | None = None  # (k, 2048), of some of the images
  inception_score: tuple[float, float] | None = None  # mean, deviation
  n: int | None = None


def chosen(count: int, most: int) -> np.ndarray:
  """Indices of the images whose features are kept: `most`, evenly spaced."""
  return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))


def sums(
  index: np.ndarray, features: inception.Features, kept: np.ndarray
) -> Sums:
  """Reduces the images `index`, and keeps the features of those in `kept`.

  Raises:
    ValueError: If a feature is not a finite number.
  """
  if not np.isfinite(features.logits).all():
    raise ValueError('not every feature is a finite number')
  logits = np.asarray(features.logits, np.float64)
  logits -= logits.max(axis=1, keepdims=True)
  log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  p = np.exp(log_p)
  # Every tenth image, so that a set sorted by class is split evenly.
  split = np.eye(SPLITS)[index % SPLITS].T
  stay = np.isin(index, kept)
  return Sums(
    running.of(np.asarray(features.pool)),
    running.of(np.asarray(features.spatial)),
    split.sum(axis=1),
    split @ p,
    split @ np.sum(p * log_p, axis=1),
    index[stay],
    np.asarray(features.pool)[stay],
  )


def merge(a: Sums, b: Sums) -> Sums:
  return Sums(
    running.merge(a.pool, b.pool),
    running.merge(a.spatial, b.spatial),
    a.split_count + b.split_count,
    a.split_p + b.split_p,
    a.split_p_log_p + b.split_p_log_p,
    np.concatenate([a.rows, b.rows]),
    np.concatenate([a.features, b.features]),
  )


def statistics(x: Sums) -> Statistics:
  order = np.argsort(x.rows)
  return Statistics(
    running.moments(x.pool),
    running.moments(x.spatial),
    x.features[order],
    inception_score(x),
    int(x.pool.n),
  )


def inception_score(x: Sums) -> tuple[float, float]:
  """exp E_x KL(p(y|x) ‖ p(y)) of each split: mean and standard deviation.

  Salimans et al. 2016. With fewer than ten images there are fewer splits.
  """
  some = x.split_count > 0
  n = x.split_count[some]
  p_y = x.split_p[some] / n[:, None]
  log_p_y = np.log(np.where(p_y > 0, p_y, 1))
  scores = np.exp(x.split_p_log_p[some] / n - np.sum(p_y * log_p_y, axis=1))
  return float(scores.mean()), float(scores.std())


def named(score: str, count: int) -> str:
  """Name of a score: FID, or FID@N for fewer than `LEAST` images."""
  return score if count >= LEAST else f'{score}@{count}'


def scores(fake: Statistics, real: Statistics) -> dict[str, float]:
  """Computes all scores that the statistics allow, by name.

  FID and sFID are biased upwards for small samples, so with fewer than `LEAST`
  fakes their names have the number.
  """
  count = fake.n or 0
  found = {
    named('FID', count): distances.frechet(*real.pool, *fake.pool),
  }
  if fake.spatial and real.spatial:
    found[named('sFID', count)] = distances.frechet(
      *real.spatial, *fake.spatial
    )
  if fake.inception_score:
    found['IS'], found['IS_deviation'] = fake.inception_score
  a, b = real.features, fake.features
  # The kernel and the third neighbour need 4.
  if a is not None and b is not None and min(len(a), len(b)) >= 4:
    kernel = distances.kernel(a, b)
    found['KID'], found['KID_error'] = kernel.value, kernel.standard_error
    found['precision'], found['recall'] = distances.precision_recall(a, b)
    found['KID_images'] = min(len(a), len(b))
  return found


def save(file: Any, x: Statistics, provenance: dict[str, Any]) -> None:
  """Writes an .npz to an open file, with the common names `mu`, `sigma`."""
  parts: dict[str, Any] = {'mu': x.pool.mean, 'sigma': x.pool.cov}
  if x.spatial:
    parts |= {'mu_s': x.spatial.mean, 'sigma_s': x.spatial.cov}
  if x.features is not None:
    parts['features'] = x.features
  if x.inception_score:
    parts['inception_score'] = np.array(x.inception_score)
  if x.n:
    parts['count'] = np.array(x.n)
  np.savez(file, **parts, provenance=np.array(json.dumps(provenance)))


def load(path: pathlib.Path) -> tuple[Statistics, dict[str, Any]]:
  """Loads statistics and their provenance, {} if a file has none.

  Reads what `save` wrote, and the common .npz with `mu` and `sigma` (and
  perhaps `mu_s` and `sigma_s`).

  Raises:
    UserError: If there is no such file, or it is not of Inception's features.
  """
  if not path.is_file():
    raise errors.UserError(
      f'{path} is not a file; statistics are an .npz with `mu` and `sigma`'
    )
  try:
    # OpenAI's files hold images too, which are not needed here.
    with path.open('rb') as file:
      parts = npz.load(file, lambda name: not name.startswith('arr_'))
      names = npz.names(file)
  except Exception as error:  # from zipfile, zlib or NumPy
    raise errors.UserError(
      f'{path} cannot be read ({" ".join(str(error).split())}); statistics '
      'are an .npz with `mu` and `sigma`'
    ) from error
  if 'mu' not in parts and {'images', 'arr_0'} & {*names}:
    raise errors.UserError(
      f'{path} has images, not their statistics `mu` and `sigma`; use it as '
      f'data: --config.data.name=arrays --config.data.path={path}'
    )
  pool = _moments(path, parts, 'mu', 'sigma', 2048)
  spatial = None
  if 'mu_s' in parts:
    spatial = _moments(path, parts, 'mu_s', 'sigma_s', 2023)
  try:
    return Statistics(pool, spatial, *_extras(parts)), _provenance(parts)
  except (ValueError, TypeError, RecursionError) as error:
    raise errors.UserError(
      f'{path} is damaged ({" ".join(str(error).split())}); delete it, and '
      'compute it again'
    ) from error


def _extras(parts: dict[str, np.ndarray]) -> tuple[Any, Any, Any]:
  """Features, Inception score and count, each None if a file has none."""
  features = parts.get('features')
  if features is not None and (
    features.shape[1:] != (2048,) or not np.isfinite(features).all()
  ):
    raise ValueError(f'`features` is {features.shape}, or not finite')
  score, count = parts.get('inception_score'), parts.get('count')
  return (
    features,
    None if score is None else tuple(map(float, score.reshape(2))),
    None if count is None else int(count.reshape(())),
  )


def _provenance(parts: dict[str, np.ndarray]) -> dict[str, Any]:
  found = jsonfile.parse(str(parts.get('provenance', '{}')))
  if not isinstance(found, dict):
    raise ValueError('`provenance` is not a JSON object')
  return found


def _moments(
  path: pathlib.Path,
  parts: dict[str, np.ndarray],
  mean: str,
  cov: str,
  d: int,
) -> distances.Moments:
  for name, shape in ((mean, (d,)), (cov, (d, d))):
    if name not in parts:
      has = ', '.join(parts) or 'nothing'
      raise errors.UserError(f'{path} has no `{name}`, only: {has}')
    if parts[name].shape != shape:
      raise errors.UserError(
        f'`{name}` of {path} is {parts[name].shape}, not {shape}: it is not '
        "from the 2015 Inception's features"
      )
    if not np.isfinite(parts[name]).all():
      raise errors.UserError(f'`{name}` of {path} is not finite everywhere')
  return distances.Moments(parts[mean], parts[cov])
