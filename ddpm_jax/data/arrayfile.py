"""Images and labels of a NumPy file."""

import os
from typing import Any

import numpy as np

from ddpm_jax import errors
from ddpm_jax import expand
from ddpm_jax import npz
from ddpm_jax.data import image_folder


def load(path: str) -> tuple[np.ndarray, np.ndarray]:
  """Images uint8 (n, h, w, c) and labels int32 (n,), -1 for none.

  Raises:
    UserError: the file is missing, broken, or holds something else.
  """
  path = expand.expanded(path)
  return checked(path, *_open(path))


def checked(
  path: str, images: np.ndarray, labels: Any
) -> tuple[np.ndarray, np.ndarray]:
  """Images uint8 (n, h, w, c) and labels int32 (n,), -1 for none.

  Args:
    path: Where they are from, for a message.
    images: uint8 (n, h, w, c) or (n, h, w).
    labels: Integers (n,), or None.

  Raises:
    UserError: If they are anything else.
  """
  if images.dtype != np.uint8:
    raise errors.UserError(
      f'{path}: images are {images.dtype}; save them as uint8, 0 to 255'
    )
  if images.ndim == 3 and images.shape[-1] not in (3, 4):
    images = images[..., None]
  if images.ndim != 4 or images.shape[-1] not in (1, 3, 4) or not images.size:
    raise errors.UserError(
      f'{path}: images have shape {images.shape}; save them as (number, '
      'height, width, channels) with 1, 3 or 4 channels'
    )
  if labels is None:
    return images, np.full(len(images), -1, np.int32)
  labels = np.asarray(labels)
  right = (
    np.issubdtype(labels.dtype, np.integer)
    and labels.shape == images.shape[:1]
    and labels.min() >= -1
    and labels.max() < image_folder.MOST_CLASSES
  )
  if not right:
    raise errors.UserError(
      f'{path}: labels are {labels.dtype} of shape {labels.shape}; save an '
      f'integer from 0 to {image_folder.MOST_CLASSES - 1} (-1: none) for each '
      f'of the {len(images)} images'
    )
  return images, labels.astype(np.int32)


def _open(path: str) -> tuple[np.ndarray, Any]:
  if not os.path.isfile(path):
    raise errors.UserError(
      f'{path!r} is not a file; set --config.data.path to a .npz or .npy'
    )
  try:
    if not npz.is_npz(path):
      return npz.mapped(path), None
    keys = npz.names(path)
    # The second pair is of numpy.savez(path, images, labels), as the samples
    # of OpenAI's evaluations are.
    pairs = ('images', 'labels'), ('arr_0', 'arr_1')
    pair = next((x for x in pairs if x[0] in keys), pairs[0])
    arrays = npz.load(path, pair.__contains__)
  except Exception as error:  # zipfile's, zlib's and NumPy's own
    raise errors.UserError(
      f'{path} cannot be read ({" ".join(str(error).split())}); save it again '
      'with numpy.savez or numpy.save'
    ) from error
  if pair[0] not in arrays:
    raise errors.UserError(
      f'{path} has no `images`, only: {", ".join(keys)}; save '
      'numpy.savez(path, images=..., labels=...)'
    )
  return arrays[pair[0]], arrays.get(pair[1])
