"""JSON files of results: lists of entries, one for each setting.

An entry holds the settings of a measurement and its results. A new measurement
replaces only the entry with exactly the same settings.
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
  """Returns {name: entries} of a file; {} if there is no file.

  A file of an earlier version is a single entry, recognized by the key `mark`.
  It is returned as a list `name` of one entry, beside the lists of objects that
  it holds. A damaged file counts as missing, with a warning, so that new
  results are not lost; `add` renames it.
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
  """Returns the text to write into the file.

  Raises:
    RunError: If a number is not finite.
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
    path: The file, which is rewritten. A damaged one is renamed first.
    name: Name of the list.
    mark: See `read`.
    entry: The settings and the results.
    found: The keys of the results; all others are settings.

  Raises:
    RunError: If a number is not finite.
  """

  def made(entry: Entry) -> Entry:
    return {k: v for k, v in entry.items() if k not in found}

  entry = json.loads(text(entry, path))  # tuples are lists, as in the file
  # Read as late as possible: another program may have added an entry.
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
