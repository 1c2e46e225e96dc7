"""The reference of FID and other scores: statistics of a data set."""

import hashlib
import pathlib
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import dataset
from ddpm_jax import errors
from ddpm_jax import expand
from ddpm_jax import recipe
from ddpm_jax.evaluation import features
from ddpm_jax.metrics import fidelity
from ddpm_jax.parallel import processes
from ddpm_jax.storage import logs
from ddpm_jax.storage import paths
from ddpm_jax.storage import workdir

HASHED = 1000  # images whose pixels identify the data


def from_file(
  path: pathlib.Path, config: ConfigDict, inception: str
) -> tuple[fidelity.Statistics, str]:
  """Reads statistics from a file; returns them and a title.

  Raises:
    UserError: If the file cannot be read, or was computed with other settings.
  """
  found, whence = fidelity.load(path)
  here = {'resize': config.evaluate.resize, 'inception': inception}
  if whence:
    _compare(path, whence, {**whence, **here})
  digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
  return found, f'{path.name} (sha256 {digest})'


def from_data(
  config: ConfigDict,
  folder: pathlib.Path | None,
  extract: features.Extract,
  inception: str,
) -> tuple[fidelity.Statistics, str]:
  """Computes the statistics of a recipe's data set; returns them and a title.

  They are cached in `config.evaluate.cache` together with their settings.

  Args:
    config: The recipe.
    folder: The workdir, if there is one.
    extract: See `features.extractor`.
    inception: Digest of Inception's weights.

  Raises:
    UserError: If the cached statistics were computed with other settings.
  """
  source, split = dataset.source_to_evaluate(config)
  count = min(len(source), config.evaluate.images or len(source))
  if count < 2:
    raise errors.UserError('statistics need a data set of 2 or more images')
  name = data_name(config)
  kept = fidelity.chosen(count, config.evaluate.neighbours)
  whence = {
    'data': name,
    'split': split,
    'images': count,
    'shape': list(recipe.shape(config)),
    'pixels': _digest(source, count),
    'resize': config.evaluate.resize,
    'inception': inception,
    'kept_one_by_one': len(kept),
  }
  title = f'{name} {split}, {count} images'
  size = 'x'.join(map(str, recipe.image_size(config)))
  path = cache(config, folder) / f'{name}_{split}_{count}_{size}.npz'
  if path.exists():
    found, there = fidelity.load(path)
    _compare(path, there, whence)
    return found, title
  logs.say(f'computing statistics of {title}, to be kept in {path}')
  parts = features.of_source(source, count, config.evaluate.batch_size, extract)
  sums = features.everyones(features.add_up(parts, kept), path.parent)
  found = fidelity.statistics(sums)
  if processes.is_primary():
    with paths.atomic_write(path) as part, part.open('wb') as file:
      fidelity.save(file, found, whence)
  processes.wait('statistics written')
  return found, title


def cache(config: ConfigDict, folder: pathlib.Path | None) -> pathlib.Path:
  """Returns the folder of cached statistics, creating it if needed."""
  runs = folder.parent if folder else pathlib.Path('runs')
  path = runs / 'reference'
  if named := expand.expanded(config.evaluate.cache):
    path = paths.of_key('evaluate.cache', named, paths.path)
  workdir.create(path)
  return path


def data_name(config: ConfigDict) -> str:
  """The name of the data, for titles and file names."""
  data = config.data
  if data.name == 'tfds':
    return data.tfds.replace('/', '_')
  return pathlib.Path(data.path).stem if data.path else data.name


def _digest(source: Any, count: int) -> str:
  """Digest of the pixels of images spread evenly over the data."""
  index = fidelity.chosen(count, HASHED).astype(np.int32)
  pixels = np.ascontiguousarray(source.gather(index)['image'])
  return hashlib.sha256(pixels.tobytes()).hexdigest()[:16]


def _compare(
  path: pathlib.Path, there: dict[str, Any], here: dict[str, Any]
) -> None:
  differ = [
    f'{key} ({there.get(key, "absent")!r} there, {here[key]!r} here)'
    for key in here
    if there.get(key) != here[key]
  ]
  if differ:
    raise errors.UserError(
      f'the statistics in {path} were computed with other settings: '
      f'{", ".join(differ)}. Delete the file to recompute it, or name '
      'another folder with --config.evaluate.cache'
    )
