"""Opens regular files only.

To open a pipe could block for ever, and a device may never end.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import BinaryIO


def is_regular(path: str | os.PathLike) -> bool:
  """Whether it is a file or a link to one, without opening it."""
  try:
    return stat.S_ISREG(os.stat(path).st_mode)
  except (OSError, ValueError):  # ValueError: a NUL in the name
    return False


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[BinaryIO]:
  """Opens a regular file to read its bytes.

  Raises:
    OSError: If it cannot be opened.
    ValueError: If it is a folder, a pipe, a socket or a device.
  """
  if not stat.S_ISREG(os.stat(path).st_mode):
    raise ValueError('it is not a regular file')
  with open(path, 'rb', opener=_opener) as file:
    yield file


def _opener(path: str, flags: int) -> int:
  # The file may have been replaced by a pipe since the check: do not block.
  return os.open(path, flags | getattr(os, 'O_NONBLOCK', 0))


def length(file: BinaryIO) -> int:
  """Returns the length of an open file in bytes, and rewinds it."""
  size = file.seek(0, os.SEEK_END)
  file.seek(0)
  return size
