"""The image files of a folder, and their labels."""

import json
import logging
import os
import posixpath
import re
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import features

from ddpm_jax import errors

SUFFIXES = (
  *('.png', '.jpg', '.jpeg', '.jpe', '.jfif', '.webp', '.bmp', '.gif'),
  *('.tif', '.tiff', '.ppm', '.pgm', '.pnm'),
  # Pillow can be built without it.
  *(('.avif',) if features.check('avif') else ()),
)

# More are not classes but, say, the numbers of the images.
MOST_CLASSES = 1_000_000

Labels = tuple[np.ndarray, tuple[str, ...]]  # int32 (n,), names of classes


def find(folder: str) -> list[str]:
  """Paths of the images under `folder`, relative to it, with /, sorted.

  Links are followed. Hidden files and folders are passed over, and so are
  workdirs, whose pictures are not data.

  Raises:
    UserError: `folder` is not a folder, or holds no image.
  """
  if not folder:
    raise errors.UserError('which folder? set --config.data.path')
  if not os.path.isdir(folder):
    what = 'is not a folder' if os.path.exists(folder) else 'does not exist'
    raise errors.UserError(f'{folder} {what}; set --config.data.path')
  if is_run(folder):
    raise errors.UserError(
      f'{folder} is the workdir of a run, whose pictures are not data: keep '
      'them apart, and set --config.data.path'
    )
  names = []
  for here, folders, files in os.walk(folder, followlinks=True):
    folders[:] = [
      f
      for f in folders
      if not (f.startswith('.') or is_run(os.path.join(here, f)))
    ]
    below = os.path.relpath(here, folder).replace(os.sep, '/')
    names += [
      posixpath.normpath(posixpath.join(below, name))
      for name in files
      if name.lower().endswith(SUFFIXES) and not name.startswith('.')
    ]
  if not names:
    raise errors.UserError(
      f'{folder} holds no image ({" ".join(SUFFIXES)}); set --config.data.path'
    )
  return sorted(names)


def is_run(folder: str) -> bool:
  """Whether a folder is a workdir."""
  parts = 'config.json', 'checkpoints'
  return all(os.path.exists(os.path.join(folder, part)) for part in parts)


def natural(name: str) -> Any:
  """A key to sort by that compares digits as numbers: img2 before img10."""
  parts: list[Any] = re.split('([0-9]+)', name)
  parts[1::2] = map(int, parts[1::2])
  return parts, name  # the name itself decides between 1 and 01


def label(
  folder: str, names: list[str], class_order: Callable[[str], Any] = natural
) -> Labels:
  """Labels of the images `names` of `folder`; -1 where there is none.

  `metadata.jsonl` in `folder` gives them, a line {"file_name": ..., "label":
  integer or string} an image; else the first-level sub-folders do. Classes that
  have names are numbered in the order of the key `class_order`.
  """
  path = os.path.join(folder, 'metadata.jsonl')
  if os.path.isfile(path):
    labels = _from_metadata(path, names, class_order)
    if (labels[0] >= 0).any():
      return labels
  classes = [name.split('/')[0] if '/' in name else None for name in names]
  return _number(classes, class_order)


def class_names(labels: np.ndarray) -> tuple[str, ...]:
  """Names for the classes of labels that are only numbers."""
  return tuple(str(i) for i in range(int(labels.max(initial=-1)) + 1))


def _number(
  classes: list[str | None], class_order: Callable[[str], Any]
) -> Labels:
  """Classes by name, numbered in order."""
  there = {c for c in classes if c is not None}
  known = tuple(sorted(there, key=class_order))
  number: dict[str | None, int] = {c: i for i, c in enumerate(known)}
  return np.array([number.get(c, -1) for c in classes], np.int32), known


def _from_metadata(
  path: str, names: list[str], class_order: Callable[[str], Any]
) -> Labels:
  given: dict[str, Any] = dict.fromkeys(names)
  kinds, foreign = set(), None
  for where, entry in lines(path):
    value = entry.get('label')
    name = posixpath.normpath(str(entry.get('file_name')))
    if name not in given:
      foreign = foreign or (where, name)
      continue
    number = type(value) is int and 0 <= value < MOST_CLASSES
    if not (number or isinstance(value, str | None)):
      raise errors.UserError(
        f'{where}: label {value!r}; use an integer from 0 to '
        f'{MOST_CLASSES - 1}, or a string'
      )
    given[name] = value
    kinds.add(type(value))
  if foreign and kinds:
    raise errors.UserError(
      f'{foreign[0]}: no image {foreign[1]!r} beside it; each line needs the '
      '"file_name" of one'
    )
  if foreign:
    logging.getLogger(__name__).warning(
      '%s: no image %r beside it, and no line names another: the file is '
      'ignored',
      *foreign,
    )
  if {int, str} <= kinds:
    raise errors.UserError(f'{path}: labels are integers and strings; use one')
  values = list(given.values())
  if str in kinds:
    return _number(values, class_order)
  labels = np.array([-1 if v is None else v for v in values], np.int32)
  return labels, class_names(labels)


def lines(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """The entries of a .jsonl file, each with where it stands."""
  with open(path, 'rb') as file:
    for number, line in enumerate(file, 1):
      if not line.strip():
        continue
      try:
        entry = json.loads(line)
      except ValueError as error:
        raise errors.UserError(
          f'{path}:{number}: not JSON ({error}); mend the line'
        ) from None
      if not isinstance(entry, dict):
        raise errors.UserError(f'{path}:{number}: not a JSON object')
      yield f'{path}:{number}', entry
