"""Data sources by name: `config.data.name` names one of `__all__`.

A function here receives those of these keywords that are among its parameters:
path, tfds, split, points, captions, image_size = (H, W), channels (1: gray, 3:
RGB), max_unreadable and max_value (of 16-bit images; 0: from the data). It
returns a `store.Source`, and raises UserError for missing or unsuitable data.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from ddpm_jax import errors
from ddpm_jax import expand
from ddpm_jax.data import arrayfile
from ddpm_jax.data import captions as caption_files
from ddpm_jax.data import contents
from ddpm_jax.data import decode
from ddpm_jax.data import image_folder
from ddpm_jax.data import points as point_sets
from ddpm_jax.data import store

__all__ = ['arrays', 'digits', 'folder', 'points', 'tfds']


def digits(*, image_size: tuple[int, int], channels: int) -> store.Source:
  """The 1797 handwritten digits that scikit-learn ships: 8 x 8, gray."""
  if tuple(image_size) != (8, 8) or channels != 1:
    raise errors.UserError(
      f'digits are 8 x 8 pixels of 1 channel, not {image_size[0]} x '
      f'{image_size[1]} of {channels}; set --config.data.image_size=8 '
      '--config.data.channels=1'
    )
  from sklearn import datasets  # a second to import

  images, labels = datasets.load_digits(return_X_y=True)
  # gray [0, 16] -> uint8 [0, 255]
  images = np.round(images * 255 / 16).astype(np.uint8).reshape(-1, 8, 8, 1)
  names = tuple('0123456789')
  return store.from_arrays(images, labels.astype(np.int32), names)


def arrays(
  *, path: str, image_size: tuple[int, int], channels: int
) -> store.Source:
  """Images from a .npz with `images` and perhaps `labels`, or from a .npy.

  images: uint8 (n, h, w, 1 | 3 | 4) or (n, h, w); resized if needed.
  labels: integers (n,), -1 for none. A .npy is memory-mapped.
  """
  images, labels = arrayfile.load(path)
  names = image_folder.class_names(labels)
  shape = (*image_size, channels)
  if images.shape[1:] == shape:
    return store.from_arrays(images, labels, names)

  def read(i: int) -> tuple[np.ndarray, int]:
    return decode.fit_array(images[i], shape), int(labels[i])

  files = store.Files(len(labels), read, lambda i: f'{path}[{i}]', names)
  made = store.from_files(files, shape, max_unreadable=0)
  return dataclasses.replace(
    made, held=store.from_arrays(images, labels, names).held
  )


def folder(
  *,
  path: str,
  image_size: tuple[int, int],
  channels: int,
  max_unreadable: int,
  max_value: int = 0,
  captions: str = '',
  class_order: Callable[[str], Any] = image_folder.natural,
  needs_labels: bool = True,
) -> store.Source:
  """Image files under `path`, of any size and mode.

  Classes are in `metadata.jsonl`, or are the first-level sub-folders; their
  names are sorted by the key `class_order`. If `captions` is 'file', captions
  are in `metadata.jsonl` or `captions.csv`. If labels are not needed, an
  invalid `metadata.jsonl` is ignored with a warning.
  """
  path = expand.expanded(path)
  names = image_folder.find(path)
  labels, class_names = image_folder.label(
    path, names, class_order, needed=needs_labels
  )
  texts = caption_files.of_folder(path, names) if captions == 'file' else []
  shape = (*image_size, channels)
  files = [os.path.join(path, name) for name in names]
  largest = max_value or decode.probe_files(files)

  def read(i: int) -> tuple[np.ndarray, int]:
    return decode.read(files[i], shape, largest), int(labels[i])

  def held() -> contents.Contents:
    classes = [*class_names, None]
    captions_of = texts or [()] * len(names)
    return contents.of(
      (names[i], (contents.size(files[i]), classes[labels[i]], captions_of[i]))
      for i in range(len(names))
    )

  found = store.Files(
    len(names), read, lambda i: image_folder.shown(names[i]), class_names
  )
  made = store.from_files(found, shape, max_unreadable)
  return dataclasses.replace(
    made, captions=tuple(texts), max_value=largest, held=held
  )


def tfds(
  *,
  path: str,
  tfds: str,
  split: str,
  image_size: tuple[int, int],
  channels: int,
  max_unreadable: int,
  max_value: int = 0,
  captions: str = '',
) -> store.Source:
  """A TFDS data set prepared as ArrayRecord, read without TensorFlow.

  CIFAR-10 is downloaded and prepared if it is missing. `path` is the TFDS
  folder, '' for TFDS's default. `captions` is '', 'classes' or a text feature.
  """
  from ddpm_jax.data import records  # imports TFDS

  path = expand.expanded(path)
  data, class_names = records.load(tfds, path, split)
  texts = []
  if captions not in ('', 'classes'):
    texts = records.texts(tfds, path, split, captions)
  shape = (*image_size, channels)
  largest = max_value or decode.probe_arrays(
    lambda i: data[i]['image'], len(data)
  )

  def read(i: int) -> tuple[np.ndarray, int]:
    example = data[i]
    label = int(example['label']) if class_names else -1
    return decode.fit_array(example['image'], shape, largest), label

  files = store.Files(len(data), read, lambda i: f'{tfds}[{i}]', class_names)
  made = store.from_files(files, shape, max_unreadable)
  # A version of a TFDS data set never changes.
  held = contents.of([(records.full_name(tfds, path, split), len(data))])
  return dataclasses.replace(
    made, captions=tuple(texts), max_value=largest, held=lambda: held
  )


def points(
  *, points: str, image_size: tuple[int, ...], channels: int
) -> store.Source:
  """Points in the plane, from a function in `data/points.py`."""
  known = ('swiss_roll', 'two_moons', 'eight_gaussians')
  if points not in known:
    raise errors.unknown('set of points', points, known)
  if tuple(image_size) != () or channels != 2:
    raise errors.UserError(
      'points have no pixels and 2 coordinates; set '
      '--config.data.image_size=() --config.data.channels=2'
    )
  data = getattr(point_sets, points)()
  return store.from_arrays(data, np.full(len(data), -1, np.int32))
