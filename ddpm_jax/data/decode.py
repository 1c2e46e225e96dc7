"""Decodes an image of any kind to 8-bit pixels of a given size.

16-bit gray images do not say how many bits they use. `max_value` is the value
that becomes 255; `probe` derives it from the largest value of the data.

An image is resized to just cover (H, W), by Pillow's antialiased bicubic filter
(clean-fid's choice); then its centre is cropped. An image of the right size
keeps its pixels.
"""

import contextlib
import logging
from collections.abc import Callable
from collections.abc import Sequence

import numpy as np
from PIL import ExifTags
from PIL import Image

from ddpm_jax import imagefile

Shape = tuple[int, int, int]  # (H, W, C); C is 1: gray, or 3: RGB

DEPTHS = (8, 10, 12, 14, 16)  # bits that a 16-bit image may use
PROBED = 64  # images that `probe` looks at
_BAND = 2**20  # pixels that are processed at a time


def probe(largest: Callable[[int], int | None], n: int) -> int:
  """Finds the `max_value` of n images; 0 if they have 8 bits.

  It is 2^b - 1 for the smallest depth b that holds the largest value of up to
  `PROBED` evenly spaced images. Logs it as a warning.

  Args:
    largest: index -> the largest value of a 16-bit image, or None for an 8-bit
      image; may raise anything.
    n: Number of images.
  """
  values = []
  for i in np.linspace(0, n - 1, min(n, PROBED)).round().astype(int):
    with contextlib.suppress(Exception):  # reported when the image is decoded
      values.append(largest(int(i)))
  usable = [v for v in values if v is not None and v < 2 ** DEPTHS[-1]]
  if not usable:
    return 0
  found = max(usable)
  bits = next(b for b in DEPTHS if found < 2**b)
  logging.getLogger(__name__).warning(
    '16-bit images: largest value %d, taken as %d bits (0..%d); '
    '--config.data.max_value sets another',
    *(found, bits, 2**bits - 1),
  )
  return 2**bits - 1


def probe_files(paths: Sequence[str]) -> int:
  """Finds the `max_value` of image files; see `probe`."""

  colours = [0]

  def largest(i: int) -> int | None:
    with imagefile.opened(paths[i]) as image:
      # Only 16-bit images need to be decoded.
      if _is_16_bits(image):
        return _largest(_turned(image))
      if image.tile and ';16' in str(image.tile[0].args):
        colours.append(int(np.asarray(image.convert('RGB')).max()))
    return None

  found = probe(largest, len(paths))
  if 0 < max(colours) < 64:
    logging.getLogger(__name__).warning(
      '16-bit colour images: Pillow keeps the upper 8 bits, whose largest '
      'value is %d of 255; if the images use fewer bits, save them as 8-bit',
      max(colours),
    )
  return found


def probe_image(image: Image.Image) -> int:
  """Finds the `max_value` of one image; see `probe`."""
  return probe(lambda _: _largest(image), 1)


def probe_arrays(read: Callable[[int], np.ndarray], n: int) -> int:
  """Finds the `max_value` of n arrays `read(i)`; see `probe`."""
  # All have the same type, uint8 or uint16.
  if read(0).dtype != np.uint16:
    return 0
  return probe(lambda i: int(read(i).max()), n)


def _is_16_bits(image: Image.Image) -> bool:
  return image.mode.startswith('I')


def _largest(image: Image.Image) -> int | None:
  return int(np.asarray(image).max()) if _is_16_bits(image) else None


def read(path: str, shape: Shape, max_value: int = 0) -> np.ndarray:
  """Reads the image file at `path` as uint8 `shape`.

  Raises whatever Pillow raises for a file that it cannot read: OSError,
  SyntaxError, ValueError, struct.error, DecompressionBombError, ...; and
  ValueError for a 16-bit image with a value above `max_value`.
  """
  with imagefile.opened(path) as image:
    return fit(_turned(image), shape, max_value)


def upright(path: str) -> Image.Image:
  """Reads the image file at `path`, turned upright; raises like `read`."""
  with imagefile.opened(path) as image:
    return _turned(image)


def shape_of(path: str) -> Shape:
  """Returns the upright shape of an image file, without decoding it."""
  with imagefile.opened(path) as image:
    # Pillow already gives the upright size of a TIFF.
    sideways = image.format != 'TIFF' and _orientation(image) >= 5
    W, H = image.size[::-1] if sideways else image.size
    return H, W, 1 if image.mode in ('1', 'L') or _is_16_bits(image) else 3


_TURNED = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}


