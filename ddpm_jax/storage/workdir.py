"""The folder of a run: config.json, classes.json, data.npz, changes.json,
metrics.jsonl, checkpoints/ and images.
"""

import contextlib
import datetime
import itertools
import json
import logging
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ddpm_jax import errors
from ddpm_jax import jsonfile
from ddpm_jax import npz
from ddpm_jax.storage import paths


def default(recipe: str) -> pathlib.Path:
  """Makes a new folder under runs/, named after the recipe and the time.

  Raises:
    UserError: If runs/ cannot be written.
  """
  now = datetime.datetime.now().strftime('%Y-%m-%d_%H-%M-%S')
  first = pathlib.Path('runs') / f'{recipe}_{now}'
  check(first)
  names = (f'{first.name}_{number}' for number in itertools.count(2))
  for name in itertools.chain([first.name], names):
    with contextlib.suppress(FileExistsError):  # begun in the same second
      first.with_name(name).mkdir(parents=True)
      return first.with_name(name)
  raise AssertionError('unreachable')


def cache() -> pathlib.Path | None:
  """Returns the cache that runs share, or None if it cannot be written.

  A user may have no home folder, or one that is not writable.
  """
  home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  path = pathlib.Path(home) / 'ddpm_jax'
  if not path.is_absolute():  # ~ is not expanded for a user without a home.
    return None
  try:
    create(path)
  except errors.UserError:
    return None
  return path


def check(path: pathlib.Path) -> None:
  """Like `create`, without making the folder.

  Raises:
    UserError: If it is a file, or cannot be written.
  """
  if paths.is_remote(path):
    paths.check(path, write=True)
    return
  here = path.absolute()
  _try(path, next(p for p in (here, *here.parents) if os.path.lexists(p)))


def create(path: pathlib.Path) -> None:
  """Makes the folder if needed, and tries to write into it.

  Raises:
    UserError: If it is a file, or cannot be written.
  """
  _try(path, path)


def _try(path: pathlib.Path, there: pathlib.Path) -> None:
  """Makes and tries `there`, which is `path` or its nearest existing parent."""
  if paths.is_remote(there):
    paths.check(there, write=True)
    return
  try:
    there.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=there):
      pass
  except (FileExistsError, NotADirectoryError):
    raise errors.UserError(
      f'{path} is a file, or inside one: choose a folder'
    ) from None
  except OSError as e:
    raise errors.UserError(f'cannot write into {path}: {e.strerror}') from None


def check_writable(path: pathlib.Path, otherwise: str) -> None:
  """Checks, before any work, that the folder of a run can be written.

  Args:
    path: The folder.
    otherwise: What to do if not, for the message.

  Raises:
    UserError: If it cannot be written.
  """
  try:
    check(path)
  except errors.UserError as e:
    raise errors.UserError(f'{e}: {otherwise}') from None


def check_run(path: pathlib.Path | None) -> None:
  """Checks that `path` is a folder with a run.

  Raises:
    UserError: If it is not, with the newest runs under runs/.
  """
  parts = 'config.json', 'checkpoints'
  if path is not None and any((path / part).exists() for part in parts):
    return
  what = 'name a run' if path is None else f'no run in {path}: name one'
  newest = sorted(
    pathlib.Path('runs').glob('*/config.json'),
    key=lambda file: file.stat().st_mtime,
    reverse=True,
  )
  listed = ', '.join(str(file.parent) for file in newest[:3])
  hint = f' (the newest: {listed})' if listed else ''
  raise errors.UserError(f'{what}: --workdir=runs/NAME{hint}')


def has_checkpoint(path: pathlib.Path) -> bool:
  """Whether the run has saved a checkpoint, even a damaged one."""
  return any(
    re.fullmatch(r'\d+(\.damaged-.*)?', folder.name)
    for folder in (path / 'checkpoints').glob('*')
  )


def read_config(path: pathlib.Path) -> dict[str, Any] | None:
  """Returns the resolved recipe of the run, or None if there is no run.

  Raises:
    UserError: If config.json is damaged.
  """
  return _read(path / 'config.json', dict, 'a recipe')


def write_config(path: pathlib.Path, config: dict[str, Any]) -> None:
  _write(path / 'config.json', config)


def read_classes(path: pathlib.Path) -> tuple[str, ...] | None:
  """Returns the names of the classes 0, 1, ... of the run, or None.

  Raises:
    UserError: If classes.json is damaged.
  """
  names = _read(path / 'classes.json', list, 'a list of class names')
  return None if names is None else tuple(map(str, names))


def write_classes(path: pathlib.Path, names: Sequence[str]) -> None:
  _write(path / 'classes.json', list(names))


def keeps_no_classes(path: pathlib.Path) -> bool:
  """Whether an earlier version, without classes.json, began the run."""
  # Check in this order, as a new run writes classes.json first.
  begun = any((path / name).exists() for name in ('config.json', 'checkpoints'))
  return begun and not (path / 'classes.json').exists()


def _read(file: pathlib.Path, kind: type, what: str) -> Any:
  """Returns the value of a JSON file, or None; refuses one not of `kind`."""
  if not file.is_file():
    return None
  found = jsonfile.read(file)
  if not isinstance(found, kind):
    raise errors.UserError(f'{file} is damaged: it does not hold {what}')
  return found


def _write(file: pathlib.Path, values: Any) -> None:
  with paths.atomic_write(file) as part:
    part.write_text(json.dumps(values, indent=2) + '\n')


def read_data(path: pathlib.Path) -> tuple[np.ndarray, ...] | None:
  """Returns the arrays that `write_data` has saved, or None.

  A damaged file counts as missing, with a warning.
  """
  file = path / 'data.npz'
  if not file.exists():
    return None
  try:
    with file.open('rb') as whole:
      return tuple(npz.load(whole).values())
  except Exception as e:  # zipfile, zlib and NumPy have own types.
    logging.warning('%s is damaged, not used: %s', file, e)
    return None


def write_data(path: pathlib.Path, arrays: Sequence[np.ndarray]) -> None:
  """Writes data.npz: hashes of the data, to detect changes."""
  with paths.atomic_write(path / 'data.npz') as part, part.open('wb') as file:
    np.savez(file, *arrays)


def add_change(path: pathlib.Path, change: dict[str, Any]) -> None:
  """Appends an entry to changes.json: what changed, and at which step."""
  file = path / 'changes.json'
  try:
    before = _read(file, list, 'a list') or []
  except errors.UserError as e:
    logging.warning('%s; it is replaced', e)
    before = []
  _write(file, [*before, change])


def mark_imported(path: pathlib.Path, whence: str) -> None:
  """Marks the run in the folder as begun from imported weights."""
  text = json.dumps({'weights': whence}, indent=2)
  (path / 'imported.json').write_text(text + '\n')


def is_imported(path: pathlib.Path) -> bool:
  """Whether the run began from imported weights, not from random ones."""
  return (path / 'imported.json').exists()


def wait_for_config(
  path: pathlib.Path, config: dict[str, Any], seconds: float = 90
) -> None:
  """Waits until config.json, which process 0 writes, holds `config`.

  Raises:
    UserError: If it does not within `seconds`.
  """
  late = time.monotonic() + seconds  # Some network file systems take a minute.
  while read_config(path) != config:
    if time.monotonic() > late:
      raise errors.UserError(
        f'{path} is not one folder for all processes, or they were given '
        'different recipes: choose a --workdir on a disk that they share'
      )
    time.sleep(0.2)
