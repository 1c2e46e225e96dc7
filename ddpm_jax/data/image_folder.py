"""The image files of a folder, and their labels."""

import codecs
import contextlib
import logging
import os
import posixpath
import re
import unicodedata
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any
from typing import BinaryIO

import numpy as np

from ddpm_jax import errors
from ddpm_jax import imagefile
from ddpm_jax import jsonfile
from ddpm_jax import regular

# Larger numbers are not classes but, for example, numbers of images.
MOST_CLASSES = 1_000_000

LONGEST = 2**24  # bytes of a line of a .jsonl file
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

log = logging.getLogger(__name__)

Labels = tuple[np.ndarray, tuple[str, ...]]  # int32 (n,), names of classes


def find(folder: str) -> list[str]:
  """Finds the images under `folder`: relative paths with /, sorted.

  Links are followed, and each folder is entered once. These are skipped: links
  to images that are listed anyway, hidden files and folders, workdirs of runs,
  and what is not a regular file (pipes, sockets, devices). A broken link is
  listed, as an unreadable image.

  Raises:
    UserError: If `folder` is not a folder, or holds no image.
  """
  if not folder:
    raise errors.UserError('no folder of images; set --config.data.path')
  if not os.path.isdir(folder):
    what = 'is not a folder' if os.path.exists(folder) else 'does not exist'
    raise errors.UserError(
      f'{shown(folder)} {what}; set --config.data.path to a folder of images'
    )
  if is_run(folder):
    raise errors.UserError(
      f'{shown(folder)} is the workdir of a run, whose images are not data; '
      'set --config.data.path to another folder'
    )
  names, links, others = _walk(folder)
  real = {os.path.realpath(os.path.join(folder, x)) for x in links and names}
  twice = 0
  for name in sorted(links):
    target = os.path.realpath(os.path.join(folder, name))
    if target in real:
      twice += 1
    else:
      names.append(name)
  if twice:
    log.warning('skipped %d links to images that are listed anyway', twice)
  if others:
    log.warning(
      'skipped, not regular files: %s', ', '.join(map(shown, others[:3]))
    )
  if not names:
    raise errors.UserError(
      f'{shown(folder)} holds no image ({" ".join(imagefile.SUFFIXES)}); set '
      '--config.data.path to a folder of images'
    )
  return sorted(names)


def is_run(folder: str) -> bool:
  """Whether a folder is a workdir."""
  parts = 'config.json', 'checkpoints'
  return all(os.path.exists(os.path.join(folder, part)) for part in parts)


def _walk(folder: str) -> tuple[list[str], list[str], list[str]]:
  """Names of images: files, links to files, and others that are neither."""
  names: list[str] = []
  links: list[str] = []
  others: list[str] = []
  entered = set()
  # Real folders come before linked ones.
  below = ['']
  linked: list[str] = []
  while below or linked:
    here = below.pop() if below else linked.pop(0)
    path = os.path.join(folder, here)
    try:
      status = os.stat(path)
      if (status.st_dev, status.st_ino) in entered:
        continue
      entered.add((status.st_dev, status.st_ino))
      if here and is_run(path):
        continue
      with os.scandir(path) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
      if not here:
        raise errors.UserError(
          f'{shown(folder)} cannot be read ({error.strerror})'
        ) from error
      log.warning('skipped folder: %s (%s)', shown(here), error.strerror)
      continue
    for entry in found:
      if entry.name.startswith('.'):
        continue
      name = posixpath.join(here, entry.name)
      if entry.is_dir(follow_symlinks=False):
        below.append(name)
      elif entry.is_symlink() and os.path.isdir(entry.path):
        linked.append(name)
      elif not name.lower().endswith(imagefile.SUFFIXES):
        continue
      elif entry.is_symlink():
        there = os.path.exists(entry.path)
        fine = regular.is_regular(entry.path) or not there
        (links if fine else others).append(name)
      else:
        fine = entry.is_file(follow_symlinks=False)
        (names if fine else others).append(name)
  return names, links, others


def shown(name: str) -> str:
  """A file name for a one-line message, whatever characters it has."""
  return name if name.isprintable() else repr(name)


def natural(name: str) -> Any:
  """Sort key that compares digits as numbers: img2 before img10."""
  parts: list[Any] = re.split('([0-9]+)', name)
  # Length first, because Python limits the digits that int() takes.
  digits = (part.lstrip('0') for part in parts[1::2])
  parts[1::2] = [(len(part), part) for part in digits]
  return parts, name  # the name itself decides between 1 and 01


def matcher(names: Iterable[str]) -> Callable[[Any], str | None]:
  """Returns a function that finds a name from a text file in `names`, or None.

  An equal name is taken, or else the only one that differs just in Unicode
  normalisation (macOS writes é as two characters), \\ for /, or the case of the
  suffix.
  """
  known = set(names)
  alike: dict[str, list[str]] = {}
  for name in known:
    alike.setdefault(_loose(name), []).append(name)

  def match(given: Any) -> str | None:
    if not isinstance(given, str) or not given:
      return None
    name = posixpath.normpath(given.strip())
    if name in known:
      return name
    found = alike.get(_loose(name), [])
    return found[0] if len(found) == 1 else None

  return match


