"""stdout and stderr that never raise.

A lost terminal, a closed pipe, a full disk or a stream that was closed before
the start must not end a run.
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

# The reader or the terminal is gone, so there is nobody to report to.
_GONE = errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO

# Errors that lost results on stdout, for `check`.
_lost: list[OSError] = []


class _Raw(io.FileIO):
  """A file descriptor that drops what cannot be written."""

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
  """For stdout, where a full disk is an error, which `check` raises."""

  def failed(self, error: OSError) -> None:
    if error.errno not in _GONE:
      _lost.append(error)


def secure() -> None:
  """Replaces stdout and stderr by streams that never raise.

  Opens the null device for each of the descriptors 0, 1 and 2 that is closed:
  otherwise the next file would get its number, and output of C++ or Python
  would go into that file. Streams that a notebook or a test has replaced stay.
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
  """Returns a stream of results on a file descriptor, which it never closes.

  Characters that its encoding lacks become question marks. If the reader goes
  away, the rest is dropped. Other errors are kept for `check`.
  """
  raw = _Results(number, 'w', closefd=False)
  by_line = raw.isatty() or getattr(sys.stdout, 'write_through', False)
  return _text(raw, sys.stdout, 'replace', by_line)


def check() -> None:
  """Checks, at the end of a program, that stdout has taken all results.

  Raises:
    RunError: If it has not, for example because a disk was full.
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
