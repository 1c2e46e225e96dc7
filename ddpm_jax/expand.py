"""Paths as people write them: ~/run, $HOME/run.

A shell expands neither in `--workdir=~/run`, nor anything in a file.
"""

import errno
import os
import re

from ddpm_jax import errors


def expanded(text: str) -> str:
  """A path with ~, ~USER, $NAME and ${NAME} replaced.

  What is there by the very name is left as it is.

  Raises:
    UserError: if there is no such home or variable, or it cannot be a path.
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
      f'{text}: {user} is not known here: name the folder in full'
    )
  unset = re.search(r'\$(\w*[a-zA-Z_]\w*|\{\w+\})', path)
  if unset:
    raise errors.UserError(
      f'{text}: {unset[0]} is not set: name the path in full'
    )
  return path
