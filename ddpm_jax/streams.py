"""stdout and stderr that a program can outlive.

A terminal is lost, a reader goes away, a disk is full, a stream was closed
before the start: none of it may end a run.
"""

import contextlib
import errno
import io
import os
import select
import sys
from typing import Any
from typing import TextIO

from ddpm_jax import errors

# The reader went away, or the terminal did: nobody is left to be told.
_GONE = errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO

# Why results could not be printed: the first error.
_lost: list[OSError] = []


class _Raw(io.FileIO):
  """A file descriptor; what cannot be written to it is dropped."""

  def write(self, data: Any, /) -> int:
    with memoryview(data) as view:
      try:
        return self._all(view)
      except OSError as error:
        self.failed(error)
      return view.nbytes

  def _all(self, view: memoryview) -> int:
    sent = 0
    while sent < view.nbytes:
      n = super().write(view[sent:])
      if n is None:  # Another program has made the pipe non-blocking.
        select.select([], [self], [])
      sent += n or 0
    return sent

  def failed(self, error: OSError) -> None:
    pass


class _Results(_Raw):
  """Like stderr, for stdout, where a full disk is an error: at the end."""

  def failed(self, error: OSError) -> None:
    if error.errno not in _GONE:
      _lost.append(error)


def secure() -> None:
  """Puts streams in place that never raise, and encode what they can.

  A descriptor 0, 1 or 2 that is closed is opened on the null device first: the
  next file would get its number, and what C++ or Python says would go into it.
  What a notebook or a test has put in the place of a stream stays there.
  """
  for number in range(3):
    try:
      os.fstat(number)
    except OSError:
      if os.open(os.devnull, os.O_RDWR) == number:  # the lowest that is free
        os.set_inheritable(number, True)
  if sys.stdin is None:
    sys.stdin = open(os.devnull)  # noqa: SIM115
  for stream in (sys.stdout, sys.stderr):
    if stream is not None:
      with contextlib.suppress(OSError):
        stream.flush()
  if sys.stdout is sys.__stdout__:
    sys.stdout = results(1)
  if sys.stderr is sys.__stderr__:
    raw = _Raw(2, 'w', closefd=False)
    sys.stderr = _text(raw, sys.stderr, 'backslashreplace', True)


def results(number: int) -> TextIO:
  """A stream of results on a file descriptor, which stays open.

  A letter that its encoding does not have becomes a question mark. If its
  reader goes away, what follows is dropped. Other errors are for `check`.
  """
  raw = _Results(number, 'w', closefd=False)
  by_line = raw.isatty() or getattr(sys.stdout, 'write_through', False)
  return _text(raw, sys.stdout, 'replace', by_line)


def check() -> None:
  """To be called at the end.

  Raises:
    RunError: results were printed, and did not arrive: a disk was full.
  """
  sys.stdout.flush()
  if _lost:
    raise errors.RunError(f'cannot write to stdout: {_lost[0].strerror}')


def _text(
  raw: _Raw, like: TextIO | None, unknown: str, by_line: bool
) -> TextIO:
  return io.TextIOWrapper(
    io.BufferedWriter(raw),
    encoding=getattr(like, 'encoding', None) or 'utf-8',
    errors=unknown,
    line_buffering=by_line,
  )
