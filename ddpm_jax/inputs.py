"""Reads the images that a flag names, and resizes them for a model."""

import collections
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from ddpm_jax import errors
from ddpm_jax import recipe
from ddpm_jax.data import arrayfile
from ddpm_jax.data import decode
from ddpm_jax.data import image_folder
from ddpm_jax.data import sources
from ddpm_jax.storage import logs


def opened(flag: str, path: pathlib.Path) -> Image.Image:
  try:
    return decode.upright(str(path))
  except Exception as e:  # Pillow raises errors of many types.
    reason = ' '.join(str(e).split())
    raise errors.UserError(
      f'--{flag}={path} cannot be read as an image ({reason})'
    ) from e


def fitted(
  path: pathlib.Path, image: Image.Image, shape: decode.Shape, max_value: int
) -> jax.Array:
  height, width, _ = shape
  if image.size != (width, height):
    say_resized(f'{path} is {written(image)}', shape)
  try:
    max_value = max_value or decode.probe_image(image)
    return jnp.asarray(decode.fit(image, shape, max_value))
  except ValueError as e:
    raise errors.UserError(f'{path}: {e}') from e


def say_resized(what: str, shape: decode.Shape) -> None:
  height, width, _ = shape
  logs.say(
    f'{what}: resized (shorter side, bicubic) and cut to {width}x{height}, in '
    'the middle'
  )


def written(image: Image.Image) -> str:
  return f'{image.width}x{image.height}'


def read(path: pathlib.Path, config: ConfigDict) -> np.ndarray:
  """Returns the images of a file, a folder or an array, sized for the model.

  Returns:
    uint8 (N, H, W, C).

  Raises:
    UserError: If there are none, or one cannot be read.
  """
  if not recipe.image_size(config):
    raise errors.UserError('the codec needs images, and this run is of points')
  H, W, C = recipe.shape(config)
  shape = H, W, C
  options: dict[str, Any] = {'image_size': (H, W), 'channels': C}
  if path.suffix.lower() in ('.npz', '.npy'):
    source = sources.arrays(path=str(path), **options)
    every, _ = arrayfile.load(str(path))
    h, w = every.shape[1:3]
    say_sizes(path, [(w, h)] * len(every), shape)
  elif path.is_dir():
    options |= {'max_unreadable': 0, 'max_value': config.data.max_value}
    source = sources.folder(path=str(path), **options)
    names = image_folder.find(str(path))
    say_sizes(path, [size_of(path / name) for name in names], shape)
  else:
    image = opened('images', path)
    one = fitted(path, image, shape, config.data.max_value)
    return np.asarray(one)[None]
  return source.gather(np.arange(len(source)))['image']


def size_of(path: pathlib.Path) -> tuple[int, int]:
  """Returns (width, height) of an image file, without decoding its pixels."""
  height, width, _ = decode.shape_of(str(path))
  return width, height


def say_sizes(
  path: pathlib.Path, sizes: list[tuple[int, int]], shape: decode.Shape
) -> None:
  """Logs how many images of which sizes are resized, if any are."""
  height, width, _ = shape
  others = collections.Counter(x for x in sizes if x != (width, height))
  shown = others.most_common(3 if len(others) > 4 else 4)
  parts = [f'{n} of {w}x{h}' for (w, h), n in shown]
  if len(others) > len(shown):
    more = others.total() - sum(n for _, n in shown)
    parts.append(f'{more} of {len(others) - len(shown)} other sizes')
  if parts:
    say_resized(f'of the images of {path}, {", ".join(parts)}', shape)


def mask(
  path: pathlib.Path, of: pathlib.Path, shape: decode.Shape
) -> np.ndarray:
  """Reads --mask as bool (H, W, 1): true where it is white.

  Args:
    path: The file of the mask.
    of: The file of its image, which must have the same size.
    shape: (H, W, C) of the model's images.

  Raises:
    UserError: If the sizes differ, or the mask has only one of the two values.
  """
  image, masked = opened('mask', path), opened('image', of)
  if image.size != masked.size:
    raise errors.UserError(
      f'--mask={path} is {written(image)}, and --image={of} {written(masked)}: '
      'they must be of one size'
    )
  height, width, _ = shape
  # The upper half of the mask's own range is white.
  white = decode.probe_image(image)
  drawn = decode.fit(image, (height, width, 1), white) > 127
  if drawn.all() or not drawn.any():
    raise errors.UserError(
      f'--mask={path} is all {"white" if drawn.all() else "black"}: white is '
      'drawn again, and black is kept'
    )
  return drawn
