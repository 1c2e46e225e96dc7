"""What a user can mend, and the words that help to mend it."""

import difflib
import errno
import math
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any


class UserError(ValueError):
  """A mistake that the user can mend: `main` prints it in one line, exits 2.

  Raise it with what was wrong and what to do. Anything else that is raised is
  our own fault, and keeps its traceback.
  """


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
  """The error for a name that is not one of `known`, naming the nearest."""
  known = sorted(known)
  close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  hint = f'did you mean {close[0]!r}? ' if close else ''
  return UserError(f'unknown {kind} {name!r}; {hint}known: {", ".join(known)}')


class RunError(RuntimeError):
  """A run that cannot go on, such as one whose loss is not a number.

  `main` prints it in one line and exits with 1.
  """


def finite(values: Mapping[str, Any], what: str) -> Mapping[str, Any]:
  """`values` as they are.

  Raises:
    RunError: naming the first number that is not finite.
  """
  for name, value in values.items():
    if isinstance(value, float) and not math.isfinite(value):
      raise RunError(f'the {what} {name} is {value}; nothing is written')
  return values


def expected(error: BaseException) -> bool:
  """Whether it needs no traceback."""
  known = UserError, RunError, KeyboardInterrupt
  return isinstance(error, known) or _no_room(error)


def verdict(error: BaseException) -> tuple[int, str]:
  """The exit code, and the line to print. 2: to try again would not help."""
  if isinstance(error, UserError):
    return 2, f'error: {error}'
  if isinstance(error, OSError) and _no_room(error):
    where = f' ({error.filename})' if error.filename else ''
    return 2, f'error: {error.strerror}{where}: make room, and go on'
  if isinstance(error, RunError):
    return 1, f'stopped: {error}'
  if isinstance(error, KeyboardInterrupt):
    return 1, 'interrupted'
  reason = ' '.join(str(error).split())
  return 1, f'failed: {type(error).__name__}: {reason}'


def _no_room(error: BaseException) -> bool:
  full = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
  return isinstance(error, OSError) and error.errno in full
