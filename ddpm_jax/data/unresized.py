"""Images from elsewhere, without resizing."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from ddpm_jax import errors
from ddpm_jax.data import arrayfile
from ddpm_jax.data import decode
from ddpm_jax.data import image_folder
from ddpm_jax.data import store


def load(
  path: pathlib.Path, max_value: int = 0
) -> tuple[store.Source, decode.Shape]:
  """Loads the images of a folder, .npz or .npy, and their common shape.

  `max_value` is for 16-bit images; 0: from the images.

  Raises:
    UserError: If there are no images, or they are not uint8, gray or RGB, or
      differ in size. `gather` raises it if a file cannot be decoded.
  """
  if not path.exists():
    raise errors.UserError(
      f'--images={path} does not exist; name a folder of images, or an .npz'
    )
  return _folder(path, max_value) if path.is_dir() else _array(path)


def _array(path: pathlib.Path) -> tuple[store.Source, decode.Shape]:
  images, labels = arrayfile.load(str(path))
  H, W, C = images.shape[1:]
  if C not in (1, 3):
    raise errors.UserError(
      f'{path}: images have {C} channels; scores need gray (1) or RGB (3)'
    )
  return store.from_arrays(images, labels), (H, W, C)


def _folder(
  path: pathlib.Path, max_value: int
) -> tuple[store.Source, decode.Shape]:
  names = image_folder.find(str(path))
  files = [os.path.join(path, name) for name in names]
  shape = _header(files[0])
  H, W, _ = shape
  for file in files:
    h, w, _ = _header(file)
    if (h, w) != (H, W):
      raise errors.UserError(
        f'{file} is {h}x{w}, and {names[0]} is {H}x{W}: scores need images '
        'of one size'
      )

  largest = max_value or decode.probe_files(files)

  def gather(indices: np.ndarray) -> store.Batch:
    images = np.empty((len(indices), *shape), np.uint8)
    for row, i in enumerate(indices.tolist()):
      with _named(files[i]):
        images[row] = decode.read(files[i], shape, largest)
    return {'image': images, 'label': np.full(len(indices), -1, np.int32)}

  return store.Source(len(names), gather), shape


def _header(file: str) -> decode.Shape:
  with _named(file):
    return decode.shape_of(file)


@contextlib.contextmanager
def _named(file: str) -> Iterator[None]:
  try:
    yield
  except Exception as error:  # Pillow raises many types
    reason = ' '.join(str(error).split())
    raise errors.UserError(f'{file} cannot be read ({reason})') from error
