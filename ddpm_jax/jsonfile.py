"""JSON that others may have written: read within bounds, refused in one line.

Every file of JSON that the program reads comes through here.
"""

import json
import pathlib
from typing import Any

from ddpm_jax import errors

# Bytes. The largest that is ours says what a run's checkpoint holds: some
# hundred KB.
LIMIT = 64 * 2**20
DEPTH = 50  # of lists and objects in one another; ours have 6


def read(path: pathlib.Path, *, limit: int = LIMIT) -> Any:
  """What a file of JSON holds.

  Raises:
    UserError: it is no JSON, larger than `limit` bytes, or too deep. The
      message begins with the path, and says what is wrong.
    OSError: it cannot be read.
  """
  with path.open('rb') as file:
    text = file.read(limit + 1)
  try:
    return parse(text, limit=limit)
  except ValueError as e:
    raise errors.UserError(f'{path} is damaged: {e}') from None


def parse(text: bytes | str, *, limit: int = LIMIT) -> Any:
  """The value of a text of JSON.

  Raises:
    ValueError: it is no JSON, longer than `limit`, or too deep.
  """
  if len(text) > limit:
    raise ValueError(f'it is longer than {limit} bytes')
  try:
    value = json.loads(text)
  except RecursionError:
    raise ValueError(f'it is more than {DEPTH} levels deep') from None
  level = [value]
  for _ in range(DEPTH):
    level = [inner for outer in level for inner in _inside(outer)]
    if not level:
      return value
  raise ValueError(f'it is more than {DEPTH} levels deep')


def _inside(value: Any) -> list[Any]:
  if isinstance(value, dict):
    return list(value.values())
  return value if isinstance(value, list) else []
