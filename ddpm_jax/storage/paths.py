"""Where a run may be: a folder of this machine, or gs://BUCKET/FOLDER.

Only here is it decided which. A path of gs:// has the methods of `pathlib.Path`
that are used in this package, so annotations say `pathlib.Path` for both.
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
# `gs:/bucket` is what is left of gs:// where a script has tidied it up.
_URL = re.compile(
  r'://|^\s*(gs|gcs|s3|s3a|az|abfs|hf|https?|hdfs|file):', re.IGNORECASE
)
# Patterns and parts of URLs, to Orbax and fsspec.
_ODD = re.compile(r'://|[*?#%\[\]\x00-\x1f]')


def path(text: str) -> pathlib.Path:
  """The path that a user has named.

  Raises:
    UserError: it is of storage that cannot be used, or gcsfs is missing.
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
  """Like `path`, where only files of this machine can be read.

  Raises:
    UserError: it is a URL, of gs:// too.
  """
  if text.startswith(GS):
    raise errors.UserError(
      f'{text} cannot be read from object storage: copy it to this machine'
    )
  if _URL.search(text):
    raise errors.UserError(
      f'{text} is not a path that can be used: name a folder or file of this '
      'machine, or gs://BUCKET/NAME'
    )
  return pathlib.Path(text)


def of_key(key: str, text: str, read: Callable[[str], T]) -> T:
  """`read(text)`, with the key of the recipe in what is wrong with it."""
  try:
    return read(text)
  except errors.UserError as e:
    raise errors.UserError(f'--config.{key}: {e}') from None


def is_remote(path: str | os.PathLike[str]) -> bool:
  """Whether it is in object storage, not on this machine."""
  return os.fspath(path).startswith(GS)


def check(path: Any, *, write: bool = False) -> None:
  """Tries a path of gs://; all others are left to who uses them.

  Raises:
    UserError: there is no such bucket, or it may not be read (or written).
  """
  if path is not None and is_remote(path):
    path.check(write=write)


@contextlib.contextmanager
def atomic_write(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A file to write that becomes `path` when it is done: never half a file.

  It has a name of its own: others may be writing the same file. For gs:// it is
  a local file, which is sent in one piece.
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
  """Gives a file another name in its folder; returns that."""
  other = path.with_name(name)
  if is_remote(path):  # which has no rename
    other.write_bytes(path.read_bytes())
    path.unlink()
  else:
    os.replace(path, other)
  return other


def append(path: pathlib.Path) -> TextIO:
  """A text file to add lines to; `flush` returns when all are in it."""
  if is_remote(path):
    return path.append()  # type: ignore[attr-defined]
  return path.open('a', buffering=1)


@contextlib.contextmanager
def mirrored(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A local folder to write into: `path`, or one whose files are sent there.

  They are sent in the end, and by `send` before that.
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
  """Puts the files of a local folder into `path`, if that is of gs://."""
  if is_remote(path):
    for file in folder.iterdir():
      (path / file.name).put(file)  # type: ignore[attr-defined]


def remove_tree(path: pathlib.Path) -> None:
  """Removes a folder and all that is in it."""
  if is_remote(path):
    path.rmtree()  # type: ignore[attr-defined]
  else:
    shutil.rmtree(path)
