"""Writes images as PNG, GIF or .npz, and tiles them into grids."""

import io
import math
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ddpm_jax import imagefile
from ddpm_jax.storage import paths


def encode(
  image: np.ndarray, form: str, quality: int
) -> tuple[np.ndarray, int, int]:
  """Encodes a uint8 (H, W, 1 or 3) image as JPEG or WEBP, and decodes it.

  Returns:
    (decoded, size, coded): the decoded image, the bytes of the file, and those
    of them that are the coded image, not headers or tables.
  """
  file = io.BytesIO()
  flat = image[..., 0] if image.shape[-1] == 1 else image
  Image.fromarray(flat).save(file, format=form, quality=quality)
  data = file.getvalue()
  if form == 'JPEG':
    scan = data.index(b'\xff\xda')
    start = scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], 'big')
    inner = len(data) - start - 2
  else:
    inner = len(data) - 30  # RIFF 12, chunk 8, frame 10
  mode = 'L' if image.shape[-1] == 1 else 'RGB'
  with imagefile.opened(file) as coded:
    shown = np.asarray(coded.convert(mode)).reshape(image.shape)
  return shown, len(data), inner


def save_png(path: pathlib.Path, image: np.ndarray) -> None:
  """Writes a uint8 (H, W, 1 or 3) image."""
  flat = image[..., 0] if image.shape[-1] == 1 else image
  with paths.atomic_write(path) as part:
    Image.fromarray(flat).save(part, format='PNG')


def save_gif(
  path: pathlib.Path, frames: Sequence[np.ndarray], milliseconds: int
) -> None:
  """Writes uint8 (H, W, 3) frames as a loop with a pause of one second."""
  first, *others = (Image.fromarray(frame) for frame in frames)
  with paths.atomic_write(path) as part:
    first.save(
      part,
      format='GIF',
      save_all=True,
      append_images=others,
      duration=[milliseconds] * len(others) + [milliseconds + 1000],
      loop=0,
    )


def save_npz(path: pathlib.Path, images: np.ndarray) -> None:
  """Writes uint8 (N, H, W, C) as the array `images`."""
  with paths.atomic_write(path) as part, part.open('wb') as file:
    np.savez(file, images=images)


def grid(
  images: np.ndarray, columns: int | None = None, width: int = 800
) -> np.ndarray:
  """Tiles images (N, H, W, C) row by row, with borders.

  Small images are enlarged by repeating pixels until the grid is about `width`
  pixels wide.
  """
  N, H, W, C = images.shape
  columns = columns or math.ceil(math.sqrt(N))
  rows = math.ceil(N / columns)
  border = max(1, H // 16)
  tiles = np.full((rows * columns, H + border, W + border, C), 255, np.uint8)
  tiles[:N, :H, :W] = images
  tiled = tiles.reshape(rows, columns, H + border, W + border, C)
  tiled = tiled.swapaxes(1, 2).reshape(rows * (H + border), -1, C)
  tiled = np.pad(tiled, ((border, 0), (border, 0), (0, 0)), constant_values=255)
  factor = max(1, width // tiled.shape[1])
  return tiled.repeat(factor, axis=0).repeat(factor, axis=1)
