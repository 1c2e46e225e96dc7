"""Opens image files safely: only known formats, and of bounded size.

All code that reads image files uses `opened`.
"""

import contextlib
import io
import os
import threading
import warnings
from collections.abc import Iterator
from typing import BinaryIO

from PIL import Image
from PIL import ImageFile
from PIL import UnidentifiedImageError
from PIL import features

from ddpm_jax import regular

# Without this list Pillow tries all formats that it knows, such as EPS, for
# which it starts Ghostscript. Some builds of Pillow lack the last two.
FORMATS = (
  *('PNG', 'JPEG', 'BMP', 'GIF', 'TIFF', 'PPM'),
  *(name for name in ('WEBP', 'AVIF') if features.check(name.lower())),
)
SUFFIXES = (
  *('.png', '.apng', '.jpg', '.jpeg', '.jpe', '.jfif', '.mpo', '.bmp', '.gif'),
  *('.tif', '.tiff', '.ppm', '.pgm', '.pbm', '.pnm', '.webp'),
  *(('.avif',) if 'AVIF' in FORMATS else ()),
)

# The limit for one image, and for all that are decoded at a time. A pixel takes
# 8 to 16 bytes, so a process uses at most 2 GB for them.
MAX_PIXELS = 2**27
MAX_SIDE = 2**16 - 1  # the limit of JPEG
MAX_BYTES = 2**30  # of a file
# Some formats are read as a whole when they are opened. While a file of more
# bytes than this is open, no other image is.
LARGE = 2**24

# Pillow checks the size too, in more places. Between its limit and twice that
# it only warns, but `opened` refuses. It also warns of damaged EXIF data, which
# do not matter here.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings('ignore', module=r'PIL\.')


class _Budget:
  """Pixels that threads share: `take` waits until enough are left."""

  def __init__(self, pixels: int) -> None:
    self._left = pixels
    self._changed = threading.Condition()

  @contextlib.contextmanager
  def take(self, pixels: int) -> Iterator[None]:
    with self._changed:
      self._changed.wait_for(lambda: self._left >= pixels)
      self._left -= pixels
    try:
      yield
    finally:
      with self._changed:
        self._left += pixels
        self._changed.notify_all()


_in_flight = _Budget(MAX_PIXELS)


@contextlib.contextmanager
def opened(
  source: str | os.PathLike | BinaryIO,
) -> Iterator[ImageFile.ImageFile]:
  """Opens an image: reads its header, but not its pixels.

  Open one image at a time in a thread: until the context is left, its pixels
  count towards the limit, for which other threads wait.

  Raises:
    ValueError: If it is not a regular file, or is too large.
    Exception: Pillow raises errors of many types.
  """
  with contextlib.ExitStack() as stack:
    file = source
    if isinstance(file, str | os.PathLike):
      file = stack.enter_context(regular.opened(file))
    size = regular.length(file)
    if size > MAX_BYTES:
      raise ValueError(f'it has {size} bytes, and may have {MAX_BYTES}')
    if size > LARGE:
      stack.enter_context(_in_flight.take(MAX_PIXELS))
    try:
      image = Image.open(_without_text(file), formats=FORMATS)
    except Image.DecompressionBombError:
      raise ValueError(f'it has more than {MAX_PIXELS} pixels') from None
    except UnidentifiedImageError:
      raise ValueError(f'it is none of {", ".join(FORMATS)}') from None
    _check_size(*stack.enter_context(image).size)
    if image.format == 'TIFF':  # A tile may be larger than the image.
      tags = image.tag_v2  # type: ignore[attr-defined]
      _check_size(tags.get(322, 1), tags.get(323, 1))
    if size <= LARGE:
      stack.enter_context(_in_flight.take(image.width * image.height))
    yield image


def _check_size(width: int, height: int) -> None:
  if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
    raise ValueError(
      f'it has {width}x{height} pixels; at most {MAX_PIXELS} in all and '
      f'{MAX_SIDE} a side are read: make it smaller'
    )


_PNG = b'\x89PNG\r\n\x1a\n'
_TEXT = (b'tEXt', b'zTXt', b'iTXt', b'iCCP')
# Chunks that may hold the orientation of the image.
_ORIENTED = (b'Raw profile type exif\0', b'XML:com.adobe.xmp\0')
_MAX_TEXT = 2**20  # bytes


def _without_text(file: BinaryIO) -> BinaryIO:
  """Returns a PNG without its texts and colour profile; other files unchanged.

  Pillow refuses an image whose texts exceed its limits. Pixels do not need
  them.
  """
  if file.read(len(_PNG)) != _PNG:
    return file
  kept = [(0, len(_PNG))]
  start, whole = len(_PNG), True
  while len(head := file.read(8 + 32)) >= 8:
    size, kind = 12 + int.from_bytes(head[:4], 'big'), head[4:8]
    wanted = size <= _MAX_TEXT and head[8:].startswith(_ORIENTED)
    if kind in _TEXT and not wanted:
      whole = False
    else:
      kept.append((start, size))
    start = file.seek(start + size)
  file.seek(0)
  if whole:
    return file
  parts = []
  for start, size in kept:
    file.seek(start)
    parts.append(file.read(size))
  return io.BytesIO(b''.join(parts))
