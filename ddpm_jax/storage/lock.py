"""A lock, so that only one program at a time writes into a workdir.

It is a POSIX lock on the file `.lock`: it is released however its process ends,
and NFS, Lustre and the like share it between machines. File systems without
locks and object storage use a heartbeat: the holder rewrites the file every
`BEAT` seconds, and a file that does not change is from a program that is gone.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Iterator

from ddpm_jax import errors
from ddpm_jax import jsonfile
from ddpm_jax.parallel import processes
from ddpm_jax.storage import logs
from ddpm_jax.storage import paths

NAME = '.lock'
BEAT = 20.0  # seconds
# Time for an ending program to save: a run may be restarted before that.
WAIT = 20.0
# A program without a heartbeat for this long counts as gone.
GONE = 3 * BEAT
_HELD = errno.EACCES, errno.EAGAIN
_NO_LOCKS = errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL


@contextlib.contextmanager
def held(folder: pathlib.Path, *, new: bool = False) -> Iterator[None]:
  """Makes this program the only writer in `folder`; makes the folder if needed.

  A folder that was made here, or is `new`, is removed at the end if nothing was
  written into it. Process 0 holds the lock for all processes.

  Raises:
    UserError: If another program holds the lock.
    OSError: If the folder cannot be written.
  """
  if not processes.is_primary():
    yield
    return
  file = folder / NAME
  if paths.is_remote(folder):
    with _beating(file):
      yield
    return
  made = [path for path in (folder, *folder.parents) if not path.exists()]
  folder.mkdir(parents=True, exist_ok=True)
  try:
    with _posix(file):
      yield
  finally:
    if made or new:
      _remove_empty(made or [folder, folder.parent], file)


def _remove_empty(made: list[pathlib.Path], file: pathlib.Path) -> None:
  if [path.name for path in file.parent.glob('*')] not in ([], [NAME]):
    return
  with contextlib.suppress(OSError):
    file.unlink(missing_ok=True)
    for path in made:
      path.rmdir()


def _me() -> dict[str, str | int]:
  since = time.strftime('%Y-%m-%d %H:%M:%S')
  return {'host': socket.gethostname(), 'process': os.getpid(), 'since': since}


def _refuse(file: pathlib.Path, text: str) -> errors.UserError:
  try:
    said = jsonfile.parse(text)
    who = f' (process {said["process"]} on {said["host"]}, {said["since"]})'
  except (ValueError, KeyError, TypeError):
    who = ''
  return errors.UserError(
    f'another program is writing into {file.parent}{who}: wait for it, stop '
    'it, or choose another --workdir'
  )


@contextlib.contextmanager
def _posix(path: pathlib.Path) -> Iterator[None]:
  late = time.monotonic() + WAIT
  said = False
  while True:
    # Do not truncate it yet: another program may hold it.
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), 'r+') as file:
      try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError as e:
        if e.errno in _NO_LOCKS:
          break
        if e.errno not in _HELD:
          raise
        held = _refuse(path, file.read())
        if time.monotonic() >= late:
          raise held from None
        if not said:
          logs.say(f'waiting up to {WAIT:.0f} s: {held}')
          said = True
        time.sleep(0.2)
        continue
      if not _is_still(file.fileno(), path):
        continue  # Its previous holder has just removed it.
      file.truncate(0)
      file.write(json.dumps(_me()) + '\n')
      file.flush()
      try:
        yield
      finally:
        with contextlib.suppress(OSError):
          path.unlink(missing_ok=True)
      return
  with _beating(path):
    yield


def _is_still(descriptor: int, path: pathlib.Path) -> bool:
  """Whether `path` is still the open file."""
  with contextlib.suppress(FileNotFoundError):
    return os.path.samestat(os.fstat(descriptor), os.stat(path))
  return False


@contextlib.contextmanager
def _beating(path: pathlib.Path) -> Iterator[None]:
  before = path.read_text() if path.exists() else ''
  if before.strip():
    logs.say(f'{path} exists: waiting {GONE:.0f} s to see if it is in use')
    late = time.monotonic() + GONE
    while time.monotonic() < late:
      time.sleep(min(1.0, BEAT / 4))
      if path.exists() and path.read_text() != before:
        raise _refuse(path, before)
  token = secrets.token_hex(8)

  def beat() -> None:
    path.write_text(json.dumps({**_me(), 'token': token, 'at': time.time()}))

  def mine() -> bool:
    return token in path.read_text()

  beat()
  time.sleep(min(1.0, BEAT / 4))
  if not mine():  # Another program has written it at the same moment.
    raise _refuse(path, path.read_text())
  ended = threading.Event()

  def beats() -> None:
    while not ended.wait(BEAT):
      # An occasional failure of the storage must not end a run.
      with contextlib.suppress(Exception):
        beat()

  thread = threading.Thread(target=beats, daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()
    with contextlib.suppress(OSError):
      path.unlink(missing_ok=True)
