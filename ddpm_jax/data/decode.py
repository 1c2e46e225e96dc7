"""One image, of whatever kind, as 8-bit pixels of the size asked for.

Gray images of 16 bits do not say how many of these they use. `max_value` is the
value that becomes 255; `probe` takes it from the largest value of the data.

Resizing: so that the image just covers (H, W), by Pillow's bicubic filter,
whose support grows with the scale (antialiased; clean-fid's choice); then the
centre is cut out. An image of the right size keeps its pixels.
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

DEPTHS = (8, 10, 12, 14, 16)  # bits that an image of 16 bits may use
PROBED = 64  # images
_BAND = 2**20  # pixels that are worked out at a time


def probe(largest: Callable[[int], int | None], n: int) -> int:
  """The `max_value` of n images; 0 if those looked at have 8 bits.

  It is 2^b - 1 of the smallest depth b that holds the largest value of up to
  `PROBED` images, spread evenly. A warning of `logging` says so.

  Args:
    largest: index -> the largest value of an image of 16 bits, None for one of
      8; may raise anything.
    n: how many images there are.
  """
  values = []
  for i in np.linspace(0, n - 1, min(n, PROBED)).round().astype(int):
    with contextlib.suppress(Exception):  # reported when it is decoded
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
  """The `max_value` of image files; see `probe`."""

  colours = [0]

  def largest(i: int) -> int | None:
    with imagefile.opened(paths[i]) as image:
      # Only images of 16 bits need be decoded.
      if _is_16_bits(image):
        return _largest(_turned(image))
      if image.tile and ';16' in str(image.tile[0].args):
        colours.append(int(np.asarray(image.convert('RGB')).max()))
    return None

  found = probe(largest, len(paths))
  if 0 < max(colours) < 64:
    logging.getLogger(__name__).warning(
      'colour images of 16 bits: Pillow keeps the upper 8, and the largest '
      'value of these is %d of 255; if they use fewer bits, save them with 8',
      max(colours),
    )
  return found


def probe_image(image: Image.Image) -> int:
  """The `max_value` of one image; see `probe`."""
  return probe(lambda _: _largest(image), 1)


def probe_arrays(read: Callable[[int], np.ndarray], n: int) -> int:
  """The `max_value` of n arrays `read(i)`, uint8 or uint16; see `probe`."""
  # All are of one type.
  if read(0).dtype != np.uint16:
    return 0
  return probe(lambda i: int(read(i).max()), n)


def _is_16_bits(image: Image.Image) -> bool:
  return image.mode.startswith('I')


def _largest(image: Image.Image) -> int | None:
  return int(np.asarray(image).max()) if _is_16_bits(image) else None


def read(path: str, shape: Shape, max_value: int = 0) -> np.ndarray:
  """The image file at `path` as uint8 `shape`.

  Raises whatever Pillow raises for a file that it cannot read: OSError,
  SyntaxError, ValueError, struct.error, DecompressionBombError, ...; and
  ValueError for an image of 16 bits with a value above `max_value`.
  """
  with imagefile.opened(path) as image:
    return fit(_turned(image), shape, max_value)


def upright(path: str) -> Image.Image:
  """The image file at `path`, as it was meant to be held; raises as `read`."""
  with imagefile.opened(path) as image:
    return _turned(image)


def shape_of(path: str) -> Shape:
  """The shape of an upright image file, which is not decoded."""
  with imagefile.opened(path) as image:
    # Pillow gives the upright size of a TIFF.
    lies = image.format != 'TIFF' and _orientation(image) >= 5
    W, H = image.size[::-1] if lies else image.size
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
  """An opened image, decoded and upright.

  Not `ImageOps.exif_transpose`, which writes EXIF anew and fails for a photo
  of which one other field is wrong.
  """
  image.load()
  if image.format == 'PPM' and _is_16_bits(image):
    # These files name their largest value, and Pillow makes it 65535.
    return Image.fromarray(_to_8_bits(np.asarray(image), 65535))
  way = _TURNED.get(_orientation(image))
  return image if way is None else image.transpose(way)


def _orientation(image: Image.Image) -> int:
  """EXIF's 1 to 8; 1 where it says nothing, or cannot be read."""
  try:
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
  except Exception:  # Pillow's are of many types
    return 1
  return value if type(value) is int else 1


def fit_array(
  pixels: np.ndarray, shape: Shape, max_value: int = 0
) -> np.ndarray:
  """Pixels (h, w, 1 | 3 | 4), uint8 or uint16, as uint8 `shape`."""
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
  """An upright image of any size and mode as uint8 `shape`."""
  height, width, channels = shape
  image = _cover(_opaque(image, max_value), height, width)
  # Gray is ITU-R 601 luma, as Pillow has it.
  return np.asarray(image.convert('L' if channels == 1 else 'RGB')).reshape(
    shape
  )


def _opaque(image: Image.Image, max_value: int) -> Image.Image:
  """The image in mode L or RGB, what is transparent laid over white."""
  if _is_16_bits(image):
    # Pillow's own conversion clips at 255: nearly all would be white.
    return Image.fromarray(_to_8_bits(np.asarray(image), max_value))
  if image.mode == 'F':
    raise ValueError('its pixels are floats, whose range is not known')
  if image.has_transparency_data:
    return _on_white(image)
  return image if image.mode in ('L', 'RGB') else image.convert('RGB')


def _on_white(image: Image.Image) -> Image.Image:
  """RGB, in bands: whole, the steps between would take five times as much."""
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
      'it has 16 bits, where the images looked at first have 8: set '
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
