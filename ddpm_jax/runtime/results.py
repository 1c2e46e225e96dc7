"""JSON files of results: a list of entries, one for each way of measuring.

An entry says how it was made and what was found. What is measured again takes
the place of an entry that was made in the very same way, and of no other.
"""

import json
import pathlib
from collections.abc import Collection
from typing import Any

from ddpm_jax import errors
from ddpm_jax.runtime import images

Entry = dict[str, Any]


def read(path: pathlib.Path, name: str, mark: str) -> dict[str, Any]:
  """The lists of a file, by name; {} if there is no file.

  A file of an earlier version is one entry, which has the key `mark`: it comes
  back as a list `name` of it.

  Raises:
    UserError: the file is damaged.
  """
  try:
    values = json.loads(path.read_text()) if path.exists() else {}
    if not isinstance(values, dict):
      raise ValueError('it is not an object')
  except ValueError as e:
    raise errors.UserError(f'{path} is damaged ({e}): remove it') from None
  return {name: [values]} if mark in values else values


def text(values: dict[str, Any], path: pathlib.Path) -> str:
  """What to write into the file.

  Raises:
    RunError: a number is not finite.
  """
  try:
    return json.dumps(values, indent=2, allow_nan=False) + '\n'
  except ValueError:
    raise errors.RunError(
      f'a number that was measured is not finite: {path} is left as it was'
    ) from None


def add(
  path: pathlib.Path,
  before: dict[str, Any],
  name: str,
  entry: Entry,
  found: Collection[str],
) -> list[Entry]:
  """Adds an entry to a list of the file, and returns the list.

  Args:
    path: the file, which is written anew.
    before: its lists.
    name: of the list.
    entry: how it was made, and what was found.
    found: the keys of what was found; all others say how.

  Raises:
    RunError: a number is not finite.
  """

  def made(entry: Entry) -> Entry:
    return {k: v for k, v in entry.items() if k not in found}

  entry = json.loads(text(entry, path))  # tuples are lists, as in the file
  others = [e for e in before.get(name, []) if made(e) != made(entry)]
  values = before | {name: [*others, entry]}
  with images.whole(path) as part:
    part.write_text(text(values, path))
  return values[name]
