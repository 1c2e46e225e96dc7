"""What scores compare with: statistics of the data set, computed once."""

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

# Images whose pixels say whether the data are the same.
LOOKED_AT = 1000


def from_file(
  path: pathlib.Path, config: ConfigDict, inception: str
) -> tuple[fidelity.Statistics, str]:
  """The statistics of a file that the user names, and what to call them.

  Raises:
    UserError: it cannot be read, or says that it was made in another way.
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
  """The statistics of the data set of a recipe, and what to call them.

  They are kept in `config.evaluate.cache`, with what they were made of.

  Args:
    config: the recipe.
    folder: the workdir, if there is one.
    extract: see `features.extractor`.
    inception: the digest of its weights.

  Raises:
    UserError: what is kept was made of something else.
  """
  source, split = dataset.source_to_evaluate(config)
  count = min(len(source), config.evaluate.images or len(source))
  if count < 2:
    raise errors.UserError('statistics of a data set need 2 images of it')
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
  logs.say(f'statistics of {title}, once and for all: {path}')
  parts = features.of_source(source, count, config.evaluate.batch_size, extract)
  sums = features.everyones(features.add_up(parts, kept), path.parent)
  found = fidelity.statistics(sums)
  if processes.is_primary():
    with paths.atomic_write(path) as part, part.open('wb') as file:
      fidelity.save(file, found, whence)
  processes.wait('statistics written')
  return found, title


def cache(config: ConfigDict, folder: pathlib.Path | None) -> pathlib.Path:
  """The folder of statistics, which is made if need be."""
  runs = folder.parent if folder else pathlib.Path('runs')
  path = runs / 'reference'
  if named := expand.expanded(config.evaluate.cache):
    path = paths.of_key('evaluate.cache', named, paths.path)
  workdir.create(path)
  return path


def data_name(config: ConfigDict) -> str:
  """Of the data, for people and for a file."""
  data = config.data
  if data.name == 'tfds':
    return data.tfds.replace('/', '_')
  return pathlib.Path(data.path).stem if data.path else data.name


def _digest(source: Any, count: int) -> str:
  """Of the pixels of images spread evenly over the data."""
  index = fidelity.chosen(count, LOOKED_AT).astype(np.int32)
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
      f'the statistics in {path} do not fit; these differ: '
      f'{", ".join(differ)}. Delete the file, and it is made anew, or name '
      'another folder with --config.evaluate.cache'
    )
