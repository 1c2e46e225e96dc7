"""Errors that are printed in one line, and helpers to write their messages."""

import difflib
import errno
import importlib
import importlib.util
import math
import pathlib
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

SHORT = 12  # The longest list of names that is printed in full.


class UserError(ValueError):
  """A mistake that the user can correct.

  The message says what was wrong and what to do. `main` prints it in one line
  and exits with 2. Errors of other types are bugs and print a traceback.
  """


def short(value: Any, limit: int = 80) -> str:
  """Returns a value on one line for a message, cut after `limit` characters."""
  try:
    text = value if isinstance(value, str) else repr(value)
  except (ValueError, RecursionError):  # 10**5000; lists within lists
    text = f'a very long {type(value).__name__}'
  text = ' '.join(text[: 4 * limit].split())
  return text if len(text) <= limit else f'{text[:limit]}...'


def unknown(
  kind: str, name: str, known: Iterable[str], *, others: str = ''
) -> UserError:
  """Returns the error for a name that is not one of `known`.

  The message lists all known names if they are few, and else the three nearest;
  `others` then says where the rest are listed.
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
  """Returns the file of an optional package, without importing it.

  Args:
    name: The name of its module, such as 'tokenizers'.
    what: What needs it: the start of the message.
    install: The command that installs it.

  Raises:
    UserError: If it is not installed.
  """
  spec = importlib.util.find_spec(name)
  if spec is None or spec.origin is None:
    raise UserError(f'{what} needs the package {name}: {install}')
  return pathlib.Path(spec.origin)


def optional(name: str, *, what: str, install: str) -> Any:
  """Imports and returns an optional package; see `find_optional`.

  Raises:
    UserError: If it is not installed or cannot be imported.
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
  """A run that cannot continue, for example because its storage fails.

  `main` prints the message in one line and exits with 1.
  """


class Diverged(RunError):
  """A run whose loss or weights are not finite, or too large.

  The same run would diverge again: `main` exits with 2, and no script retries.
  """


def finite(values: Mapping[str, Any], what: str) -> Mapping[str, Any]:
  """Returns `values` if all of them are finite.

  Raises:
    RunError: With the first number that is not finite.
  """
  for name, value in values.items():
    if isinstance(value, float) and not math.isfinite(value):
      raise RunError(f'the {what} {name} is {value}; nothing is written')
  return values


def expected(error: BaseException) -> bool:
  """Whether the error is printed without a traceback."""
  known = UserError, RunError, KeyboardInterrupt
  return isinstance(error, known) or _no_room(error)


def verdict(error: BaseException) -> tuple[int, str]:
  """Returns the exit code and the line to print. 2: a retry would not help."""
  if isinstance(error, UserError):
    return 2, f'error: {error}'
  if isinstance(error, OSError) and _no_room(error):
    where = f' ({error.filename})' if error.filename else ''
    return 2, f'error: {error.strerror}{where}: free some space, then resume'
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
