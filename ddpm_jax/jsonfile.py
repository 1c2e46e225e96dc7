"""Reads JSON that others may have written, with limits on size and depth.

All code that reads JSON files uses this module.
"""

import json
import pathlib
from typing import Any

from ddpm_jax import errors

# Bytes. The largest file of this program, the list of arrays in a checkpoint,
# has some hundred KB.
LIMIT = 64 * 2**20
DEPTH = 50  # of nested lists and objects; files of this program have 6


def read(path: pathlib.Path, *, limit: int = LIMIT) -> Any:
  """Returns the value of a JSON file.

  Raises:
    UserError: If it is not JSON, larger than `limit` bytes, or nested too
      deeply. The message begins with the path.
    OSError: If it cannot be read.
  """
  with path.open('rb') as file:
    text = file.read(limit + 1)
  try:
    return parse(text, limit=limit)
  except ValueError as e:
    raise errors.UserError(f'{path} is damaged: {e}') from None


def parse(text: bytes | str, *, limit: int = LIMIT) -> Any:
  """Returns the value of a JSON text.

  Raises:
    ValueError: If it is not JSON, longer than `limit`, or nested too deeply.
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
