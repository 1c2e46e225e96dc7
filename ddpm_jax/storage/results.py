"""JSON files of results: a list of entries, one for each way of measuring.

An entry says how it was made and what was found. What is measured again takes
the place of an entry that was made in the very same way, and of no other.
"""

import json
import logging
import pathlib
import time
from collections.abc import Collection
from typing import Any

from ddpm_jax import errors
from ddpm_jax import jsonfile
from ddpm_jax.storage import paths

Entry = dict[str, Any]


def read(path: pathlib.Path, name: str, mark: str) -> dict[str, Any]:
  """The lists of a file, by name; {} if there is no file.

  A file of an earlier version is one entry, which has the key `mark`: it comes
  back as a list `name` of it, beside the lists of objects that were in it. A
  damaged file is warned of and counts as none: it must not cost what was
  measured now. `add` keeps it under another name.
  """
  try:
    return _read(path, name, mark)
  except errors.UserError as e:
    logging.warning('%s; nothing is read from it', e)
    return {}


def _read(path: pathlib.Path, name: str, mark: str) -> dict[str, Any]:
  """Like `read`, but raises UserError for a damaged file."""
  values = jsonfile.read(path) if path.exists() else {}
  if isinstance(values, dict) and mark in values:
    lists = {key: value for key, value in values.items() if _is_list(value)}
    entry = {key: values[key] for key in values if key not in lists}
    values = {name: [entry]} | lists
  if not isinstance(values, dict):
    raise errors.UserError(f'{path} is damaged: it is not an object')
  if wrong := [key for key in values if not _is_list(values[key])]:
    raise errors.UserError(
      f'{path} is damaged: {wrong[0]} is not a list of objects'
    )
  try:
    text(values, path)
  except errors.RunError:
    raise errors.UserError(
      f'{path} is damaged: it holds a number that is not finite'
    ) from None
  return values


def _is_list(value: Any) -> bool:
  """Whether it is a list of objects."""
  return isinstance(value, list) and all(isinstance(x, dict) for x in value)


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
  path: pathlib.Path, name: str, mark: str, entry: Entry, found: Collection[str]
) -> list[Entry]:
  """Adds an entry to a list of the file, and returns the list.

  Args:
    path: the file, which is written anew. A damaged one is kept, under another
      name.
    name: of the list.
    mark: see `read`.
    entry: how it was made, and what was found.
    found: the keys of what was found; all others say how.

  Raises:
    RunError: a number is not finite.
  """

  def made(entry: Entry) -> Entry:
    return {k: v for k, v in entry.items() if k not in found}

  entry = json.loads(text(entry, path))  # tuples are lists, as in the file
  # Read only now: another program may have added to it in the meantime.
  try:
    before = _read(path, name, mark)
  except errors.UserError as e:
    aside = paths.move(path, f'{path.name}.damaged-{time.time_ns()}')
    logging.warning('%s; it is kept as %s', e, aside.name)
    before = {}
  others = [e for e in before.get(name, []) if made(e) != made(entry)]
  values = before | {name: [*others, entry]}
  with paths.atomic_write(path) as part:
    part.write_text(text(values, path))
  return values[name]
