"""What a user can mend, and the words that help to mend it."""

import difflib
import errno
import importlib
import importlib.util
import math
import pathlib
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

SHORT = 12  # names that are listed in full


class UserError(ValueError):
  """A mistake that the user can mend: `main` prints it in one line, exits 2.

  Raise it with what was wrong and what to do. Anything else that is raised is
  our own fault, and keeps its traceback.
  """


def short(value: Any, limit: int = 80) -> str:
  """A value in a message: text as it is, on one line, and not at length."""
  try:
    text = value if isinstance(value, str) else repr(value)
  except (ValueError, RecursionError):  # 10**5000; lists within lists
    text = f'a very long {type(value).__name__}'
  text = ' '.join(text[: 4 * limit].split())
  return text if len(text) <= limit else f'{text[:limit]}...'


def unknown(
  kind: str, name: str, known: Iterable[str], *, others: str = ''
) -> UserError:
  """The error for a name that is not one of `known`, naming the nearest.

  A short list is given in full. Of a long one the nearest three are named, and
  `others` says where the rest are listed.
  """
  known, name = sorted(known), short(name)
  close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  hint = f'did you mean {close[0]!r}? ' if close else ''
  if len(known) <= SHORT:
    listed = f'known: {", ".join(x or repr(x) for x in known)}'
  else:
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0)
    listed = f'nearest: {", ".join(nearest)}' + (others and f'; {others}')
  return UserError(f'unknown {kind} {name!r}; {hint}{listed}')


def find_optional(name: str, *, what: str, install: str) -> pathlib.Path:
  """The file of an optional package, which is not imported.

  Args:
    name: of its module, such as 'tokenizers'.
    what: needs it, to begin the message with.
    install: the command that installs it.

  Raises:
    UserError: if it is not installed.
  """
  spec = importlib.util.find_spec(name)
  if spec is None or spec.origin is None:
    raise UserError(f'{what} needs the package {name}: {install}')
  return pathlib.Path(spec.origin)


def optional(name: str, *, what: str, install: str) -> Any:
  """The module of an optional package, imported; see `find_optional`.

  Raises:
    UserError: if it is not installed, or is and cannot be imported.
  """
  find_optional(name, what=what, install=install)
  try:
    return importlib.import_module(name)
  except Exception as e:  # A broken package may raise anything.
    reason = ' '.join(str(e).split())
    raise UserError(
      f'{what} needs the package {name}, which is installed but fails to '
      f'import ({type(e).__name__}: {reason:.200})'
    ) from e


class RunError(RuntimeError):
  """A run that cannot go on, such as one whose loss is not a number.

  `main` prints it in one line and exits with 1.
  """


class Diverged(RunError):
  """A run whose loss or weights are not finite, or too large.

  The same run would diverge again: `main` exits with 2, and no script retries.
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
  if isinstance(error, Diverged):
    return 2, f'stopped: {error}'
  if isinstance(error, RunError):
    return 1, f'stopped: {error}'
  if isinstance(error, KeyboardInterrupt):
    return 1, 'interrupted'
  reason = ' '.join(str(error).split())
  return 1, f'failed: {type(error).__name__}: {reason}'


def _no_room(error: BaseException) -> bool:
  full = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
  return isinstance(error, OSError) and error.errno in full
