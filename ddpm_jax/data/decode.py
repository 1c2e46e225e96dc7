"""One image, of whatever kind, as 8-bit pixels of the size asked for.

Resizing: so that the image just covers (H, W), by Pillow's bicubic filter,
whose support grows with the scale (antialiased; clean-fid's choice); then the
centre is cut out. An image of the right size keeps its pixels.
"""

import numpy as np
from PIL import Image
from PIL import ImageOps

Shape = tuple[int, int, int]  # (H, W, C); C is 1: gray, or 3: RGB


def read(path: str, shape: Shape) -> np.ndarray:
  """The image file at `path` as uint8 `shape`.

  Raises whatever Pillow raises for a file that it cannot read: OSError,
  SyntaxError, ValueError, struct.error, DecompressionBombError, ...
  """
  return fit(upright(path), shape)


def upright(path: str) -> Image.Image:
  """The image file at `path`, as it was meant to be held; raises as `read`."""
  with Image.open(path) as image:
    image.load()
    return ImageOps.exif_transpose(image)


def fit_array(pixels: np.ndarray, shape: Shape) -> np.ndarray:
  """Pixels (h, w, 1 | 3 | 4), uint8 or uint16, as uint8 `shape`."""
  if pixels.dtype == np.uint16:
    pixels = np.round(pixels / 257).astype(np.uint8)
  if pixels.dtype != np.uint8:
    raise ValueError(f'pixels are {pixels.dtype}, not uint8 or uint16')
  if pixels.shape == shape:
    return pixels
  if pixels.shape[-1] == 1:
    pixels = pixels[..., 0]
  return fit(Image.fromarray(np.ascontiguousarray(pixels)), shape)


def fit(image: Image.Image, shape: Shape) -> np.ndarray:
  """An upright image of any size and mode as uint8 `shape`."""
  height, width, channels = shape
  image = _cover(_opaque(image), height, width)
  # Gray is ITU-R 601 luma, as Pillow has it.
  return np.asarray(image.convert('L' if channels == 1 else 'RGB')).reshape(
    shape
  )


def _opaque(image: Image.Image) -> Image.Image:
  """The image in mode L or RGB, what is transparent laid over white."""
  if image.mode.startswith('I'):
    return _from_16_bits(image)
  if image.mode == 'F':
    raise ValueError('its pixels are floats, whose range is not known')
  if image.has_transparency_data:
    image = image.convert('RGBA')
    white = Image.new('RGBA', image.size, 'white')
    return Image.alpha_composite(white, image).convert('RGB')
  return image if image.mode == 'L' else image.convert('RGB')


def _from_16_bits(image: Image.Image) -> Image.Image:
  # Pillow's own conversion clips at 255: nearly all would be white.
  gray = np.asarray(image).astype(np.float64)
  if gray.min() < 0 or gray.max() > 65535:
    raise ValueError('its pixels have more than 16 bits')
  return Image.fromarray(np.round(gray / 257).astype(np.uint8))


def _cover(image: Image.Image, height: int, width: int) -> Image.Image:
  """Resized so that it just covers (height, width), then the centre of it.

  Both in one go: only the pixels that are kept are worked out, so that a strip
  of 1 x 10,000 pixels does no harm.
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
