"""Images made elsewhere, exactly as they are."""

import os
import pathlib

import numpy as np
from PIL import Image

from ddpm_jax import errors
from ddpm_jax.data import arrayfile
from ddpm_jax.data import decode
from ddpm_jax.data import listing
from ddpm_jax.data import store


def load(path: pathlib.Path) -> tuple[store.Source, decode.Shape]:
  """The images of a folder, or of an .npz or .npy; and their one shape.

  Raises:
    UserError: there are none, they are not uint8, gray or RGB, or not all of
      one size; a file that cannot be read is named when it is gathered.
  """
  if not path.exists():
    raise errors.UserError(
      f'--images={path} is not there; name a folder of images, or an .npz'
    )
  return (_folder if path.is_dir() else _array)(path)


def _array(path: pathlib.Path) -> tuple[store.Source, decode.Shape]:
  images, labels = arrayfile.load(str(path))
  H, W, C = images.shape[1:]
  if C not in (1, 3):
    raise errors.UserError(
      f'{path}: images have {C} channels; scores are of gray (1) or RGB (3)'
    )
  return store.from_arrays(images, labels), (H, W, C)


def _folder(path: pathlib.Path) -> tuple[store.Source, decode.Shape]:
  names = listing.find(str(path))

  def read(i: int) -> np.ndarray:
    file = os.path.join(path, names[i])
    try:
      with Image.open(file) as image:
        gray = image.mode in ('1', 'L', 'I;16')
        size = image.height, image.width, 1 if gray else 3
      return decode.read(file, size)
    except Exception as error:  # Pillow's are of many types
      reason = ' '.join(str(error).split())
      raise errors.UserError(f'{file} cannot be read ({reason})') from error

  shape = read(0).shape

  def gather(indices: np.ndarray) -> store.Batch:
    images = [read(i) for i in indices.tolist()]
    for i, image in zip(indices, images, strict=True):
      if image.shape != shape:
        raise errors.UserError(
          f'{os.path.join(path, names[i])} is {image.shape} (height, width, '
          f'channels), and {names[0]} is {shape}: scores are of images of one '
          'size'
        )
    labels = np.full(len(images), -1, np.int32)
    return {'image': np.stack(images), 'label': labels}

  return store.Source(len(names), gather), shape
