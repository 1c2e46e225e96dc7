"""Expands ~ and environment variables in paths: ~/run, $HOME/run.

A shell does not expand the ~ of `--workdir=~/run`, nor paths in a file.
"""

import errno
import os
import re

from ddpm_jax import errors


def expanded(text: str) -> str:
  """Returns a path with ~, ~USER, $NAME and ${NAME} replaced.

  A path that exists as it is written is not changed, unless it begins with ~.

  Raises:
    UserError: If there is no such home or variable, or it cannot be a path.
  """
  try:
    os.lstat(text)
  except ValueError as e:
    raise errors.UserError(f'{errors.short(repr(text))}: {e}') from None
  except OSError as e:
    if e.errno == errno.ENAMETOOLONG:
      raise errors.UserError(f'{errors.short(text)}: {e.strerror}') from None
  if os.path.lexists(text) and not text.startswith('~'):
    return text
  path = os.path.expandvars(os.path.expanduser(text))
  if path.startswith('~') and not os.path.lexists(path):
    user = path.partition('/')[0]
    raise errors.UserError(
      f'{text}: {user} is not known here: write the path in full'
    )
  unset = re.search(r'\$(\w*[a-zA-Z_]\w*|\{\w+\})', path)
  if unset:
    raise errors.UserError(
      f'{text}: {unset[0]} is not set: write the path in full'
    )
  return path