def _turned(image: Image.Image) -> Image.Image:
  """Decodes an opened image and turns it upright.

  Not by `ImageOps.exif_transpose`, which rewrites the EXIF data and fails if
  any other field in it is invalid.
  """
  image.load()
  if image.format == 'PPM' and _is_16_bits(image):
    # Pillow scales the largest value, which these files state, to 65535.
    return Image.fromarray(_to_8_bits(np.asarray(image), 65535))
  method = _TURNED.get(_orientation(image))
  return image if method is None else image.transpose(method)


def _orientation(image: Image.Image) -> int:
  """EXIF orientation, 1 to 8; 1 if it is missing or cannot be read."""
  try:
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
  except Exception:  # Pillow raises many types
    return 1
  return value if type(value) is int else 1


def fit_array(
  pixels: np.ndarray, shape: Shape, max_value: int = 0
) -> np.ndarray:
  """Converts pixels (h, w, 1 | 3 | 4), uint8 or uint16, to uint8 `shape`."""
  if pixels.dtype == np.uint16:
    pixels = _to_8_bits(pixels, max_value)
  if pixels.dtype != np.uint8:
    raise ValueError(f'pixels are {pixels.dtype}, not uint8 or uint16')
  if pixels.shape == shape:
    return pixels
  if pixels.shape[-1] == 1:
    pixels = pixels[..., 0]
  return fit(Image.fromarray(np.ascontiguousarray(pixels)), shape)


def fit(image: Image.Image, shape: Shape, max_value: int = 0) -> np.ndarray:
  """Converts an upright image of any size and mode to uint8 `shape`."""
  height, width, channels = shape
  image = _cover(_opaque(image, max_value), height, width)
  # Gray is ITU-R 601 luma, as in Pillow.
  return np.asarray(image.convert('L' if channels == 1 else 'RGB')).reshape(
    shape
  )


def _opaque(image: Image.Image, max_value: int) -> Image.Image:
  """Converts an image to mode L or RGB, with white for transparency."""
  if _is_16_bits(image):
    # Pillow's own conversion clips at 255: nearly all pixels would be white.
    return Image.fromarray(_to_8_bits(np.asarray(image), max_value))
  if image.mode == 'F':
    raise ValueError('its pixels are floats, whose range is not known')
  if image.has_transparency_data:
    return _on_white(image)
  return image if image.mode in ('L', 'RGB') else image.convert('RGB')


def _on_white(image: Image.Image) -> Image.Image:
  """Converts to RGB in bands: at once it would take five times the memory."""
  made = Image.new('RGB', image.size)
  rows = max(1, _BAND // image.width)
  for top in range(0, image.height, rows):
    below = min(top + rows, image.height)
    band = image.crop((0, top, image.width, below)).convert('RGBA')
    white = Image.new('RGBA', band.size, 'white')
    made.paste(Image.alpha_composite(white, band).convert('RGB'), (0, top))
  return made


def _to_8_bits(pixels: np.ndarray, max_value: int) -> np.ndarray:
  """0..max_value -> uint8 0..255."""
  low, high = int(pixels.min()), int(pixels.max())
  if low < 0 or high > 65535:
    raise ValueError('its pixels have more than 16 bits')
  if not max_value:
    raise ValueError(
      'it has 16 bits, but the images that were probed have 8: set '
      '--config.data.max_value'
    )
  if high > max_value:
    raise ValueError(
      f'its largest value {high} is above {max_value}: set '
      '--config.data.max_value'
    )
  made = np.empty(pixels.shape, np.uint8)
  rows = max(1, _BAND * len(pixels) // pixels.size)
  for top in range(0, len(pixels), rows):
    band = slice(top, top + rows)
    made[band] = np.round(pixels[band] / (max_value / 255))
  return made


def _cover(image: Image.Image, height: int, width: int) -> Image.Image:
  """Resizes to just cover (height, width), and crops the centre.

  Both in one call, which computes only the pixels that are kept, so that a
  strip of 1 x 10,000 pixels does no harm.
  """
  if image.size == (width, height):
    return image
  scale = max(width / image.width, height / image.height)
  across = max(width, round(image.width * scale))
  down = max(height, round(image.height * scale))
  # Whole pixels of the resized image, so that scale 1 stays exact.
  left, top = (across - width) // 2, (down - height) // 2
  x, y = image.width / across, image.height / down
  right = min(image.width, (left + width) * x)
  bottom = min(image.height, (top + height) * y)
  return image.resize(
    (width, height),
    Image.Resampling.BICUBIC,
    box=(left * x, top * y, right, bottom),
  )
