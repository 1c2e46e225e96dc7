"""Paths in object storage (gs://): etils.epath on gcsfs, without TensorFlow.

A bucket has no folders, no append and no rename: an object is created or
replaced as a whole.
"""

import concurrent.futures
import contextlib
import fnmatch
import io
import logging
import os
import secrets
import time
from collections.abc import Iterator
from typing import IO
from typing import Any
from typing import Self

# Set before epath is imported, which would use TensorFlow if it is installed.
os.environ['EPATH_USE_TF'] = 'false'
# By default gcsfs asks for the kind of a bucket before each call, and warns if
# it may not. Only zonal buckets need that.
os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')

import fsspec
from etils.epath import gpath
from google.cloud import storage

from ddpm_jax import errors

# TensorStore and other processes write too, so cached listings would be stale.
fsspec.config.conf.setdefault('gs', {})['use_listings_cache'] = False

# gcsfs logs pages about errors that it raises anyway.
logging.getLogger('gcsfs').setLevel(logging.CRITICAL)

SECONDS = 30  # between two uploads of a log


def path(text: str) -> 'Path':
  return Path(text)


class Path(gpath.PosixGPath):
  """A path of gs:// with the pathlib methods that epath lacks.

  Errors of the storage are raised as a `RunError` of one line.
  """

  @property
  def _fs(self) -> Any:
    return self._backend.fs(self)

  def resolve(self, strict: bool = False) -> Self:
    del strict
    return self

  def absolute(self) -> Self:
    return self

  def mkdir(self, *args: Any, **kwargs: Any) -> None:
    """Does nothing: buckets have no folders, and none is created by mistake."""

  def exists(self) -> bool:
    with self._named():
      return super().exists()

  def is_dir(self) -> bool:
    with self._named():
      return super().is_dir()

  def is_file(self) -> bool:
    with self._named():
      return self._fs.isfile(str(self))

  def iterdir(self) -> Iterator[Self]:
    with self._named():
      try:
        return iter(sorted(super().iterdir()))
      except FileNotFoundError:
        return iter(())

  def glob(self, pattern: str) -> Iterator[Self]:
    """Like pathlib; fsspec would read [ and * in a folder name as patterns."""
    first, _, rest = pattern.partition('/')
    for found in self.iterdir():
      if fnmatch.fnmatchcase(found.name, first):
        yield from found.glob(rest) if rest else [found]

  def open(self, mode: str = 'r', **kwargs: Any) -> IO[Any]:
    """Opens for reading; `write_bytes` and `put` write, in one piece."""
    del kwargs
    file = io.BytesIO(self.read_bytes())
    return file if 'b' in mode else io.TextIOWrapper(file, encoding='utf-8')

  def read_bytes(self) -> bytes:
    with self._named():
      return self._fs.cat_file(str(self))

  def read_text(self, encoding: str | None = None) -> str:
    del encoding
    return self.read_bytes().decode()

  def write_bytes(self, data: bytes) -> int:
    with self._named():
      self._fs.pipe_file(str(self), data)
    return len(data)

  def write_text(self, data: str, encoding: str | None = None) -> int:
    del encoding
    return self.write_bytes(data.encode())

  def put(self, file: os.PathLike[str]) -> None:
    """Uploads a local file to this path."""
    with self._named():
      self._fs.put_file(os.fspath(file), str(self))

  def append(self) -> 'Log':
    return Log(self)

  def unlink(self, missing_ok: bool = False) -> None:
    try:
      with self._named():
        self._fs.rm_file(str(self))
    except FileNotFoundError:
      if not missing_ok:
        raise

  def rmtree(self, missing_ok: bool = False) -> None:
    with self._named():
      super().rmtree(missing_ok)

  def check(self, *, write: bool) -> None:
    """Tries to list the path, and with `write` to write into it.

    Raises:
      UserError: If there is no such bucket, or access is denied.
    """
    name = self.parts[2]
    try:
      self._fs.call(
        'GET', 'b/{}/o', name, maxResults=1, prefix='/'.join(self.parts[3:])
      )
      if write:
        # Orbax makes this request, much later, to remove an old checkpoint.
        storage.Client().get_bucket(name)
        probe = self / f'.write_test_{secrets.token_hex(4)}'
        self._fs.pipe_file(str(probe), b'')
        self._fs.rm_file(str(probe))
    except FileNotFoundError:
      raise errors.UserError(
        f'{self}: there is no bucket {name}: create it, or choose another'
      ) from None
    except Exception as e:  # aiohttp, google.auth and gcsfs have own types.
      what = 'written' if write else 'read'
      raise errors.UserError(
        f'{self} cannot be {what} ({_line(e)}); `gcloud auth '
        'application-default login` gives this machine credentials'
      ) from None
    if write and self.is_file():
      raise errors.UserError(f'{self} is a file: name a folder')

  @contextlib.contextmanager
  def _named(self) -> Iterator[None]:
    """Raises errors with this path, after gcsfs has retried for a minute."""
    try:
      yield
    except FileNotFoundError:
      raise FileNotFoundError(2, 'there is no such object', str(self)) from None
    except Exception as e:
      raise errors.RunError(f'cannot use {self} ({_line(e)})') from e


class Log(io.TextIOBase):
  """A text object to append to, uploaded as a whole in the background."""

  def __init__(self, path: Path) -> None:
    self._path = path
    self._text = [path.read_text()] if path.exists() else []
    self._sent = len(self._text)
    self._begun = time.monotonic()
    self._thread = concurrent.futures.ThreadPoolExecutor(1)
    self._under_way: concurrent.futures.Future[None] | None = None

  def write(self, text: str) -> int:
    self._text.append(text)
    idle = self._under_way is None or self._under_way.done()
    if idle and time.monotonic() - self._begun > SECONDS:
      self._begun = time.monotonic()
      self._under_way = self._thread.submit(self._put, len(self._text))
    return len(text)

  def flush(self) -> None:
    """Returns when all of the text is in the bucket."""
    if self._under_way:
      concurrent.futures.wait([self._under_way])
    if self._sent < len(self._text):
      self._put(len(self._text))

  def close(self) -> None:
    if not self.closed:
      super().close()  # flushes
      self._thread.shutdown()

  def _put(self, count: int) -> None:
    self._path.write_text(''.join(self._text[:count]))
    self._sent = count


def _line(error: Exception) -> str:
  text = ' '.join(str(error).split())
  return f'{type(error).__name__}: {text:.200}'
