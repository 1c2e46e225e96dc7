"""Paths on this machine or in object storage, gs://BUCKET/FOLDER.

Only this module distinguishes them. A path of gs:// has the methods of
`pathlib.Path` that this package uses, so annotations say `pathlib.Path`.
"""

import contextlib
import os
import pathlib
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any
from typing import TextIO
from typing import TypeVar

from ddpm_jax import errors

T = TypeVar('T')

GS = 'gs://'
# `gs:/bucket` is gs:// after a script has normalized the path.
_URL = re.compile(
  r'://|^\s*(gs|gcs|s3|s3a|az|abfs|hf|https?|hdfs|file):', re.IGNORECASE
)
# Orbax and fsspec read these as patterns or parts of URLs.
_ODD = re.compile(r'://|[*?#%\[\]\x00-\x1f]')


def path(text: str) -> pathlib.Path:
  """Returns the path that a user has given, local or of gs://.

  Raises:
    UserError: If its storage is not supported, or gcsfs is not installed.
  """
  if not text.startswith(GS):
    return local(text)
  bucket, _, name = text.removeprefix(GS).partition('/')
  odd = _ODD.search(name)
  if not bucket or not name.strip('/') or '..' in name.split('/') or odd:
    raise errors.UserError(
      f'{text} is not a folder or file of a bucket: write gs://BUCKET/NAME'
      + (f', without {odd[0]!r}' if odd else '')
    )
  errors.find_optional(
    'gcsfs', what=f'{GS} (object storage)', install="pip install -e '.[gcs]'"
  )
  from ddpm_jax.storage import bucket as buckets

  return buckets.path(text)


def local(text: str) -> pathlib.Path:
  """Like `path`, for local files only.

  Raises:
    UserError: If it is a URL, including gs://.
  """
  if text.startswith(GS):
    raise errors.UserError(
      f'{text} cannot be read from object storage: copy it to this machine'
    )
  if _URL.search(text):
    raise errors.UserError(
      f'{text} is not a supported path: choose a folder or file of this '
      'machine, or gs://BUCKET/NAME'
    )
  return pathlib.Path(text)


def of_key(key: str, text: str, read: Callable[[str], T]) -> T:
  """Returns `read(text)`; its error messages begin with the recipe's key."""
  try:
    return read(text)
  except errors.UserError as e:
    raise errors.UserError(f'--config.{key}: {e}') from None


def is_remote(path: str | os.PathLike[str]) -> bool:
  """Whether a path is in object storage."""
  return os.fspath(path).startswith(GS)


def check(path: Any, *, write: bool = False) -> None:
  """Tries to access a path of gs://; does not check local paths.

  Raises:
    UserError: If there is no such bucket, or it may not be read (or written).
  """
  if path is not None and is_remote(path):
    path.check(write=write)


@contextlib.contextmanager
def atomic_write(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary file that replaces `path` when it is complete.

  Its name is unique, as others may write the same file. For gs:// it is a local
  file, which is uploaded in one piece.
  """
  if is_remote(path):
    with tempfile.TemporaryDirectory() as folder:
      part = pathlib.Path(folder) / path.name
      yield part
      path.put(part)  # type: ignore[attr-defined]
    return
  part = path.with_name(f'.{path.name}.{secrets.token_hex(4)}.part')
  try:
    yield part
    os.replace(part, path)
  finally:
    part.unlink(missing_ok=True)


def move(path: pathlib.Path, name: str) -> pathlib.Path:
  """Renames a file within its folder; returns the new path."""
  other = path.with_name(name)
  if is_remote(path):  # Object storage has no rename.
    other.write_bytes(path.read_bytes())
    path.unlink()
  else:
    os.replace(path, other)
  return other


def append(path: pathlib.Path) -> TextIO:
  """Opens a text file to append lines; `flush` returns when all are stored."""
  if is_remote(path):
    return path.append()  # type: ignore[attr-defined]
  return path.open('a', buffering=1)


@contextlib.contextmanager
def mirrored(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a local folder to write into: `path`, or a temporary one for gs://.

  Its files are then uploaded at the end, and whenever `send` is called.
  """
  if not is_remote(path):
    yield path
    return
  with tempfile.TemporaryDirectory() as folder:
    try:
      yield pathlib.Path(folder)
    finally:
      send(pathlib.Path(folder), path)


def send(folder: pathlib.Path, path: pathlib.Path) -> None:
  """Uploads the files of a local folder to `path`, if that is of gs://."""
  if is_remote(path):
    for file in folder.iterdir():
      (path / file.name).put(file)  # type: ignore[attr-defined]


def remove_tree(path: pathlib.Path) -> None:
  """Removes a folder and its content."""
  if is_remote(path):
    path.rmtree()  # type: ignore[attr-defined]
  else:
    shutil.rmtree(path)
