"""The folder of a run: config.json, metrics.jsonl, checkpoints/, pictures."""

import datetime
import json
import os
import pathlib
import tempfile
import time
from typing import Any

from ddpm_jax import errors


def default(recipe: str) -> pathlib.Path:
  """A new folder named after the recipe and the time, under runs/."""
  now = datetime.datetime.now().strftime('%Y-%m-%d_%H-%M-%S')
  return pathlib.Path('runs') / f'{recipe}_{now}'


def cache() -> pathlib.Path:
  """Where what is dear to make is kept for other runs."""
  home = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(home).expanduser() / 'ddpm_jax'


def create(path: pathlib.Path) -> None:
  """Makes the folder, if need be, and tries to write into it.

  Raises:
    UserError: if it is a file, or cannot be written.
  """
  try:
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
      pass
  except (FileExistsError, NotADirectoryError):
    raise errors.UserError(
      f'{path} is a file, or inside one: name a folder'
    ) from None
  except OSError as e:
    raise errors.UserError(f'cannot write into {path}: {e.strerror}') from None


def read_config(path: pathlib.Path) -> dict[str, Any] | None:
  """The resolved recipe of the run, or None if none has begun here.

  Raises:
    UserError: if config.json is damaged.
  """
  file = path / 'config.json'
  if not file.is_file():
    return None
  try:
    return json.loads(file.read_text())
  except ValueError as e:
    raise errors.UserError(f'{file} is damaged: {e}') from None


def write_config(path: pathlib.Path, config: dict[str, Any]) -> None:
  part = path / '.config.json.part'
  part.write_text(json.dumps(config, indent=2) + '\n')
  os.replace(part, path / 'config.json')


def mark_imported(path: pathlib.Path, whence: str) -> None:
  """Keeps in the folder that its run began from weights made elsewhere."""
  text = json.dumps({'weights': whence}, indent=2)
  (path / 'imported.json').write_text(text + '\n')


def is_imported(path: pathlib.Path) -> bool:
  """Whether the run began from weights made elsewhere, not from random ones."""
  return (path / 'imported.json').exists()


def wait_for_config(
  path: pathlib.Path, config: dict[str, Any], seconds: float = 90
) -> None:
  """Returns when config.json, which another process writes, says that.

  Raises:
    UserError: if it does not come to.
  """
  late = time.monotonic() + seconds  # Some network file systems take a minute.
  while read_config(path) != config:
    if time.monotonic() > late:
      raise errors.UserError(
        f'{path} is not one folder for all processes, or they were given '
        'different recipes: name a --workdir on a disk that they share'
      )
    time.sleep(0.2)
