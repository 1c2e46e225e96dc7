"""Files that others name: only regular ones are opened.

A pipe would be waited for, for ever; a device may give bytes without end.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import BinaryIO


def is_regular(path: str | os.PathLike) -> bool:
  """Whether it is a file, or a link to one; never opens it."""
  try:
    return stat.S_ISREG(os.stat(path).st_mode)
  except (OSError, ValueError):  # ValueError: a NUL in the name
    return False


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[BinaryIO]:
  """A regular file, to be read as bytes.

  Raises:
    OSError: it cannot be opened.
    ValueError: it is a folder, a pipe, a socket or a device.
  """
  if not stat.S_ISREG(os.stat(path).st_mode):
    raise ValueError('it is not a regular file')
  with open(path, 'rb', opener=_opener) as file:
    yield file


def _opener(path: str, flags: int) -> int:
  # It may have become a pipe since it was looked at: that is not waited for.
  return os.open(path, flags | getattr(os, 'O_NONBLOCK', 0))


def length(file: BinaryIO) -> int:
  """The bytes of an open file, which is then at its start."""
  size = file.seek(0, os.SEEK_END)
  file.seek(0)
  return size