def _loose(name: str) -> str:
  name = unicodedata.normalize('NFC', name.replace('\\', '/'))
  stem, suffix = posixpath.splitext(posixpath.normpath(name))
  return stem + suffix.lower()


def label(
  folder: str,
  names: list[str],
  class_order: Callable[[str], Any] = natural,
  *,
  needed: bool = True,
) -> Labels:
  """Returns the labels of the images `names` of `folder`; -1 for none.

  They are in `metadata.jsonl` in `folder`, one line {"file_name": ..., "label":
  integer or string} per image; otherwise the first-level sub-folders are the
  classes. Named classes are numbered in the order of the sort key
  `class_order`. If labels are not `needed`, an invalid file is only a warning.
  """
  path = os.path.join(folder, 'metadata.jsonl')
  if os.path.exists(path):
    try:
      labels = _from_metadata(path, names, class_order)
      if (labels[0] >= 0).any():
        return labels
    except errors.UserError as error:
      if needed:
        raise
      log.warning('%s; its labels are ignored', error)
  classes = [name.split('/')[0] if '/' in name else None for name in names]
  return _number(classes, class_order)


def class_names(labels: np.ndarray) -> tuple[str, ...]:
  """Names the classes of numeric labels: 0, 1, ..."""
  return tuple(str(i) for i in range(int(labels.max(initial=-1)) + 1))


def _number(
  classes: list[str | None], class_order: Callable[[str], Any]
) -> Labels:
  """Numbers named classes in the order of `class_order`."""
  present = {c for c in classes if c is not None}
  known = tuple(sorted(present, key=class_order))
  number: dict[str | None, int] = {c: i for i, c in enumerate(known)}
  return np.array([number.get(c, -1) for c in classes], np.int32), known


def _from_metadata(
  path: str, names: list[str], class_order: Callable[[str], Any]
) -> Labels:
  labels_by_name: dict[str, Any] = dict.fromkeys(names)
  kinds, unknown = set(), None
  match = matcher(names)
  for where, entry in lines(path):
    value = entry.get('label')
    name = match(entry.get('file_name'))
    if name is None:
      unknown = unknown or (where, entry.get('file_name'))
      continue
    number = type(value) is int and 0 <= value < MOST_CLASSES
    if not (number or isinstance(value, str | None)):
      raise errors.UserError(
        f'{where}: label {value!r:.80}; use an integer from 0 to '
        f'{MOST_CLASSES - 1}, or a string'
      )
    labels_by_name[name] = value
    kinds.add(type(value))
  if unknown and kinds:
    raise errors.UserError(
      f'{unknown[0]}: no image {unknown[1]!r:.300} in its folder; each line '
      'needs the "file_name" of an image'
    )
  if unknown:
    log.warning(
      '%s: no image %.300r in its folder, and no line names an image: the file '
      'is ignored',
      *unknown,
    )
  if {int, str} <= kinds:
    raise errors.UserError(f'{path}: labels are integers and strings; use one')
  values = list(labels_by_name.values())
  if str in kinds:
    return _number(values, class_order)
  labels = np.array([-1 if v is None else v for v in values], np.int32)
  return labels, class_names(labels)


def lines(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (location, entry) for each line of a .jsonl file."""
  with opened(path) as file:
    for number, line in enumerate(_lines(file), 1):
      where = f'{shown(path)}:{number}'
      if len(line) > LONGEST:
        raise errors.UserError(
          f'{where}: more than {LONGEST} bytes; put each image on its own line'
        )
      if not line.strip():
        continue
      try:
        entry = jsonfile.parse(line)
      except (ValueError, RecursionError) as error:
        raise errors.UserError(
          f'{where}: not JSON ({error}); fix the line'
        ) from None
      if not isinstance(entry, dict):
        raise errors.UserError(f'{where}: not a JSON object')
      yield where, entry


def _lines(file: BinaryIO) -> Iterator[bytes]:
  """Yields lines of at most LONGEST + 1 bytes; UTF-16 becomes UTF-8."""
  if file.read(2) in UTF_16:
    file.seek(0)
    yield from file.read().decode('utf-16', 'replace').encode().split(b'\n')
    return
  file.seek(0)
  while line := file.readline(LONGEST + 1):
    yield line


@contextlib.contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
  """Opens a text file; raises UserError if it cannot be read."""
  try:
    with regular.opened(path) as file:
      yield file
  except OSError as error:
    raise errors.UserError(
      f'{shown(path)} cannot be read ({error.strerror})'
    ) from error
  except ValueError as error:
    if isinstance(error, errors.UserError):
      raise
    raise errors.UserError(f'{shown(path)}: {error}') from error
